import pytest
import torch

from headrace.kernels.embed import TOLERANCE, embed_rms_norm, embed_rms_norm_reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 1), (1, 576), (5, 100), (4, 1024)])
def test_embed_rms_norm_equals_its_reference(num_tokens, hidden, dtype, device, assert_close):
    embedding = torch.randn(11, hidden, device=device).to(dtype)
    weight = torch.randn(hidden, device=device).to(dtype)
    tokens = torch.randint(11, (num_tokens,), dtype=torch.int32).to(device)
    tokens[1::2] = -1
    shape = (num_tokens, hidden)
    out = torch.full(shape, float("nan"), dtype=dtype, device=device)
    residual = torch.full(shape, float("nan"), device=device)
    found = embed_rms_norm(tokens, embedding, weight, 1e-5, out, residual)
    assert found[0] is out
    assert found[1] is residual
    expected, expected_residual = embed_rms_norm_reference(tokens, embedding, weight, 1e-5)
    assert torch.equal(residual, expected_residual)
    assert_close(out, expected, TOLERANCE)
    assert torch.equal(out[1::2], torch.zeros_like(out[1::2]))


def test_no_tokens_are_no_launch(device):
    tokens = torch.empty(0, dtype=torch.int32, device=device)
    normed, residual = embed_rms_norm(
        tokens, torch.randn(3, 8, device=device), torch.ones(8, device=device), 1e-6
    )
    assert normed.shape == residual.shape == (0, 8)


def test_bad_arguments_are_told_apart(device):
    tokens = torch.zeros(4, dtype=torch.int32, device=device)
    embedding, weight = torch.randn(3, 64, device=device), torch.randn(64, device=device)
    with pytest.raises(ValueError, match=r"tokens must be torch.int32; found torch.int64: "):
        embed_rms_norm(tokens.long(), embedding, weight, 1e-5)
    with pytest.raises(ValueError, match=r"tokens must have shape \[0\]; found \[2, 2\]: "):
        embed_rms_norm(tokens.view(2, 2), embedding, weight, 1e-5)
    with pytest.raises(ValueError, match=r"weight must have shape \[64\]; found \[32\]: "):
        embed_rms_norm(tokens, embedding, weight[:32], 1e-5)
    with pytest.raises(ValueError, match=r"residual must be torch.float32; found torch.float16: "):
        embed_rms_norm(tokens, embedding, weight, 1e-5, residual=torch.empty(4, 64).half())
