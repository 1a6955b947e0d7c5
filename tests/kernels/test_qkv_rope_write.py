import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

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
        "k_cache": cache.to(dtype),
        "v_cache": cache.to(dtype),
        "num_q_heads": num_q_heads,
    }


def run_both(inputs):
    """Return (kernel's q, k, v) and (reference's), each on caches of its own."""
    results = []
    for function in (qkv_rope_write, qkv_rope_write_reference):
        caches = {name: inputs[name].clone() for name in ("k_cache", "v_cache")}
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
        ({"num_q_heads": 5}, r"num_q_heads must be a multiple of num_kv_heads; found 5 and 2: "),
        ({"num_q_heads": 4}, r"qkv must have shape \[4, 512\]; found \[4, 640\]: "),
        ({"slots": inputs["slots"].long()}, r"slots must be torch.int32; found torch.int64: "),
        ({"positions": inputs["positions"][:2]}, r"positions must have shape \[4\]; found \[2\]: "),
        ({"cos": inputs["cos"].half()}, r"cos must be torch.float32; found torch.float16: "),
        ({"v_cache": inputs["v_cache"][:2]}, r"v_cache must have shape .*; found \[2, 16, 2, 64\]"),
        ({"k_cache": inputs["k_cache"].half()}, r"k_cache must be torch.float32; found"),
        ({"q_norm": torch.ones(64, device=device)}, r"must come together; found only q_norm: "),
    ):
        with pytest.raises(ValueError, match=text):
            qkv_rope_write(**(inputs | changed))
