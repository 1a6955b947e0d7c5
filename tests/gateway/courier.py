"""A courier with a script in place of an engine: claims, logs and ends jobs as the worker does."""

from dataclasses import dataclass, field

from headrace.contract import wire
from headrace.contract.ledger import Ending, Finish, Ledger
from headrace.contract.streams import Claim, JobStreams
from headrace.contract.tokens import Append, TokenLog
from headrace.contract.wire import FinishReason, JobStatus

MODEL = "tiny"


def token_text(index: int) -> str:
    """Text of the token at an index: of different lengths, and beyond ASCII."""
    return " é😀x"[: index % 4] + str(index)


@dataclass
class Held:
    """A job this courier runs, with what it has made of it."""

    claim: Claim
    spec: wire.JobSpec
    attempt: int
    gen: int
    ids: list[int] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(token_text(i) for i in range(len(self.ids)))


#: What every prompt here is counted as.
PROMPT_TOKENS = 5


class Courier:
    """One worker of the tests' model."""

    def __init__(
        self, ledger: Ledger, streams: JobStreams, token_log: TokenLog, *, name: str = "w1"
    ) -> None:
        self.ledger, self.streams, self.token_log, self.name = ledger, streams, token_log, name

    def take(self, *, lease_ms: int = 60_000) -> Held:
        """Claim the next job, begin an attempt, and announce it."""
        claimed = self.streams.claim(
            MODEL, self.name, lease_ms=lease_ms, room_tokens=1 << 20, max_jobs=1, is_idle=True
        )
        (claim,) = claimed.claims
        spec = wire.decode(claim.spec)
        assert isinstance(spec, wire.JobSpec)
        pick_up = self.ledger.pick_up([claim.job], self.name)[claim.job]
        assert pick_up is not None
        assert pick_up.attempt is not None
        fenced = self.token_log.fence(MODEL, claim.job, pick_up.attempt, self.name)
        assert fenced is not None
        held = Held(claim, spec, pick_up.attempt, fenced.gen)
        held.ids = [token_id for chunk in fenced.log for token_id in chunk.ids]
        started = wire.JobStarted(
            job=claim.job,
            attempt=held.attempt,
            gen=held.gen,
            next=len(held.ids),
            worker=self.name,
        )
        self.token_log.announce(MODEL, [(started, PROMPT_TOKENS)])
        return held

    def say(self, held: Held, count: int = 1, *, logprobs: bool = False) -> None:
        """Log and publish the next tokens."""
        state = self.token_log.append(
            MODEL, [(held.spec.tenant, self.chunk(held, count, logprobs))]
        )
        assert state == [Append.LOGGED]

    def chunk(self, held: Held, count: int, logprobs: bool = False) -> wire.TokenChunk:
        first = len(held.ids)
        chunk = chunk_of(held.claim.job, first, count, attempt=held.attempt, gen=held.gen)
        held.ids += chunk.ids
        if not logprobs:
            return chunk
        some = wire.TokenLogprobs(-0.5, ((7, -0.5), (8, -1.5)))
        return wire.TokenChunk(
            **{
                name: getattr(chunk, name) for name in chunk.__struct_fields__ if name != "logprobs"
            },
            logprobs=(some,) * count,
        )

    def restore(self, held: Held) -> None:
        """Put a job that said nothing yet back into a Redis that lost it, as renewals do."""
        restored = self.streams.restore(
            held.spec, self.name, held.claim.cost_tokens, attempt=held.attempt, gen=held.gen, log=()
        )
        assert restored

    def end(
        self,
        held: Held,
        status: JobStatus = JobStatus.SUCCEEDED,
        reason: FinishReason = FinishReason.STOP,
        **more: object,
    ) -> None:
        """Commit the end, then write the end record, then acknowledge."""
        whole = chunk_of(held.claim.job, 0, len(held.ids), attempt=held.attempt, gen=held.gen)
        fields = {
            "status": status,
            "finish_reason": reason,
            "prompt_tokens": PROMPT_TOKENS,
            "cached_tokens": 2,
            "gen": held.gen,
            "text": whole.text,
            "token_ids": whole.ids,
            "ends": whole.ends,
        }
        ending = Ending(**(fields | more))
        assert self.ledger.finish(held.claim.job, held.attempt, ending) is Finish.DONE
        self.token_log.end(
            MODEL,
            [
                wire.JobEnd(
                    job=held.claim.job,
                    gen=held.gen,
                    next=len(held.ids),
                    status=status,
                    finish_reason=reason,
                    prompt_tokens=PROMPT_TOKENS,
                    cached_tokens=2,
                    error_code=ending.error_code,
                    error_text=ending.error_text,
                )
            ],
        )
        self.streams.finish(MODEL, [(held.claim.job, held.claim.entry)])


def chunk_of(
    job: str, first: int, count: int, *, attempt: int = 1, gen: int = 0
) -> wire.TokenChunk:
    """Tokens first to first + count - 1 of a job; ids are 100 + index + 1000 * gen."""
    texts = [token_text(index) for index in range(first, first + count)]
    ends = [sum(map(len, texts[: n + 1])) for n in range(count)]
    ids = tuple(100 + index + 1000 * gen for index in range(first, first + count))
    return wire.TokenChunk(
        job=job,
        attempt=attempt,
        gen=gen,
        first=first,
        ids=ids,
        text="".join(texts),
        ends=tuple(ends),
    )
