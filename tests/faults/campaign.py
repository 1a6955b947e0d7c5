"""One run of one scenario, from its servers' start to its verdict.

    start servers -> start programs -> ready -> scenario.run (load, faults) -> rows -> stop -> check

Invariants:
1. Bounded: a run has a deadline, after which nothing is waited for and what is open is lost.
2. Whatever happens, Ctrl-C included, all processes are ended and the recorder's file is closed.
3. The verdict is of the file: `python -m headrace.tests.faults --check FILE` gives it again.
4. The folder of a run that failed is kept, with its records and all logs; others are removed,
   unless the caller wants them.

Called by: __main__, test_campaign, test_planted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from headrace.tests.faults.checker import Verdict, check
from headrace.tests.faults.clients import Clients
from headrace.tests.faults.main_thread import MainThread
from headrace.tests.faults.record import Attempt, Recorder, Row, now_s, read_records
from headrace.tests.faults.scenario import Run, Scenario
from headrace.tests.faults.stage import Stage

#: What a scenario's fleet has unless it says otherwise. Short leases: takeovers are the matter.
SETTINGS = {
    "HEADRACE_RUNNER": "stub",
    "HEADRACE_STUB_STEP_MS": "15",
    "HEADRACE_LEASE_S": "2",
    "HEADRACE_HEARTBEAT_S": "2",
    "HEADRACE_SWEEP_EVERY_S": "1",
    "HEADRACE_MAX_NUM_SEQS": "64",
}
#: Rows read at a time.
PAGE_ROWS = 500


@dataclass(frozen=True)
class Options:
    seed: int = 1
    jobs: int | None = None  # None: the scenario's slice
    faults: int | None = None
    is_full: bool = False  # the counts
    minutes: float | None = None
    keep: Path | None = None  # folder to keep everything in

    @property
    def is_slice(self) -> bool:
        """True for what CI runs: few jobs, few workers, no promise about speed."""
        return not (self.is_full or self.jobs or self.minutes)


@dataclass
class Outcome:
    """What a run came to."""

    scenario: Scenario
    seed: int
    num_jobs: int
    num_faults: int
    verdict: Verdict
    seconds: float
    folder: Path | None  # kept, or None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        return not self.verdict.violations


def run_scenario(scenario: Scenario, model: Path, options: Options) -> Outcome:
    """Run a scenario in the main thread and check it."""
    folder = _folder_of(scenario, options)
    began_s = now_s()
    jobs = options.jobs or (scenario.jobs if options.is_full else scenario.slice_jobs)
    faults = options.faults
    if faults is None:
        faults = scenario.faults if options.is_full else scenario.slice_faults
    main, records = MainThread(), folder / "records.jsonl"
    with Recorder(records) as recorder:
        stage = _stage_of(scenario, folder, model, main, recorder, options)
        try:
            stage.start_all()
            main.run(lambda: _drive(scenario, stage, recorder, options, jobs, faults))
        except Exception as error:  # noqa: BLE001  a broken scenario is a finding of its own
            stage.note("broken", f"{type(error).__name__}: {error}")
            (folder / "broken.txt").write_text("".join(traceback.format_exception(error)))
        finally:
            stage.stop()
    rules = (scenario.slice_rules if options.is_slice else None) or scenario.rules
    verdict = check(read_records(records), rules)
    outcome = Outcome(
        scenario, options.seed, jobs, faults, verdict, now_s() - began_s, folder, verdict.figures
    )
    if options.keep is None and outcome.is_clean:
        shutil.rmtree(folder, ignore_errors=True)
        outcome.folder = None
    return outcome


def _folder_of(scenario: Scenario, options: Options) -> Path:
    if options.keep is None:
        return Path(tempfile.mkdtemp(prefix=f"headrace-{scenario.name}-"))
    folder = options.keep / f"{scenario.name}-{options.seed}"
    folder.mkdir(parents=True)
    return folder


def _stage_of(
    scenario: Scenario,
    folder: Path,
    model: Path,
    main: MainThread,
    recorder: Recorder,
    options: Options,
) -> Stage:
    engine = {} if scenario.engine == "stub" else {"HEADRACE_RUNNER": "model"}
    return Stage(
        folder,
        model,
        SETTINGS | engine | scenario.settings,
        main=main,
        recorder=recorder,
        num_workers=min(
            scenario.num_workers, scenario.slice_workers if options.is_slice else 1 << 30
        ),
        num_gateways=scenario.num_gateways,
        own_doors=scenario.own_doors,
        wrap=scenario.wrap and scenario.wrap.format(seed=options.seed),
        wrapped_programs=scenario.wrapped_programs,
    )


async def _drive(
    scenario: Scenario,
    stage: Stage,
    recorder: Recorder,
    options: Options,
    num_jobs: int,
    num_faults: int,
) -> None:
    limit_s = scenario.slice_limit_s if options.is_slice else scenario.limit_s
    minutes = options.minutes or (scenario.minutes if options.is_full else None)
    deadline_s = now_s() + limit_s + (minutes or 0) * 60
    keys = {"one": stage.key, "two": stage.other_key}
    clients = Clients(stage.apis, keys, stage.model.name, recorder, deadline_s)
    await clients.open()
    run = Run(
        scenario,
        stage,
        clients,
        recorder,
        random.Random(options.seed),
        num_jobs,
        num_faults,
        deadline_s,
        minutes,
        options.is_slice,
    )
    run.note("scenario", scenario.name)
    run.note("seed", str(options.seed))
    minders = [asyncio.create_task(stage.supervise()), asyncio.create_task(stage.sample())]
    try:
        await stage.until_ready()
        async with asyncio.timeout_at(
            asyncio.get_running_loop().time() + deadline_s - now_s() + 60
        ):
            await _run_while(minders, run)
        await stage.sample_once()  # what was counted since the last one
        if now_s() >= deadline_s:
            run.note("overdue", f"{len(clients.followed)} streams open at the deadline")
    finally:
        await clients.close()
        for minder in minders:
            minder.cancel()
        await asyncio.gather(*minders, return_exceptions=True)
        await stage.on_main(record_rows, stage.postgres.url, recorder)


async def _run_while(minders: list[asyncio.Task[None]], run: Run) -> None:
    """Run the scenario; a minder that ended has failed, and ends it."""
    work = asyncio.ensure_future(run.scenario.run(run))
    try:
        await asyncio.wait([work, *minders], return_when=asyncio.FIRST_COMPLETED)
        for minder in minders:
            if minder.done():
                minder.result()
        await work
        await run.until_done()
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


def record_rows(url: str, recorder: Recorder) -> None:
    """Write down every job that Postgres has, whoever asked for it."""
    for row in _rows(url.replace("+psycopg", "")):
        recorder.add(row)


def _rows(url: str) -> Iterator[Row]:
    with psycopg.connect(url, row_factory=dict_row) as connection:
        has_letters = _has(connection, "select to_regclass('dead_letters') is not null as has")
        has_crashes = _has(
            connection,
            "select count(*) > 0 as has from information_schema.columns"
            " where table_name = 'jobs' and column_name = 'num_crashes'",
        )
        letter = "(select signature from dead_letters d where d.job_id = j.id)"
        query = f"""
            select j.id, case when j.made_from is null then j.metadata->>'campaign' end as campaign,
              t.name as tenant, j.status, j.attempt,
              j.finish_reason, j.error_code, j.prompt_tokens, j.output_text, j.output_token_ids,
              j.output_ends, j.output_gen, j.cancel_requested_at is not null as is_canceled,
              {"j.num_crashes" if has_crashes else "0"} as num_crashes,
              {letter if has_letters else "null::text"} as dead_letter,
              (select min(key) from idempotency_keys i where i.job_id = j.id) as key,
              (select json_agg(json_build_array(a.number, a.worker, a.outcome) order by a.number)
                from attempts a where a.job_id = j.id) as attempts
            from jobs j join tenants t on t.id = j.tenant_id order by j.id
        """
        with contextlib.closing(connection.cursor(name="rows")) as cursor:
            cursor.itersize = PAGE_ROWS
            cursor.execute(query)  # pyright: ignore[reportArgumentType, reportCallIssue]
            yield from map(_row, cursor)


def _has(connection: psycopg.Connection[dict[str, Any]], query: Any) -> bool:
    found = connection.execute(query).fetchone()
    return found is not None and bool(found["has"])


def _row(row: dict[str, Any]) -> Row:
    return Row(
        job=row["id"],
        key=row["key"],
        campaign=row["campaign"],
        tenant=row["tenant"],
        status=row["status"],
        attempt=row["attempt"],
        finish_reason=row["finish_reason"],
        error_code=row["error_code"],
        prompt_tokens=row["prompt_tokens"],
        text=row["output_text"],
        token_ids=row["output_token_ids"],
        ends=row["output_ends"],
        gen=row["output_gen"],
        is_canceled=row["is_canceled"],
        num_crashes=row["num_crashes"],
        dead_letter=row["dead_letter"],
        attempts=[Attempt(*each) for each in row["attempts"] or []],
    )


def as_json(outcome: Outcome) -> str:
    """Return what is kept of a run, seed included."""
    verdict = outcome.verdict
    return json.dumps(
        {
            "scenario": outcome.scenario.name,
            "what": outcome.scenario.what,
            "seed": outcome.seed,
            "jobs": outcome.num_jobs,
            "faults": outcome.num_faults,
            "seconds": round(outcome.seconds, 1),
            "is_clean": outcome.is_clean,
            "figures": verdict.figures,
            "violations": [
                {"code": each.code, "job": each.job, "text": each.text}
                for each in verdict.violations[:200]
            ],
            "num_violations": len(verdict.violations),
        },
        indent=2,
    )
