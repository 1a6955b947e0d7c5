import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from headrace.kernels.fp8 import FP8
from headrace.kernels.qkv_rope_write import (
    TOLERANCE,
    qkv_rope_write,
    qkv_rope_write_reference,
    rotate_reference,
)

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MAX_POSITIONS = 40


def make_inputs(num_tokens, heads, head_dim, dtype, device, block_size=16):
    num_q_heads, num_kv_heads = heads
    angles = torch.rand(MAX_POSITIONS, head_dim // 2, device=device) * 6.3
    cache = torch.full((3, block_size, num_kv_heads, head_dim), float("nan"), device=device)
    slots = torch.randperm(3 * block_size)[:num_tokens].to(torch.int32)
    slots[1::3] = -1
    return {
        "qkv": torch.randn(
            num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim, device=device
        ).to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.randint(MAX_POSITIONS, (num_tokens,), dtype=torch.int32).to(device),
        "slots": slots.to(device),
        "k_cache": cache.to(dtype, copy=True),
        "v_cache": cache.to(dtype, copy=True),
        "num_q_heads": num_q_heads,
    }


def by_heads(cache):
    """Return an equal cache whose memory holds each block head by head, as a view."""
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def run_both(inputs, lay_out=torch.clone):
    """Return (kernel's q, k, v) and (reference's), each on caches of its own."""
    results = []
    for function in (qkv_rope_write, qkv_rope_write_reference):
        caches = {name: lay_out(inputs[name]) for name in ("k_cache", "v_cache")}
        q = function(**(inputs | caches))
        results.append((q, caches["k_cache"], caches["v_cache"]))
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "heads", "head_dim"),
    [(1, (1, 1), 64), (5, (6, 2), 96), (4, (9, 3), 64), (3, (4, 4), 128), (2, (20, 1), 256)],
)
def test_kernel_equals_its_reference(
    num_tokens, heads, head_dim, has_norm, dtype, device, assert_close
):
    inputs = make_inputs(num_tokens, heads, head_dim, dtype, device)
    if has_norm:
        inputs["q_norm"] = torch.randn(head_dim, device=device).to(dtype)
        inputs["k_norm"] = torch.randn(head_dim, device=device).to(dtype)
    (q, k, v), (expected_q, expected_k, expected_v) = run_both(inputs)
    assert_close(q, expected_q, TOLERANCE)
    # NaN marks what must not be written: the same slots stay NaN, the others hold numbers.
    assert torch.equal(k.isnan(), expected_k.isnan())
    assert_close(k.nan_to_num(), expected_k.nan_to_num(), TOLERANCE)
    assert torch.equal(v.isnan(), expected_v.isnan())
    assert torch.equal(v.nan_to_num(), expected_v.nan_to_num())


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_is_added_before_all_else(dtype, has_norm, device, assert_close):
    inputs = make_inputs(3, (6, 2), 64, dtype, device)
    # Halves of small integers: a sum that no dtype rounds, so that it can be compared exactly.
    for name in ("qkv", "bias"):
        inputs[name] = (torch.randint(-8, 8, inputs["qkv"].shape, device=device) / 2).to(dtype)
    inputs["bias"] = inputs["bias"][0].contiguous()
    if has_norm:
        inputs["q_norm"] = inputs["k_norm"] = torch.randn(64, device=device).to(dtype)
    out = torch.full((3, 6, 64), float("nan"), dtype=dtype, device=device)
    added = inputs | {"qkv": inputs["qkv"] + inputs["bias"], "bias": None}
    caches = {name: inputs[name].clone() for name in ("k_cache", "v_cache")}
    expected = qkv_rope_write(**(added | caches))
    assert qkv_rope_write(**inputs, out=out) is out
    assert_close(out, expected, TOLERANCE)
    for name, cache in caches.items():
        assert_close(inputs[name].nan_to_num(), cache.nan_to_num(), TOLERANCE)
    (q, _, v), (expected_q, _, expected_v) = run_both(inputs)
    assert_close(q, expected_q, TOLERANCE)
    assert torch.equal(v.nan_to_num(), expected_v.nan_to_num())


@pytest.mark.parametrize("launch", [None, {"HEADS": 1, "num_warps": 1}])
def test_the_strides_of_a_cache_do_not_matter(launch, device):
    inputs = make_inputs(5, (6, 2), 64, torch.float32, device) | {"launch": launch}
    ours, views = ({**inputs}, {**inputs})
    wide = torch.full((3, 2, 16, 2, 64), float("nan"), device=device)  # K and V side by side
    ours |= {"k_cache": by_heads(inputs["k_cache"]), "v_cache": by_heads(inputs["v_cache"])}
    views |= {"k_cache": wide[:, 0], "v_cache": wide[:, 1]}
    assert not ours["k_cache"].is_contiguous()
    expected_q = qkv_rope_write(**inputs)
    for changed in (ours, views):
        assert torch.equal(qkv_rope_write(**changed), expected_q)
        for name in ("k_cache", "v_cache"):
            assert torch.equal(changed[name].isnan(), inputs[name].isnan())
            assert torch.equal(changed[name].nan_to_num(), inputs[name].nan_to_num())


def test_many_tokens_are_laid_out_in_larger_programs(device, assert_close):
    # One token more than the limit below which programs are small; one head, so it stays quick.
    inputs = make_inputs(257, (1, 1), 64, torch.float32, device, block_size=128)
    (q, k, v), (expected_q, expected_k, expected_v) = run_both(inputs)
    assert_close(q, expected_q, TOLERANCE)
    assert torch.equal(k.isnan(), expected_k.isnan())
    assert_close(k.nan_to_num(), expected_k.nan_to_num(), TOLERANCE)
    assert torch.equal(v.nan_to_num(), expected_v.nan_to_num())


def make_fp8_inputs(dtype, device, head_dim=64):
    inputs = make_inputs(5, (6, 2), head_dim, dtype, device)
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name].to(FP8)
    scales = torch.rand(2, 2, device=device) + 0.5
    return inputs | {"k_scale": scales[0].contiguous(), "v_scale": scales[1].contiguous()}


@pytest.mark.parametrize("lay_out", [torch.clone, by_heads])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
def test_an_fp8_cache_holds_the_scaled_values(has_norm, dtype, lay_out, device, assert_close):
    inputs = make_fp8_inputs(dtype, device)
    if has_norm:
        inputs["q_norm"] = inputs["k_norm"] = torch.randn(64, device=device).to(dtype)
    (q, k, v), (expected_q, expected_k, expected_v) = run_both(inputs, lay_out)
    assert_close(q, expected_q, TOLERANCE)
    assert torch.equal(v.view(torch.uint8), expected_v.view(torch.uint8))
    # K was rounded to the dtype before: a last place there may be a step of e4m3, 1/8 at most.
    assert torch.equal(k.float().isnan(), expected_k.float().isnan())
    k, expected_k = k.float().nan_to_num(), expected_k.float().nan_to_num()
    torch.testing.assert_close(k, expected_k, rtol=0.126, atol=0.02)
    differ = (k != expected_k).float().sum() / (~expected_q.isnan()).sum()
    assert differ <= (0.002 if dtype is torch.float32 else 0.1)


def test_fp8_saturates_and_keeps_nan(device):
    inputs = make_fp8_inputs(torch.float32, device)
    inputs |= {"slots": torch.arange(5, dtype=torch.int32, device=device)}
    inputs["v_scale"].fill_(0.5)
    nan, inf = float("nan"), float("inf")
    row = torch.tensor([224.0, 225.0, 1e30, -1e30, nan, inf, -inf, 1.0625], device=device)
    inputs["qkv"][2, -8:] = row
    qkv_rope_write(**inputs)
    stored = inputs["v_cache"].float()[0, 2, 1, -8:]
    # 1.0625 / 0.5 lies between 2 and 2.25: nearest, ties to even.
    expected = torch.tensor([448, 448, 448, -448, nan, nan, nan, 2.0], device=device)
    torch.testing.assert_close(stored, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", [qkv_rope_write, qkv_rope_write_reference])
def test_only_named_slots_are_written(function, device):
    inputs = make_inputs(4, (6, 2), 64, torch.float32, device)
    inputs["slots"] = torch.tensor([17, -1, 0, 47], dtype=torch.int32, device=device)
    function(**inputs)
    for cache in (inputs["k_cache"], inputs["v_cache"]):
        written = ~cache.view(48, -1).isnan().all(dim=1)
        assert written.nonzero().flatten().tolist() == [0, 17, 47]
        assert not cache.view(48, -1)[written].isnan().any()
    v_of_first_token = inputs["qkv"][0].view(10, 64)[8:]
    assert torch.equal(inputs["v_cache"].view(48, 2, 64)[17], v_of_first_token)


def test_a_batch_of_padding_writes_nothing(device):
    inputs = make_inputs(3, (3, 1), 64, torch.float32, device)
    inputs["slots"].fill_(-1)
    assert not qkv_rope_write(**inputs).isnan().any()
    assert inputs["k_cache"].isnan().all()
    assert inputs["v_cache"].isnan().all()


def test_the_rotation_is_what_transformers_computes():
    x = torch.randn(5, 3, 64)
    angles = torch.rand(5, 32) * 6.3
    doubled = torch.cat((angles, angles), dim=-1)[None]
    expected, _ = apply_rotary_pos_emb(
        x.transpose(0, 1)[None], x.transpose(0, 1)[None], doubled.cos(), doubled.sin()
    )
    actual = rotate_reference(x, angles.cos(), angles.sin())
    torch.testing.assert_close(actual, expected[0].transpose(0, 1))


def test_bad_arguments_are_told_apart(device):
    inputs = make_inputs(4, (6, 2), 64, torch.float32, device)
    for changed, text in (
        ({"num_q_heads": 5}, r"a multiple of num_kv_heads; found 5 and 2: "),
        ({"num_q_heads": 4}, r"qkv must have shape \[4, 512\]; found \[4, 640\]: "),
        ({"slots": inputs["slots"].long()}, r"slots must be torch.int32; found torch.int64: "),
        ({"positions": inputs["positions"][:2]}, r"positions must have shape \[4\]; found \[2\]: "),
        ({"cos": inputs["cos"].half()}, r"cos must be torch.float32; found torch.float16: "),
        ({"v_cache": inputs["v_cache"][:2]}, r"v_cache must have shape .*; found \[2, 16"),
        ({"v_cache": by_heads(inputs["v_cache"])}, r"v_cache must have the strides of k_cache"),
        (
            {"k_cache": inputs["k_cache"].half()},
            r"k_cache must be torch.float32 as .*; found torch.float16: ",
        ),
        ({"k_cache": inputs["k_cache"][0]}, r"k_cache must be .*; found \[16, 2, 64\]: "),
        (
            {"k_cache": inputs["k_cache"].transpose(2, 3).contiguous().transpose(2, 3)},
            r"k_cache must be dense in its last dimension; found strides ",
        ),
        (
            {"k_scale": torch.ones(2, device=device)},
            r"k_scale must be given for .*; found one with torch.float32: ",
        ),
        (
            {name: inputs[name].to(FP8) for name in ("k_cache", "v_cache")},
            r"k_scale must be given for .*; found none with torch.float8_e4m3fn: ",
        ),
        ({"bias": torch.ones(64, device=device)}, r"bias must have shape \[640\]; found \[64\]: "),
        ({"out": torch.empty(4, 6, 32)}, r"out must have shape \[4, 6, 64\]; found \[4, 6, 32\]: "),
        ({"q_norm": torch.ones(64, device=device)}, r"must come together; found only q_norm: "),
    ):
        with pytest.raises(ValueError, match=text):
            qkv_rope_write(**(inputs | changed))
