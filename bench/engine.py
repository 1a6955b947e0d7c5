"""Our engine on the reference workloads, beside a peer on the same token ids.

    python -m bench.engine --model llama-8b|qwen3-0.6b|smollm2-135m|FOLDER
        --workload single,mixed,mixed1k,prefill,shared [--peer transformers,vllm] [--check] ...

The model has random weights in bf16, made on the device from its config; end tokens are off and all
outputs are exactly as long as asked. Our engine runs as its users have it, a process at the other
end of a socketpair, one for all workloads of a model; then it ends, and each peer runs in a child
process. A peer that is not installed is skipped with a line; one that does not end within
`--peer-seconds` a workload is reported as such. Start-up and a warm-up of other tokens come before
each measured run and are not part of it; start-up is told apart.

A row says output tokens/s, % of roofline (bench/roofline.py, with this run's `--max-num-seqs`, for
every engine the same), p50 and p99 of the times between tokens and to the first token, the host's
time a step, and steps. It is appended to bench/results/<device>.jsonl.

`--check` first compares every kernel with its reference on this device (bench.kernels --check), and
stops where one is wrong. Exit status: 0, 1 if our engine failed, 2 for a bad option.

Run from the repository root, with PYTHONPATH=.imports unless headrace is installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from headrace.bench import engine_peers, engine_rows, workload
from headrace.bench.children import child_environ
from headrace.bench.engine_log import Figures, RunError, RunLog, figures
from headrace.bench.engine_ours import EngineOptions, OursDriver
from headrace.bench.engine_requests import WORKLOADS, make_requests, make_warm_up
from headrace.bench.roofline import ModelCost, Request, Roofline

RESULTS = Path(__file__).parent / "results"
#: positions kept beyond the longest request, for peers that round.
SPARE_POSITIONS = 64


@dataclass(frozen=True, slots=True)
class Model:
    """A model's shape under the name that rows give it."""

    name: str
    folder: Path
    config: dict[str, Any]

    @classmethod
    def find(cls, name: str, root: Path) -> Model:
        """Make a config-only folder for a known name, or take a folder; ValueError otherwise."""
        if name in workload.MODELS:
            folder = Path(workload.model_dir(name, str(root)))
        else:
            folder = Path(name).resolve()
        try:
            return cls(folder.name, folder, json.loads((folder / "config.json").read_text()))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--model {name} is none of {', '.join(workload.MODELS)} and no folder with a "
                f"config.json ({error}): name one"
            ) from error

    @property
    def vocab_size(self) -> int:
        return self.config["vocab_size"]


class Report:
    """Makes, prints and keeps the rows of one run of this program on one model."""

    def __init__(self, model: Model, options: argparse.Namespace) -> None:
        self._model = model
        self._options = options
        self._machine = engine_rows.Machine.here(options.commit)
        is_fp8 = {"kv": options.kv_dtype == "fp8", "layers": options.w8a8}
        self._roofline = Roofline(
            ModelCost.from_config(model.config),
            kv_bytes=1 if is_fp8["kv"] else 2,
            layer_bytes=1 if is_fp8["layers"] else 2,
        )
        self._floors_s: dict[str, float] = {}

    def row(
        self,
        engine: str,
        name: str,
        result: Figures | str,  # or what went wrong
        **values: Any,  # of the engine: settings, start_s, start_ledger
    ) -> None:
        """Print and append the row of one engine on one workload."""
        requests = make_requests(name, self._model.vocab_size, self._options.scale)
        if name not in self._floors_s:
            floor_s = self._roofline.workload_s(requests, self._options.max_num_seqs)
            self._floors_s[name] = floor_s
        floor_s = self._floors_s[name]
        figures_of = {} if isinstance(result, str) else result.values()
        percent = None if isinstance(result, str) else 100 * floor_s / result.seconds
        row = engine_rows.make_row(
            self._machine,
            {
                "engine": engine,
                "model": self._model.name,
                "workload": name,
                "scale": self._options.scale,
                "num_requests": len(requests),
                "num_prompt_tokens": sum(len(prompt) for prompt, _ in requests),
                "num_output_tokens": sum(num_output for _, num_output in requests),
                "roofline_s": floor_s,
                "roofline_percent": percent,
                "error": result if isinstance(result, str) else None,
                **figures_of,
                **values,
            },
        )
        engine_rows.append_row(self._options.results, self._machine, row)
        print(engine_rows.line_of(row), flush=True)


def run_ours(model: Model, options: argparse.Namespace, report: Report) -> int:
    """Run all workloads on one engine process; return the tokens that its pool holds."""
    asked = EngineOptions(
        device=options.device,
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        weights_dtype="fp8" if options.w8a8 else None,
        max_num_seqs=options.max_num_seqs,
        max_step_tokens=options.max_step_tokens,
        block_size=options.block_size,
        kv_bytes=None if options.kv_gb is None else int(options.kv_gb * 1e9),
        target_step_ms=options.target_step_ms,
        num_threads=options.threads,
        run_s=options.max_seconds,
    )
    with OursDriver(model.folder, asked) as driver:
        settings = {k: v for k, v in asdict(asked).items() if v is not None}
        settings |= {"num_blocks": driver.ready.num_blocks, "block_size": driver.ready.block_size}
        settings |= {"device": driver.ready.device, "max_num_seqs": driver.ready.max_num_seqs}
        ledger = {"load_s": round(driver.ready.load_s, 3), "stages": driver.stages()}
        print(f"headrace ready after {driver.start_s:.1f} s, with a pool of", end=" ")
        print(f"{driver.kv_tokens:,} tokens; {ledger}", flush=True)
        for name in options.workloads:
            driver.run(make_warm_up(name, model.vocab_size, options.scale))
            requests = make_requests(name, model.vocab_size, options.scale)
            result = figures(driver.run(requests), requests)
            told = {"settings": settings, "start_s": driver.start_s, "start_ledger": ledger}
            report.row("headrace", name, result, **told)
        return driver.kv_tokens


def run_peer(
    peer: str, model: Model, options: argparse.Namespace, report: Report, kv_tokens: int
) -> None:
    """Run all workloads on a peer, in each of its setups."""
    if reason := engine_peers.missing_peer(peer):
        print(reason, flush=True)
        return
    kv_bytes = 1 if options.kv_dtype == "fp8" else 2
    longest = {
        name: longest_of(make_requests(name, model.vocab_size, options.scale))
        for name in options.workloads
    }
    for setup in engine_peers.SETUPS[peer]:
        if options.peer_setup not in (None, setup):
            continue
        with tempfile.TemporaryDirectory() as folder:
            job = engine_peers.PeerJob(
                peer=peer,
                setup=setup,
                model_folder=str(model.folder),
                out_folder=folder,
                workloads=options.workloads,
                scale=options.scale,
                vocab_size=model.vocab_size,
                max_num_seqs=options.max_num_seqs,
                max_step_tokens=options.max_step_tokens,
                max_seq_tokens=max(longest.values()) + SPARE_POSITIONS,
                kv_bytes=ModelCost.from_config(model.config).kv_elements * kv_bytes * kv_tokens,
                kv_tokens=kv_tokens,
                kv_dtype=options.kv_dtype,
                weights_dtype="fp8" if options.w8a8 else None,
                seconds=options.peer_seconds,
                is_traced=not options.untraced,
            )
            report_peer(job, model, options, report)


def report_peer(
    job: engine_peers.PeerJob, model: Model, options: argparse.Namespace, report: Report
) -> None:
    """Run one setup of a peer and make a row of each of its events."""
    engine = f"{job.peer} {job.setup}"
    told: dict[str, Any] = {"settings": {}, "start_s": None}
    workloads = iter(job.workloads)
    for event in engine_peers.run_peer(job, options.peer_start_seconds):
        if event.workload:
            next(workloads)
        if event.error:
            name = event.workload or next(workloads)
            report.row(engine, name, event.error, **told)
            print(f"{engine}: not run after that: {', '.join(workloads) or 'nothing'}", flush=True)
            return
        if not event.workload:
            told = {"settings": event.settings, "start_s": event.start_s}
            print(f"{engine} ready after {event.start_s:.1f} s; {event.settings}", flush=True)
            continue
        requests = make_requests(event.workload, model.vocab_size, options.scale)
        report.row(engine, event.workload, peer_figures(event, requests), **told)


def peer_figures(event: engine_peers.Event, requests: Sequence[Request]) -> Figures:
    """Put a peer's throughput and its traced latencies together."""
    rate = sum(num_output for _, num_output in requests) / event.seconds
    if not event.log:
        return Figures(event.seconds, rate)
    traced = figures(RunLog.load(Path(event.log)), requests)
    return replace(traced, seconds=event.seconds, output_tokens_per_s=rate)


def longest_of(requests: Sequence[Request]) -> int:
    return max(len(prompt) + num_output for prompt, num_output in requests)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, help="a name, or a folder with a config.json")
    parser.add_argument("--workload", required=True, help="one or several, comma separated")
    parser.add_argument("--peer", default="", help="transformers, vllm, or both by comma")
    parser.add_argument("--check", action="store_true", help="compare the kernels first")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--kv-dtype", choices=("fp8",))
    parser.add_argument("--w8a8", action="store_true", help="fp8 linear layers")
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--max-step-tokens", type=int, default=8192)
    parser.add_argument("--block-size", type=int, help="tokens; the engine's default")
    parser.add_argument("--kv-gb", type=float, help="of the pool; the engine's default")
    parser.add_argument("--target-step-ms", type=float, default=0.0, help="between tokens; 0: off")
    parser.add_argument("--threads", type=int, help="of a CPU engine")
    parser.add_argument("--scale", type=float, default=1.0, help="shrink counts and lengths")
    parser.add_argument("--max-seconds", type=float, default=300, help="for a workload of ours")
    parser.add_argument("--peer-seconds", type=float, default=120, help="for a peer's workload")
    parser.add_argument("--peer-setup", help="one of a peer's, else all: vLLM's equal, defaults")
    parser.add_argument("--untraced", action="store_true", help="no times of vLLM's tokens")
    parser.add_argument("--peer-start-seconds", type=float, default=400)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the rows")
    parser.add_argument("--commit", help="of a tree without its history")
    options = parser.parse_args(arguments)
    options.workloads = options.workload.split(",")
    options.peers = [peer for peer in options.peer.split(",") if peer]
    for found, known in ((options.workloads, WORKLOADS), (options.peers, engine_peers.SETUPS)):
        if unknown := [name for name in found if name not in known]:
            parser.error(f"{', '.join(unknown)} found; {', '.join(known)} there are: name those")
    if not 0 < options.scale <= 1:
        parser.error(f"--scale {options.scale} found; above 0 and at most 1 needed")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked; return the exit status."""
    options = parse(arguments)
    if options.check:
        command = [sys.executable, "-m", "headrace.bench.kernels", "--quick", "--check"]
        if subprocess.run(command, env=child_environ()).returncode:
            print("a kernel is wrong or broken (above): nothing is measured", file=sys.stderr)
            return 1
    with tempfile.TemporaryDirectory() as root:
        try:
            model = Model.find(options.model, Path(root))
            report = Report(model, options)
            kv_tokens = run_ours(model, options, report)
        except ValueError as error:
            print(f"bench.engine: {error}", file=sys.stderr)
            return 2
        except RunError as error:
            print(f"bench.engine: {error}", file=sys.stderr)
            return 1
        for peer in options.peers:
            run_peer(peer, model, options, report, kv_tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
