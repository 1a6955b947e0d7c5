"""What the CLI prints: JSON for programs, text and tables for people, problems on stderr.

Invariants:
1. With --json standard output holds one JSON document, or JSON lines, and nothing else.
2. Without it standard output holds the answer alone (a model's text, a table); what is said about
   it (ids, states, progress) goes to stderr, so that `headrace submit ... > file` keeps the text.
3. Text from a model or a server is printed as it is, never read as markup, and without the control
   characters that would drive the terminal.

Called by the CLI's commands.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from headrace.fleet.sse import Event

#: The option of every command.
as_json_option = typer.Option("--json", help="JSON on standard output, and nothing else there.")

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

#: Control characters but tab and newline; C1 too, which some terminals obey.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def print_json(value: Any) -> None:
    """Print one document on one line."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Say something about the answer."""
    err.print(Text(plain(text), style="dim"))


def print_text(text: str) -> None:
    """Print a part of a model's text, at once and without a line's end."""
    sys.stdout.write(plain(text))
    sys.stdout.flush()


def plain(text: str) -> str:
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print aligned columns; never cut to the terminal, because ids are there to be copied."""
    cells = [[plain("-" if cell is None else str(cell)) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
    for row, style in [(columns, "bold"), *((row, "") for row in cells)]:
        padded = [
            text + " " * (width - cell_len(text)) for text, width in zip(row, widths, strict=True)
        ]
        out.print(Text("  ".join(padded).rstrip(), style=style))


def print_event(event: Event) -> None:
    """Print an event of a job that is being followed."""
    if event.name == "token":
        print_text(event.data["text"])
    elif event.name == "reset":
        print_text("\n")
        note(f"the text begins again ({event.data.get('reason', 'the token log was lost')})")
    elif event.is_terminal:
        print_text("\n")
        note(ending(event.name, event.data))
    else:
        note(f"{event.data.get('job', '')} {event.name}")


def ending(status: str, record: Mapping[str, Any]) -> str:
    """Say in one line how a job ended; `record` is the job or its terminal event."""
    parts = [status]
    if record.get("finish_reason"):
        parts.append(f"({record['finish_reason']})")
    if usage := record.get("usage"):
        counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        parts.append("{} prompt + {} completion tokens".format(*counts))
    if error := record.get("error"):
        parts.append(f"{error.get('code')}: {error.get('detail')}")
    return " ".join(parts)


def print_job(job: Mapping[str, Any]) -> None:
    """Print a job's stored record."""
    usage = job.get("usage") or {}
    rows = [(name, job.get(name)) for name in ("id", "status", "model", "class", "priority")]
    rows += [("attempt", job.get("attempt")), ("created", job.get("created_at"))]
    rows += [("finished", job.get("finished_at")), ("finish reason", job.get("finish_reason"))]
    rows += [(name.replace("_", " "), count) for name, count in usage.items()]
    if error := job.get("error"):
        rows.append(("error", f"{error.get('code')}: {error.get('detail')}"))
    if output := job.get("output"):
        rows.append(("text", output.get("text")))
    print_table(["field", "value"], rows)
