"""From token ids to text, a piece a token: incremental decoding and stop strings.

Invariants:
1. The pieces of all tokens, joined, are the job's text; piece i belongs to token i, so a stream may
   be resumed after any token.
2. No piece holds a broken character: bytes of an unfinished UTF-8 character wait for the token that
   finishes it, and are dropped when none comes; bytes that no token can finish become U+FFFD.
3. Text that may be the beginning of a stop string waits until that is decided; a stop string, and
   what follows it, is never in any piece, wherever the borders of its tokens are.
4. State is a function of the ids alone: a takeover feeds the logged ids again and goes on.
5. No NUL: Postgres cannot store one, so U+0000 becomes U+FFFD before anybody sees it.

Called by: worker/running.py, which feeds it new tokens and, at takeover, the logged ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class StopMatcher:
    """Find the first of several strings in text that comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""  # text that may be the beginning of a stop string
        self.is_matched = False

    def feed(self, text: str) -> str:
        """Add text; return what is certainly not part of a stop string."""
        if self.is_matched:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self.is_matched = True
            self._held = ""
            return text[: min(found)]
        keep = self._longest_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def release(self) -> str:
        """Return what was held back, once no more text can come."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), max(map(len, self._stops)) - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class OutputText:
    """The text of one job's output, fed a token at a time."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._matcher = StopMatcher(stops)

    @property
    def is_stopped(self) -> bool:
        """True once a stop string was found: the job ends with the token just fed."""
        return self._matcher.is_matched

    def feed(self, token: int, *, is_last: bool) -> str:
        """Return the piece of the next token; the last one also releases what was held back."""
        text = self._stream.step(self._tokenizer, token) or ""
        piece = self._matcher.feed(text.replace("\0", "\ufffd"))
        if is_last and not self._matcher.is_matched:
            piece += self._matcher.release()
        return piece
