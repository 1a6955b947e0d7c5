"""A job inside the courier: its tokens, their text, how much of it is logged, how it ends.

Invariants:
1. `num_logged <= len(ids)`; what is logged is never changed, and `chunk` is exactly the rest.
2. `ids`, `ends` and `logprobs` (where asked for) have one item a token; `ends` never falls.
3. After `ending` is set no token is taken: the job ends with what it has.
4. A takeover takes ids and text of the log as they are (they were seen) and feeds the text decoder
   with the ids, so that the next piece goes on where the log stops.

Owned by the courier's loop; intake builds it and hands it over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from headrace.contract.errors import DeadlineExceeded
from headrace.contract.ledger import Ending
from headrace.contract.streams import Claim
from headrace.contract.timings import Timings
from headrace.contract.wire import (
    FinishReason,
    JobEnd,
    JobSpec,
    JobStatus,
    TokenChunk,
    TokenLogprobs,
)
from headrace.worker.stamps import Stamps
from headrace.worker.text import OutputText

#: What -inf becomes: JSON has no infinity, and OpenAI's API uses this number.
MIN_LOGPROB = -9999.0


@dataclass(slots=True)
class RunningJob:
    spec: JobSpec
    claim: Claim
    attempt: int
    gen: int
    prompt_ids: list[int]
    stop_token_ids: tuple[int, ...]
    text: OutputText
    seq_id: int = 0  # the engine's name for it, set at admission
    is_in_engine: bool = False  # it was sent there, and its end has not come back
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_logged: int = 0
    resumed: tuple[TokenChunk, ...] = ()  # what earlier attempts logged
    cached_tokens: int = 0
    ending: Ending | None = None
    stamps: Stamps = field(default_factory=Stamps)

    @property
    def job(self) -> str:
        return self.spec.job

    def resume(self, log: Sequence[TokenChunk]) -> None:
        """Take over what earlier attempts logged; sets `ending` if that was the whole output."""
        self.resumed = tuple(log)
        for chunk in log:
            self.ids += chunk.ids
            start = 0
            for end in chunk.ends:
                self._add_piece(chunk.text[start:end])
                start = end
            if chunk.logprobs is not None:
                self.logprobs += chunk.logprobs
        for token in self.ids:
            self.text.feed(token, is_last=False)
        self.num_logged = len(self.ids)
        self._end_if_complete()

    def take(self, token: int, *, is_last: bool, logprobs: TokenLogprobs | None) -> None:
        """Add the engine's next token."""
        if self.ending is not None:
            return
        self.ids.append(token)
        is_last = is_last or len(self.ids) >= self.spec.sampling.max_tokens
        self._add_piece(self.text.feed(token, is_last=is_last))
        if self.spec.sampling.logprobs is not None and logprobs is not None:
            self.logprobs.append(_finite(logprobs))
        self._end_if_complete()

    def _add_piece(self, piece: str) -> None:
        self.pieces.append(piece)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(piece))

    def _end_if_complete(self) -> None:
        if self.text.is_stopped or (self.ids and self.ids[-1] in self.stop_token_ids):
            self.end(JobStatus.SUCCEEDED, FinishReason.STOP)
        elif len(self.ids) >= self.spec.sampling.max_tokens:
            self.end(JobStatus.SUCCEEDED, FinishReason.LENGTH)

    def end(
        self,
        status: JobStatus,
        reason: FinishReason,
        *,
        error_code: str | None = None,
        error_text: str | None = None,
    ) -> None:
        """Decide how the job ends; the first decision stands."""
        if self.ending is None:
            self.ending = self.ending_now(
                status, reason, error_code=error_code, error_text=error_text
            )

    def ending_now(
        self,
        status: JobStatus,
        reason: FinishReason,
        *,
        error_code: str | None = None,
        error_text: str | None = None,
    ) -> Ending:
        """Return how the job would end with the output it has."""
        asked = self.spec.sampling.logprobs is not None
        return Ending(
            status=status,
            finish_reason=reason,
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=self.cached_tokens,
            gen=self.gen,
            text="".join(self.pieces),
            token_ids=tuple(self.ids),
            ends=tuple(self.ends),
            logprobs=msgspec.to_builtins(self.logprobs) if asked else None,
            error_code=error_code,
            error_text=error_text,
        )

    def fail(self, code: str, text: str) -> Ending:
        """Replace how the job ends by a failure without output."""
        self.ending = Ending(
            status=JobStatus.FAILED,
            finish_reason=FinishReason.ERROR,
            prompt_tokens=len(self.prompt_ids),
            gen=self.gen,
            error_code=code,
            error_text=text,
        )
        return self.ending

    def expire(self, error_text: str) -> None:
        """End the job because its deadline has passed."""
        self.end(
            JobStatus.EXPIRED,
            FinishReason.EXPIRED,
            error_code=DeadlineExceeded.code,
            error_text=error_text,
        )

    def chunk(self) -> TokenChunk | None:
        """Return the tokens not yet logged as one chunk; None when there are none."""
        return self._cut(self.num_logged, len(self.ids))

    def logged_chunks(self) -> list[TokenChunk]:
        """Return everything the log holds, as `restore` puts it back.

        Chunks of earlier attempts stay theirs: a chunk of this attempt from before its own first
        token would tell subscribers that tokens are made again.
        """
        own = self._cut(self.resumed[-1].next if self.resumed else 0, self.num_logged)
        return [*self.resumed, own] if own else list(self.resumed)

    def _cut(self, first: int, last: int) -> TokenChunk | None:
        """Return tokens first to last - 1."""
        if first >= last:
            return None
        start = self.ends[first - 1] if first else 0
        asked = self.spec.sampling.logprobs is not None
        return TokenChunk(
            job=self.job,
            attempt=self.attempt,
            gen=self.gen,
            first=first,
            ids=tuple(self.ids[first:last]),
            text="".join(self.pieces[first:last]),
            ends=tuple(end - start for end in self.ends[first:last]),
            logprobs=tuple(self.logprobs[first:last]) if asked else None,
        )

    def timings(self) -> Timings:
        """Return where this attempt's time went, and how many tokens it made."""
        resumed_at = self.resumed[-1].next if self.resumed else 0
        return self.stamps.timings(resumed_at=resumed_at, num_tokens=len(self.ids) - resumed_at)

    def end_record(self) -> JobEnd:
        """Return the record that follows the last token in the log."""
        if self.ending is None:
            raise RuntimeError(f"{self.job} has not ended")
        return JobEnd(
            job=self.job,
            gen=self.gen,
            next=len(self.ending.token_ids),
            status=self.ending.status,
            finish_reason=self.ending.finish_reason,
            prompt_tokens=self.ending.prompt_tokens,
            cached_tokens=self.ending.cached_tokens,
            error_code=self.ending.error_code,
            error_text=self.ending.error_text,
        )


def _finite(item: TokenLogprobs) -> TokenLogprobs:
    top = tuple((token, max(value, MIN_LOGPROB)) for token, value in item.top)
    return TokenLogprobs(max(item.chosen, MIN_LOGPROB), top)
