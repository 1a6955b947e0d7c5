"""`python -m headrace.tests.faults` (or `python -m tests.faults` from the repository's root).

    python -m tests.faults --list
    python -m tests.faults --seed 7 --scenario worker-kill --jobs 1000 --faults 30
    python -m tests.faults --seed 7 --full                # every scenario at its full counts
    python -m tests.faults --check FOLDER/records.jsonl --scenario worker-kill

Without --jobs and --full each scenario runs the slice that CI runs. Everything a run starts is its
own, on loopback, and ends with it. Exit status: 0 every promise was kept, 1 one was broken, 2 wrong
usage.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if not any(Path(entry, "headrace").exists() for entry in sys.path if entry):
    sys.path.insert(0, str(ROOT / ".imports"))  # `python -m tests.faults` with nothing installed

from headrace.fleet.programs import EMBEDDED_MODEL  # noqa: E402
from headrace.fleet.smollm2 import ensure_model  # noqa: E402
from headrace.tests.faults.campaign import Options, run_scenario  # noqa: E402
from headrace.tests.faults.checker import check  # noqa: E402
from headrace.tests.faults.record import read_records  # noqa: E402
from headrace.tests.faults.report import table, violations_text, write_outcome  # noqa: E402
from headrace.tests.faults.scenario import Scenario, all_scenarios  # noqa: E402


def main(argv: Sequence[str]) -> int:
    """Run the scenarios that were asked for, one after another; print the table."""
    parser = _parser()
    args = parser.parse_args(argv)
    scenarios = all_scenarios()
    if args.list:
        for each in scenarios:
            print(f"{each.name:18} {each.jobs:>7,} jobs {each.faults:>5} faults  {each.what}")
        return 0
    known = {each.name: each for each in scenarios}
    if unknown := [name for name in args.scenario if name not in known]:
        parser.error(f"--scenario {unknown[0]}: there are {', '.join(known)}")
    chosen = [known[name] for name in args.scenario] or scenarios
    if args.engine:
        chosen = [each for each in chosen if each.engine == args.engine]
    if args.check is not None:
        return _check(args.check, chosen)
    model = args.model or ensure_model(ROOT / ".data/models" / EMBEDDED_MODEL)
    options = Options(
        seed=args.seed,
        jobs=args.jobs,
        faults=args.faults,
        is_full=args.full,
        minutes=args.minutes,
        keep=args.keep,
    )
    outcomes = []
    for scenario in chosen:
        outcome = run_scenario(scenario, model, options)
        outcomes.append(outcome)
        write_outcome(outcome, args.out)
        if not outcome.is_clean:
            print(f"\n{scenario.name}: broken\n{violations_text(outcome)}", flush=True)
        print("\n" + table(outcomes), flush=True)
    return 0 if all(outcome.is_clean for outcome in outcomes) else 1


def _check(path: Path, chosen: list[Scenario]) -> int:
    if len(chosen) != 1:
        print("--check needs the one --scenario whose rules apply", file=sys.stderr)
        return 2
    verdict = check(read_records(path), chosen[0].rules)
    for each in verdict.violations:
        print(f"{each.code}: {each.job} {each.text}")
    print(verdict.figures)
    return 1 if verdict.violations else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--list", action="store_true", help="show the scenarios and their full counts")
    add("--scenario", action="append", default=[], metavar="NAME", help="may be repeated; all")
    add("--seed", type=int, default=1, help="of everything that is drawn")
    add("--jobs", type=int, help="instead of the slice's number")
    add("--faults", type=int, help="instead of the slice's number")
    add("--full", action="store_true", help="the full counts")
    add("--engine", choices=["stub", "model"], help="only scenarios on this engine")
    add("--minutes", type=float, help="how long scenarios last that end by time (soak)")
    add("--model", type=Path, help="model folder; else the embedded one is made in .data")
    add("--keep", type=Path, help="folder for records and logs of every run, kept")
    add("--out", type=Path, default=ROOT / "bench/faults", help="folder of the outcomes")
    add("--check", type=Path, metavar="FILE", help="check a run's records again")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as orderly as Ctrl-C
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped; everything it started has ended", file=sys.stderr)
        sys.exit(130)
