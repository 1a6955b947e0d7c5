import pytest
import torch

from headrace.kernels.logprobs import (
    MAX_LOGPROBS,
    TOLERANCE,
    chosen_logprobs,
    logprobs_reference,
    logprobs_rows,
    logprobs_work,
)

pytestmark = pytest.mark.gpu
BOUND = TOLERANCE[torch.float32]
POISON = -12345


def make_slots(wanted, device):
    """Scatter how many logprobs each row wants (None: padding) over a column of slots."""
    state = torch.full((len(wanted) + 4, 3), 11, dtype=torch.int32, device=device)
    rows = torch.randperm(len(wanted) + 4)[: len(wanted)].to(torch.int32).to(device)
    for row, k in enumerate(wanted):
        state[rows[row].long(), 1] = -1 if k is None else k
        if k is None:
            rows[row] = -1
    return rows, state[:, 1]


def list_likeliest(logits, wanted):
    """Call logprobs_rows into poisoned memory; return what chosen_logprobs goes on with."""
    device = logits.device
    rows, num_logprobs = make_slots(wanted, device)
    work = logprobs_work(len(wanted), logits.shape[1], device)
    for name in work.__dataclass_fields__:
        getattr(work, name).fill_(POISON)
    ids = torch.full((len(wanted), MAX_LOGPROBS), POISON, dtype=torch.int32, device=device)
    values = torch.full((len(wanted), MAX_LOGPROBS), float(POISON), device=device)
    logprobs_rows(logits, rows, num_logprobs, work, ids, values)
    return {"rows": rows, "num_logprobs": num_logprobs, "work": work, "ids": ids, "values": values}


def logprobs(logits, tokens, k):
    """Call both launchers as logprobs_reference is called; the product that remakes a logit is 1 x.

    hidden is the number of rows: row i of x picks column i of the weight, which is logits[i].
    """
    num_rows = logits.shape[0]
    found = list_likeliest(logits, [k] * num_rows)
    chosen = torch.full((num_rows,), float("nan"), device=logits.device)
    x = torch.eye(num_rows, device=logits.device)
    weight = logits.clamp(min=-3e38).t().contiguous()
    chosen_logprobs(x, weight, tokens=tokens.to(torch.int32), chosen=chosen, **found)
    return chosen, found["ids"][:, :k].long(), found["values"][:, :k]


BOTH = pytest.mark.parametrize("function", [logprobs, logprobs_reference])


@pytest.mark.parametrize(
    ("num_seqs", "vocab", "k"), [(1, 1, 1), (2, 1000, 20), (3, 8193, 5), (2, 20_000, 20)]
)
def test_kernels_equal_their_reference(num_seqs, vocab, k, device):
    # To one digit many logits are equal, so the order of ties is tested too.
    logits = (torch.randn(num_seqs, vocab, device=device) * 3).round(decimals=1)
    tokens = torch.randint(vocab, (num_seqs,), device=device)
    actual, expected = logprobs(logits, tokens, k), logprobs_reference(logits, tokens, k)
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[0], expected[0], atol=BOUND, rtol=BOUND)
    torch.testing.assert_close(actual[2], expected[2], atol=BOUND, rtol=BOUND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_chosen_tokens_logit_is_remade_from_hidden_and_weight(dtype, device):
    x = torch.randn(3, 1500, device=device).to(dtype)
    weight = (torch.randn(200, 1500, device=device) * 0.1).to(dtype)
    logits = x.float() @ weight.float().t()
    tokens = logits.argsort(descending=True)[[0, 1, 2], [0, 150, 4]].to(torch.int32)
    found = list_likeliest(logits, [5, 3, 0])
    chosen = torch.full((3,), float("nan"), device=device)
    chosen_logprobs(x, weight, tokens=tokens, chosen=chosen, **found)
    expected, _, _ = logprobs_reference(logits, tokens.long(), 0)
    torch.testing.assert_close(chosen, expected, atol=BOUND, rtol=BOUND)
    # From the list where it is in it, to the last bit.
    assert chosen[0] == found["values"][0, 0]


def test_only_rows_that_ask_are_written(device):
    logits = torch.randn(5, 300, device=device)
    logits[[1, 3]] = float("nan")
    found = list_likeliest(logits, [2, None, 0, -1, 99])
    written = (found["ids"] != POISON).sum(1).tolist()
    assert written == (found["values"] != POISON).sum(1).tolist() == [2, 0, 0, 0, MAX_LOGPROBS]
    chosen = torch.full((5,), float(POISON), device=device)
    tokens = torch.tensor([3, 4, 5, 6, -1], dtype=torch.int32, device=device)
    x, weight = torch.eye(5, device=device), torch.randn(300, 5, device=device)
    chosen_logprobs(x, weight, tokens=tokens, chosen=chosen, **found)
    assert (chosen != POISON).tolist() == [True, False, True, False, False]


def test_a_row_does_not_depend_on_the_batch(device):
    logits = torch.randn(4, 10_000, device=device)
    together = list_likeliest(logits, [20, 3, -1, 20])
    alone = list_likeliest(logits[3:], [20])
    assert torch.equal(together["ids"][3:], alone["ids"])
    assert torch.equal(together["values"][3:], alone["values"])
    assert together["work"].log_sums[3] == alone["work"].log_sums[0]


@BOTH
def test_equal_logits_are_listed_by_lower_id(function, device):
    logits = torch.zeros(1, 9000, device=device)
    logits[0, [8500, 17, 2500]] = 1.0
    _, top_ids, _ = function(logits, torch.tensor([0], device=device), 5)
    assert top_ids.tolist() == [[17, 2500, 8500, 0, 1]]


@BOTH
def test_masked_tokens_come_last_with_minus_infinity(function, device):
    logits = torch.full((1, 6), float("-inf"), device=device)
    logits[0, 4] = 2.0
    chosen, top_ids, top = function(logits, torch.tensor([1], device=device), 3)
    assert chosen.tolist() == [float("-inf")]
    assert top_ids.tolist() == [[4, 0, 1]]
    assert top.tolist() == [[0.0, float("-inf"), float("-inf")]]


def test_a_vocabulary_shorter_than_the_list_fills_up_with_none(device):
    found = list_likeliest(torch.randn(1, 3, device=device), [5])
    assert found["ids"][0, 3:5].tolist() == [-1, -1]
    assert found["values"][0, 3:5].tolist() == [float("-inf")] * 2
    torch.testing.assert_close(found["values"][0, :3].exp().sum().item(), 1.0)


def test_bad_arguments_are_told_apart(device):
    logits = torch.randn(2, 40, device=device)
    rows, num_logprobs = make_slots([1, 1], device)
    ids = torch.empty(2, MAX_LOGPROBS, dtype=torch.int32, device=device)
    good = {
        "logits": logits, "rows": rows, "num_logprobs": num_logprobs, "ids": ids,
        "work": logprobs_work(2, 40, device), "values": ids.float(),
    }  # fmt: skip
    for changed, text in (
        ({"logits": logits.half()}, r"logits must be one of torch.float32; found torch.float16"),
        ({"num_logprobs": num_logprobs.long()}, r"num_logprobs must be torch.int32 \[6\]"),
        ({"ids": ids[:, :3]}, r"ids must have shape \[2, 20\]; found \[2, 3\]: "),
        (
            {"work": logprobs_work(1, 40, device)},
            r"work must hold 2 rows of 1 tiles; found room for",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            logprobs_rows(**(good | changed))
    chosen = {name: good[name] for name in ("rows", "num_logprobs", "work", "ids", "values")}
    chosen |= {"x": logits, "weight": logits, "tokens": rows, "chosen": logits[0, :2].clone()}
    for changed, text in (
        ({"weight": logits.half()}, r"weight must be torch.float32; found torch.float16: "),
        ({"tokens": rows.long()}, r"tokens must be torch.int32; found torch.int64: "),
    ):
        with pytest.raises(ValueError, match=text):
            chosen_logprobs(**(chosen | changed))
