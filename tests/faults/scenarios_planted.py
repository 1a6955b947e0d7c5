"""For each planted bug a short scenario in which it must show, and the codes that must be among it.

`control` is the same without a bug: thefts, deaths at both points and repeated POSTs in one run,
which the product survives; so what the checker finds in the others is the bug's work.

Not among scenario.all_scenarios: these are broken on purpose.

Called by: test_planted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from headrace.tests.faults.record import now_s
from headrace.tests.faults.scenario import Rules, Run, Scenario
from headrace.tests.faults.scenarios_wire import steal_one

#: Seconds without any progress after which what a bug lost is taken for lost.
STILL_S = 8.0
#: Seconds between two looks at progress.
LOOK_S = 0.25


async def until_done_or_still(run: Run) -> None:
    """Wait until all is done, or nothing has moved for long: a bug's victims never end."""
    clients, seen, since_s = run.clients, None, now_s()
    while not clients.is_all_done and now_s() < run.deadline_s:
        now = (clients.num_ended, sorted((job, f.last_id) for job, f in clients.followed.items()))
        if now != seen or not run.stage.ready_workers():
            seen, since_s = now, now_s()
        if now_s() - since_s > STILL_S:
            run.deadline_s = clients.deadline_s = now_s()
            return
        await asyncio.sleep(LOOK_S)


async def blame_crashes(run: Run) -> None:
    """Let no one wonder about workers that die of the wrapper `crash`; runs until cancelled."""
    starts = {name: run.stage.programs[name].num_starts for name in run.stage.workers}
    while True:
        for name in run.stage.workers:
            program = run.stage.programs[name]
            program.is_blamed = True
            if program.num_starts > starts[name]:
                starts[name] = program.num_starts
                run.fault("crash", name)
        await asyncio.sleep(0.02)


async def _with(run: Run, *work: Coroutine[Any, Any, None], may_stop_short: bool = True) -> None:
    blame = asyncio.create_task(blame_crashes(run))
    try:
        await run.beside(*work)
        await (until_done_or_still(run) if may_stop_short else run.until_done())
    finally:
        blame.cancel()


async def thefts(run: Run) -> None:
    async for _ in run.faults_due():
        await steal_one(run)


async def repeated_posts(run: Run) -> None:
    """Submit a job twice with one key, as a client does whose first answer was lost."""
    for _ in range(run.num_jobs):
        asked = run.next_asked((5, 20))
        await run.clients.submit(asked)
        job = await run.clients.submit(asked)
        if job is not None:
            await run.clients.follow(job, asked.tenant)


async def stolen(run: Run) -> None:
    await _with(run, run.load(tokens=(60, 120)), thefts(run))


async def plain(run: Run) -> None:
    await _with(run, run.load(tokens=(20, 60)))


async def posted_twice(run: Run) -> None:
    await _with(run, repeated_posts(run))


def check_wrapping(run: Run) -> None:
    """See that couriers are wrapped and engines are not."""
    for name in run.stage.workers:
        engine = run.stage.engine_pid(name)
        for pid, is_wrapped in ((run.stage.processes[name].pid, True), (engine, False)):
            command = b"" if pid is None else Path(f"/proc/{pid}/cmdline").read_bytes()
            if command and (b"faults.wrapped" in command) is not is_wrapped:
                run.note("broken", f"{name}: process {pid} runs {command!r}")


async def everything(run: Run) -> None:
    check_wrapping(run)
    run.num_jobs //= 2
    load = run.load(tokens=(60, 120))
    await _with(run, load, thefts(run), repeated_posts(run), may_stop_short=False)


def _scenario(
    name: str,
    run: Callable[[Run], Awaitable[None]],
    *,
    wrap: str,
    rules: Rules | None = None,
    num_workers: int = 1,
) -> Scenario:
    return Scenario(
        name=name,
        what="a planted bug" if "planted" in wrap else "the same faults, without a bug",
        jobs=16,
        faults=6,
        slice_jobs=16,
        slice_faults=6,
        run=run,
        rules=rules or Rules(),
        wrap=wrap,
        num_workers=num_workers,
        in_flight=12,
    )


CONTROL = _scenario(
    "control",
    everything,
    wrap="crash:at=log,every=60+crash:at=commit,every=5",
    rules=Rules(needs_takeovers=True),
    num_workers=2,
)

#: Bug -> where it shows, and the violations of which one at least must be found.
PLANTED: dict[str, tuple[Scenario, set[str]]] = {
    "skip_fence": (
        _scenario("skip-fence", stolen, wrap="planted:bug=skip_fence", num_workers=2),
        {"wrong_token", "stored_differs", "reset"},
    ),
    "publish_first": (
        _scenario("publish-first", plain, wrap="planted:bug=publish_first+crash:at=log,every=30"),
        {"reset"},
    ),
    "ack_early": (
        _scenario("ack-early", plain, wrap="planted:bug=ack_early+crash:at=commit,every=5"),
        {"lost"},
    ),
    "drop_publish": (
        _scenario("drop-publish", plain, wrap="planted:bug=drop_publish"),
        {"gap"},
    ),
    "restart_at_zero": (
        _scenario("restart-at-zero", stolen, wrap="planted:bug=restart_at_zero", num_workers=2),
        {"repeat"},
    ),
    "double_outbox": (
        _scenario("double-outbox", plain, wrap="planted:bug=double_outbox"),
        {"two_rows"},
    ),
    "forget_key": (
        _scenario("forget-key", posted_twice, wrap="planted:bug=forget_key"),
        {"id_changed"},
    ),
}
