"""The courier's end of its engine: what an engine is asked, and asked again."""

import socket
import subprocess

import msgspec
import pytest

from headrace.contract.settings import WorkerSettings
from headrace.worker import engine_link, frames
from headrace.worker.engine_link import EngineLink, config_of
from headrace.worker.frames import EngineConfig, Ready

STORES = {
    "HEADRACE_REDIS_URL": "redis://h:1/0",
    "HEADRACE_DATABASE_URL": "postgresql+psycopg://u:p@h/d",
}


def settings(**named: str) -> WorkerSettings:
    return WorkerSettings.from_env(
        STORES | {f"HEADRACE_{name.upper()}": value for name, value in named.items()}
    )


def test_auto_is_left_to_the_engine():
    config = config_of(settings(model="/m"))
    assert config.num_threads >= 1
    assert config == EngineConfig("/m", num_threads=config.num_threads)


def test_what_is_named_reaches_the_engine():
    given = settings(
        model="/m",
        device="cuda",
        dtype="bfloat16",
        kv_dtype="fp8",
        weights_dtype="fp8",
        engine_threads="3",
        kv_cache_mb="5",
        gpu_memory_fraction="0.5",
        block_size="128",
        max_seq_tokens="4096",
        max_num_seqs="1024",
        max_step_tokens="2048",
        target_step_ms="0",
        runner="stub",
        stub_step_ms="2",
        stub_lost_steps="9",
    )
    assert config_of(given) == EngineConfig(
        model_folder="/m",
        device="cuda",
        dtype="bfloat16",
        kv_dtype="fp8",
        weights_dtype="fp8",
        num_threads=3,
        kv_bytes=5 << 20,
        gpu_memory_fraction=0.5,
        block_size=128,
        max_seq_tokens=4096,
        max_num_seqs=1024,
        max_step_tokens=2048,
        target_step_ms=0.0,
        runner="stub",
        stub_step_ms=2.0,
        stub_lost_steps=9,
    )


@pytest.fixture
def started(monkeypatch):
    """Start no process; keep each engine's end of the socket and what it was asked."""
    found: list[tuple[socket.socket, EngineConfig]] = []

    class Process:
        pid = 1

        def __init__(self, command, pass_fds, **_):
            text = command[command.index("--config") + 1]
            config = msgspec.json.decode(text, type=EngineConfig)
            found.append((socket.socket(fileno=socket.dup(pass_fds[0])), config))

        def wait(self, timeout=None):
            return 1

    monkeypatch.setattr(engine_link.subprocess, "Popen", Process)
    assert subprocess.Popen is Process
    yield found
    for end, _ in found:
        end.close()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_invariant_4_an_engine_after_the_first_stays_on_its_device(started, device):
    link = EngineLink(EngineConfig("/m"), {})
    link.start()
    link.end()  # before it was ready: nothing is known
    link.start()
    ready = Ready(8, 64, 512, 100, "float32", 0.5, device, 32, [])
    started[1][0].sendall(frames.pack_notice(ready))
    assert link.receive() == ([ready], True)
    assert link.ready == ready
    link.end()
    link.start()
    link.end()
    assert [config.device for _, config in started] == ["auto", "auto", device]
