import pytest
import torch

from headrace.kernels.logprobs import TOLERANCE, logprobs, logprobs_reference

pytestmark = pytest.mark.gpu


def check_equal(actual, expected, dtype):
    bound = TOLERANCE[dtype]
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[0], expected[0], atol=bound, rtol=bound)
    torch.testing.assert_close(actual[2], expected[2], atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_seqs", "vocab", "k"), [(1, 1, 1), (2, 2048, 5), (3, 3000, 2)])
def test_kernel_equals_its_reference(num_seqs, vocab, k, dtype, device):
    # In 16 bits many of 3000 logits are equal, so the order of ties is tested too.
    logits = (torch.randn(num_seqs, vocab, device=device) * 3).to(dtype)
    tokens = torch.randint(vocab, (num_seqs,), device=device)
    check_equal(logprobs(logits, tokens, k), logprobs_reference(logits, tokens, k), dtype)


@pytest.mark.parametrize("function", [logprobs, logprobs_reference])
def test_equal_logits_are_listed_by_lower_id(function, device):
    logits = torch.zeros(1, 5000, device=device)
    logits[0, [4000, 17, 2500]] = 1.0
    _, top_ids, _ = function(logits, torch.tensor([0], device=device), 5)
    assert top_ids.tolist() == [[17, 2500, 4000, 0, 1]]


@pytest.mark.parametrize("function", [logprobs, logprobs_reference])
def test_masked_tokens_come_last_with_minus_infinity(function, device):
    logits = torch.full((1, 6), float("-inf"), device=device)
    logits[0, 4] = 2.0
    chosen, top_ids, top = function(logits, torch.tensor([1], device=device), 3)
    assert chosen.tolist() == [float("-inf")]
    assert top_ids.tolist() == [[4, 0, 1]]
    assert top.tolist() == [[0.0, float("-inf"), float("-inf")]]


def test_probabilities_sum_to_one_and_the_chosen_is_among_them(device):
    logits = torch.randn(2, 40, device=device)
    tokens = torch.tensor([3, 39], device=device)
    chosen, top_ids, top = logprobs(logits, tokens, 40)
    torch.testing.assert_close(top.exp().sum(1), torch.ones(2, device=device))
    assert torch.equal(top[top_ids == tokens[:, None]], chosen)


def test_no_alternatives_wanted(device):
    logits, tokens = torch.randn(2, 40, device=device), torch.tensor([3, 39], device=device)
    chosen, top_ids, top = logprobs(logits, tokens, 0)
    assert top_ids.shape == top.shape == (2, 0)
    torch.testing.assert_close(chosen, logprobs_reference(logits, tokens, 0)[0])


def test_bad_arguments_are_told_apart(device):
    logits, tokens = torch.randn(2, 40, device=device), torch.tensor([3, 39], device=device)
    with pytest.raises(ValueError, match=r"k must be from 0 to vocab; found 41 with vocab 40: "):
        logprobs(logits, tokens, 41)
    with pytest.raises(ValueError, match=r"k must be from 0 to vocab; found -1 with vocab 40: "):
        logprobs(logits, tokens, -1)
    with pytest.raises(ValueError, match=r"tokens must be torch.int64; found torch.int32: "):
        logprobs(logits, tokens.int(), 1)
