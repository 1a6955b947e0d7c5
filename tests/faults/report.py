"""The table of a campaign's runs, and the file that is kept of each.

Called by: __main__.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headrace.tests.faults.campaign import Outcome, as_json

#: Column titles, and how wide each is at least.
COLUMNS = (
    "scenario", "jobs", "faults", "lost", "repeated", "missing", "resets", "stale refused",
    "resume p50 s", "p99 s", "max MB", "MB/h", "seconds", "seed", "verdict",
)  # fmt: skip


def row_of(outcome: Outcome) -> list[str]:
    """Return a run's line of the table, as texts in the order of COLUMNS."""
    figures = outcome.verdict.figures
    peaks, slopes = figures["rss_max_mb"], figures["rss_slope_mb_per_h"]
    return [
        outcome.scenario.name,
        str(figures["jobs_accepted"]),
        str(sum(figures["faults_done"].values())),
        str(figures["lost"]),
        str(figures["repeated"]),
        str(figures["missing"]),
        str(figures["resets"]),
        str(figures["stale_writes_refused"]),
        f"{figures['resume_p50_s']:.2f}" if figures["pauses"] else "-",
        f"{figures['resume_p99_s']:.2f}" if figures["pauses"] else "-",
        f"{max(peaks.values()):.0f}" if peaks else "-",
        f"{max(slopes.values()):.1f}" if slopes else "-",
        f"{outcome.seconds:.0f}",
        str(outcome.seed),
        "kept" if outcome.is_clean else f"BROKEN ({len(outcome.verdict.violations)})",
    ]


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the table as Markdown, padded so that it reads as text too."""
    rows = [list(COLUMNS), *map(row_of, outcomes)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def violations_text(outcome: Outcome, num_shown: int = 20) -> str:
    """Return what was broken, a line each, and where the records are."""
    found = outcome.verdict.violations
    lines = [f"{each.code}: {each.job} {each.text}" for each in found[:num_shown]]
    if len(found) > num_shown:
        lines.append(f"... and {len(found) - num_shown} more")
    return "\n".join([*lines, f"records and logs: {outcome.folder}"])


def write_outcome(outcome: Outcome, folder: Path) -> Path:
    """Keep a run's outcome as `<scenario>-<jobs>-<seed>.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{outcome.scenario.name}-{outcome.num_jobs}x{outcome.num_faults}-{outcome.seed}.json"
    path = folder / name
    path.write_text(as_json(outcome) + "\n")
    return path
