"""Which kernel and which tile sizes a narrow linear layer gets, without measuring anything.

A table a GPU, `tuning/<device>.json`, ships with the package: `python -m headrace.bench.tune`
measures it once on such a GPU. At start an engine only reads it.

    {"device": "NVIDIA H200", "source": "measured", "command": ..., "torch": ..., "triton": ...,
     "entries": [{"op": "add", "n": 1024, "k": 2048, "m": 4, "config": {...} | "cublas",
                  "us": 3.1, "cublas_us": 4.0}]}

Invariants:
1. The same arguments give the same answer in every process: numerics do not depend on when or
   where an engine was started, nor on a measurement made at start.
2. Rows between two measured counts take the next larger one's entry. A device, an op or a shape
   that no table has takes `guess` for one or two rows, and "cublas" for more.
3. A table that breaks the schema is refused whole, by the entry that breaks it.

Called by the GPU engine when it captures a graph, and by the bench that writes the tables.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from headrace.kernels.checks import MAX_LINEAR_ROWS

#: Activation before the product, addition after it: (prologue, adds_residual) by the op's name.
OPS: dict[str, tuple[str, bool]] = {
    "plain": ("none", False),
    "add": ("none", True),
    "rms_norm": ("rms_norm", False),
    "silu_mul_add": ("silu_mul", True),
}
#: Rows up to which the guess beat cuBLAS on every shape measured (H200); tensor-core tiles lose to
#: it by up to 4x where nobody has measured which ones suit.
MAX_GUESSED_ROWS = 2
#: Programs that keep a Hopper GPU's 132 multiprocessors busy: two on nearly each of them.
FULL_GRID = 256
TABLES = Path(__file__).parent / "tuning"


@dataclass(frozen=True, slots=True)
class SkinnyConfig:
    """How one launch of skinny_linear cuts its weight matrix."""

    method: Literal["rows", "tiles"]  # multiply and sum a row at a time, or tensor cores
    block_n: int  # weight rows a program
    block_k: int  # weight columns an iteration
    splits: int = 1  # programs that share one tile's columns; 1 for "rows"
    num_warps: int = 4
    num_stages: int = 1  # iterations whose weights are in flight at once
    block_m: int = 64  # rows a program of "tiles" takes at most
    uses_pdl: bool = False  # starts before the launch before it ends, to prefetch weights

    def __post_init__(self) -> None:
        limits = {
            "block_n": (1 if self.method == "rows" else 16, 256),
            "block_k": (16, 8192),
            "splits": (1, 1 if self.method == "rows" else 32),
            "num_warps": (1, 16),
            "block_m": (16, 128),
        }
        if self.method not in ("rows", "tiles"):
            raise ValueError(f"method must be rows or tiles; found {self.method!r}: take one")
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most or value & (value - 1):
                raise ValueError(
                    f"{name} of a {self.method!r} config must be a power of two in "
                    f"{least}..{most}; found {value!r}: correct the config"
                )
        if type(self.num_stages) is not int or not 1 <= self.num_stages <= 8:
            raise ValueError(
                f"num_stages must be in 1..8; found {self.num_stages!r}: correct the config"
            )

    def text(self) -> str:
        """Name the config as tables and benchmarks print it."""
        split = f" x{self.splits}" if self.splits > 1 else ""
        pdl = " pdl" if self.uses_pdl else ""
        wide = f" m{self.block_m}" if self.block_m != 64 else ""
        shape = f"{self.block_n}x{self.block_k}{split}{wide}"
        return f"{self.method} {shape} w{self.num_warps} s{self.num_stages}{pdl}"


Choice = SkinnyConfig | Literal["cublas"]


def choose(device_name: str, op: str, m: int, n: int, k: int) -> Choice:
    """Say how to run `op` on m rows with a weight [n, k] on the GPU of that name.

    "cublas" means torch's product and the op's other kernels each by itself, and is the answer
    for every m above MAX_LINEAR_ROWS.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}; found {op!r}: take one of them")
    if min(m, n, k) < 1:
        raise ValueError(
            f"m, n and k must be at least 1; found {m}, {n}, {k}: pass a layer's shape"
        )
    if m > MAX_LINEAR_ROWS:
        return "cublas"
    by_rows = tables().get(device_name, {}).get((op, n, k), {})
    larger = [rows for rows in by_rows if rows >= m]
    if larger:
        return by_rows[min(larger)]
    return guess(m, n, k) if m <= MAX_GUESSED_ROWS else "cublas"


def guess(m: int, n: int, k: int) -> SkinnyConfig:
    """Choose by reasoning alone: enough programs for the GPU, 16 to 32 KiB of weights each."""
    if m == 1:
        whole = max(16, _power_of_2_from(k))
        block_k = whole if whole <= 4096 else 1024
        # A row alone would read x, which is fp32 for rms_norm, as often as weights.
        most = min(8, 16384 // block_k)
        fitting = [rows for rows in (8, 4, 2) if rows <= most and -(-n // rows) >= FULL_GRID]
        return SkinnyConfig("rows", fitting[0] if fitting else 2, block_k)
    block_n = 32 if m <= 16 else 64
    block_k = 128 if k >= 128 else max(16, _power_of_2_from(k))
    tiles, most = -(-n // block_n), max(1, k // (2 * block_k))
    splits = 1
    while splits * tiles < FULL_GRID and splits * 2 <= min(most, 16):
        splits *= 2
    return SkinnyConfig("tiles", block_n, block_k, splits, 4, 4 if m <= 32 else 3)


def _power_of_2_from(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


Table = dict[tuple[str, int, int], dict[int, Choice]]  # (op, n, k) -> rows -> choice


@cache
def tables() -> dict[str, Table]:
    """Read the shipped tables, once a process: device name -> its table."""
    found: dict[str, Table] = {}
    for path in sorted(TABLES.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        found[document["device"]] = parse_table(document, path.name)
    return found


def parse_table(document: dict[str, Any], name: str) -> Table:
    """Check one table's document and index it; ValueError names the entry that is wrong."""
    table: Table = {}
    if document.get("source") not in ("measured", "heuristic"):
        raise ValueError(
            f"{name}: source must be measured or heuristic; found {document.get('source')!r}: "
            "say where the figures are from"
        )
    for index, entry in enumerate(document["entries"]):
        try:
            key, rows = (entry["op"], entry["n"], entry["k"]), entry["m"]
            if entry["op"] not in OPS or not 1 <= rows <= MAX_LINEAR_ROWS or min(key[1:]) < 1:
                raise ValueError(f"no such op or shape: {key}, {rows} rows")
            config = entry["config"]
            choice: Choice = "cublas" if config == "cublas" else SkinnyConfig(**config)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name}: each entry must have op, n, k, m and a config; entry {index} has not "
                f"({error}): measure the table anew with headrace.bench.tune"
            ) from error
        if rows in table.setdefault(key, {}):
            raise ValueError(
                f"{name}: one entry for each op, shape and row count; found a second for {key}, "
                f"{rows} rows: remove one"
            )
        table[key][rows] = choice
    return table


def as_json(choice: Choice) -> dict[str, Any] | str:
    """Return what an entry's `config` holds for this choice."""
    return choice if isinstance(choice, str) else asdict(choice)
