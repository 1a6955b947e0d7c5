"""Malformed input: what schemathesis makes of our document, and raw sockets of HTTP itself.

`faults` is the number of hostile requests. Beside them runs a load of good jobs, which the checker
judges as ever: whatever is thrown at a gateway, others are served.

Called by: scenario.all_scenarios.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections import Counter
from pathlib import Path

from headrace.contract import database
from headrace.contract.accounts import Accounts
from headrace.contract.roles import Role
from headrace.fleet.child import start_child
from headrace.tests.faults.raw_sockets import Answers, Target, attack
from headrace.tests.faults.record import now_s
from headrace.tests.faults.scenario import Rules, Run, Scenario

#: Share of the requests that schemathesis makes; making one costs it as much as ten raw ones.
SPEC_SHARE = 0.3
#: Words of a log that say that something happened which nobody foresaw.
UNFORESEEN = ("request.failed", "connection.failed", "Traceback", "engine.died", "courier.failed")


async def malformed_input(run: Run) -> None:
    """Load and fuzz side by side; then count what should not be."""
    key = await run.stage.on_main(_admin_key, run.stage.postgres.url)
    num_spec = int(run.num_faults * SPEC_SHARE)
    found: list[dict[str, int]] = []
    try:
        await run.beside(
            run.load(tokens=(5, 40), in_flight=8),
            _spec(run, key, num_spec, found),
            _raw(run, key, run.num_faults - num_spec, found),
        )
    except ExceptionGroup as group:
        raise group.exceptions[0] from None  # what it found, in the report
    # Sequences end early where an answer offers nothing to take up: raw ones make up for it.
    await _raw(run, key, run.num_faults - sum(_total(found).values()), found)
    await run.until_done()
    total = _total(found)
    run.note("requests", str(sum(total.values())))
    run.note("statuses", json.dumps(dict(sorted(total.items()))))
    assert sum(total.values()) >= run.num_faults, f"only {sum(total.values())} were answered"
    said = _unforeseen(run.stage.folder)
    assert not said, f"the logs tell of what nobody foresaw: {said[:5]}"


async def _spec(run: Run, key: str, num: int, found: list[dict[str, int]]) -> None:
    """Let schemathesis send so many requests, in a process of its own."""
    stage, out = run.stage, run.stage.folder / "spec_fuzz.json"
    argv = [sys.executable, "-m", "headrace.tests.faults.spec_fuzz", out, num]
    env = {name: stage.env[name] for name in ("PATH", "PYTHONPATH", "HOME")}
    run.fault("spec_fuzz", "g0", num_requests=num)
    process = stage.processes["spec_fuzz"] = await stage.on_main(
        start_child,
        [str(part) for part in (*argv, run.random.randrange(1 << 30))],
        log=stage.folder / "spec_fuzz.log",
        env=env | {"FUZZ_URL": stage.apis[0], "FUZZ_KEY": key},
        death_signal=signal.SIGKILL,
        cwd=stage.folder,
    )
    await stage.until(
        lambda: process.poll() is not None, "spec_fuzz ends", run.deadline_s - now_s()
    )
    assert process.returncode == 0, (stage.folder / "spec_fuzz.log").read_text()[-2000:]
    told = json.loads(out.read_text())
    run.note("spec_fuzz", json.dumps(told))
    assert not told["wrong"], told["wrong"][:5]
    assert told["num_in_sequences"] > 0
    found.append(told["statuses"])


async def _raw(run: Run, key: str, num: int, found: list[dict[str, int]]) -> None:
    """Send so many raw requests, some thousand for each set of known jobs."""
    host, _, port = run.stage.apis[0].removeprefix("http://").partition(":")
    paths = await asyncio.to_thread(_paths, run.stage.apis[0])
    target = Target(host, int(port), key, run.stage.model.name, paths)
    run.fault("raw_sockets", "g0", num_requests=num)
    answers = Answers()
    while (left := num - sum(answers.statuses.values())) > 0:
        target.jobs = list(run.clients.followed)[:20]
        part = await attack(target, run.random, min(left, 2000))
        answers.statuses += part.statuses
        answers.num_silent += part.num_silent
        answers.wrong += part.wrong
        assert not answers.wrong, [(status, sent[:600]) for status, sent in answers.wrong[:3]]
    run.note("silent", str(answers.num_silent))
    found.append({str(status): count for status, count in answers.statuses.items()})


def _total(found: list[dict[str, int]]) -> Counter[str]:
    return sum(map(Counter, found), Counter())


def _admin_key(url: str) -> str:
    """Make a key that every operation admits, of a tenant that no client of the campaign is."""
    engine = database.connect(url)
    try:
        return Accounts(engine).create_key(tenant="hostile", name="fuzz", role=Role.ADMIN).secret
    finally:
        engine.dispose()


def _paths(api: str) -> list[str]:
    import httpx

    document = httpx.get(f"{api}/openapi.json", timeout=60).json()
    return [*document["paths"], "/dashboard", "/dashboard/jobs/{id}", "/dashboard/static/x/{name}"]


def _unforeseen(folder: Path) -> list[str]:
    """Return the lines of all programs' logs that tell of a failure."""
    return [
        f"{path.name}: {line[:600]}"
        for path in sorted(folder.glob("*.log"))
        if path.name not in ("spec_fuzz.log", "postgres.log", "valkey.log")
        for line in path.read_text(errors="replace").splitlines()
        if any(word in line for word in UNFORESEEN)
    ]


SCENARIOS = [
    Scenario(
        name="malformed-input",
        what="schemathesis on the API's document and raw sockets: no 5xx, no death",
        jobs=1000,
        faults=100_000,
        slice_jobs=30,
        slice_faults=2000,
        run=malformed_input,
        rules=Rules(has_other_jobs=True),
        num_workers=1,
        settings={"HEADRACE_STUB_STEP_MS": "1", "HEADRACE_BODY_TIMEOUT_S": "5"},
    ),
]
