import json
import tomllib
from dataclasses import asdict, replace

import pytest

from headrace.kernels import tuning
from headrace.kernels.tuning import (
    OPS,
    TABLES,
    SkinnyConfig,
    as_json,
    choose,
    guess,
    parse_table,
    tables,
)

ROWS = SkinnyConfig("rows", 4, 1024)
TILES = SkinnyConfig("tiles", 32, 128, 4, num_stages=4)
#: Each (n, k) of a layer of the three models measured, and a few that belong to no model.
SHAPES = [
    *((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)),
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    *((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)),
    *((1, 1), (17, 33), (100, 16), (16, 100_000)),
]
#: What one program may have on Hopper.
MAX_SHARED_BYTES = 227 * 1024


def entry(m: int, config: object) -> dict:
    return {"op": "add", "n": 1024, "k": 2048, "m": m, "config": config}


def document(*entries: dict) -> dict:
    return {"device": "NVIDIA Test", "source": "measured", "entries": list(entries)}


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """Put one table in place of the shipped ones."""

    def put(*entries: dict) -> None:
        (tmp_path / "test.json").write_text(json.dumps(document(*entries)))

    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    tables.cache_clear()
    yield put
    tables.cache_clear()


def test_invariant_1_the_same_question_has_one_answer():
    assert choose("NVIDIA H200", "add", 3, 1024, 2048) == choose(
        "NVIDIA H200", "add", 3, 1024, 2048
    )


def test_invariant_2_rows_take_the_next_larger_entry(shipped):
    shipped(entry(1, asdict(ROWS)), entry(8, "cublas"), entry(16, asdict(TILES)))
    answers = [choose("NVIDIA Test", "add", m, 1024, 2048) for m in (1, 2, 8, 9, 16)]
    assert answers == [ROWS, "cublas", "cublas", TILES, TILES]


def test_invariant_2_beyond_the_last_entry_and_of_no_table_is_guessed(shipped):
    shipped(entry(8, "cublas"))
    assert choose("NVIDIA Test", "add", 9, 1024, 2048) == "cublas"
    assert choose("NVIDIA Test", "plain", 2, 1024, 2048) == guess(2, 1024, 2048)
    assert choose("NVIDIA Test", "add", 1, 1024, 2049) == guess(1, 1024, 2049)
    assert choose("Another GPU", "add", 2, 1024, 2048) == guess(2, 1024, 2048)
    assert choose("Another GPU", "add", 3, 1024, 2048) == "cublas"


def test_more_rows_than_the_kernels_are_built_for_are_cublas():
    assert choose("NVIDIA H200", "rms_norm", 257, 4096, 1024) == "cublas"
    assert choose("NVIDIA H200", "rms_norm", 256, 4096, 1024) == "cublas", "nobody measured it yet"


@pytest.mark.parametrize("m", [1, 2, 5, 16, 33, 64])
def test_a_guess_fits_any_shape(m):
    for n, k in SHAPES:
        config = guess(m, n, k)
        assert config.method == ("rows" if m == 1 else "tiles")
        # No split is left without columns of its own, and none needs a second workspace.
        assert config.splits == 1 or config.splits * config.block_k <= k
        tiles = -(-n // config.block_n)
        assert config.splits == 1 or tiles * config.splits * 64 * (config.block_n + 1) <= 1 << 22


def test_each_shipped_table_is_of_the_schema():
    for path in TABLES.glob("*.json"):
        read = json.loads(path.read_text())
        assert path.stem == read["device"].lower().replace(" ", "-")
        assert read["source"] == "measured"
        assert all(read[name] for name in ("command", "torch", "triton"))
        for (op, n, k), by_rows in parse_table(read, path.name).items():
            for m, choice in by_rows.items():
                assert choice == "cublas" or fits(choice, op, m, n, k), (path.name, op, n, k, m)


def fits(config: SkinnyConfig, op: str, m: int, n: int, k: int) -> bool:
    """Say whether a config's shared memory fits, and its tiles are not mostly padding."""
    x_bytes = {"none": 2, "rms_norm": 4, "silu_mul": 4}[OPS[op][0]] * max(16, m)
    stage = config.block_k * (2 * config.block_n + x_bytes)
    in_flight = stage * max(1, config.num_stages - 1) if config.method == "tiles" else 0
    is_full = config.block_n < 2 * n and config.splits * config.block_k < 2 * k
    return in_flight <= MAX_SHARED_BYTES and is_full


def test_the_folder_of_tables_ships_with_the_package():
    config = tomllib.loads((TABLES.parents[1] / "pyproject.toml").read_text())
    data = config["tool"]["setuptools"]["package-data"]
    assert data["headrace.kernels"] == ["tuning/*.json"]


def test_an_entry_read_back_is_the_choice_written():
    for choice in (ROWS, TILES, replace(ROWS, uses_pdl=True), "cublas"):
        read = parse_table(json.loads(json.dumps(document(entry(4, as_json(choice))))), "t.json")
        assert read == {("add", 1024, 2048): {4: choice}}


@pytest.mark.parametrize(
    "broken",
    [
        entry(4, {"method": "rows"}),
        entry(4, asdict(ROWS) | {"block_n": 3}),
        entry(4, asdict(ROWS) | {"splits": 2}),
        entry(4, asdict(ROWS) | {"waves": 2}),
        entry(4, asdict(TILES) | {"block_n": 8}),
        entry(4, asdict(TILES) | {"num_stages": 0}),
        entry(4, asdict(TILES) | {"num_warps": 3}),
        entry(4, asdict(TILES) | {"method": "magic"}),
        entry(4, "magic"),
        entry(257, "cublas"),
        entry(4, "cublas") | {"op": "conv"},
        {"op": "add", "n": 1024, "k": 2048, "config": "cublas"},
        entry(1, "cublas"),  # a second for the same rows
    ],
    ids=repr,
)
def test_invariant_3_a_broken_table_is_refused_by_its_entry(broken):
    with pytest.raises(ValueError, match=r"t\.json: .*(entry 1 has not|a second for)"):
        parse_table(document(entry(1, "cublas"), broken), "t.json")


def test_a_table_says_where_its_figures_are_from():
    with pytest.raises(ValueError, match="source must be measured or heuristic; found 'dreamt'"):
        parse_table(document() | {"source": "dreamt"}, "t.json")


def test_bad_questions_are_told_apart():
    with pytest.raises(ValueError, match=r"op must be one of plain, .*; found 'conv': "):
        choose("NVIDIA H200", "conv", 1, 8, 8)
    with pytest.raises(ValueError, match="must be at least 1; found 0, 8, 8: "):
        choose("NVIDIA H200", "add", 0, 8, 8)


def test_a_config_is_named_as_tables_print_it():
    assert TILES.text() == "tiles 32x128 x4 w4 s4"
    assert replace(ROWS, uses_pdl=True).text() == "rows 4x1024 w4 s1 pdl"
