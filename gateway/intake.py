"""From a valid request to the row that is committed: card, prompt check, seed, cost, deadline.

Called by: gateway/jobs.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from typing import Any

from headrace.contract.accounts import Principal
from headrace.contract.errors import InvalidHeader
from headrace.contract.ids import new_id
from headrace.contract.specs import sampling_json
from headrace.gateway.cards import ModelCards
from headrace.gateway.prompt_check import PromptCheck
from headrace.gateway.schemas import JobRequest, wire_sampling

_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def new_row(
    job: JobRequest, principal: Principal, cards: ModelCards, prompts: PromptCheck
) -> dict[str, Any]:
    """Return the values of the job's row; raise what makes this fleet unable to run it."""
    card = cards.card(job.model)
    prompt_tokens = prompts.prompt_tokens(card, job)
    sampling = wire_sampling(job.sampling, seed=secrets.randbits(63))
    return {
        "id": new_id("job"),
        "tenant_id": principal.tenant_id,
        "key_id": principal.key_id,
        "model": card.name,
        "job_class": job.job_class,
        "priority": job.priority,
        "input": job.input_json(),
        "sampling": sampling_json(sampling),
        "meta": job.metadata,
        "cost_tokens": prompt_tokens + sampling.max_tokens,
        "deadline_s": job.deadline_s,  # from now by Postgres' clock, as all times are
    }


def checked_idempotency_key(key: str | None) -> str | None:
    """Return the header's value; raise InvalidHeader for one that is no key."""
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidHeader(
            f"Idempotency-Key has {len(key)} characters or some that are not visible ASCII: "
            "send 1 to 255 visible ASCII characters"
        )
    return key


def request_sha256(body: dict[str, Any]) -> bytes:
    """Hash what was asked; the order of fields and white space do not count."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).digest()
