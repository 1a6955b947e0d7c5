"""Prompts are measured before they are accepted: an over-long one never takes a worker's time.

A byte-level tokenizer makes at most one token a byte, so a short text needs no tokenizer to be sure
that it fits. Longer texts and messages are rendered and counted with the model's own tokenizer, in
a real thread, because that is computing and the other greenlets must not wait for it. Where the
model's folder cannot be read from here, the job is accepted: its worker measures again.

Called by: gateway/intake, gateway/admission (rough_tokens).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import gevent
from gevent import monkey

from headrace.contract import log
from headrace.contract.errors import (
    ChatTemplateRefused,
    OutOfRange,
    PromptTooLong,
    TokenOutOfVocabulary,
)
from headrace.contract.prompts import Prompts
from headrace.contract.wire import ModelCard
from headrace.gateway.schemas import JobRequest

P = ParamSpec("P")
T = TypeVar("T")

#: Special tokens a tokenizer may add to a text, at most.
MAX_ADDED_TOKENS = 16
#: Seconds until a folder that could not be read is tried again.
RETRY_LOAD_S = 30.0


def estimate_tokens(num_bytes: int) -> int:
    """Guess the tokens of a text, for the cost by which jobs are admitted; rather too many."""
    return num_bytes // 3 + 1


class PromptCheck:
    """Counts prompt tokens with each model's tokenizer, loaded when first needed."""

    def __init__(self) -> None:
        self._loaded: dict[ModelCard, Prompts] = {}
        self._retry_at: dict[ModelCard, float] = {}  # monotonic; folders that cannot be read
        self._lock = threading.Lock()  # one load at a time

    def prompt_tokens(self, card: ModelCard, job: JobRequest) -> int:
        """Return the prompt's tokens, or an estimate where it surely fits; refuse what cannot."""
        max_tokens = job.sampling.max_tokens
        self._check_ids(card, job)
        if job.prompt_token_ids is not None:
            count = len(job.prompt_token_ids)
        else:
            counted = self._count_text(card, job)
            if counted is None:
                return estimate_tokens(_num_bytes(job))
            count = counted
        if count == 0:
            raise OutOfRange(
                "prompt has 0 tokens, and the model begins no text by itself: send some text"
            )
        if count + max_tokens > card.max_seq_tokens:
            raise PromptTooLong(
                f"prompt has {count:,} tokens and max_tokens is {max_tokens:,}; {card.name} holds "
                f"{card.max_seq_tokens:,} (max_seq_tokens): shorten the prompt or lower max_tokens"
            )
        return count

    def _count_text(self, card: ModelCard, job: JobRequest) -> int | None:
        """Count the tokens of prompt or messages; None where no count is needed or possible."""
        if job.messages is not None and not card.has_chat_template:
            raise ChatTemplateRefused(
                f"messages were sent; {card.name} has no chat template: send `prompt` instead"
            )
        room = card.max_seq_tokens - job.sampling.max_tokens - MAX_ADDED_TOKENS
        if job.prompt and len(job.prompt.encode()) <= room:
            return None
        prompts = self._prompts(card)
        if prompts is None:
            return None
        if job.prompt is not None:
            return aside(prompts.count, job.prompt, add_special_tokens=True)
        messages = [message.model_dump() for message in job.messages or ()]
        return aside(lambda: prompts.count(prompts.render(messages), add_special_tokens=False))

    @staticmethod
    def _check_ids(card: ModelCard, job: JobRequest) -> None:
        for name, ids in (
            ("prompt_token_ids", job.prompt_token_ids),
            ("sampling.logit_bias", job.sampling.logit_bias),
        ):
            for token_id in (min(ids), max(ids)) if ids else ():
                if not 0 <= token_id < card.vocab_size:
                    raise TokenOutOfVocabulary(
                        f"{name} holds token {token_id}; {card.name} has tokens 0 to "
                        f"{card.vocab_size - 1}: was it made with another model's tokenizer?"
                    )

    def _prompts(self, card: ModelCard) -> Prompts | None:
        with self._lock:
            if card not in self._loaded:
                if time.monotonic() < self._retry_at.get(card, 0.0):
                    return None
                try:
                    self._loaded[card] = aside(Prompts.load, card.folder)
                except Exception as error:  # noqa: BLE001  tokenizers raises nothing narrower
                    self._retry_at[card] = time.monotonic() + RETRY_LOAD_S
                    log.event(
                        "tokenizer.unreadable",
                        level=logging.WARNING,
                        model=card.name,
                        folder=card.folder,
                        error=type(error).__name__,
                    )
                    return None
            return self._loaded[card]


def aside(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Compute in a real thread where greenlets would have to wait for it, else here."""
    if monkey.is_module_patched("threading"):
        return gevent.get_hub().threadpool.apply(function, args, dict(kwargs))
    return function(*args, **kwargs)


def rough_tokens(job: JobRequest) -> int:
    """Guess a prompt's tokens without a tokenizer."""
    ids = job.prompt_token_ids
    return estimate_tokens(_num_bytes(job)) if ids is None else len(ids)


def _num_bytes(job: JobRequest) -> int:
    texts = [message.content for message in job.messages or ()]
    return sum(len(text.encode()) for text in [job.prompt or "", *texts])
