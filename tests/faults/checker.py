"""Says of a run's records whether every promise was kept. Pure: records in, verdict out.

What is asserted, and the code of each violation:

| code | of an accepted job |
|---|---|
| `id_changed` | POSTs of one key gave one id |
| `bad_answer` | a POST, a stream or a cancel got 5xx other than 503, or a 4xx that nobody earned |
| `no_row`, `two_rows`, `unasked_row` | Postgres has one row a key, and none that nobody asked for |
| `foreign` | row, stream and events are of this job and its tenant, with nobody else's tokens |
| `lost` | the row is terminal |
| `wrong_state` | it is the state that had to come: succeeded, canceled if asked, failed if poison |
| `two_endings` | no more than one attempt ended the job |
| `no_end` | the stream said the end |
| `two_ends`, `after_end` | it said so once, and nothing after it |
| `end_differs` | stream and row agree on state, finish reason, error and usage |
| `wrong_usage` | usage counts the tokens that were streamed and the prompt that was sent |
| `gap`, `repeat` | indexes are 0, 1, 2, ... over all connections, each once |
| `wrong_token` | token i is the stub's token i of this job's seed, or the reference's |
| `wrong_count` | the tokens are as many as were asked for |
| `stored_differs` | text and tokens streamed == stored, and the text's cuts are where tokens end |
| `wrong_event_id`, `bad_event` | ids name the last token; lines are as the specification says |
| `reset` | it was not said, unless the rules or a MayReset record allow it |
| `innocent_dead`, `poison_alive`, `too_many_runs` | dead letters: all poison, after <= 3 runs |

and of a run: `slow_resume`, `few_stale_writes`, `no_takeover` (rules), `overdue` (the deadline cut
the run off), `surprise` (a program ended by itself), `broken` (the scenario itself failed).

Invariants:
1. Nothing here imports the product but for the function that is the stub's definition.
2. A job's stream is read connection by connection, as its client received it: what a client had
   when a connection broke is what the next one must go on from.

Called by: campaign, __main__, tests.

Size: every promise in one place, each a few lines; the reader checks the table against the code.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headrace.tests.faults import record as rec
from headrace.tests.faults.event_bytes import BadEvent, EventBytes, StreamEvent
from headrace.tests.faults.figures import Figures
from headrace.tests.faults.scenario import Rules
from headrace.worker.engine.stub import stub_tokens

ENDS = frozenset({"succeeded", "failed", "canceled", "expired"})
OTHERS = frozenset({"queued", "started", "token", "reset"})
#: Runs of a poison that may have died: with all others, with suspects, alone.
MAX_RUNS = 3
#: Outcomes of an attempt that ended its job.
ENDING_OUTCOMES = ENDS
#: Statuses that a client may meet while a store or a gateway is away, or when it is told to wait.
EARNED = frozenset({0, 200, 202, 429, 503})


@dataclass(frozen=True, slots=True)
class Violation:
    code: str
    job: str
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    violations: list[Violation]
    figures: dict[str, Any]

    @property
    def codes(self) -> set[str]:
        return {each.code for each in self.violations}


@dataclass(slots=True)
class Seen:
    """What one job's subscriber was shown."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    cuts: list[int] = field(default_factory=list)  # length of the text after each event
    end: StreamEvent | None = None
    connection: int = -1
    parser: EventBytes = field(default_factory=EventBytes)
    attempt: int = 0  # the highest that `started` named


def check(records: Iterable[rec.Record], rules: Rules) -> Verdict:
    """Read a run's records in order and return what was broken, with the run's figures."""
    checker = _Checker(rules)
    for record in records:
        checker.take(record)
    return checker.verdict()


class _Checker:
    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.violations: list[Violation] = []
        self.figures = Figures()
        self.asked: dict[str, rec.Asked] = {}
        self.job_of: dict[str, str] = {}  # key -> job
        self.key_of: dict[str, str] = {}
        self.seen: defaultdict[str, Seen] = defaultdict(Seen)
        self.rows: dict[str, rec.Row] = {}
        self.row_keys: Counter[str] = Counter()
        self.references: dict[str, rec.Reference] = {}
        self.may_reset: set[str] = set()
        self.canceled: dict[str, list[int]] = defaultdict(list)

    def broke(self, code: str, job: str, text: str) -> None:
        self.violations.append(Violation(code, job, text))

    # -- records -----------------------------------------------------------------------------

    def take(self, record: rec.Record) -> None:
        self.figures.take(record)
        match record:
            case rec.Asked():
                self.asked[record.key] = record
            case rec.Answer():
                self._take_answer(record)
            case rec.Opened():
                self._take_opened(record)
            case rec.Chunk():
                self._take_chunk(record)
            case rec.Row():
                self.rows[record.job] = record
                if record.campaign is not None:
                    self.row_keys[record.campaign] += 1
            case rec.Canceled():
                self.canceled[record.job].append(record.status)
                if record.status not in EARNED | {409}:
                    self.broke("bad_answer", record.job, f"a cancel got {record.status}")
            case rec.MayReset():
                self.may_reset.add(record.job)
            case rec.Reference():
                self.references[record.name] = record
            case rec.Note(name="overdue" | "broken" | "surprise" as name, value=value):
                self.broke(name, "", value)
            case _:
                pass

    def _take_answer(self, answer: rec.Answer) -> None:
        if answer.status not in EARNED:
            self.broke("bad_answer", answer.key, f"a POST got {answer.status} {answer.error}")
        if answer.job is None:
            return
        if (known := self.job_of.setdefault(answer.key, answer.job)) != answer.job:
            self.broke("id_changed", known, f"key {answer.key} was also given {answer.job}")
        if self.key_of.setdefault(answer.job, answer.key) != answer.key:
            self.broke("id_changed", answer.job, f"the id was given to {answer.key} too")

    def _take_opened(self, opened: rec.Opened) -> None:
        if opened.status not in EARNED:
            self.broke("bad_answer", opened.job, f"the stream got {opened.status}")

    # -- streams -----------------------------------------------------------------------------

    def _take_chunk(self, chunk: rec.Chunk) -> None:
        seen = self.seen[chunk.job]
        if chunk.connection != seen.connection:
            seen.connection, seen.parser = chunk.connection, EventBytes()
        try:
            for event in seen.parser.take(chunk.data):
                self._take_event(chunk, seen, event)
        except (BadEvent, UnicodeDecodeError) as error:
            self.broke("bad_event", chunk.job, str(error))
            seen.parser = EventBytes()

    def _take_event(self, chunk: rec.Chunk, seen: Seen, event: StreamEvent) -> None:
        job = chunk.job
        if event.data.get("job") != job:
            self.broke("foreign", job, f"its stream has an event of {event.data.get('job')}")
            return
        if seen.end is not None:
            code = "two_ends" if event.name in ENDS else "after_end"
            self.broke(code, job, f"`{event.name}` came after `{seen.end.name}`")
            return
        if event.name == "token":
            self._take_tokens(job, seen, event)
        elif event.name == "reset":
            self._take_reset(job, seen)
        elif event.name in ENDS:
            seen.end = event
        elif event.name not in OTHERS:
            self.broke("bad_event", job, f"there is no event `{event.name}`")
        elif event.name == "started":
            seen.attempt = max(seen.attempt, int(event.data.get("attempt", 0)))
        self.figures.saw(chunk, event)

    def _take_tokens(self, job: str, seen: Seen, event: StreamEvent) -> None:
        data, known = event.data, len(seen.ids)
        ids, first = data.get("token_ids"), data.get("index")
        if not isinstance(ids, list) or not ids or not isinstance(first, int):
            self.broke("bad_event", job, "a token event without ids or index")
            return
        if data.get("count") != len(ids):
            self.broke("bad_event", job, f"count {data.get('count')} of {len(ids)} tokens")
        last = first + len(ids) - 1
        if event.id is None or event.id.partition(".")[0] != str(last):
            self.broke("wrong_event_id", job, f"id {event.id} of tokens {first} to {last}")
        if first > known:
            self.figures.num_missing += first - known
            self.broke("gap", job, f"tokens {known} to {first - 1} were not sent")
            seen.ids += [-1] * (first - known)
        elif first < known:
            self.figures.num_repeated += known - first
            self.broke("repeat", job, f"token {first} came after token {known - 1}")
            return
        seen.ids += ids
        seen.text += data.get("text", "")
        seen.cuts.append(len(seen.text))

    def _take_reset(self, job: str, seen: Seen) -> None:
        self.figures.num_resets += 1
        if not self.rules.may_reset and job not in self.may_reset:
            self.broke("reset", job, f"`reset` after {len(seen.ids)} tokens")
        seen.ids, seen.text, seen.cuts = [], "", []

    # -- verdict -----------------------------------------------------------------------------

    def verdict(self) -> Verdict:
        for key, count in self.row_keys.items():
            if count > 1:
                self.broke("two_rows", key, f"{count} jobs were made of one key")
        for job, row in self.rows.items():
            if row.campaign not in self.asked and not self.rules.has_other_jobs:
                self.broke("unasked_row", job, "a job that no client asked for")
        for job, key in self.key_of.items():
            if key not in self.asked:
                self.broke("unasked_row", job, f"an answer to {key}, which nobody asked")
                continue
            self._judge(job, self.asked[key])
        for job in self.seen.keys() - self.key_of.keys():
            self.broke("unasked_row", job, "a stream of a job that was not accepted")
        self._judge_run()
        return Verdict(self.violations, self._figures())

    def _judge(self, job: str, asked: rec.Asked) -> None:
        row, seen = self.rows.get(job), self.seen[job]
        if row is None:
            self.broke("no_row", job, "accepted, and not in Postgres")
            return
        if row.tenant != asked.tenant or row.campaign != asked.key:
            self.broke("foreign", job, f"its row is of {row.tenant} {row.campaign}")
        if row.key is not None and row.key != asked.key:
            self.broke("foreign", job, f"its row belongs to the idempotency key {row.key}")
        self._judge_tokens(job, asked, seen, row)
        if row.status not in ENDS:
            self.figures.num_lost += 1
            self.broke("lost", job, f"accepted, and `{row.status}` at the end of the run")
            return
        self.figures.num_finished += 1
        self._judge_state(job, asked, row)
        self._judge_end(job, asked, seen, row)
        self._judge_stored(job, seen, row)
        self._judge_poison(job, asked, row)

    def _judge_tokens(self, job: str, asked: rec.Asked, seen: Seen, row: rec.Row) -> None:
        """Compare what was streamed, and what was stored, with the answer that must come."""
        for where, ids in (("streamed", seen.ids), ("stored", row.token_ids or [])):
            expected = self._expected(asked, len(ids))
            for index, (found, wanted) in enumerate(zip(ids, expected, strict=False)):
                if found != wanted and found != -1:
                    text = f"{where} token {index} is {found}, not {wanted}"
                    self.broke("wrong_token", job, text)
                    break
            if len(ids) > len(expected):
                self.broke("wrong_token", job, f"{where}: more than the answer has")

    def _expected(self, asked: rec.Asked, count: int) -> list[int]:
        if asked.reference is not None:
            reference = self.references.get(asked.reference)
            return [] if reference is None else reference.token_ids
        seeds = np.full(count, asked.seed % 2**64, np.uint64)
        return stub_tokens(seeds, np.arange(count), self.rules.vocab_size).tolist()

    def _judge_state(self, job: str, asked: rec.Asked, row: rec.Row) -> None:
        allowed = {"succeeded"}
        if asked.poison is not None:
            allowed = {"failed"}
        if self.canceled.get(job):
            allowed.add("canceled")
        is_allowed_failure = row.status == "failed" and row.error_code in self.rules.may_fail
        if row.status not in allowed and not is_allowed_failure:
            self.broke("wrong_state", job, f"`{row.status}` ({row.error_code}), not {allowed}")
        if row.status == "canceled" and not row.is_canceled:
            self.broke("wrong_state", job, "canceled, and no cancel was noted")
        endings = [each for each in row.attempts if each.outcome in ENDING_OUTCOMES]
        if len(endings) > 1:
            self.broke("two_endings", job, f"attempts {[e.number for e in endings]} ended it")
        if endings and (endings[0].outcome != row.status or endings[0].number != row.attempt):
            self.broke("two_endings", job, f"attempt {endings[0].number} is not the row's end")
        numbers = [each.number for each in row.attempts]
        if numbers != list(range(1, row.attempt + 1)):
            self.broke("two_endings", job, f"attempts {numbers} of {row.attempt}")

    def _judge_end(self, job: str, asked: rec.Asked, seen: Seen, row: rec.Row) -> None:
        count = len(row.token_ids or [])
        if row.status == "succeeded" and count != self._wanted_count(asked):
            self.broke("wrong_count", job, f"{count} tokens stored of {self._wanted_count(asked)}")
        has_run = count > 0 or row.status == "succeeded"
        if has_run and isinstance(asked.prompt, list) and row.prompt_tokens != len(asked.prompt):
            text = f"{row.prompt_tokens} prompt tokens of {len(asked.prompt)}"
            self.broke("wrong_usage", job, text)
        if seen.end is None:
            self.broke("no_end", job, f"`{row.status}`, which its stream never said")
            return
        data = seen.end.data
        error = data.get("error") or {}
        told = (seen.end.name, data.get("status"), data.get("finish_reason"), error.get("code"))
        if told != (row.status, row.status, row.finish_reason, row.error_code):
            self.broke("end_differs", job, f"the stream said {told}, the row {row.status}")
        usage = data.get("usage") or {}
        wanted = {
            "prompt_tokens": row.prompt_tokens or 0,
            "completion_tokens": len(seen.ids),
            "total_tokens": (row.prompt_tokens or 0) + len(seen.ids),
        }
        if any(usage.get(name) != value for name, value in wanted.items()):
            self.broke("wrong_usage", job, f"usage {usage}, not {wanted}")

    def _wanted_count(self, asked: rec.Asked) -> int:
        if asked.reference is None:
            return asked.num_tokens
        reference = self.references.get(asked.reference)
        return asked.num_tokens if reference is None else len(reference.token_ids)

    def _judge_stored(self, job: str, seen: Seen, row: rec.Row) -> None:
        ids, ends = row.token_ids or [], row.ends or []
        if seen.end is None and seen.ids == ids[: len(seen.ids)]:
            return  # `no_end` says it
        if seen.ids != ids or seen.text != (row.text or ""):
            first = next(
                (i for i, (a, b) in enumerate(zip(seen.ids, ids, strict=False)) if a != b), -1
            )
            counts = f"{len(seen.ids)} and {len(ids)} tokens, first other at {first}"
            self.broke("stored_differs", job, f"streamed and stored differ: {counts}")
        if len(ends) != len(ids) or not set(seen.cuts) <= {*ends, len(row.text or "")}:
            self.broke("stored_differs", job, "the text was cut where no token ends")

    def _judge_poison(self, job: str, asked: rec.Asked, row: rec.Row) -> None:
        if asked.poison is None:
            if row.dead_letter is not None or row.error_code == "poison":
                self.broke("innocent_dead", job, f"dead letter {row.dead_letter}")
            return
        if row.status == "canceled":
            return
        if row.dead_letter is None or row.error_code != "poison":
            self.broke("poison_alive", job, f"`{row.status}` {row.error_code}, no dead letter")
        crashed = [each for each in row.attempts if each.outcome == "crashed"]
        if max(len(crashed), row.num_crashes) > MAX_RUNS:
            self.broke("too_many_runs", job, f"{len(crashed)} runs died of it")

    def _judge_run(self) -> None:
        rules, figures = self.rules, self.figures
        for name, found in figures.unended_refusals(self.asked, self.job_of).items():
            if not rules.may_refuse:
                self.broke("bad_answer", name, found)
        if rules.max_resume_s is not None and figures.resume_p99_s > rules.max_resume_s:
            text = f"p99 of resuming is {figures.resume_p99_s:.1f} s, not {rules.max_resume_s} s"
            self.broke("slow_resume", "", text)
        if rules.max_silence_s is not None and figures.silence_p99_s > rules.max_silence_s:
            text = f"p99 of silence is {figures.silence_p99_s:.1f} s, not {rules.max_silence_s} s"
            self.broke("slow_resume", "", text)
        if figures.num_stale_writes < rules.min_stale_writes:
            text = f"{figures.num_stale_writes} stale writes were counted: the fault did not bite"
            self.broke("few_stale_writes", "", text)
        if rules.needs_takeovers and not any(row.attempt > 1 for row in self.rows.values()):
            self.broke("no_takeover", "", "no job had a second attempt: the faults did not bite")

    def _figures(self) -> dict[str, Any]:
        rows = self.rows.values()
        return self.figures.summary() | {
            "jobs_accepted": len(self.key_of),
            "jobs_taken_over": sum(row.attempt > 1 for row in rows),
            "attempts": sum(row.attempt for row in rows),
            "dead_letters": sum(row.dead_letter is not None for row in rows),
            "statuses": dict(Counter(row.status for row in rows)),
            "violations": dict(Counter(each.code for each in self.violations)),
        }
