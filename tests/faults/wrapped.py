"""Run one of our programs with wrappers inside.

    python -m headrace.tests.faults.wrapped SPEC -- NAME [ARGUMENT...]

NAME and what follows it is what `python -m headrace.fleet` takes: `worker`, `gateway`, `tasks`. The
CLI itself reads the settings and builds the program's command line; only its last act, to become
that program, is led through here, so that the program begins with the wrappers installed.

SPEC names wrappers, joined by `+`, with their options: `unsure:share=0.01,seed=7+repeated`.

Invariants:
1. The program is the one that production runs: same module, arguments, environment and pid.
2. Wrappers hold in every process the program forks (gunicorn's workers, Celery's beat) and in none
   that it starts anew (the engine): see on_import.
3. A SPEC that cannot be read, or names what is not there, ends with status 2 and says so: a fault
   that was mistyped must not pass for a fault that was survived.

Called by: stage (and by itself, once it has become the program).
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from headrace.tests.faults import crashes, planted, repeated, unsure

#: What may be installed: called with the program's name and its options.
Installer = Callable[[str, Mapping[str, str]], None]
INSTALLERS: dict[str, Installer] = {
    "unsure": unsure.install,
    "repeated": repeated.install,
    "planted": planted.install,
    "crash": crashes.install,
}
#: The module that each command of the CLI becomes.
PROGRAMS = {"headrace.worker": "worker", "gunicorn": "gateway", "celery": "tasks"}
ITSELF = "headrace.tests.faults.wrapped"


class SpecError(ValueError):
    """SPEC cannot be read."""


def parse(spec: str) -> list[tuple[str, dict[str, str]]]:
    """Return the wrappers SPEC names, with their options."""
    found: list[tuple[str, dict[str, str]]] = []
    for part in spec.split("+"):
        name, _, text = part.partition(":")
        if name not in INSTALLERS:
            raise SpecError(
                f"wrapper {name!r} was asked for; there are {', '.join(INSTALLERS)}: name one"
            )
        pairs = [pair.partition("=") for pair in text.split(",") if pair]
        if not all(key and value for key, _, value in pairs):
            raise SpecError(f"options of {name} are {text!r}: write key=value,key=value")
        found.append((name, {key: value for key, _, value in pairs}))
    return found


def install(spec: str, program: str) -> None:
    """Install what SPEC names into this process, for one of our programs."""
    for name, options in parse(spec):
        try:
            INSTALLERS[name](program, options)
        except (TypeError, ValueError, KeyError) as error:
            raise SpecError(f"{name} was given {options}: {error}") from error


def argv_of(spec: str, *arguments: str) -> list[str]:
    """Return the command line that runs `headrace ARGUMENTS` wrapped."""
    return [sys.executable, "-m", ITSELF, spec, "--", *arguments]


def _run_cli(spec: str, arguments: Sequence[str]) -> int:
    """Let the CLI prepare the program, and come back here in place of becoming it."""
    parse(spec)
    become = os.execve

    def become_wrapped(_path: str, argv: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
        if argv[1] != "-m" or argv[2] not in PROGRAMS:
            raise SpecError(f"{argv[1:3]} was started; only {', '.join(PROGRAMS)} can be wrapped")
        become(argv[0], [argv[0], "-m", ITSELF, spec, "--become", *argv[2:]], environ)

    os.execve = become_wrapped
    from headrace.fleet import cli

    return cli.run(arguments, dict(os.environ))


def _become(spec: str, module: str, arguments: Sequence[str]) -> None:
    install(spec, PROGRAMS[module])
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> int:
    """Run this process's command line."""
    try:
        match sys.argv[1:]:
            case [spec, "--become", module, *arguments]:
                _become(spec, module, arguments)
                return 0
            case [spec, "--", *arguments] if arguments:
                return _run_cli(spec, arguments)
    except SpecError as error:
        print(f"wrapped: {error}", file=sys.stderr)
        return 2
    print("usage: wrapped SPEC -- worker|gateway|tasks [ARGUMENT...]", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
