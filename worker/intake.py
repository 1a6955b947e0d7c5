"""Claim jobs as far as there is room, begin an attempt at each, and hand it to the courier's loop.

The way of a job through here: claim (Redis) -> pick up (Postgres gives the attempt number) -> fence
(the log is ours from here on, and tells what earlier attempts wrote) -> prompt to token ids ->
admit. What cannot run is ended here and costs the engine nothing; what must not run here (a suspect
among others) goes back before it is admitted.

Invariants:
1. Backpressure is at the claim: nothing is claimed beyond the pool's predicted peak and the number
   of sequences; jobs wait in their lane, visible, not here.
2. A job is in `Held` from its pickup until it has ended, was lost or was handed back, so its lease
   is renewed all that time.
3. Any failure between claim and admission leaves the job claimable: its lease runs out, or its end
   is committed. It is never dropped in silence.
4. A lease that ran out while Redis was away proves no death: for a lease after that nothing is
   taken over but what was handed back. Who lives renews in a third of it; taking over from the
   living moves every job, and makes streams say `reset` where Redis lost its last second too.
5. It begins paused. Once paused it begins no claim, and `is_resting` is true from when the one in
   hand, if any, has delivered all it will: then nothing more comes out of here.
6. Suspects are claimed with nothing in hand, and nothing is claimed until they have left.

Called by: lifecycle, as a thread of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from headrace.contract import log, wire
from headrace.contract.errors import EngineRefused, HeadraceError, PromptTooLong, Unavailable
from headrace.contract.ledger import Ledger, PickUp
from headrace.contract.prompts import Prompts
from headrace.contract.specs import end_of
from headrace.contract.streams import ONLY_HANDED_BACK_MS, Claim, JobStreams
from headrace.contract.tokens import TokenLog
from headrace.contract.wire import FinishReason, JobStatus
from headrace.worker.held import Held
from headrace.worker.metrics import Metrics
from headrace.worker.room import Room
from headrace.worker.running import RunningJob
from headrace.worker.spec_check import check_spec
from headrace.worker.stamps import Stamps
from headrace.worker.suspicion import Suspicion
from headrace.worker.text import OutputText

#: Jobs claimed by one call: enough to fill a batch quickly, few enough to share with other workers.
MAX_CLAIM = 16
#: Seconds between attempts at a store that is away.
RETRY_S = 0.25
#: Seconds after which a claim is tried even if nobody rang.
POLL_S = 1.0


class Intake:
    """The claiming thread of a worker."""

    def __init__(
        self,
        *,
        model: str,
        worker: str,
        lease_ms: int,
        streams: JobStreams,
        tokens: TokenLog,
        ledger: Ledger,
        prompts: Prompts,
        held: Held,
        room: Room,
        suspicion: Suspicion,
        metrics: Metrics,
        deliver: Callable[[RunningJob], None],
    ) -> None:
        self._model = model
        self._worker = worker
        self._lease_ms = lease_ms
        self._streams = streams
        self._tokens = tokens
        self._ledger = ledger
        self._prompts = prompts
        self._held = held
        self._room = room
        self._suspicion = suspicion
        self._metrics = metrics
        self._deliver = deliver
        self._may_take_over_at = 0.0  # monotonic s
        self.bell = threading.Event()  # rung by a wake message, and when room has come free
        self._is_quiet = threading.Event()
        self._lock = threading.Lock()  # of the two flags, never held over a claim
        self._is_paused, self._is_claiming = True, False

    def pause(self) -> None:
        """Begin no claim until `resume`."""
        with self._lock:
            self._is_paused = True

    def resume(self) -> None:
        """Claim (again), at once."""
        with self._lock:
            was_paused, self._is_paused = self._is_paused, False
        if was_paused:
            self.bell.set()

    @property
    def is_resting(self) -> bool:
        with self._lock:
            return self._is_paused and not self._is_claiming

    def redis_was_away(self) -> None:
        """Take nothing over for a lease: those who held jobs meanwhile could not renew either."""
        self._may_take_over_at = time.monotonic() + self._lease_ms / 1000

    def _takeover_after_ms(self) -> int:
        is_sure = time.monotonic() >= self._may_take_over_at
        return self._lease_ms if is_sure else ONLY_HANDED_BACK_MS

    def quiet(self) -> None:
        """Claim nothing more."""
        self._is_quiet.set()
        self.bell.set()

    def run(self) -> None:
        """Claim, while not paused, until told to be quiet."""
        while not self._is_quiet.is_set():
            self.bell.wait(POLL_S)
            self.bell.clear()
            try:
                while not self._is_quiet.is_set() and self._claim_unless_paused():
                    pass
            except Unavailable as error:
                self.redis_was_away()
                log.event(
                    "claim.delayed", level=logging.WARNING, worker=self._worker, code=error.code
                )
                self._is_quiet.wait(RETRY_S)

    def _claim_unless_paused(self) -> bool:
        with self._lock:
            if self._is_paused:
                return False
            self._is_claiming = True
        try:
            return self._claim_once()
        finally:
            with self._lock:
                self._is_claiming = False

    def _claim_once(self) -> bool:
        """Claim what there is room for; True when more may be waiting."""
        if self._room.is_on_trial:
            return False
        room_tokens, num_free = self._room.left()
        if num_free <= 0 or room_tokens <= 0:
            return False
        claimed = self._streams.claim(
            self._model,
            self._worker,
            lease_ms=self._takeover_after_ms(),
            room_tokens=room_tokens,
            max_jobs=min(MAX_CLAIM, num_free),
            is_idle=self._room.is_idle,
        )
        if claimed.claims:
            self._begin(claimed.claims)
        return bool(claimed.claims) and not claimed.is_blocked and not claimed.is_trial

    def _begin(self, claims: tuple[Claim, ...]) -> None:
        """Pick the claimed jobs up in one transaction and start each."""
        claimed_at = time.monotonic()
        pickups = self._pick_up([claim.job for claim in claims])
        if pickups is None:
            return  # the lease runs out and somebody claims them again
        for claim in claims:
            pickup = pickups[claim.job]
            if pickup is None or pickup.attempt is None:
                self._drop_ended(claim)
                continue
            self._held.add(claim.job, pickup.attempt)
            job = self._start(claim, pickup, pickup.attempt)
            if job is None:
                self._held.remove(claim.job, pickup.attempt)
            else:
                job.stamps = Stamps(
                    claimed_at=claimed_at,
                    picked_up_at=pickup.asked_at,
                    age_s=pickup.age_s,
                    waited_s=pickup.waited_s,
                    was_lost=pickup.was_lost,
                )
                self._room.reserve(claim.job, claim.cost_tokens, is_trial=claim.suspect > 0)
                self._deliver(job)

    def _drop_ended(self, claim: Claim) -> None:
        """Acknowledge a job that has ended, telling what its last worker died before telling."""
        row = self._ledger.job(claim.job)
        if row is not None:
            self._tokens.end(self._model, [end_of(row)])
        self._streams.finish(self._model, [(claim.job, claim.entry)])
        log.event("job.dropped", job=claim.job, worker=self._worker, reason="has ended")

    def _pick_up(self, job_ids: list[str]) -> dict[str, PickUp | None] | None:
        """Pick up, trying again while the lease lasts; None when Postgres stayed away."""
        give_up_at = time.monotonic() + self._lease_ms / 1000 * 0.6
        while True:
            try:
                return self._ledger.pick_up(job_ids, self._worker)
            except Unavailable as error:
                log.event(
                    "pickup.delayed", level=logging.WARNING, worker=self._worker, code=error.code
                )
                if time.monotonic() > give_up_at or self._is_quiet.wait(RETRY_S):
                    return None

    def _start(self, claim: Claim, pickup: PickUp, attempt: int) -> RunningJob | None:
        """Fence the log and build the job; None when a newer attempt exists or Redis went away."""
        try:
            fenced = self._tokens.fence(self._model, claim.job, attempt, self._worker)
        except (Unavailable, wire.WireError) as error:  # or a log that holds no tokens of ours
            log.event(
                "fence.failed",
                level=logging.WARNING,
                job=claim.job,
                worker=self._worker,
                code=error.code,
            )
            return None
        if fenced is None:
            self._metrics.refused("fence")
            log.event("job.lost", job=claim.job, worker=self._worker, attempt=attempt)
            return None
        if pickup.was_lost or pickup.suspect > claim.suspect:
            # Before its prompt is read: that may be what ended the workers before.
            job = self._build(claim, attempt, fenced.gen, has_prompt=False)
            job.resume(fenced.log)
            if job.ending is None:
                if not self._suspicion.may_run(job, pickup):
                    return None
                if job.ending is not None:
                    return job
        job = self._build(claim, attempt, fenced.gen)
        if job.ending is None:
            job.resume(fenced.log)
        if fenced.is_canceled or pickup.is_canceled:
            job.end(JobStatus.CANCELED, FinishReason.CANCELED)
        if job.spec.deadline_ms is not None and time.time() * 1000 >= job.spec.deadline_ms:
            job.expire("the job's deadline passed before it was done")
        log.event(
            "job.started",
            job=claim.job,
            worker=self._worker,
            attempt=attempt,
            resumed_at=fenced.next,
            takeover=claim.is_takeover,
            prompt_tokens=len(job.prompt_ids),
        )
        self._announce(job, fenced.next)
        return job

    def _build(
        self, claim: Claim, attempt: int, gen: int, *, has_prompt: bool = True
    ) -> RunningJob:
        """Decode and tokenise; what cannot be is a job that has ended before it began."""
        error: HeadraceError | None = None
        prompt_ids: list[int] = []
        try:
            message = wire.decode(claim.spec)
            if not isinstance(message, wire.JobSpec):
                raise wire.WireError(f"entry holds a {type(message).__name__}, not a job")
            spec = message
            check_spec(spec, claim.job)
        except HeadraceError as refused:
            spec, error = _unreadable(claim.job, self._model), refused
        if error is None and has_prompt:
            try:
                prompt_ids = self._prompt_ids(spec)
            except HeadraceError as refused:
                error = refused
            except Exception as raised:  # noqa: BLE001  a tokenizer may raise anything: the job's end
                log.failure("prompt.refused", raised, job=claim.job, worker=self._worker)
                error = EngineRefused("the prompt cannot be tokenised by this model: change it")
        job = RunningJob(
            spec=spec,
            claim=claim,
            attempt=attempt,
            gen=gen,
            prompt_ids=prompt_ids,
            stop_token_ids=self._prompts.stop_token_ids,
            text=OutputText(self._prompts.tokenizer, spec.sampling.stop),
        )
        if error is not None:
            job.end(
                JobStatus.FAILED,
                FinishReason.ERROR,
                error_code=error.code,
                error_text=error.detail,
            )
        return job

    def _prompt_ids(self, spec: wire.JobSpec) -> list[int]:
        ids = self._prompts.prompt_ids(
            prompt=spec.prompt, prompt_token_ids=spec.prompt_token_ids, messages=spec.messages
        )
        limit, wanted = self._room.max_seq_tokens, spec.sampling.max_tokens
        if len(ids) + wanted > limit:
            raise PromptTooLong(
                f"prompt has {len(ids):,} tokens and max_tokens is {wanted:,}; this worker holds "
                f"{limit:,} (max_seq_tokens): shorten the prompt or ask for fewer tokens"
            )
        if not ids:
            raise EngineRefused("prompt has no token: send at least one")
        return ids

    def _announce(self, job: RunningJob, next_index: int) -> None:
        started = wire.JobStarted(
            job=job.job,
            attempt=job.attempt,
            gen=job.gen,
            next=next_index,
            worker=self._worker,
        )
        try:
            if self._tokens.announce(self._model, [(started, len(job.prompt_ids))]):
                self._metrics.refused("publish")
        except Unavailable as error:  # subscribers see `started` from the first token, or the row
            log.event(
                "announce.failed",
                level=logging.WARNING,
                job=job.job,
                worker=self._worker,
                code=error.code,
            )


def _unreadable(job: str, model: str) -> wire.JobSpec:
    """Stand in for a spec that cannot be decoded, so that the job can be ended as failed."""
    return wire.JobSpec(
        job=job,
        tenant="",
        model=model,
        job_class=wire.JobClass.BATCH,
        priority=wire.Priority.LOW,
        sampling=wire.Sampling(),
        prompt="",
    )
