"""The rows of the engine's benchmark: what is printed, and what is kept in bench/results/.

A row is one engine on one workload. It is appended as one line of JSON to <device>.jsonl, with all
that is needed to make it again; `FIELDS` is its schema, which README.md beside the files explains.

Invariants:
1. Every row has exactly the fields of FIELDS; what an engine does not tell is null.
2. A run that failed is a row too, with `error` and no figures: an engine that did not end is told.

Called by: engine.py.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import Any

#: name of each field -> types of its value.
FIELDS: dict[str, tuple[type, ...]] = {
    "time": (str,),
    "device": (str,),
    "driver": (str, NoneType),
    "versions": (dict,),
    "commit": (str,),
    "command": (str,),
    "load_average": (float,),
    "engine": (str,),
    "settings": (dict,),
    "start_s": (float, NoneType),
    "start_ledger": (dict,),
    "model": (str,),
    "workload": (str,),
    "scale": (float,),
    "num_requests": (int,),
    "num_prompt_tokens": (int,),
    "num_output_tokens": (int,),
    "seconds": (float, NoneType),
    "output_tokens_per_s": (float, NoneType),
    "roofline_s": (float,),
    "roofline_percent": (float, NoneType),
    "inter_token_p50_ms": (float, NoneType),
    "inter_token_p99_ms": (float, NoneType),
    "first_token_p50_ms": (float, NoneType),
    "first_token_p99_ms": (float, NoneType),
    "step_us_p50": (float, NoneType),
    "host_us_p50": (float, NoneType),
    "host_us_mean": (float, NoneType),
    "num_steps": (int, NoneType),
    "num_prefill_tokens": (int, NoneType),
    "error": (str, NoneType),
}
#: packages whose versions a row names.
PACKAGES = ("torch", "triton", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and by what a row was measured."""

    device: str
    driver: str | None
    versions: dict[str, str]
    commit: str

    @classmethod
    def here(cls, commit: str | None) -> Machine:
        """Ask this machine; a copy of the tree without its history is told its commit."""
        gpu = _ask("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
        # As text: asking torch would open a context on the device, and hold memory of it.
        device, _, driver = gpu.partition("\n")[0].partition(", ")
        versions = {"python": platform.python_version()}
        for package in PACKAGES:
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return cls(device or _cpu_name(), driver or None, versions, commit or _commit())

    def values(self, program: str, arguments: Sequence[str]) -> dict[str, Any]:
        """Return what every kind of row begins with: when, where, and by which command."""
        return {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": self.device,
            "driver": self.driver,
            "versions": self.versions,
            "commit": self.commit,
            "command": " ".join([f"python -m bench.{program}", *arguments]),
        }

    @property
    def file_name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-") + ".jsonl"


def make_row(machine: Machine, values: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a row's values with the machine's, in the schema's order."""
    row = {
        **machine.values("engine", sys.argv[1:]),
        "load_average": round(os.getloadavg()[0], 2),
        "start_ledger": {},
        **values,
    }
    if unknown := row.keys() - FIELDS.keys():
        raise KeyError(f"a row has no field {sorted(unknown)}")
    return {name: row.get(name) for name in FIELDS}


def check_row(row: Mapping[str, Any]) -> None:
    """Raise ValueError unless the row follows the schema."""
    if list(row) != list(FIELDS):
        raise ValueError(f"fields {list(FIELDS)} needed, {list(row)} found: write by make_row")
    for name, types in FIELDS.items():
        if not isinstance(row[name], types):
            raise ValueError(f"{name} must be one of {types}, found {row[name]!r}: see FIELDS")
    if (row["error"] is None) != (row["seconds"] is not None):
        raise ValueError("a row has either an error or figures; found neither or both")


def append_row(folder: Path, machine: Machine, row: Mapping[str, Any]) -> None:
    """Check a row and append it to the device's file."""
    check_row(row)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / machine.file_name).open("a") as file:
        file.write(json.dumps(row) + "\n")


def line_of(row: Mapping[str, Any]) -> str:
    """Say a row in one line."""
    head = f"{row['engine']:14s} {row['model']:12s} {row['workload']:8s}"
    if row["error"]:
        return f"{head} FAILED {row['error']}"

    def pair(name: str) -> str:
        p50, p99 = row[f"{name}_p50_ms"], row[f"{name}_p99_ms"]
        return "-" if p50 is None else f"p50 {p50:.2f} p99 {p99:.2f} ms"

    host = "-" if row["host_us_p50"] is None else f"{row['host_us_p50']:.0f} us"
    return (
        f"{head} {row['output_tokens_per_s']:9.1f} tokens/s  {row['roofline_percent']:5.1f} % of "
        f"roofline  inter-token {pair('inter_token')}  first {pair('first_token')}  "
        f"host {host} a step  {row['num_steps'] or '-'} steps  {row['seconds']:.2f} s"
    )


def _ask(*command: str) -> str:
    """Return what a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _commit() -> str:
    commit = _ask("git", "rev-parse", "HEAD")
    if not commit:
        return "unknown"
    return commit + ("+changes" if _ask("git", "status", "--porcelain") else "")


def _cpu_name() -> str:
    return f"cpu {platform.machine()} {os.cpu_count()} cores"
