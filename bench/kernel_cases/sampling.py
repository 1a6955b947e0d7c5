"""From the last hidden state to the token: lm_head with its draw, filters, penalties, logprobs.

What is to be seen. `lm_head`: up to 64 rows, the share of the bandwidth at which the weight is
read; from 256, the share of the tensor cores' rate; beside it torch's product and argmax, which
writes the logits. `sample`: how far four launches are from reading the logits once, beside a sort.
All rows of a workload ask for the same, and none is padding. Outputs are poisoned before a check.

Errors: of lm_head_draw the distance of the drawn token's score (by the fp32 reference) from the
best one; of sample the share of rows that draw another token than the reference.

Size: five launchers, each with its tensors, call, reference and peer, read one at a time.

Called by: bench/kernels.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from headrace.bench.kernels import Case
from headrace.kernels.lm_head import (
    LmHeadTile,
    lm_head_draw,
    lm_head_draw_reference,
    lm_head_work,
)
from headrace.kernels.logprobs import (
    MAX_LOGPROBS,
    logprobs_reference,
    logprobs_rows,
    logprobs_work,
)
from headrace.kernels.penalise import penalise_reference, penalise_rows
from headrace.kernels.sample import (
    sample,
    sample_reference,
    sample_work,
    threshold_reference,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: name -> hidden, vocab; the last is for the interpreter.
MODELS = {
    "qwen3-0.6b": (1024, 151936),
    "llama-8b": (4096, 128256),
    "smollm2-135m": (576, 49152),
    "tiny": (64, 700),
}
ROWS = (1, 8, 64, 256, 1024)
#: three times the L2 cache of an H200.
ROTATED_BYTES = 180e6
NUM_SLOTS = 1024
#: name -> temperature, top_k, top_p, min_p; "peaked" is 2.5 x randn, about as a trained model's.
FILTERS = {
    "drawn": (1.0, 0, 1.0, 0.0),
    "k50 p0.9": (1.0, 50, 0.9, 0.0),
    "p0.9": (1.0, 0, 0.9, 0.0),
    "greedy": (0.0, 0, 1.0, 0.0),
    "k2000": (1.0, 2000, 1.0, 0.0),
    "min_p0.05": (1.0, 0, 1.0, 0.05),
}
#: What is tried beside the default, by rows.
TILES = {
    8: (
        LmHeadTile(128, 16, 64, 4, 6),
        LmHeadTile(64, 16, 64, 4, 8),
        LmHeadTile(128, 16, 128, 8, 3),
        LmHeadTile(64, 16, 128, 4, 4, 264),
    ),
    64: (
        LmHeadTile(64, 64, 64, 4, 4),
        LmHeadTile(256, 64, 64, 8, 3),
        LmHeadTile(128, 64, 128, 8, 3),
        LmHeadTile(128, 64, 64, 4, 4, 264),
    ),
    256: (
        LmHeadTile(128, 128, 64, 8, 3),
        LmHeadTile(256, 128, 64, 8, 3),
        LmHeadTile(128, 256, 64, 8, 3),
        LmHeadTile(256, 64, 64, 8, 4),
        LmHeadTile(128, 128, 64, 8, 4, 132),
        LmHeadTile(256, 128, 64, 8, 3, 132),
    ),
}


@dataclass(frozen=True)
class Tables:
    """The parameters of each slot, as columns of one state, and which slots the rows have."""

    rows: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    num_output: torch.Tensor

    def of_rows(self) -> dict[str, torch.Tensor]:
        """Return what the references want: a value a row, seeds and positions as int64."""
        slots = self.rows.long()
        names = ("temperature", "top_k", "top_p", "min_p")
        values = {name: getattr(self, name)[slots] for name in names}
        seeds = self.seeds[slots].contiguous().view(torch.int64).squeeze(1)
        return values | {"seeds": seeds, "positions": self.num_output[slots].long()}


def make_tables(num_rows: int, filters: tuple[float, int, float, float]) -> Tables:
    num_slots = max(num_rows, NUM_SLOTS)
    state = torch.randint(0, 2**31, (num_slots, 16), dtype=torch.int32, device=DEVICE)
    columns = state.view(torch.float32)
    temperature, top_k, top_p, min_p = filters
    columns[:, 1], state[:, 2], columns[:, 3], columns[:, 4] = temperature, top_k, top_p, min_p
    rows = torch.randperm(num_slots, device=DEVICE)[:num_rows].to(torch.int32)
    return Tables(
        rows, columns[:, 1], state[:, 2], columns[:, 3], columns[:, 4], state[:, 6:8], state[:, 9]
    )


def num_sets(num_bytes: float) -> int:
    return max(1, min(16, round(ROTATED_BYTES / num_bytes)))


# -- lm_head ---------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _weights(hidden: int, vocab: int) -> list[torch.Tensor]:
    scale = 2 / hidden**0.5
    make = partial(torch.randn, vocab, hidden, device=DEVICE, dtype=torch.bfloat16)
    return [make().mul_(scale) for _ in range(num_sets(2 * hidden * vocab))]


@lru_cache(maxsize=4)
def _hidden(num_rows: int, hidden: int) -> torch.Tensor:
    return torch.randn(num_rows, hidden, device=DEVICE, dtype=torch.bfloat16)


def _lm_head(model: str, num_rows: int, draws: str, variant: str, tile: LmHeadTile | None) -> Case:
    hidden, vocab = MODELS[model]

    @lru_cache(maxsize=1)
    def state() -> tuple:
        weights = _weights(hidden, vocab)
        tables = make_tables(num_rows, FILTERS[draws])
        outputs = (
            torch.empty(num_rows, dtype=torch.int32, device=DEVICE),
            torch.empty(num_rows, dtype=torch.float32, device=DEVICE),
            torch.empty(num_rows, dtype=torch.int32, device=DEVICE),
        )
        work = lm_head_work(num_rows, vocab, DEVICE)
        return itertools.cycle(weights), tables, outputs, work

    def run(weight: torch.Tensor | None = None) -> object:
        weights, tables, outputs, work = state()
        return lm_head_draw(
            _hidden(num_rows, hidden), next(weights) if weight is None else weight, tables.rows,
            tables.temperature, tables.seeds, tables.num_output, work, *outputs, tile=tile,
        )  # fmt: skip

    def check() -> float:
        _, tables, (tokens, best, is_finite), work = state()
        for values, poison in ((tokens, -7), (best, float("nan")), (is_finite, -7)):
            values.fill_(poison)
        work.scores.fill_(float("nan"))
        weight = _weights(hidden, vocab)[-1]
        run(weight)
        row_values = tables.of_rows()
        wanted = {name: row_values[name] for name in ("temperature", "seeds", "positions")}
        worst = 0.0
        for start in range(0, num_rows, 64):
            part = slice(start, start + 64)
            args = {name: values[part] for name, values in wanted.items()}
            _, scores = lm_head_draw_reference(_hidden(num_rows, hidden)[part], weight, **args)
            reached = scores.gather(1, tokens[part].long()[:, None])[:, 0]
            for found in (reached, best[part]):
                worst = max(worst, float((found - scores.amax(1)).norm() / scores.amax(1).norm()))
        return worst if bool((is_finite == 1).all()) else float("nan")

    return Case(
        "sampling", f"lm_head {model} b{num_rows} {draws}", variant, run, check,
        num_bytes=2 * hidden * vocab, flops=2.0 * num_rows * hidden * vocab, max_error=1e-4,
    )  # fmt: skip


def _lm_head_peer(model: str, num_rows: int, is_fp32: bool) -> Case:
    hidden, vocab = MODELS[model]

    @lru_cache(maxsize=1)
    def weights() -> Iterator[torch.Tensor]:
        return itertools.cycle(_weights(hidden, vocab))

    def run() -> object:
        x, weight = _hidden(num_rows, hidden), next(weights()).t()
        logits = torch.mm(x, weight, out_dtype=torch.float32) if is_fp32 else torch.mm(x, weight)
        return logits.argmax(dim=-1)

    return Case(
        "sampling", f"lm_head {model} b{num_rows} greedy",
        "torch mm fp32 + argmax" if is_fp32 else "torch mm bf16 + argmax", run,
        num_bytes=2 * hidden * vocab, flops=2.0 * num_rows * hidden * vocab,
    )  # fmt: skip


def _tile_name(tile: LmHeadTile) -> str:
    parts = f" parts{tile.max_parts}" if tile.max_parts < 1 << 20 else ""
    shape = f"v{tile.block_v} b{tile.block_b} k{tile.block_k}"
    return f"{shape} w{tile.num_warps} s{tile.num_stages}{parts}"


def _lm_head_cases(quick: bool) -> Iterator[Case]:
    for model, num_rows in itertools.product(list(MODELS)[:3], ROWS):
        yield _lm_head(model, num_rows, "greedy", "default", None)
        if num_rows in (1, 256):
            yield _lm_head(model, num_rows, "drawn", "default", None)
        if not quick and model != "smollm2-135m":
            tiles = TILES[8 if num_rows <= 8 else 64 if num_rows == 64 else 256]
            for tile in tiles:
                yield _lm_head(model, num_rows, "greedy", _tile_name(tile), tile)
            if num_rows == 256:
                yield _lm_head(model, num_rows, "drawn", _tile_name(tiles[1]), tiles[1])
        yield _lm_head_peer(model, num_rows, is_fp32=False)
        yield _lm_head_peer(model, num_rows, is_fp32=True)


# -- logits ----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _logits(num_rows: int, vocab: int) -> list[torch.Tensor]:
    count = num_sets(4 * num_rows * vocab)
    return [torch.randn(num_rows, vocab, device=DEVICE) * 2.5 for _ in range(count)]


def _sample(num_rows: int, vocab: int, filters: str) -> Case:
    @lru_cache(maxsize=1)
    def state() -> tuple:
        tables = make_tables(num_rows, FILTERS[filters])
        work = sample_work(num_rows, vocab, DEVICE)
        outputs = torch.empty(2, num_rows, dtype=torch.int32, device=DEVICE)
        return itertools.cycle(_logits(num_rows, vocab)), tables, work, outputs

    def run(logits: torch.Tensor | None = None) -> object:
        cycle, tables, work, outputs = state()
        return sample(
            next(cycle) if logits is None else logits, tables.rows, tables.temperature,
            tables.top_k, tables.top_p, tables.min_p, tables.seeds, tables.num_output, work,
            *outputs,
        )  # fmt: skip

    def check() -> float:
        _, tables, _, outputs = state()
        outputs.fill_(-7)
        logits = _logits(num_rows, vocab)[-1]
        run(logits)
        wanted = sample_reference(logits, **tables.of_rows())
        is_right = (outputs[0] == wanted) & (outputs[1] == 1)
        return 1.0 - float(is_right.float().mean())

    # A threshold that lies within rounding of a token's mass may go either way: one row in 64.
    return Case(
        "sampling", f"sample v{vocab} b{num_rows} {filters}", "default", run, check,
        num_bytes=4 * num_rows * vocab, max_error=0.02,
    )  # fmt: skip


def _sample_peer(num_rows: int, vocab: int, filters: str) -> Case:
    @lru_cache(maxsize=1)
    def state() -> tuple:
        tables = make_tables(num_rows, FILTERS[filters])
        return itertools.cycle(_logits(num_rows, vocab)), tables.of_rows()

    def run() -> object:
        cycle, values = state()
        scaled = next(cycle) / values["temperature"][:, None]
        threshold = threshold_reference(scaled, values["top_k"], values["top_p"], values["min_p"])
        probs = torch.softmax(scaled.masked_fill(scaled < threshold[:, None], float("-inf")), -1)
        return (probs / torch.empty_like(probs).exponential_()).argmax(-1)

    return Case(
        "sampling", f"sample v{vocab} b{num_rows} {filters}", "torch sort", run,
        num_bytes=4 * num_rows * vocab,
    )  # fmt: skip


def _penalise(num_rows: int, vocab: int) -> Case:
    @lru_cache(maxsize=1)
    def state() -> tuple:
        rows = make_tables(num_rows, FILTERS["greedy"]).rows
        num_slots = max(num_rows, NUM_SLOTS)
        counts = torch.randint(4, (num_slots, vocab), dtype=torch.int16, device=DEVICE)
        penalties = torch.full((3, num_slots), 1.0, device=DEVICE)
        # Applied over and over to the same logits: repetition 1 keeps them finite, at equal cost.
        penalties[0], penalties[1] = 1e-3, 1e-3
        num_bias = torch.full((num_slots,), 8, dtype=torch.int32, device=DEVICE)
        bias_ids = torch.arange(300, dtype=torch.int32, device=DEVICE).expand(num_slots, -1)
        bias = torch.full((num_slots, 300), 1e-3, device=DEVICE)
        tables = (*penalties, counts, num_bias, bias_ids.contiguous(), bias)
        return itertools.cycle(_logits(num_rows, vocab)), rows, tables

    def run() -> object:
        cycle, rows, tables = state()
        return penalise_rows(next(cycle), rows, *tables)

    def check() -> float:
        _, rows, tables = state()
        logits = _logits(num_rows, vocab)[0]
        presence, frequency, repetition, counts, _, _, bias = (t[rows.long()] for t in tables)
        held = counts.to(torch.int32)
        wanted = penalise_reference(
            logits, held >> 1, held % 2 == 1, presence, frequency, repetition
        )
        wanted[:, :8] += bias[:, :8]
        found = penalise_rows(logits.clone(), rows, *tables)
        return float((found - wanted).norm() / wanted.norm())

    return Case(
        "sampling", f"penalise v{vocab} b{num_rows}", "default", run, check,
        num_bytes=10 * num_rows * vocab, max_error=1e-5,
    )  # fmt: skip


def _logprobs(num_rows: int, vocab: int) -> Case:
    @lru_cache(maxsize=1)
    def state() -> tuple:
        rows = make_tables(num_rows, FILTERS["greedy"]).rows
        asked = torch.full((max(num_rows, NUM_SLOTS),), 20, dtype=torch.int32, device=DEVICE)
        ids = torch.empty(num_rows, MAX_LOGPROBS, dtype=torch.int32, device=DEVICE)
        work = logprobs_work(num_rows, vocab, DEVICE)
        return itertools.cycle(_logits(num_rows, vocab)), rows, asked, work, ids, ids.float()

    def run(logits: torch.Tensor | None = None) -> object:
        cycle, *rest = state()
        return logprobs_rows(next(cycle) if logits is None else logits, *rest)

    def check() -> float:
        *_, ids, values = state()
        ids.fill_(-7)
        values.fill_(float("nan"))
        logits = _logits(num_rows, vocab)[-1]
        run(logits)
        first = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
        _, wanted_ids, wanted = logprobs_reference(logits, first, min(MAX_LOGPROBS, vocab))
        if not torch.equal(ids.long(), wanted_ids):
            return float("nan")
        return float((values - wanted).norm() / wanted.norm())

    return Case(
        "sampling", f"logprobs v{vocab} b{num_rows} k20", "default", run, check,
        num_bytes=4 * num_rows * vocab, max_error=1e-5,
    )  # fmt: skip


def _logprobs_peer(num_rows: int, vocab: int) -> Case:
    @lru_cache(maxsize=1)
    def logits() -> Iterator[torch.Tensor]:
        return itertools.cycle(_logits(num_rows, vocab))

    def run() -> object:
        return torch.log_softmax(next(logits()), dim=-1).topk(MAX_LOGPROBS)

    return Case(
        "sampling", f"logprobs v{vocab} b{num_rows} k20", "torch log_softmax + topk", run,
        num_bytes=4 * num_rows * vocab,
    )  # fmt: skip


def _logits_cases(quick: bool) -> Iterator[Case]:
    vocab = MODELS["qwen3-0.6b"][1]
    for num_rows in (1, 64, 256):
        for filters in list(FILTERS)[: 3 if quick else None]:
            yield _sample(num_rows, vocab, filters)
            if filters in ("k50 p0.9", "p0.9"):
                yield _sample_peer(num_rows, vocab, filters)
    yield _penalise(64, vocab)
    yield _logprobs(64, vocab)
    yield _logprobs_peer(64, vocab)


def cases(quick: bool) -> Iterator[Case]:
    yield from _lm_head_cases(quick)
    yield from _logits_cases(quick)


def tiny_cases() -> Iterator[Case]:
    """Yield the same workloads on shapes that Triton's interpreter gets through."""
    yield _lm_head("tiny", 3, "drawn", "default", None)
    yield _lm_head("tiny", 3, "greedy", "v64 b16 k32 parts2", LmHeadTile(64, 16, 32, 4, 2, 2))
    for filters in FILTERS:
        yield _sample(3, 9000, filters)
    yield _penalise(2, 5000)
    yield _logprobs(2, 9000)
