"""The error tree: codes are unique and stable, and the drawing at its top is the tree."""

from __future__ import annotations

import re

from headrace.contract import errors, wire
from headrace.contract.errors import HeadraceError, all_errors


def ours():
    return [cls for cls in all_errors() if cls.__module__.startswith("headrace.contract")]


def test_codes_are_unique_and_plain():
    codes = [cls.code for cls in ours()]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)
    assert all_errors() == sorted(all_errors(), key=lambda cls: cls.code)


def test_the_docstring_draws_the_tree():
    assert errors.__doc__ is not None
    drawn: dict[str, str] = {}
    parents = ["HeadraceError"]
    for line in errors.__doc__.splitlines():
        if match := re.match(r"    ((?:\|   )*)\+-- ([A-Z]\w+(?:, [A-Z]\w+)*)", line):
            depth = len(match[1]) // 4
            names = match[2].split(", ")
            drawn |= dict.fromkeys(names, parents[depth])
            parents[depth + 1 :] = [names[-1]]
    real = {cls.__name__: cls.__base__.__name__ for cls in ours() if cls is not HeadraceError}
    assert drawn == real


def test_the_drawn_statuses_are_the_classes():
    assert errors.__doc__ is not None
    pairs = re.findall(r"([A-Z]\w+) +(\d{3})\b", errors.__doc__)
    assert len(pairs) >= 10
    for name, status in pairs:
        assert getattr(errors, name).http_status == int(status)


def test_only_what_may_pass_by_itself_is_retryable():
    retryable = {cls.__name__ for cls in ours() if cls.retryable}
    away = {"Unavailable", "DatabaseUnavailable", "QueueUnavailable"}
    full = {"Overloaded", "QueueFull", "TenantQueueFull"}
    assert retryable == away | full | {"BodyTimeout", "LoginBusy", "LockedOut"}


def test_an_error_carries_its_text_and_when_to_come_back():
    error = errors.QueueUnavailable("Redis is away: try again", retry_after_s=1)
    assert (str(error), error.detail, error.retry_after_s) == (error.detail, str(error), 1)
    assert wire.WireError("x").retry_after_s is None
