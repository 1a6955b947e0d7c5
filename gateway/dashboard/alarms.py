"""The alarms: what is wrong with the fleet now, since when, and what to do about it.

    code                 severity  when
    no_worker            page      a model has jobs that may run, and no worker takes any
    steps_stopped        page      an engine has work and made no step for half of its timeout
    worker_broken        page      a worker's engines die before they serve: it takes no jobs
    failures_growing     page      of the jobs ended in 5 min over 5 % failed, at least 5
    dead_letters_growing page      3 jobs or more of a model were dead-lettered in 5 min
    oldest_job           page      a job waits for longer than the target (its queue is not paused)
    redis_away           page      a gateway cannot reach Redis: jobs are accepted and wait
    postgres_away        page      a gateway cannot reach Postgres: nothing is accepted
    tasks_silent         page      there is no new sample: the tasks process is down or stuck
    worker_quarantined   warn      a worker that runs is set aside for over an hour

The first six and the last are found by the sampler, with each sample; the others by each gateway,
because they are about the sampler's own ways.

Invariants:
1. An alarm stands while its cause does and keeps its `since`; it has no memory beyond that.
2. A text says what was found, with numbers, and what to do; it holds no job's content.

Called by: sampler.py, overview.py. To add one: a row above, a function below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from headrace.contract.live import Alarm, Severity
from headrace.contract.wire import WorkerBeat, WorkerState

#: Share of its step_timeout_s an engine with work may take for a step: it is told before the
#: courier ends the engine, which would hide that it stood.
STEP_SHARE = 0.5
#: Share of ended jobs that may fail, and how many must have failed to speak of it.
FAILED_SHARE, NUM_FAILED = 0.05, 5
#: Dead letters of a model in the same time: each cost up to three engines.
NUM_DEAD = 3
#: How long a worker may be set aside before somebody is reminded.
QUARANTINE = timedelta(hours=1)
#: Seconds without a sample: four ticks.
SILENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the alarms look at for one model."""

    num_queued: int  # in queues that are not paused
    num_held: int
    oldest_s: float | None  # of those queued
    num_serving: int  # workers that claim, or will when they have started
    num_workers: int
    num_ended: int  # of the last five minutes
    num_failed: int


@dataclass(frozen=True, slots=True)
class Facts:
    at: datetime
    oldest_target_s: float
    models: Mapping[str, ModelFacts]
    beats: Sequence[WorkerBeat]
    quarantined: Mapping[str, datetime] = field(default_factory=dict[str, datetime])
    num_dead: Mapping[str, int] = field(default_factory=dict[str, int])  # by model, in 5 min


def fleet_alarms(facts: Facts, before: Iterable[Alarm]) -> list[Alarm]:
    """Return the alarms of the fleet now; one that stood before keeps its `since`."""
    since = {alarm.identity: alarm.since for alarm in before}
    found: list[Alarm | None] = []
    for name, model in sorted(facts.models.items()):
        found += _of(name, model, facts)
    found += [_dying(name, num, facts.at) for name, num in sorted(facts.num_dead.items())]
    found += [_stopped(beat, facts.at) for beat in facts.beats]
    found += [_broken(beat, facts.at) for beat in facts.beats]
    found += [_quarantined(name, at, facts.at) for name, at in sorted(facts.quarantined.items())]
    return [_keeping(alarm, since) for alarm in found if alarm is not None]


def process_alarms(
    *,
    is_redis_up: bool,
    is_postgres_up: bool,
    sample_age_s: float | None,  # None: there never was one
    at: datetime,
    before: Iterable[Alarm],
) -> list[Alarm]:
    """Return what a gateway finds wrong with what it needs itself."""
    since = {alarm.identity: alarm.since for alarm in before}
    found: list[Alarm] = []
    if not is_redis_up:
        text = "Redis does not answer this gateway: jobs are accepted and wait, streams stand still"
        found.append(_page("redis_away", f"{text}: look at the Redis server", at))
    if not is_postgres_up:
        text = "Postgres does not answer this gateway: jobs are refused, results are held back"
        found.append(_page("postgres_away", f"{text}: look at the Postgres server", at))
    if is_redis_up and (sample_age_s is None or sample_age_s > SILENCE_S):
        how_long = "at all" if sample_age_s is None else f"for {sample_age_s:.0f} s"
        text = f"there is no sample {how_long}: the tasks process is silent, so lost jobs are not "
        found.append(_page("tasks_silent", text + "put back: start `headrace tasks`", at))
    return [_keeping(alarm, since) for alarm in found]


def iso(at: datetime) -> str:
    """Write a time as job_json's encoder does."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _of(name: str, model: ModelFacts, facts: Facts) -> Iterable[Alarm]:
    num_jobs = model.num_queued + model.num_held
    if num_jobs and not model.num_serving:
        found = f"{model.num_workers} live, none takes jobs" if model.num_workers else "none"
        text = f"{num_jobs} jobs for model {name}, workers: {found}: start or resume a worker"
        yield _page("no_worker", text, facts.at, model=name)
    if model.oldest_s is not None and model.oldest_s > facts.oldest_target_s:
        text = (
            f"the oldest job for model {name} waits for {model.oldest_s:.0f} s, target "
            f"{facts.oldest_target_s:g} s: add a worker, or see what blocks the queue"
        )
        yield _page("oldest_job", text, facts.at, model=name)
    is_growing = model.num_failed > FAILED_SHARE * model.num_ended
    if model.num_failed >= NUM_FAILED and is_growing:
        text = (
            f"{model.num_failed} of {model.num_ended} jobs for model {name} failed in 5 min: "
            "search the failed jobs for their error"
        )
        yield _page("failures_growing", text, facts.at, model=name)


def _stopped(beat: WorkerBeat, at: datetime) -> Alarm | None:
    if beat.step_age_ms <= STEP_SHARE * beat.step_timeout_ms:
        return None
    text = (
        f"worker {beat.worker} has work and made no step for {beat.step_age_ms / 1000:.0f} s: "
        "look at its log and GPU, restart it"
    )
    return _page("steps_stopped", text, at, model=beat.model, subject=beat.worker)


def _broken(beat: WorkerBeat, at: datetime) -> Alarm | None:
    if beat.state != WorkerState.BROKEN:
        return None
    text = (
        f"engines of worker {beat.worker} die before they serve, {beat.engine_restarts} in all: "
        "look at its log and GPU, repair it or stop it"
    )
    return _page("worker_broken", text, at, model=beat.model, subject=beat.worker)


def _dying(model: str, num_dead: int, at: datetime) -> Alarm | None:
    if num_dead < NUM_DEAD:
        return None
    text = (
        f"{num_dead} jobs for model {model} killed their engines and were dead-lettered in 5 min: "
        "look at the dead letters by signature, stop who sends them or repair the engine"
    )
    return _page("dead_letters_growing", text, at, model=model)


def _quarantined(worker: str, ordered_at: datetime, at: datetime) -> Alarm | None:
    age = at - ordered_at
    if age <= QUARANTINE:
        return None
    hours = age.total_seconds() / 3600
    return Alarm(
        code="worker_quarantined",
        severity=Severity.WARN,
        text=f"worker {worker} is quarantined for {hours:.0f} h: repair and resume it, or stop it",
        since=iso(ordered_at + QUARANTINE),
        subject=worker,
    )


def _page(
    code: str, text: str, at: datetime, *, model: str | None = None, subject: str = ""
) -> Alarm:
    return Alarm(
        code=code,
        severity=Severity.PAGE,
        text=text,
        since=iso(at),
        model=model,
        subject=subject or model or "",
    )


def _keeping(alarm: Alarm, since: Mapping[tuple[str, str], str]) -> Alarm:
    """Return the alarm with the time it stood first."""
    return Alarm(
        code=alarm.code,
        severity=alarm.severity,
        text=alarm.text,
        since=since.get(alarm.identity, alarm.since),
        model=alarm.model,
        subject=alarm.subject,
    )
