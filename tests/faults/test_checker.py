"""The checker could fail: each promise, broken by hand, is found, by the code it must have."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from headrace.tests.faults import checker
from headrace.tests.faults import record as rec
from headrace.tests.faults.checker import check
from headrace.tests.faults.event_bytes import BadEvent, EventBytes
from headrace.tests.faults.good_run import Event, GoodRun, Job, good_run
from headrace.tests.faults.scenario import Rules

RULES = Rules()
POISON, CANCELED = -2, -1  # where good_run puts them


def change_row(job: Job, **changes: Any) -> None:
    job.row = msgspec.structs.replace(job.row, **changes)


def find(job: Job, name: str) -> Event:
    return next(e for events in job.connections for e in events if e.name == name)


def last_event(job: Job) -> Event:
    return job.connections[-1][-1]


# -- spoilers: each breaks one promise --------------------------------------------------------


def other_id(run: GoodRun) -> None:
    run.jobs[0].answers.append(rec.Answer("key-0", 202, "job_other", 0.6))


def one_id_for_two(run: GoodRun) -> None:
    run.jobs[0].answers.append(rec.Answer("key-1", 202, run.jobs[0].job, 0.6))


def post_got_500(run: GoodRun) -> None:
    run.jobs[0].answers.insert(0, rec.Answer("key-0", 500, None, 0.1, "internal"))


def never_accepted(run: GoodRun) -> None:
    run.extra.append(rec.Asked("key-never", "one", 7, 5))


def stream_got_500(run: GoodRun) -> None:
    run.jobs[0].extra.append(rec.Opened(run.jobs[0].job, 9, None, 500, 3.0))


def cancel_got_404(run: GoodRun) -> None:
    run.jobs[0].extra.append(rec.Canceled(run.jobs[0].job, 404, 3.0))


def two_rows(run: GoodRun) -> None:
    run.extra.append(msgspec.structs.replace(run.jobs[0].row, job="job_twin"))


def row_of_nobody(run: GoodRun) -> None:
    run.extra.append(msgspec.structs.replace(run.jobs[0].row, job="job_x", campaign="nobody"))


def other_tenants_row(run: GoodRun) -> None:
    change_row(run.jobs[0], tenant="two")


def other_keys_row(run: GoodRun) -> None:
    change_row(run.jobs[0], key="key-1")


def other_jobs_event(run: GoodRun) -> None:
    run.jobs[0].connections[1].insert(1, run.jobs[1].connections[0][1])


def other_jobs_tokens(run: GoodRun) -> None:
    (events, at), (others, other_at) = run.jobs[0].tokens()[0], run.jobs[1].tokens()[0]
    events[at].data["token_ids"] = others[other_at].data["token_ids"]
    events[at].data["count"] = len(events[at].data["token_ids"])


def still_running(run: GoodRun) -> None:
    change_row(run.jobs[0], status="running")


def failed(run: GoodRun) -> None:
    change_row(run.jobs[0], status="failed", error_code="internal")


def canceled_unasked(run: GoodRun) -> None:
    run.jobs[CANCELED].extra.clear()


def canceled_unnoted(run: GoodRun) -> None:
    change_row(run.jobs[CANCELED], is_canceled=False)


def two_attempts_end(run: GoodRun) -> None:
    attempts = [rec.Attempt(1, "w0", "succeeded"), rec.Attempt(2, "w1", "succeeded")]
    change_row(run.jobs[0], attempts=attempts)


def older_attempt_ends(run: GoodRun) -> None:
    attempts = [rec.Attempt(1, "w0", "succeeded"), rec.Attempt(2, "w1", None)]
    change_row(run.jobs[0], attempts=attempts)


def attempt_number_twice(run: GoodRun) -> None:
    change_row(run.jobs[0], attempts=[run.jobs[0].row.attempts[1]] * 2)


def stream_without_end(run: GoodRun) -> None:
    run.jobs[0].connections[-1].pop()


def end_cut_off(run: GoodRun) -> None:
    run.jobs[0].connections[-1].pop()
    data = b'event: succeeded\nid: 3\ndata: {"job":"' + run.jobs[0].job.encode() + b'"}\n'
    run.jobs[0].extra.append(rec.Chunk(run.jobs[0].job, 5, 3.0, data))


def end_twice(run: GoodRun) -> None:
    run.jobs[0].connections[-1].append(last_event(run.jobs[0]))


def token_after_end(run: GoodRun) -> None:
    events, at = run.jobs[0].tokens()[-1]
    run.jobs[0].connections[-1].append(events[at])


def other_end(run: GoodRun) -> None:
    last_event(run.jobs[0]).name = "canceled"


def other_reason(run: GoodRun) -> None:
    last_event(run.jobs[0]).data["finish_reason"] = "stop"


def other_usage(run: GoodRun) -> None:
    last_event(run.jobs[0]).data["usage"]["completion_tokens"] += 1


def other_prompt_usage(run: GoodRun) -> None:
    change_row(run.jobs[0], prompt_tokens=4)


def token_event_lost(run: GoodRun) -> None:
    events, at = run.jobs[0].tokens()[1]
    del events[at]


def token_event_twice(run: GoodRun) -> None:
    events, at = run.jobs[0].tokens()[1]
    events.insert(at, events[at])


def begins_at_zero_again(run: GoodRun) -> None:
    job = run.jobs[0]
    tokens = [events[at] for events, at in job.tokens()]
    job.connections = [job.connections[0][:2] + tokens, [*tokens, last_event(job)]]


def other_token(run: GoodRun) -> None:
    events, at = run.jobs[0].tokens()[0]
    events[at].data["token_ids"][0] += 1


def other_token_everywhere(run: GoodRun) -> None:
    other_token(run)
    ids = list(run.jobs[0].row.token_ids or [])
    ids[0] += 1
    change_row(run.jobs[0], token_ids=ids)


def one_token_short(run: GoodRun) -> None:
    asked = run.jobs[0].asked
    run.jobs[0].asked = msgspec.structs.replace(asked, num_tokens=asked.num_tokens + 1)


def other_text(run: GoodRun) -> None:
    events, at = run.jobs[0].tokens()[0]
    events[at].data["text"] = events[at].data["text"].upper()


def other_stored_text(run: GoodRun) -> None:
    change_row(run.jobs[0], text="x" * len(run.jobs[0].row.text or ""))


def text_cut_elsewhere(run: GoodRun) -> None:
    ends = list(run.jobs[0].row.ends or [])
    change_row(run.jobs[0], ends=[end + 1 for end in ends[:-1]] + ends[-1:])


def other_stored_tokens(run: GoodRun) -> None:
    change_row(run.jobs[0], token_ids=(run.jobs[0].row.token_ids or [])[:-1])


def other_event_id(run: GoodRun) -> None:
    events, at = run.jobs[0].tokens()[0]
    events[at].id = "77"


def no_event_id(run: GoodRun) -> None:
    events, at = run.jobs[0].tokens()[0]
    events[at].id = None


def other_count(run: GoodRun) -> None:
    events, at = run.jobs[0].tokens()[0]
    events[at].data["count"] += 1


def unknown_event(run: GoodRun) -> None:
    run.jobs[0].connections[0].insert(0, Event("progress", {"job": run.jobs[0].job}))


def unknown_line(run: GoodRun) -> None:
    run.jobs[0].extra.append(rec.Chunk(run.jobs[0].job, 1, 3.0, b"Traceback (most recent)\n"))


def reset(run: GoodRun) -> None:
    job = run.jobs[0]
    tokens = [events[at] for events, at in job.tokens()]
    said = Event("reset", {"job": job.job, "reason": "why"})
    job.connections = [job.connections[0][:2] + tokens, [said, *tokens, last_event(job)]]


def innocent_dead(run: GoodRun) -> None:
    change_row(run.jobs[0], dead_letter="SIGSEGV")


def poison_lives(run: GoodRun) -> None:
    change_row(run.jobs[POISON], dead_letter=None)


def poison_succeeds(run: GoodRun) -> None:
    change_row(run.jobs[POISON], status="succeeded")


def poison_kills_on(run: GoodRun) -> None:
    change_row(run.jobs[POISON], num_crashes=4)


def no_row(run: GoodRun) -> None:
    run.jobs[0].row = msgspec.structs.replace(run.jobs[1].row)


def surprise(run: GoodRun) -> None:
    run.extra.append(rec.Note("surprise", "w0 ended by itself with 70", 3.0))


def overdue(run: GoodRun) -> None:
    run.extra.append(rec.Note("overdue", "1 stream open", 3.0))


def broken(run: GoodRun) -> None:
    run.extra.append(rec.Note("broken", "AssertionError", 3.0))


SPOILERS: list[tuple[Callable[[GoodRun], None], str]] = [
    (other_id, "id_changed"),
    (one_id_for_two, "id_changed"),
    (post_got_500, "bad_answer"),
    (never_accepted, "bad_answer"),
    (stream_got_500, "bad_answer"),
    (cancel_got_404, "bad_answer"),
    (two_rows, "two_rows"),
    (row_of_nobody, "unasked_row"),
    (no_row, "no_row"),
    (other_tenants_row, "foreign"),
    (other_keys_row, "foreign"),
    (other_jobs_event, "foreign"),
    (other_jobs_tokens, "wrong_token"),
    (still_running, "lost"),
    (failed, "wrong_state"),
    (canceled_unasked, "wrong_state"),
    (canceled_unnoted, "wrong_state"),
    (poison_succeeds, "wrong_state"),
    (two_attempts_end, "two_endings"),
    (older_attempt_ends, "two_endings"),
    (attempt_number_twice, "two_endings"),
    (stream_without_end, "no_end"),
    (end_cut_off, "no_end"),
    (end_twice, "two_ends"),
    (token_after_end, "after_end"),
    (other_end, "end_differs"),
    (other_reason, "end_differs"),
    (other_usage, "wrong_usage"),
    (other_prompt_usage, "wrong_usage"),
    (token_event_lost, "gap"),
    (token_event_twice, "repeat"),
    (begins_at_zero_again, "repeat"),
    (other_token, "wrong_token"),
    (other_token_everywhere, "wrong_token"),
    (one_token_short, "wrong_count"),
    (other_text, "stored_differs"),
    (other_stored_text, "stored_differs"),
    (text_cut_elsewhere, "stored_differs"),
    (other_stored_tokens, "stored_differs"),
    (other_event_id, "wrong_event_id"),
    (no_event_id, "wrong_event_id"),
    (other_count, "bad_event"),
    (unknown_event, "bad_event"),
    (unknown_line, "bad_event"),
    (reset, "reset"),
    (innocent_dead, "innocent_dead"),
    (poison_lives, "poison_alive"),
    (poison_kills_on, "too_many_runs"),
    (surprise, "surprise"),
    (overdue, "overdue"),
    (broken, "broken"),
]


@pytest.mark.parametrize("seed", range(20))
def test_a_good_run_breaks_nothing(seed):
    verdict = check(good_run(seed).records(), RULES)
    assert verdict.violations == []
    figures = verdict.figures
    assert figures["jobs_accepted"] == figures["finished"] == 6
    assert (figures["lost"], figures["repeated"], figures["missing"]) == (0, 0, 0)


@pytest.mark.parametrize(("spoil", "code"), SPOILERS, ids=lambda x: getattr(x, "__name__", x))
def test_each_broken_promise_is_found(spoil, code):
    run = good_run()
    spoil(run)
    assert code in check(run.records(), RULES).codes


def test_every_code_of_the_table_has_a_spoiler():
    table = (checker.__doc__ or "").split("and of a run:")[0]
    named = {word for line in table.splitlines() if line.startswith("| `")
             for word in line.split("|")[1].replace("`", "").replace(",", " ").split()}  # fmt: skip
    assert named <= {code for _, code in SPOILERS}


# -- rules -----------------------------------------------------------------------------------


def test_a_reset_that_is_allowed_breaks_nothing():
    for rules, extra in (
        (Rules(may_reset=True), []),
        (RULES, [rec.MayReset(good_run().jobs[0].job)]),
    ):
        run = good_run()
        reset(run)
        verdict = check([*extra, *run.records()], rules)
        assert verdict.violations == []
        assert verdict.figures["resets"] == 1


def test_a_run_whose_faults_did_not_bite_is_no_proof():
    run = good_run()
    for job in run.jobs:
        change_row(job, attempt=1)
    codes = check(run.records(), Rules(needs_takeovers=True, min_stale_writes=1)).codes
    assert {"no_takeover", "few_stale_writes"} <= codes
    bitten = [*good_run().records(), rec.Sample("w0", 7, "stale_writes", 2.0, 1.0)]
    assert check(bitten, Rules(needs_takeovers=True, min_stale_writes=1)).violations == []


def test_a_pause_is_the_silence_between_two_attempts():
    verdict = check(good_run().records(), Rules(max_resume_s=0.5))
    assert verdict.codes == {"slow_resume"}
    assert verdict.figures["resume_p99_s"] == pytest.approx(1.0, abs=0.11)
    assert check(good_run().records(), Rules(max_resume_s=1.2)).violations == []


def test_refusals_that_the_rules_allow_break_nothing():
    run = good_run()
    never_accepted(run)
    assert check(run.records(), Rules(may_refuse=True)).violations == []


def test_the_models_answer_is_that_of_its_undisturbed_run():
    run = good_run()
    job = run.jobs[0]
    job.asked = msgspec.structs.replace(job.asked, seed=0, reference="story")
    ids = list(job.row.token_ids or [])
    reference = rec.Reference("story", ids, job.row.text or "")
    assert check([reference, *run.records()], RULES).violations == []
    other = rec.Reference("story", [*ids[:-1], 5], "")
    assert "wrong_token" in check([other, *run.records()], RULES).codes
    longer = rec.Reference("story", [*ids, 5], "")
    assert check([longer, *run.records()], RULES).codes == {"wrong_count"}


# -- random damage ---------------------------------------------------------------------------


def damage(run: GoodRun, draw: random.Random) -> str:
    """Do something to one event of one stream that a right gateway never does."""
    job = draw.choice(run.jobs[:POISON])
    events, at = draw.choice(job.tokens())
    ways: dict[str, Callable[[], Any]] = {
        "drop": lambda: events.pop(at),
        "repeat": lambda: events.insert(draw.randint(at, len(events) - 1) + 1, events[at]),
        "early": lambda: events.insert(0, job.connections[-1][-1]),
        "index": lambda: events[at].data.update(index=events[at].data["index"] + 1),
        "token": lambda: events[at].data["token_ids"].__setitem__(-1, 255),
        "text": lambda: events[at].data.update(text=events[at].data["text"] + "x"),
        "id": lambda: setattr(events[at], "id", str(int(events[at].id or 0) + 1)),
        "job": lambda: events[at].data.update(job="job_other"),
        "name": lambda: setattr(events[at], "name", "message"),
    }
    way = draw.choice(sorted(ways))
    ways[way]()
    return way


@pytest.mark.parametrize("seed", range(200))
def test_any_damage_to_a_stream_is_found(seed):
    draw = random.Random(seed)
    run = good_run(seed)
    way = damage(run, draw)
    assert check(run.records(), RULES).violations, way


@pytest.mark.parametrize("seed", range(20))
def test_a_record_left_out_is_found(seed):
    """Without any of its streams' bytes, answers or rows no run is clean."""
    run = good_run(seed)
    records = run.records()
    kinds = (rec.Row, rec.Chunk)
    places = [at for at, each in enumerate(records) if isinstance(each, kinds)]
    place = random.Random(seed).choice(places)
    assert check([*records[:place], *records[place + 1 :]], RULES).violations


# -- bytes -----------------------------------------------------------------------------------


def test_events_are_the_same_however_the_bytes_are_cut():
    data = b"retry: 1000\n\n: ping\n\n" + b"".join(
        event.as_bytes() for events in good_run().jobs[0].connections for event in events
    )
    whole = list(EventBytes().take(data))
    assert len(whole) > 5
    for size in (1, 2, 7, 64):
        parser = EventBytes()
        cut = [e for at in range(0, len(data), size) for e in parser.take(data[at : at + size])]
        assert cut == whole


@pytest.mark.parametrize("data", [b"data: {\n\n", b"data: []\n\n", b"what\n\n", b"retry: x\n\n"])
def test_what_is_no_event_is_refused(data):
    with pytest.raises(BadEvent):
        list(EventBytes().take(data))
