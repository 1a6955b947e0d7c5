"""What is printed: control characters, tables, the ends of jobs."""

from headrace.fleet.show import ending, plain, print_event, print_table
from headrace.fleet.sse import Event


def test_a_models_text_cannot_drive_the_terminal_or_be_markup(capsys):
    print_event(Event("token", {"text": "a\x1b[31m\x9b2J\x07 [bold]b[/bold]\n\t漢🙂"}))
    out = capsys.readouterr().out
    assert out == "a\ufffd[31m\ufffd2J\ufffd [bold]b[/bold]\n\t漢🙂"
    assert plain("\r\x00\x7f") == "\ufffd" * 3


def test_tables_are_aligned_and_never_cut(capsys):
    long = "job_" + "0" * 200
    print_table(("id", "n"), [(long, 1), ("漢", None), ("[red]", "\x1b")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{long}  1"
    assert lines[2] == "漢" + " " * 202 + "  -"
    assert lines[3] == "[red]" + " " * 199 + "  \ufffd"


def test_an_ending_names_reason_counts_and_error():
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    done = {"finish_reason": "stop", "usage": usage, "error": None}
    assert ending("succeeded", done) == "succeeded (stop) 3 prompt + 4 completion tokens"
    failed = {"error": {"code": "engine_refused", "detail": "too long"}}
    assert ending("failed", failed) == "failed engine_refused: too long"


def test_a_reset_is_said_on_standard_error(capsys):
    print_event(Event("reset", {"job": "job_1", "reason": "log_lost"}))
    said = capsys.readouterr()
    assert said.out == "\n"
    assert "begins again (log_lost)" in said.err
