"""Every entry delivered more than once: what a relay that looks at nothing, or comes late, does.

In a wrapped gateway or tasks process each enqueue is made twice, and one or two more entries of the
same job are added to its lane behind the hash's back, before and after the real one. The product
must let all of that come to one visible effect: the second enqueue does nothing (streams invariant
1), and an entry that the job's hash does not name is deleted when a claim meets it.

Option: seed (default 0), of how many entries are added.

Called by: wrapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from types import ModuleType
from typing import Any

from headrace.tests.faults.on_import import when_imported


def without(script: str, *lines: str) -> str:
    """Return a script without some of its lines; each must be there, once."""
    for line in lines:
        if script.count(line) != 1:
            raise ValueError(f"the script holds {line!r} {script.count(line)} times, not once")
        script = script.replace(line, "")
    return script


def careless(enqueue: str) -> str:
    """Return an enqueue script as it would be if it neither asked nor told the job's hash."""
    return without(
        enqueue,
        "if redis.call('HEXISTS', hash, 'lane') == 1 then return 0 end\n",
        "redis.call('HSET', hash, 'lane', lane, 'entry', id)\n",
        "redis.call('HINCRBY', P..'counts', 'accepted', 1)\n",
    )


def install(program: str, options: Mapping[str, str]) -> None:
    """Let the program deliver each entry two or three times."""
    if options.keys() - {"seed"}:
        raise ValueError("the only option is seed")
    if program != "worker":  # a worker enqueues nothing
        random = Random(f"{options.get('seed', '0')}:{program}")
        when_imported("headrace.contract.streams", lambda module: _wrap(module, random))


def _wrap(module: ModuleType, random: Random) -> None:
    kind: Any = module.JobStreams
    begin, enqueue = kind.__init__, kind.enqueue

    def begin_careless(self: Any, client: Any) -> None:
        begin(self, client)
        self._careless = client.register_script(careless(self._enqueue.script))

    def add_stray(self: Any, spec: Any, cost_tokens: int) -> None:
        real, self._enqueue = self._enqueue, self._careless
        try:
            enqueue(self, spec, cost_tokens)
        finally:
            self._enqueue = real

    def enqueue_often(self: Any, spec: Any, cost_tokens: int, **more: Any) -> bool:
        if random.random() < 0.5:
            add_stray(self, spec, cost_tokens)
        is_new = enqueue(self, spec, cost_tokens, **more)
        enqueue(self, spec, cost_tokens, **more)
        add_stray(self, spec, cost_tokens)
        return is_new

    kind.__init__, kind.enqueue = begin_careless, enqueue_often
