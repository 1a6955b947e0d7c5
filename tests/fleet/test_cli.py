"""The command line against a whole fleet with the real model, as a user has it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from headrace.fleet.cli import run
from headrace.fleet.programs import EMBEDDED_MODEL

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."

START_S = 180
STOP_S = 60


def environment(data_dir: Path, model: Path, **changes: str) -> dict[str, str]:
    return {
        "PATH": os.defpath,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HOME": str(data_dir),
        "HEADRACE_DATA_DIR": str(data_dir),
        "HEADRACE_PORT": "0",
        "HEADRACE_MODEL": str(model),
        "HEADRACE_KV_CACHE_MB": "256",
        **changes,
    }


def start(environ: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "headrace.fleet", *arguments]
    return subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, text=True)


def processes_of(data_dir: Path) -> list[str]:
    """Return the command lines of all processes that were started for this data folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            texts = [(entry / name).read_bytes() for name in ("cmdline", "environ")]
        except OSError:  # ended meanwhile, or no process
            continue
        if any(os.fsencode(data_dir) in text for text in texts):
            found.append(texts[0].replace(b"\0", b" ").decode())
    return found


@dataclass
class Up:
    environ: dict[str, str]
    process: subprocess.Popen[str]
    access: dict[str, str]  # what `up --json` printed


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path) -> Iterator[Up]:
    data_dir = tmp_path_factory.mktemp("fleet") / "data"
    environ = environment(data_dir, smollm2_folder)
    process = start(environ, "up", "--json")
    assert process.stdout is not None
    yield Up(environ, process, json.loads(process.stdout.readline()))
    process.send_signal(signal.SIGINT)
    assert process.wait(STOP_S) == 0
    assert process.stdout.read() == ""
    process.stdout.close()
    assert processes_of(data_dir) == []


@pytest.fixture
def headrace(up, capsys):
    """Run a command; return exit code, standard output and standard error."""

    def call(*arguments: str, **changes: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(arguments, {**up.environ, **changes})
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def as_json(headrace):
    """Run a command with --json that must succeed; return its documents."""

    def call(*arguments: str) -> list[Any]:
        code, out, err = headrace(*arguments, "--json")
        assert (code, err) == (0, "")
        return [json.loads(line) for line in out.splitlines()]

    return call


def test_follow_prints_the_answer_and_nothing_else_on_standard_output(headrace):
    code, out, err = headrace("submit", QUESTION, "--follow", "--temperature", "0")
    assert (code, out) == (0, ANSWER + "\n")
    assert "succeeded (stop)" in err


def test_followed_events_are_contiguous_and_equal_the_stored_record(as_json):
    arguments = ("--temperature", "1", "--seed", "7", "--max-tokens", "40")
    *events, end = as_json("submit", "Tell me a story.", "--follow", *arguments)
    tokens = [event for event in events if event["event"] == "token"]
    assert end["event"] == "succeeded"
    ids = [token for event in tokens for token in event["token_ids"]]
    starts = [event["index"] for event in tokens]
    counts = [event["count"] for event in tokens]
    assert starts == [sum(counts[:place]) for place in range(len(counts))]
    (listed,) = as_json("jobs", "--limit", "1")
    assert listed["data"][0]["id"] == end["job"]
    watched = as_json("watch", end["job"])
    texts = [event["text"] for event in watched if event["event"] == "token"]
    assert "".join(texts) == "".join(event["text"] for event in tokens)
    assert sum(counts) == len(ids) == end["usage"]["completion_tokens"]


def test_a_submitted_job_is_watched_later_and_listed(headrace, as_json):
    code, out, _ = headrace(
        "submit", QUESTION, "--temperature", "0", "--metadata", "a=b=c", "--class", "batch"
    )
    assert code == 0
    job_id = out.strip()
    assert headrace("watch", job_id)[:2] == (0, ANSWER + "\n")
    (page,) = as_json("jobs", "--class", "batch", "--status", "succeeded")
    assert [job["metadata"] for job in page["data"]] == [{"a": "b=c"}]
    code, out, _ = headrace("jobs")
    assert code == 0
    assert job_id in out


def test_raw_prompts_and_messages_differ_from_a_chat(as_json):
    raw = as_json("submit", "The capital of France is", "--raw", "--follow", "--max-tokens", "4")
    assert raw[-1]["usage"]["prompt_tokens"] == 5
    chat = json.dumps([{"role": "user", "content": QUESTION}])
    events = as_json("submit", "--messages", chat, "--follow", "--temperature", "0")
    assert "".join(each.get("text", "") for each in events) == ANSWER


def test_the_idempotency_key_makes_one_job(as_json):
    arguments = ("submit", QUESTION, "--max-tokens", "1", "--idempotency-key", "mine")
    assert as_json(*arguments)[0]["id"] == as_json(*arguments)[0]["id"]


def test_a_cancelled_job_ends_and_cannot_be_cancelled_again(as_json, headrace):
    (job,) = as_json("submit", "Count to a million.", "--max-tokens", "4000")
    assert headrace("cancel", job["id"])[0] == 0
    code, _, _ = headrace("watch", job["id"])
    assert code == 1
    code, out, err = headrace("cancel", job["id"], "--json")
    assert (code, out) == (1, "")
    assert err.startswith("job_already_ended: ")


def test_a_file_gives_one_result_a_line_and_repeats_nothing(as_json, tmp_path):
    path = tmp_path / "jobs.jsonl"
    lines = [{"prompt": f"{number} and", "sampling": {"max_tokens": 3}} for number in range(9)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    arguments = ("submit", "--file", str(path), "--follow", "--class", "batch")
    arguments += ("--idempotency-key", "file", "--concurrency", "4")
    first = as_json(*arguments)
    assert sorted(result["index"] for result in first) == list(range(9))
    assert all(result["job"]["status"] == "succeeded" for result in first)
    assert {result["job"]["usage"]["completion_tokens"] for result in first} == {3}
    again = as_json(*arguments)
    assert {each["job"]["id"] for each in again} == {each["job"]["id"] for each in first}


def test_a_refused_line_does_not_stop_the_others(headrace, tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"prompt": "a", "sampling": {"max_tokens": 1}}\n{"prompt": "a", "oops": 1}\n')
    code, out, err = headrace("submit", "--file", str(path), "--follow", "--json")
    results = {each["index"]: each for each in map(json.loads, out.splitlines())}
    assert code == 1
    assert results[0]["job"]["status"] == "succeeded"
    assert results[1]["error"]["code"] == "unknown_field"
    assert "1 of 2 jobs" in err


def test_the_operator_that_up_made_logs_in_and_the_folders_key_reads_of_it(up, as_json):
    with httpx.Client(base_url=up.access["api_url"], follow_redirects=True) as browser:
        page = browser.post(
            "/dashboard/login",
            data={"name": up.access["operator"], "password": up.access["operator_password"]},
            headers={"Sec-Fetch-Site": "same-origin"},
        )
        assert (page.status_code, str(page.url)) == (200, up.access["dashboard_url"])
        assert browser.get("/v1/admin/me").json()["role"] == "admin"
    (log,) = as_json("audit", "--actor", up.access["operator"], "--action", "login")
    assert [row["outcome"] for row in log["audit"]] == ["done"]


def test_keys_are_made_listed_without_their_secret_and_revoked(as_json, headrace, up):
    (made,) = as_json("keys", "create", "--name", "mine", "--tenant", "other")
    code, out, _ = headrace("jobs", "--json", HEADRACE_API_KEY=made["key"])
    assert code == 0
    assert json.loads(out)["data"] == [], "another tenant's jobs"
    (listed,) = as_json("keys", "list")
    row = next(row for row in listed["data"] if row["id"] == made["id"])
    assert (row["name"], row["tenant"]) == ("mine", "other")
    assert made["key"].rpartition("_")[2] not in json.dumps(listed)
    assert as_json("keys", "revoke", made["id"])[0]["revoked"] is True
    assert headrace("keys", "revoke", made["id"])[0] == 1
    deadline = time.monotonic() + 30
    while headrace("jobs", HEADRACE_API_KEY=made["key"])[0] == 0:  # gateways remember for seconds
        assert time.monotonic() < deadline
    assert headrace("jobs", HEADRACE_API_KEY=made["key"])[2].startswith("unauthenticated: ")


def test_the_model_is_ready(as_json, headrace):
    (listed,) = as_json("models")
    assert [(each["id"], each["ready"]) for each in listed["data"]] == [(EMBEDDED_MODEL, True)]
    assert EMBEDDED_MODEL in headrace("models")[1]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("submit", "x", "--model", "nope"), "unknown_model"),
        (("submit", "x", "--temperature", "-1"), "out_of_range"),
        (("submit", "x", "--temperature", "nan"), "fleet"),
        (("submit", "--messages", "{}"), "fleet"),
        (("watch", "job_" + "0" * 32), "not_found"),
        (("cancel", "../x"), "fleet"),
        (("jobs", "--cursor", "nonsense"), "invalid_cursor"),
        (("jobs", "--status", "nonsense"), "out_of_range"),
    ],
)
def test_refusals_are_code_and_text_on_standard_error(headrace, arguments, code):
    status, out, err = headrace(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith(f"{code}: ")


def test_wrong_usage_is_exit_code_2(headrace):
    for arguments in (("submit",), ("submit", "x", "--file", "y"), ("nonsense",), ("jobs", "--x")):
        assert headrace(*arguments)[0] == 2


def test_up_announces_what_answers(up):
    wanted = {"api_url", "docs_url", "api_key", "data_dir"}
    assert set(up.access) == wanted | {"dashboard_url", "operator", "operator_password"}
    assert httpx.get(up.access["docs_url"]).status_code == 200
    login = httpx.get(up.access["dashboard_url"], follow_redirects=True)
    assert (login.status_code, login.url.path) == (200, "/dashboard/login")
    assert httpx.get(f"{up.access['api_url']}/v1/models").status_code == 401


def test_the_demo_says_paris_and_leaves_nothing(tmp_path, smollm2_folder):
    process = start(environment(tmp_path / "data", smollm2_folder), "demo", "--json")
    out, _ = process.communicate(timeout=START_S)
    assert process.returncode == 0
    *events, record = [json.loads(line) for line in out.splitlines()]
    text = "".join(event["text"] for event in events if event["event"] == "token")
    assert text == record["output"]["text"] == ANSWER
    assert processes_of(tmp_path / "data") == []


def test_a_stopped_start_leaves_nothing(tmp_path, smollm2_folder):
    process = start(environment(tmp_path / "data", smollm2_folder), "up", "--json")
    log = tmp_path / "data" / "logs" / "worker.log"
    deadline = time.monotonic() + START_S
    while not log.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
    process.terminate()
    out, _ = process.communicate(timeout=STOP_S)
    assert (process.returncode, out) == (0, "")
    assert processes_of(tmp_path / "data") == []
