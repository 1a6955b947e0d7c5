"""Change a module the moment it is imported, and not before: how wrappers reach a program's inside.

A wrapper must not import what it changes: gunicorn's workers import redis and psycopg after gevent
has patched the standard library, and both look at that only once.

Invariants:
1. An act runs once a process, right after the module's own code; in the importing process and in
   each that it forks, but in none that it starts anew: the engine stays as it is.
2. A module that is there already is changed at once.

Called by: wrapped's installers (unsure, repeated, planted).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Act = Callable[[ModuleType], None]


class _Watch(MetaPathFinder):
    """Finds nothing by itself: lets the others find, and adds our acts to what they load."""

    def __init__(self) -> None:
        self.acts: dict[str, list[Act]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.acts:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_act(module: ModuleType) -> None:
            load(module)
            for act in self.acts[fullname]:
                act(module)

        spec.loader.exec_module = load_and_act  # type: ignore[method-assign]  # this spec's own
        return spec


def when_imported(name: str, act: Act) -> None:
    """Call `act` with the module `name` as soon as it is imported."""
    module = sys.modules.get(name)
    if module is not None:
        act(module)
        return
    watch = next((finder for finder in sys.meta_path if isinstance(finder, _Watch)), None)
    if watch is None:
        watch = _Watch()
        sys.meta_path.insert(0, watch)
    watch.acts.setdefault(name, []).append(act)
