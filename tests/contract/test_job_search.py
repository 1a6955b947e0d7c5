"""The job search on a real Postgres: every filter, every way of finding, and what is refused."""

from __future__ import annotations

import itertools
import random
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text, update

from headrace.contract import job_search
from headrace.contract.errors import SearchTooBroad
from headrace.contract.ids import new_id
from headrace.contract.job_search import JobFilter, JobSearch, first_id_at
from headrace.contract.labels import label_of, labeling
from headrace.contract.records import jobs, tenants

MODELS = ("m-common", "m-rare")
ERRORS = ("CUDA out of memory", "prompt has 9,120 tokens", "100% of C:\\_x", None)
LONG = "x" * 511
#: Entries that a label might mix up: other letters, equal beginnings, a name that runs on.
METAS = (
    {"env": "Prod", "größe": "è ≠ e\u0300 😀"},
    {"envp": "rod", LONG[:63] + "a": LONG + "a"},
    {"env": "", LONG[:63] + "a": LONG + "b", LONG[:63] + "b": LONG + "a"},
)


@pytest.fixture(scope="module")
def search(engine) -> JobSearch:
    return JobSearch(engine)


@pytest.fixture(scope="module")
def filled(engine, accounts) -> list[dict]:
    """A thousand jobs of a fixed draw, newest first, as plain rows."""
    draw = random.Random(4)
    keys = {name: accounts.create_key(tenant=name, name="k") for name in ("a", "b")}
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    rows = []
    for number in range(1000):
        tenant = draw.choice("aab")
        status = draw.choice(["succeeded"] * 6 + ["failed", "failed", "queued", "expired"])
        error = draw.choice(ERRORS) if status == "failed" else None
        at = begin + timedelta(minutes=number)
        row = {
            "id": first_id_at(at) + f"7{number:019x}",
            "tenant_id": keys[tenant].tenant_id,
            "key_id": keys[tenant].id,
            "model": MODELS[draw.random() < 0.02],
            "job_class": draw.choice(["interactive", "batch"]),
            "priority": "normal",
            "input": {"prompt": "x"},
            "sampling": {"max_tokens": 4},
            "meta": draw.choice([{}, {"env": "prod"}, {"env": "prod", "n": str(number)}, *METAS]),
            "cost_tokens": 5,
            "created_at": at,
            "status": status,
            "worker": draw.choice(["w1", "w2", None]) if status != "queued" else None,
            "finished_at": None if status == "queued" else at,
            "error_code": "engine_refused" if error else None,
            "error_text": error,
            "made_from": None,
        }
        rows.append(row)
    with engine.begin() as db:
        db.execute(jobs.insert(), rows)
        db.execute(labeling(jobs))
        db.execute(text("ANALYZE jobs, job_labels"))
    names = {key.tenant_id: name for name, key in keys.items()}
    return [row | {"tenant": names[row["tenant_id"]]} for row in reversed(rows)]


def matches(row: dict, wanted: JobFilter) -> bool:
    """Say in plain words what a filter means."""
    error = f"{row['error_code']} {row['error_text']}".lower() if row["error_code"] else ""
    return (
        (wanted.id is None or row["id"].startswith(wanted.id))
        and (wanted.tenant is None or wanted.tenant in (row["tenant"], row["tenant_id"]))
        and (not wanted.statuses or row["status"] in wanted.statuses)
        and (wanted.model is None or row["model"] == wanted.model)
        and (wanted.job_class is None or row["job_class"] == wanted.job_class)
        and (wanted.worker is None or row["worker"] == wanted.worker)
        and (wanted.error is None or wanted.error.lower() in error)
        and (wanted.meta is None or row["meta"].get(wanted.meta[0]) == wanted.meta[1])
        and (wanted.created_after is None or row["created_at"] >= wanted.created_after)
        and (wanted.created_before is None or row["created_at"] < wanted.created_before)
    )


def all_pages(search: JobSearch, wanted: JobFilter, limit: int) -> list[str]:
    found, before = [], None
    while True:
        page = search.page(wanted, limit=limit, before=before)
        found += [row["id"] for row in page.rows]
        before = page.next_before
        if before is None:
            return found
        assert len(page.rows) == limit


NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SINGLE = [
    {"tenant": "a"},
    {"tenant": "nobody"},
    {"statuses": ("failed",)},
    {"statuses": ("failed", "expired")},
    {"statuses": ("canceled",)},
    {"model": "m-common"},
    {"model": "m-rare"},
    {"job_class": "batch"},
    {"worker": "w1"},
    {"error": "OUT of mem"},
    {"error": "100% of c:\\_X"},
    {"error": "1000 of"},
    {"error": "engine_refused"},
    {"error": "%%%"},
    {"meta": ("env", "prod")},
    {"meta": ("n", "500")},
    {"meta": ("env", "pro")},
    {"meta": ("env", "")},
    {"meta": ("envp", "rod")},
    {"meta": ("größe", "è ≠ e\u0300 😀")},
    {"meta": ("größe", "è ≠ è 😀")},
    {"meta": (LONG[:63] + "a", LONG + "a")},
    {"meta": (LONG[:63] + "b", LONG + "a")},
    {"created_after": NOON},
    {"created_before": NOON},
    {"id": "job_"},
]


@pytest.fixture(params=[(500, 4000, 25_000), (3, 10, 40), (1, 1, 0)], ids=["walk", "both", "index"])
def ways(request, monkeypatch):
    """Make the search walk to the end, or turn to the indexes early, or at once."""
    first, second, most = request.param
    monkeypatch.setattr(job_search, "STRETCHES", (first, second))
    monkeypatch.setattr(job_search, "SCATTERED_STRETCHES", (first, second))
    monkeypatch.setattr(job_search, "MAX_WALK", most)
    monkeypatch.setattr(job_search, "MAX_SCATTERED_WALK", most)
    monkeypatch.setattr(job_search, "MAX_FAILED_WALK", most)


@pytest.mark.usefixtures("ways")
def test_invariant_1_every_pair_of_filters_finds_exactly_what_matches(search, filled):
    for one, two in itertools.combinations_with_replacement(SINGLE, 2):
        wanted = JobFilter(**{**one, **two})
        expected = [row["id"] for row in filled if matches(row, wanted)]
        assert all_pages(search, wanted, 90) == expected, wanted
        assert sorted(search.ids(wanted, limit=5000)) == sorted(expected), wanted


@pytest.mark.usefixtures("ways")
def test_small_pages_join_without_gap_or_repeat(search, filled):
    wanted = JobFilter(error="out of memory", meta=("env", "prod"))
    expected = [row["id"] for row in filled if matches(row, wanted)]
    assert len(expected) > 10
    assert all_pages(search, wanted, 3) == expected


@pytest.mark.usefixtures("ways")
def test_invariant_5_a_label_that_stands_for_two_values_finds_each(search, filled, monkeypatch):
    monkeypatch.setattr(job_search, "label_of", lambda name, value: label_of("env", "prod"))
    for value in ("prod", "other"):
        wanted = JobFilter(meta=("env", value))
        expected = [row["id"] for row in filled if matches(row, wanted)]
        assert all_pages(search, wanted, 90) == expected
        assert sorted(search.ids(wanted, limit=5000)) == sorted(expected)


def test_a_row_carries_its_tenants_name_and_no_output(search, filled):
    (row,) = search.page(JobFilter(id=filled[0]["id"]), limit=1).rows
    assert row["tenant"] == filled[0]["tenant"]
    assert "output_text" not in row


def test_the_beginning_of_an_id_finds_it(search, filled):
    job_id = filled[7]["id"]
    assert all_pages(search, JobFilter(id=job_id[:-1]), 50) == [
        row["id"] for row in filled if row["id"].startswith(job_id[:-1])
    ]
    assert all_pages(search, JobFilter(id=new_id("job")), 50) == []


def test_jobs_that_another_was_made_from_can_be_left_out(search, filled, engine):
    failed = [row["id"] for row in filled if row["status"] == "failed"]
    with engine.begin() as db:
        db.execute(update(jobs).where(jobs.c.id == filled[0]["id"]).values(made_from=failed[3]))
    wanted = JobFilter(statuses=("failed",), is_unretried=True)
    assert set(search.ids(wanted, limit=1000)) == set(failed) - {failed[3]}
    assert search.made_of(failed[3]) == [filled[0]["id"]]


def test_ids_stop_at_their_limit(search, filled):
    assert len(search.ids(JobFilter(), limit=17)) == 17
    assert len(filled) > 17


def test_invariant_2_a_search_that_takes_too_long_says_to_narrow_it(search, engine, monkeypatch):
    monkeypatch.setattr(job_search, "TIMEOUT_MS", 50)
    with engine.begin() as db:
        db.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(SearchTooBroad, match="narrow it"):
            search.page(JobFilter(), limit=1)
    assert search.page(JobFilter(), limit=1).rows


def test_the_settings_of_a_search_end_with_it(search, engine):
    search.page(JobFilter(), limit=1)
    with engine.connect() as db:
        assert db.execute(text("SHOW statement_timeout")).scalar() == "15s"
        assert db.execute(text("SHOW jit")).scalar() == "on"


def test_invariant_3_a_time_is_a_place_among_the_ids():
    at = datetime.fromtimestamp(int(new_id("job")[4:16], 16) / 1000, UTC)
    before, now = new_id("job"), datetime.now(UTC) + timedelta(milliseconds=2)
    assert first_id_at(at) <= before < first_id_at(now)
    far = datetime(9999, 12, 31, tzinfo=UTC), datetime(1, 1, 1, tzinfo=UTC)
    assert first_id_at(far[0]) > before > first_id_at(far[1])


def test_a_name_that_is_another_tenants_id_finds_both(search, engine, filled):
    with engine.begin() as db:
        db.execute(tenants.insert().values(id=new_id("tenant"), name=filled[0]["tenant_id"]))
    wanted = JobFilter(tenant=filled[0]["tenant_id"])
    expected = [row["id"] for row in filled if row["tenant_id"] == filled[0]["tenant_id"]]
    assert all_pages(search, wanted, 100) == expected
