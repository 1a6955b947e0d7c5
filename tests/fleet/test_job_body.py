"""Job bodies out of options and files."""

import pytest

from headrace.fleet.failure import FleetError
from headrace.fleet.job_body import parse_messages, parse_metadata, read_bodies, without_none


def test_a_line_wins_over_the_options_field_by_field(tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_text(
        '{"prompt": "a\u2028b", "sampling": {"seed": 1}}\r\n\n{"prompt": "c", "class": "batch"}'
    )
    defaults = {"model": "m", "class": "interactive", "sampling": {"seed": 9, "max_tokens": 2}}
    assert read_bodies(path, defaults) == [
        {
            "model": "m",
            "class": "interactive",
            "prompt": "a\u2028b",
            "sampling": {"seed": 1, "max_tokens": 2},
        },
        {
            "model": "m",
            "class": "batch",
            "prompt": "c",
            "sampling": {"seed": 9, "max_tokens": 2},
        },
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{oops}', "line 2: no JSON"),
        ('{"prompt": "a"}\n[1]', "line 2: a list"),
        ("[" * 100_000, "line 1: no JSON"),
        ("\n \n", "holds no job"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_sent(tmp_path, text, said):
    (tmp_path / "jobs.jsonl").write_text(text)
    with pytest.raises(FleetError, match=said):
        read_bodies(tmp_path / "jobs.jsonl", {})


def test_a_file_that_is_no_text_or_not_there_is_named(tmp_path):
    (tmp_path / "jobs.jsonl").write_bytes(b"\xff\xfe")
    for name in ("jobs.jsonl", "missing"):
        with pytest.raises(FleetError, match=rf"{name} cannot be read"):
            read_bodies(tmp_path / name, {})


def test_metadata_is_name_and_value():
    assert parse_metadata(["a=b=c", "d="]) == {"a": "b=c", "d": ""}
    for pairs in (["a"], ["=b"], ["a=1", "a=2"]):
        with pytest.raises(FleetError, match="--metadata"):
            parse_metadata(pairs)


def test_messages_are_a_list_given_or_in_a_file(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text('[{"role": "user", "content": "x"}]')
    assert parse_messages(f"@{path}") == parse_messages(path.read_text())
    for text in ('{"role": "user"}', "hello", "@/no/such/file"):
        with pytest.raises(FleetError):
            parse_messages(text)


def test_what_was_not_given_is_left_to_the_api():
    assert without_none({"a": None, "b": 0, "c": [], "d": "", "e": False}) == {
        "b": 0,
        "d": "",
        "e": False,
    }
