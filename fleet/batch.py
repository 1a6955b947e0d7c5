"""Many jobs of a file, with bounded concurrency and a progress bar on stderr.

Invariants:
1. At most `concurrency` jobs are between their submission and their end (with `follow`), or between
   request and answer (without); the rest of the file waits here.
2. Results are printed in the order in which they come, each with its line `index` (from 0).
3. A refused job is reported and does not stop the others; the exit code tells that there was one.
   Lost connections end the run: with --idempotency-key the same command goes on where it was.

Called by `cli_jobs.submit`.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from headrace.fleet.client import ApiProblem, Client
from headrace.fleet.show import err, note, print_json, print_text

FAILED = frozenset({"failed", "canceled", "expired"})


@dataclass(frozen=True, slots=True)
class Result:
    index: int  # position among the file's jobs
    job: dict[str, Any] | None
    problem: ApiProblem | None


def submit_all(
    client: Client,
    bodies: Sequence[dict[str, Any]],
    *,
    key: str | None,  # idempotency key of the whole file; a job's own is `key-index`
    follow: bool,
    concurrency: int,
    as_json: bool,
) -> int:
    """Submit all, print what becomes of them; return how many were refused or failed."""

    def one(index: int) -> Result:
        own = None if key is None else f"{key}-{index}"
        try:
            job = client.submit(bodies[index], own)
            if follow:
                for _ in client.events(job["id"]):
                    pass
                job = client.job(job["id"])
        except ApiProblem as problem:
            return Result(index, None, problem)
        return Result(index, job, None)

    num_bad = 0
    with _progress(as_json) as progress:
        task = progress.add_task("jobs", total=len(bodies))
        for result in _bounded(one, len(bodies), concurrency):
            num_bad += _is_bad(result)
            _print(result, follow, as_json)
            progress.advance(task)
    return num_bad


def _bounded(one: Callable[[int], Result], num_jobs: int, concurrency: int) -> Iterator[Result]:
    pending: set[Future[Result]] = set()
    indexes = iter(range(num_jobs))
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            while True:
                room = concurrency - len(pending)
                pending |= {pool.submit(one, index) for index in itertools.islice(indexes, room)}
                if not pending:
                    return
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _progress(as_json: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=err, disable=as_json)


def _is_bad(result: Result) -> bool:
    return result.job is None or result.job["status"] in FAILED


def _print(result: Result, follow: bool, as_json: bool) -> None:
    if result.problem is not None:
        problem = {"code": result.problem.problem, "detail": result.problem.detail}
        if as_json:
            print_json({"index": result.index, "job": None, "error": problem})
        else:
            note(f"job {result.index}: {problem['code']}: {problem['detail']}")
        return
    assert result.job is not None
    if as_json:
        print_json({"index": result.index, "job": result.job, "error": None})
    elif follow:
        text = (result.job.get("output") or {}).get("text", "")
        print_text(f"{result.index}\t{result.job['id']}\t{result.job['status']}\t{text!r}\n")
    else:
        print_text(f"{result.job['id']}\n")
