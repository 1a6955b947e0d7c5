"""Random fleets with poison among their jobs: intake, hand-back and endings on real stores.

Only engines are played: a `Player` is one worker whose engine makes a token of each job a turn,
and dies of poison when chance says so. Beside that engines are killed, whole workers go silent,
jobs are canceled, Redis is emptied; and one worker's engines become broken in themselves: they die
of whatever they are given, until somebody repairs them.
"""

import itertools
import random

import pytest
from sqlalchemy import select

from headrace.contract import database, redis_client, streams
from headrace.contract.records import dead_letters, jobs
from headrace.contract.specs import spec_of
from headrace.contract.streams import MAX_TRIAL_GROUP
from headrace.contract.wire import FinishReason, JobStatus
from headrace.tests.worker.conftest import MODEL, Bench
from headrace.tests.worker.test_hand_back import CERTAIN, UNCERTAIN, way_back
from headrace.worker.evidence import Evidence
from headrace.worker.running import RunningJob

NUM_WORKERS, NUM_JOBS, NUM_POISON = 3, 20, 3
#: Turns of the whole fleet after which everything must have ended; it takes some 60.
MAX_TURNS = 600


class Player:
    """One worker, its engine played."""

    def __init__(self, bench: Bench, chance: random.Random, poison: set[str]) -> None:
        self.bench, self.chance, self.poison = bench, chance, poison
        self.jobs: dict[str, RunningJob] = {}
        self.is_broken = False
        self.is_unsound = False  # its engine did not do its own job: it serves nobody

    def claim(self) -> None:
        if self.is_unsound:
            self.is_unsound = self.is_broken  # the next start, after a pause
            return
        was_idle = not self.jobs
        given = self.bench.claim()
        levels = {job.claim.suspect for job in given}
        if levels - {0}:
            assert was_idle, "suspects run beside nothing else"
            assert len(levels) == 1
            assert len(given) <= (1 if levels == {2} else MAX_TRIAL_GROUP)
        for job in given:
            self.jobs[job.job] = job
            if job.ending is not None:
                self.end(job)

    def turn(self) -> None:
        """Let the engine make a step, or die of one."""
        if self.is_broken and self.jobs:
            self.die(CERTAIN)
            return
        for job in list(self.jobs.values()):
            if job.job in self.poison and (job.num_logged > 4 or self.chance.random() < 0.3):
                self.die(CERTAIN)
                return
            job.take(self.chance.randrange(256), is_last=False, logprobs=None)
            chunk = job.chunk()
            assert chunk is not None
            self.bench.tokens.append(MODEL, [(job.spec.tenant, chunk)])
            job.num_logged = chunk.next
        for job in [job for job in self.jobs.values() if job.ending is not None]:
            self.end(job)

    def end(self, job: RunningJob) -> None:
        self.bench.settle(job)
        self.bench.room.release(job.job)
        del self.jobs[job.job]

    def die(self, evidence: Evidence) -> None:
        """End the engine, and start another at once: its own job says whether it is sane."""
        self.bench.room.closed()
        way = way_back(self.bench, list(self.jobs.values()))
        way.after_death(evidence, frozenset(self.jobs))
        self.is_unsound = self.is_broken
        way.inquests.next_engine(is_sane=not self.is_broken)
        way.inquests.turn()
        assert way.inquests.num_open == 0
        self.bench.settle()
        self._begin_anew()

    def vanish(self) -> None:
        """End the whole worker without a word; its leases run out, another is started."""
        self.bench.room.closed()
        for job in self.jobs.values():
            self.bench.held.remove(job.job, job.attempt)
            self.bench.streams.hand_back(MODEL, job.job, job.attempt)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.jobs.clear()
        assert self.bench.held.pairs() == []
        self.bench.room.opened(10_000, 100, max_num_seqs=8)

    def cancel(self, job_id: str) -> None:
        if (job := self.jobs.get(job_id)) is not None:
            job.end(JobStatus.CANCELED, FinishReason.CANCELED)
            self.end(job)

    def restore(self) -> None:
        """Put back what a Redis that was emptied has lost, as the courier does."""
        for job in self.jobs.values():
            assert self.bench.streams.restore(
                job.spec,
                self.bench.name,
                13,
                attempt=job.attempt,
                gen=job.gen,
                log=job.logged_chunks(),
                suspect=job.claim.suspect,
            )


class PlayedFleet:
    def __init__(self, benches: list[Bench], seed: int) -> None:
        self.chance = random.Random(seed)
        self.bench = benches[0]
        self.jobs = [
            self.bench.accept(max_tokens=self.chance.randrange(8, 20)) for _ in range(NUM_JOBS)
        ]
        self.poison = set(self.chance.sample(self.jobs, NUM_POISON))
        innocent = [job for job in self.jobs if job not in self.poison]
        self.to_cancel = self.chance.sample(innocent, 3)
        begin = self.chance.randrange(30)
        self.broken_turns = range(begin, begin + self.chance.randrange(10, 60))
        self.players = [Player(bench, self.chance, self.poison) for bench in benches]

    def run(self) -> None:
        for number in itertools.count():
            assert number < MAX_TURNS, f"left after {number} turns: {self.open_jobs()}"
            for player in self.players:
                if self.chance.random() < 0.8:
                    player.claim()
                if self.chance.random() < 0.8:
                    player.turn()
            if number < 40:
                self.strike()
            self.players[-1].is_broken = number in self.broken_turns
            if number % 5 == 0 and not self.open_jobs():
                return

    def strike(self) -> None:
        """Let one thing happen that is no job's fault."""
        player, what = self.chance.choice(self.players), self.chance.random()
        if what < 0.15:
            player.turn()  # so that a token is between two losses
            player.die(UNCERTAIN)
        elif what < 0.25:
            player.turn()
            player.vanish()
        elif what < 0.35 and self.to_cancel:
            job = self.to_cancel.pop()
            self.bench.ledger.request_cancel(job, tenant_id=self.bench.key.tenant_id)
            self.bench.streams.cancel(MODEL, job)
            for one in self.players:
                one.cancel(job)
        elif what < 0.40:
            self.empty_redis()

    def empty_redis(self) -> None:
        self.bench.client.flushall()
        for player in self.players:
            player.restore()
        held = {job for player in self.players for job in player.jobs}
        for job in self.open_jobs():  # as the sweeper does, also for those of silent workers
            if job not in held:
                row = self.bench.row(job)
                self.bench.streams.enqueue(spec_of(row), 13, suspect=row["suspect"])

    def open_jobs(self) -> list[str]:
        query = select(jobs.c.id).where(jobs.c.id.in_(self.jobs), jobs.c.finished_at.is_(None))
        with self.bench.engine.connect() as db:
            return list(db.execute(query).scalars())


@pytest.fixture
def benches(redis_url, database_url, prompts):
    engine, client = database.connect(database_url), redis_client.connect(redis_url)
    client.flushall()
    yield [Bench(engine, client, prompts, f"w{n}") for n in range(NUM_WORKERS)]
    engine.dispose()
    client.close()


@pytest.mark.parametrize("seed", range(4))
def test_invariant_8_no_innocent_dies_all_poison_does_and_nothing_starves(
    benches, seed, monkeypatch
):
    monkeypatch.setattr(streams, "TRIAL_AFTER_MS", 20)  # turns of a fleet take milliseconds here
    monkeypatch.setattr(streams, "TRIAL_TTL_MS", 500)
    fleet = PlayedFleet(benches, seed)
    fleet.run()
    rows = {job: fleet.bench.row(job) for job in fleet.jobs}
    with fleet.bench.engine.connect() as db:
        query = select(dead_letters.c.job_id).where(dead_letters.c.job_id.in_(fleet.jobs))
        assert set(db.execute(query).scalars()) == fleet.poison
    for job, row in rows.items():
        if job in fleet.poison:
            assert (row["status"], row["error_code"]) == (JobStatus.FAILED, "poison")
            assert row["num_crashes"] <= 3
        else:
            assert row["status"] in (JobStatus.SUCCEEDED, JobStatus.CANCELED)
        view = fleet.bench.tokens.read(MODEL, job)
        if view.chunks:  # Redis has not been emptied since
            logged = [token for chunk in view.chunks for token in chunk.ids]
            assert row["output_token_ids"] == logged
    assert fleet.bench.num_entries() == 0
