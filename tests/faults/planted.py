"""Planted bugs: one guarantee broken each, inside a running program; the checker must see it.

headrace guards most promises twice, so the plain bug is often invisible: another guard catches it.
Then what disables that guard is planted too, and said here; `PLANTS` holds what is planted where.

- skip_fence: a log takes what any attempt writes. The second guard, that an append must begin where
  the log ends, goes too: the writer's own index is not believed, the log's length is. (Tokens are a
  pure function, so a stale writer that respected indexes would write what the newest writes.)
  Shows when an entry is stolen from a living worker.
- publish_first: tokens are seen before they are logged. Shows when the worker dies between (crash:
  at=log): the next attempt makes again what was seen, and the stream must say `reset`.
- ack_early: the entry is acknowledged before the result is committed. Shows when the worker dies
  between (crash:at=commit): nobody has the job any more. The sweeper would find it after
  keys.JOB_TTL_S; a scenario's patience ends long before.
- drop_publish: a third of all chunks is logged, not published. The cursor's repair of gaps goes
  too: else it reads the log and nobody sees anything.
- restart_at_zero: a takeover does not resume; it throws the log away and begins at index 0. What
  makes the stream say `reset` then goes too: subscribers see indexes again, unannounced.
- double_outbox: one accept makes two jobs, each with its outbox row. (Two outbox rows of one job
  are harmless: the enqueue, the claim and the fence each stop the second.)
- forget_key: an Idempotency-Key is not kept: a repeated POST makes another job.

Option: bug, one of them. A program that a bug has nothing in is left as it is.

Called by: wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from headrace.tests.faults.on_import import when_imported
from headrace.tests.faults.repeated import without


def _instead(script: str, old: str, new: str) -> str:
    without(script, old)  # it must be there, once
    return script.replace(old, new)


# -- skip_fence ------------------------------------------------------------------------------


def _append_whoever_writes(module: ModuleType) -> None:
    scripts: Any = module
    checks = scripts.APPEND[
        scripts.APPEND.index("  if h[3] or newest > attempt") : scripts.APPEND.index(
            "      state = 0"
        )
    ]
    scripts.APPEND = _instead(scripts.APPEND, checks, "  if h[3] then state = 2\n  else do\n")


def _believe_the_log(module: ModuleType) -> None:
    import msgspec

    kind, keys = module.TokenLog, module.keys
    append = kind.append

    def renumbered(self: Any, model: str, chunks: Any) -> Any:
        found = []
        for tenant, chunk in chunks:
            at = self._client.hget(keys.job_hash(model, chunk.job), "next")
            found.append((tenant, msgspec.structs.replace(chunk, first=int(at or 0))))
        return append(self, model, found)

    kind.append = renumbered


# -- publish_first ---------------------------------------------------------------------------


def _append_in_silence(module: ModuleType) -> None:
    module.APPEND = without(module.APPEND, "      send(job, payload)\n")


def _publish_before_log(module: ModuleType) -> None:
    kind, keys, wire = module.TokenLog, module.keys, module.wire
    append = kind.append

    def publish_then_append(self: Any, model: str, chunks: Any) -> Any:
        args: list[Any] = [keys.prefix(model), keys.shard_channel("")]
        for _, chunk in chunks:
            args += (chunk.job, chunk.attempt, wire.encode(chunk), 0)
        with module.redis_errors("publish"):
            self._announce(keys=[keys.prefix(model) + "lanes"], args=args)
        return append(self, model, chunks)

    kind.append = publish_then_append


# -- ack_early -------------------------------------------------------------------------------


def _acknowledge_before_commit(module: ModuleType) -> None:
    kind = module.Endings
    end = kind._end

    def acknowledge_then_end(self: Any, job: Any) -> None:
        self._streams.finish(self._model, [(job.job, "")])
        end(self, job)

    kind._end = acknowledge_then_end


# -- drop_publish ----------------------------------------------------------------------------


def _publish_two_of_three(module: ModuleType) -> None:
    module.APPEND = _instead(
        module.APPEND,
        "      send(job, payload)\n",
        "      if (first + count) % 3 > 0 then send(job, payload) end\n",
    )


def _believe_every_frame(module: ModuleType) -> None:
    kind, wire = module.StreamCursor, module.wire
    take = kind.take

    def take_as_it_comes(self: Any, message: Any) -> Any:
        if isinstance(message, wire.TokenChunk) and message.first > self.next:
            self.next = message.first
        return take(self, message)

    kind.take = take_as_it_comes


# -- restart_at_zero -------------------------------------------------------------------------


def _fence_without_log(module: ModuleType) -> None:
    found = _instead(module.FENCE, "if not gen then\n", "if true then\n")
    module.FENCE = _instead(found, "gen = tostring(attempt - 1)", "gen = gen or '0'")


def _start_over_in_silence(module: ModuleType) -> None:
    def start_over(self: Any, _reason: str) -> list[Any]:
        self.next = 0
        self.is_behind = True
        return []

    module.StreamCursor._start_over = start_over


# -- double_outbox, forget_key ---------------------------------------------------------------


def _insert_twice(module: ModuleType) -> None:
    insert_job = module.insert_job

    def insert_two(db: Any, job: dict[str, Any]) -> Any:
        from headrace.contract.ids import new_id

        row = insert_job(db, job)
        insert_job(db, {**job, "id": new_id("job")})
        return row

    module.insert_job = insert_two


def _keep_no_key(module: ModuleType) -> None:
    accept_job = module.Ledger.accept_job

    def accept(self: Any, job: Any, *, idempotency_key: Any, request_sha256: bytes) -> Any:
        return accept_job(self, job, idempotency_key=None, request_sha256=request_sha256)

    module.Ledger.accept_job = accept


SCRIPTS, TOKENS = "headrace.contract.scripts", "headrace.contract.tokens"
LEDGER, CURSOR = "headrace.contract.ledger", "headrace.gateway.cursor"

#: Bug -> program -> what is changed in which module.
Plant = dict[str, list[tuple[str, Callable[[ModuleType], None]]]]
PLANTS: dict[str, Plant] = {
    "skip_fence": {"worker": [(SCRIPTS, _append_whoever_writes), (TOKENS, _believe_the_log)]},
    "publish_first": {"worker": [(SCRIPTS, _append_in_silence), (TOKENS, _publish_before_log)]},
    "ack_early": {"worker": [("headrace.worker.endings", _acknowledge_before_commit)]},
    "drop_publish": {
        "worker": [(SCRIPTS, _publish_two_of_three)],
        "gateway": [(CURSOR, _believe_every_frame)],
    },
    "restart_at_zero": {
        "worker": [(SCRIPTS, _fence_without_log)],
        "gateway": [(CURSOR, _start_over_in_silence)],
    },
    "double_outbox": {"gateway": [(LEDGER, _insert_twice)]},
    "forget_key": {"gateway": [(LEDGER, _keep_no_key)]},
}


def install(program: str, options: Mapping[str, str]) -> None:
    """Plant a bug into the program."""
    if options.keys() != {"bug"} or options["bug"] not in PLANTS:
        raise ValueError(f"name bug=, one of {', '.join(PLANTS)}, and nothing else")
    for module, act in PLANTS[options["bug"]].get(program, []):
        when_imported(module, act)
