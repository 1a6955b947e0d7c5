from dataclasses import replace

import pytest
import torch

from headrace.kernels.rms_norm import rms_norm_reference
from headrace.kernels.silu_mul import silu_mul_reference
from headrace.kernels.skinny_linear import (
    TOLERANCE,
    SkinnyWorkspace,
    skinny_linear,
    skinny_linear_reference,
)
from headrace.kernels.tuning import SkinnyConfig

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PROLOGUES = ["none", "rms_norm", "silu_mul"]
# 576, 960 and 1536 are SmolLM2's; no tile of 128 divides 576 or 960, no tile of 64 divides 100.
SHAPES = [(100, 1536), (576, 576), (100, 960)]  # (n, k)
ROWS = SkinnyConfig("rows", 64, 512, num_warps=16)
TILES = SkinnyConfig("tiles", 64, 128, 4, num_stages=3)


@pytest.fixture
def workspace(device) -> SkinnyWorkspace:
    made = SkinnyWorkspace.allocate(device, 1 << 19, 256)
    made.partials.fill_(float("nan"))
    return made


def arguments(m, n, k, dtype, device, prologue="none", has_bias=False, adds=False) -> dict:
    """Random arguments of both the launcher and its reference."""
    wide = 2 * k if prologue == "silu_mul" else k
    normed = prologue == "rms_norm"
    made = {
        "x": torch.randn(m, wide, device=device).to(torch.float32 if normed else dtype),
        "weight": torch.randn(n, k, device=device).to(dtype),
        "prologue": prologue,
    }
    if normed:
        # A stream of another size than one, as the norm is there for.
        made["x"] *= 3.0
        made |= {"norm_weight": torch.randn(k, device=device).to(dtype), "eps": 0.5}
    if has_bias:
        made["bias"] = torch.randn(n, device=device).to(dtype)
    if adds:
        made["residual"] = torch.randn(m, n, device=device)
    return made


def assert_is_reference(actual: torch.Tensor, made: dict, dtype: torch.dtype) -> None:
    """Compare by the error against the result's own size, which grows with the root of k."""
    expected = skinny_linear_reference(**made)
    assert actual.shape == expected.shape
    scale = made["weight"].shape[1] ** 0.5
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.float() / scale, expected.float() / scale, atol=bound, rtol=bound
    )


def check(made: dict, dtype: torch.dtype, **options) -> None:
    expected = dict(made)
    if "residual" in made:
        made = made | {"residual": made["residual"].clone()}
        assert skinny_linear(**made, **options) is made["residual"]
        assert_is_reference(made["residual"], expected, dtype)
        return
    shape = (made["x"].shape[0], made["weight"].shape[0])
    out = torch.full(shape, float("nan"), dtype=dtype, device=made["x"].device)
    assert skinny_linear(**made, out=out, **options) is out
    assert_is_reference(out, expected, dtype)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("config", [ROWS, TILES, replace(TILES, splits=1)], ids=str)
def test_every_prologue_and_epilogue_equals_the_reference(
    config, prologue, adds, device, workspace
):
    for m, (n, k), has_bias in ((1, SHAPES[0], True), (5, SHAPES[1], False)):
        made = arguments(m, n, k, torch.bfloat16, device, prologue, has_bias, adds)
        check(made, torch.bfloat16, config=config, workspace=workspace)


@pytest.mark.parametrize("m", [1, 2, 16, 33, 64])
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_every_row_count_equals_the_reference(m, prologue, device, workspace):
    n, k = SHAPES[2]
    made = arguments(m, n, k, torch.bfloat16, device, prologue, adds=prologue == "silu_mul")
    for config in (TILES, ROWS) if m == 2 else (TILES,):
        check(made, torch.bfloat16, config=config, workspace=workspace)


@pytest.mark.parametrize(("m", "block_m"), [(65, 64), (130, 128), (256, 128), (40, 16)])
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_rows_beyond_a_tile_are_tiles_of_their_own(m, block_m, prologue, device, workspace):
    config = SkinnyConfig("tiles", 64, 64, 2, block_m=block_m)
    made = arguments(m, 100, 192, torch.bfloat16, device, prologue, True, prologue != "none")
    for splits in (1, 2):
        check(made, torch.bfloat16, config=replace(config, splits=splits), workspace=workspace)
        assert not workspace.counters.any()


@pytest.mark.parametrize("m", [1, 5, 40])
def test_the_guess_needs_no_workspace(m, device):
    check(arguments(m, 48, 80, torch.bfloat16, device, "rms_norm"), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_every_dtype_equals_the_reference(prologue, dtype, device, workspace):
    made = arguments(3, 100, 576, dtype, device, prologue, has_bias=True)
    for config in (ROWS, TILES):
        check(made, dtype, config=config, workspace=workspace)


def test_the_result_may_be_fp32(device):
    made = arguments(2, 64, 128, torch.bfloat16, device)
    out = torch.full((2, 64), float("nan"), device=device)
    skinny_linear(**made, out=out)
    expected = skinny_linear_reference(**made, dtype=torch.float32)
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_invariant_2_counters_are_zero_after_each_launch(prologue, device, workspace):
    made = arguments(5, 100, 576, torch.bfloat16, device, prologue)
    runs = []
    for _ in range(3):
        workspace.partials.fill_(float("nan"))
        runs.append(skinny_linear(**made, config=TILES, workspace=workspace))
        assert not workspace.counters.any()
    assert_is_reference(runs[0], made, torch.bfloat16)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_invariant_1_a_row_does_not_depend_on_the_rows_beside_it(device, workspace):
    made = arguments(16, 100, 576, torch.bfloat16, device, "rms_norm")
    whole = skinny_linear(**made, config=TILES, workspace=workspace)
    for row in (0, 7):
        alone = made | {"x": made["x"][row : row + 1]}
        one = skinny_linear(**alone, config=TILES, workspace=workspace)
        assert torch.equal(one[0], whole[row])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("config", [ROWS, TILES], ids=["rows", "tiles"])
def test_invariant_3_a_launch_that_starts_early_sees_all_that_went_before(
    config, whole, device, workspace
):
    # Each layer reads what the one before it wrote; the interpreter runs them one by one anyway.
    width = 256
    if whole and config.method == "rows":
        config = replace(config, block_n=16, block_k=width)
    early = replace(config, splits=min(config.splits, 2), uses_pdl=True)
    weight = torch.randn(width, width, device=device).bfloat16()
    norm = torch.randn(width, device=device).bfloat16()
    found = torch.randn(3, width, device=device)
    expected = found.clone()
    options = {"config": early, "workspace": workspace}
    made = {"weight": weight, "prologue": "rms_norm", "norm_weight": norm}
    for _ in range(4):
        y = skinny_linear(found, **made, **options)
        skinny_linear(y, weight, residual=found, **options)
        y = skinny_linear_reference(expected, **made)
        expected = skinny_linear_reference(y, weight, residual=expected)
    error = (found - expected).norm() / expected.norm()
    assert error < 0.05, error


def test_splits_beyond_the_last_column_add_nothing(device, workspace):
    # 576 columns are cut into 8 splits of 128, of which the last three have none.
    made = arguments(2, 64, 576, torch.bfloat16, device, "rms_norm")
    check(made, torch.bfloat16, config=replace(TILES, splits=8), workspace=workspace)


def test_the_reference_is_its_parts_one_after_another():
    x, weight = torch.randn(3, 32), torch.randn(8, 32)
    norm, residual = torch.randn(32), torch.randn(3, 8)
    linear = torch.nn.functional.linear
    normed = skinny_linear_reference(x, weight, None, "rms_norm", norm, 1e-5)
    torch.testing.assert_close(normed, linear(rms_norm_reference(x, norm, 1e-5), weight))
    gate_up = torch.randn(3, 64)
    gated = skinny_linear_reference(gate_up, weight, None, "silu_mul", residual=residual)
    torch.testing.assert_close(gated, residual + linear(silu_mul_reference(gate_up), weight))


def test_no_rows_are_no_launch(device):
    made = arguments(0, 64, 128, torch.bfloat16, device)
    assert skinny_linear(**made).shape == (0, 64)


BAD = {
    "too many rows": (
        {"x": torch.zeros(257, 32)},
        r"at most 256 rows; found \[257, 32\]: use torch",
    ),
    "one dimension": ({"x": torch.zeros(32)}, r"x must have 2 dimensions .* found \[32\]: "),
    "another k": ({"x": torch.zeros(2, 31)}, r"x must have shape \[2, 32\]; found \[2, 31\]: "),
    "half a gate": ({"prologue": "silu_mul"}, r"x must have shape \[2, 64\]; found \[2, 32\]: "),
    "another dtype": ({"x": torch.zeros(2, 32).half()}, r"x must be torch.float32; found .*16: "),
    "another order": ({"weight": torch.zeros(32, 8).t()}, r"weight must be contiguous; found "),
    "no such prologue": ({"prologue": "gelu"}, r"must be one of none, .*; found 'gelu': take"),
    "norm alone": ({"norm_weight": torch.zeros(32)}, r"prologue 'none' and a norm_weight: pass"),
    "no norm": ({"prologue": "rms_norm"}, r"prologue 'rms_norm' and no norm_weight: pass both"),
    "a long bias": ({"bias": torch.zeros(9)}, r"bias must have shape \[8\]; found \[9\]: "),
    "a wide out": ({"out": torch.zeros(2, 9)}, r"out must have shape \[2, 8\]; found \[2, 9\]: "),
    "out in fp16": ({"out": torch.zeros(2, 8).half()}, r"out must be torch.float32; found "),
    "two outputs": (
        {"out": torch.zeros(2, 8), "residual": torch.zeros(2, 8)},
        r"either out or residual must be given; found both: ",
    ),
    "a narrow residual": (
        {"residual": torch.zeros(2, 8).half()},
        r"residual must be torch.float32; found torch.float16: ",
    ),
    "no workspace": ({"config": TILES}, r"4 splits must have a workspace; found None: pass Skin"),
    "a small workspace": (
        {
            "config": TILES,
            "workspace": SkinnyWorkspace(torch.zeros(4), torch.zeros(1, dtype=torch.int32)),
        },
        r"must hold 4160 floats and 1 tiles; found 4 and 1: ",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_told_apart(name, device):
    changes, message = BAD[name]
    made = {"x": torch.zeros(2, 32), "weight": torch.zeros(8, 32)} | changes
    made = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in made.items()}
    with pytest.raises(ValueError, match=message):
        skinny_linear(**made)
