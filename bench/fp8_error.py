"""What fp8 costs in accuracy: logits of the engine's own variants on the same tokens.

    python -m headrace.bench.fp8_error --model qwen3-0.6b|FOLDER [--text FILE]
        [--prompts 8] [--tokens 512] [--chunk 256] ...

One model as the engine runs it (worker/engine/gpu_model.py): in bf16, with an fp8 KV pool whose
scales the engine's calibration sets, with W8A8 layers, and with both; and in fp32 from the same
bf16 weights where it fits beside them. Each prompt goes through all of them chunk by chunk, so that
a position attends to keys and values read back from the pool, and every position's logits are
compared, with bf16 and with fp32:

    error        ||a - b|| / ||b|| over all logits
    error_worst  the same of the worst position
    kl           mean of KL(b || a), nats
    agreement    % of positions with the same greedy token
    perplexity   of the next tokens of --text (null without a text)

A model of random weights has logits so flat that the greedy token changes by little: its agreement
is a lower bound, its errors are of use. Prompts are pieces of the text, or random tokens. `bf16`
against `fp32` is the scale to read the others on. One line of JSON is appended to
bench/results/<device>-fp8-error.jsonl.

Without a GPU it runs in Triton's interpreter (TRITON_INTERPRET=1), tiny models only: stores to bf16
are truncated there, so its errors are about twice those of a GPU. W8A8's product is torch's own on
either device.

Size: one tool with one command; its variants, figures and table have no other user.

Invariants:
1. All variants get the same tokens, positions and chunks, and share the weights that are alike.
2. Figures are of real positions only, summed in fp64.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headrace.bench import workload
from headrace.bench.engine_rows import Machine
from headrace.kernels import step as layout
from headrace.kernels.triton_seam import is_interpreted
from headrace.worker.engine import gpu_start
from headrace.worker.engine.architecture import Architecture, UnsupportedModel
from headrace.worker.engine.gpu_layers import in_fp8
from headrace.worker.engine.gpu_model import GpuModel, KvCache
from headrace.worker.engine.gpu_state import DeviceState
from headrace.worker.engine.weights import LayerWeights, Weights, obtain_weights
from headrace.worker.frames import EngineConfig

RESULTS = Path(__file__).parent / "results"
#: bytes left free beside an fp32 copy of the weights: logits of a chunk in each variant, and work.
SPARE_BYTES = 12 << 30
#: what the others are compared with, and how the figures are called.
REFERENCES = ("bf16", "fp32")


@dataclass(frozen=True, slots=True)
class Variant:
    """The model in one arithmetic, with a pool that holds one prompt."""

    name: str
    model: GpuModel
    cache: KvCache


@dataclass(slots=True)
class Tally:
    """Sums over the positions of one variant against one reference."""

    num_positions: int = 0
    num_agreed: int = 0
    difference: float = 0.0  # squared norms
    norm: float = 0.0
    kl: float = 0.0
    worst: float = 0.0  # largest ||a - b|| / ||b|| of a position

    def add(
        self,
        found: torch.Tensor,  # [num_rows, vocab] fp32
        reference: torch.Tensor,  # [num_rows, vocab] fp32
    ) -> None:
        """Count a chunk's positions in."""
        difference = (found - reference).norm(dim=1, dtype=torch.float64)
        norm = reference.norm(dim=1, dtype=torch.float64)
        log_p, log_q = reference.log_softmax(dim=1), found.log_softmax(dim=1)
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=1, dtype=torch.float64)
        self.num_positions += len(found)
        self.num_agreed += int((found.argmax(1) == reference.argmax(1)).sum())
        self.difference += float((difference**2).sum())
        self.norm += float((norm**2).sum())
        self.kl += float(kl.sum())
        self.worst = max(self.worst, float((difference / norm).max()))

    def figures(self) -> dict[str, float]:
        return {
            "error": (self.difference / self.norm) ** 0.5,
            "error_worst": self.worst,
            "kl": self.kl / self.num_positions,
            "agreement": 100 * self.num_agreed / self.num_positions,
        }


class Subject:
    """A model in all its variants, which share tables, inputs of a step, and weights."""

    def __init__(
        self, folder: Path, num_tokens: int, chunk_tokens: int, *, block_size: int, has_fp32: bool
    ) -> None:
        self.arch = Architecture.from_folder(folder)
        self._device = torch.device("cpu") if is_interpreted() else torch.device("cuda")
        self.is_random = not any(folder.glob("*.safetensors"))
        self._check(folder, num_tokens)
        self._num_blocks = -(-num_tokens // block_size)
        self._config = EngineConfig(
            str(folder), block_size=block_size, max_num_seqs=chunk_tokens, kv_dtype="fp8"
        )
        # As many slots as rows: then every row of a chunk can be due.
        self.state = DeviceState(
            num_slots=chunk_tokens,
            max_blocks=self._num_blocks,
            max_rows=chunk_tokens,
            vocab_size=self.arch.vocab_size,
            device=self._device,
            depth=1,
        )
        self.variants = list(self._variants(folder, has_fp32=has_fp32))
        self.state.reset()
        self.state.words[0, layout.ALIVE] = 1
        self.state.tables[0, : self._num_blocks] = torch.arange(
            self._num_blocks, dtype=torch.int32, device=self._device
        )

    def _check(self, folder: Path, num_tokens: int) -> None:
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "a GPU is needed; torch finds none: run it on one, or set TRITON_INTERPRET=1 to "
                "interpret a tiny model"
            )
        if num_tokens > self.arch.max_positions:
            raise ValueError(
                f"--tokens {num_tokens} asked; {folder.name} has {self.arch.max_positions} "
                "positions: ask for no more"
            )

    def _variants(self, folder: Path, *, has_fp32: bool) -> Iterator[Variant]:
        weights = obtain_weights(
            folder, self.arch, torch.bfloat16, self._device, is_random=self.is_random
        )
        wide = self._model(weights)
        narrow = self._model(replace(weights, layers=tuple(map(in_fp8, weights.layers))))
        yield Variant("bf16", wide, self._cache("auto", wide))
        yield Variant("kv fp8", wide, self._cache("fp8", wide))
        yield Variant("w8a8", narrow, self._cache("auto", narrow))
        yield Variant("w8a8, kv fp8", narrow, self._cache("fp8", narrow))
        if has_fp32 and self._fits(weights):
            exact = self._model(widened(weights))
            yield Variant("fp32", exact, self._cache("auto", exact))

    def _model(self, weights: Weights) -> GpuModel:
        name = "cpu" if self._device.type == "cpu" else torch.cuda.get_device_name()
        return GpuModel(self.arch, weights, self.state, name, is_fp8_cache=False)

    def _cache(self, kv_dtype: str, model: GpuModel) -> KvCache:
        """Make a pool as the engine does at its start, scales included."""
        config = self._config if kv_dtype == "fp8" else EngineConfig("", block_size=self.block_size)
        dtype, device = model.dtype, self._device
        cache = gpu_start.allocate(config, self.arch, dtype, device, self._num_blocks)
        if kv_dtype == "fp8":
            gpu_start.calibrate(config, self.arch, model, self.state, cache)
        return cache

    @property
    def block_size(self) -> int:
        return self._config.block_size

    def _fits(self, weights: Weights) -> bool:
        if self._device.type == "cpu":
            return True
        tensors = [weights.embedding, weights.lm_head, *map(_numel_of, weights.layers)]
        num_bytes = 4 * sum(t if isinstance(t, int) else t.numel() for t in tensors)
        return num_bytes + SPARE_BYTES < torch.cuda.mem_get_info()[0]

    def logits(
        self,
        tokens: np.ndarray,  # [num_tokens] int32 of a prompt
        start: int,
    ) -> dict[str, torch.Tensor]:  # by variant: [num_rows, vocab] fp32
        """Compute the prompt's chunk that begins at `start`; chunks come in order."""
        piece = torch.from_numpy(tokens[start : start + self.state.max_rows]).to(self._device)
        num_rows, state = len(piece), self.state
        rows = torch.arange(num_rows, dtype=torch.int32, device=self._device)
        for tensor in (state.row_slots, state.due_rows):
            tensor.fill_(-1)
        state.row_slots[:num_rows] = 0
        state.row_tokens[:num_rows] = piece
        state.row_positions[:num_rows] = rows + start
        state.due_rows[:num_rows] = rows
        state.chunk_starts[1:] = num_rows
        state.chunk_lens[0] = start + num_rows
        found = {}
        for variant in self.variants:
            variant.model.compute_rows(variant.cache, num_rows)
            found[variant.name] = variant.model.due_logits(num_rows)
        return found


def widened(weights: Weights) -> Weights:
    """Return the same weights in fp32; tied ones stay one tensor."""
    made: dict[int, torch.Tensor] = {}

    def widen(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(widen, value))
        if isinstance(value, (LayerWeights, Weights)):
            return replace(value, **{f.name: widen(getattr(value, f.name)) for f in fields(value)})
        return value if value is None else made.setdefault(id(value), value.float())

    return widen(weights)


def _numel_of(layer: LayerWeights) -> int:
    return sum(weight.numel() for weight in (layer.qkv, layer.o, layer.gate_up, layer.down))


@torch.inference_mode()
def compare(
    subject: Subject,
    prompts: Sequence[np.ndarray],  # [num_tokens] int32 each
) -> dict[str, dict[str, Any]]:
    """Return by variant its figures against each reference, and the perplexity."""
    names = [variant.name for variant in subject.variants]
    references = [name for name in REFERENCES if name in names]
    tallies = {(a, b): Tally() for a in names for b in references if a != b}
    losses, num_scored = dict.fromkeys(names, 0.0), 0
    for tokens in prompts:
        for start in range(0, len(tokens), subject.state.max_rows):
            logits = subject.logits(tokens, start)
            for (a, b), tally in tallies.items():
                tally.add(logits[a], logits[b])
            targets = torch.from_numpy(
                tokens[start + 1 :][: subject.state.max_rows].astype(np.int64)
            )
            num_scored += len(targets)
            for name, values in logits.items():
                losses[name] += next_token_loss(values, targets.to(values.device))
    return {
        name: {
            **{b: tallies[name, b].figures() for b in references if b != name},
            "perplexity": float(np.exp(losses[name] / num_scored)),
        }
        for name in names
    }


def next_token_loss(
    logits: torch.Tensor,  # [num_rows, vocab] fp32
    targets: torch.Tensor,  # [num_rows or one less] int64, what follows each row
) -> float:
    """Return the sum of -log p of the targets."""
    log_p = logits[: len(targets)].log_softmax(dim=1)
    return -float(log_p.gather(1, targets[:, None]).sum(dtype=torch.float64))


def make_prompts(
    folder: Path, text: Path | None, vocab_size: int, num_prompts: int, num_tokens: int
) -> list[np.ndarray]:
    """Cut the text into prompts of that many tokens, or draw them; ValueError says what lacks."""
    if text is None:
        generator = np.random.default_rng(0)
        drawn = generator.integers(0, vocab_size, (num_prompts, num_tokens))
        return list(drawn.astype(np.int32))
    if not (file := folder / "tokenizer.json").exists():
        raise ValueError(f"--text asked; {folder} has no tokenizer.json: use a folder with one")
    from tokenizers import Tokenizer  # only here: random prompts need none

    ids = np.array(Tokenizer.from_file(str(file)).encode(text.read_text()).ids, np.int32)
    found = [ids[at : at + num_tokens] for at in range(0, len(ids), num_tokens)][:num_prompts]
    found = [prompt for prompt in found if len(prompt) == num_tokens]
    if not found:
        raise ValueError(
            f"{text} has {len(ids)} tokens; one prompt needs --tokens {num_tokens}: give a longer "
            "text or ask for fewer tokens"
        )
    return found


def lines_of(row: dict[str, Any]) -> Iterator[str]:
    """Say a row as a table."""
    yield (
        f"{row['model']} ({row['weights']} weights) on {row['device']}: "
        f"{row['num_prompts']} prompts of {row['num_tokens']} tokens"
    )
    for name, figures in row["variants"].items():
        perplexity = figures["perplexity"]
        tail = "" if perplexity is None else f"  perplexity {perplexity:.4f}"
        for reference in REFERENCES:
            if reference not in figures:
                continue
            f = figures[reference]
            yield (
                f"{name:14s} against {reference}: error {f['error']:.2e} (worst position "
                f"{f['error_worst']:.2e})  KL {f['kl']:.2e}  greedy {f['agreement']:6.2f} %{tail}"
            )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, help="a name, or a folder with a config.json")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of a prompt")
    parser.add_argument("--chunk", type=int, default=256, help="tokens computed in one step")
    parser.add_argument("--block-size", type=int, default=64, help="tokens of a block of the pool")
    parser.add_argument("--text", type=Path, help="prompts from this file, and perplexity")
    parser.add_argument("--no-fp32", action="store_true", help="leave the fp32 reference out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the line")
    parser.add_argument("--commit", help="of a tree without its history")
    options = parser.parse_args(arguments)
    for name, least in (("prompts", 1), ("tokens", 2), ("chunk", 1)):
        if (value := getattr(options, name)) < least:
            parser.error(f"--{name} {value} found; at least {least} needed")
    if options.chunk > 1024:
        parser.error(f"--chunk {options.chunk} found; at most 1024 needed, the engine's slots")
    return options


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the row of one model."""
    subject = Subject(
        folder,
        options.tokens,
        min(options.chunk, options.tokens),
        block_size=options.block_size,
        has_fp32=not options.no_fp32,
    )
    prompts = make_prompts(
        folder, options.text, subject.arch.vocab_size, options.prompts, options.tokens
    )
    variants = compare(subject, prompts)
    if options.text is None:  # random tokens cannot be foretold: no figure of use
        for figures in variants.values():
            figures["perplexity"] = None
    return {
        "model": folder.name,
        "weights": "random" if subject.is_random else "folder",
        "num_prompts": len(prompts),
        "num_tokens": options.tokens,
        "chunk_tokens": subject.state.max_rows,
        "block_size": subject.block_size,
        "text": None if options.text is None else options.text.name,
        "variants": variants,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one model; return the exit status."""
    options = parse(arguments)
    machine = Machine.here(options.commit)
    with tempfile.TemporaryDirectory() as root:
        known = options.model in workload.MODELS
        folder = Path(workload.model_dir(options.model, root) if known else options.model)
        try:
            with torch.inference_mode():
                figures = measure(options, folder)
        except (ValueError, UnsupportedModel, OSError) as error:
            print(f"bench.fp8_error: {error}", file=sys.stderr)
            return 2
    row = {
        **machine.values("fp8_error", arguments or sys.argv[1:]),
        **figures,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    file_name = machine.file_name.replace(".jsonl", "-fp8-error.jsonl")
    with (options.results / file_name).open("a") as file:
        file.write(json.dumps(row) + "\n")
    print("\n".join(lines_of(row)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
