import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from headrace.kernels.penalise import TOLERANCE, penalise, penalise_reference

pytestmark = pytest.mark.gpu


def make_inputs(num_seqs, vocab, device):
    return {
        "logits": torch.randn(num_seqs, vocab, device=device) * 3,
        "output_counts": torch.randint(0, 3, (num_seqs, vocab), dtype=torch.int32).to(device),
        "in_prompt": torch.rand(num_seqs, vocab, device=device) < 0.3,
        "presence": torch.rand(num_seqs, device=device) * 4 - 2,
        "frequency": torch.rand(num_seqs, device=device) * 4 - 2,
        "repetition": torch.rand(num_seqs, device=device) * 2 + 0.1,
    }


@pytest.mark.parametrize("shape", [(1, 1), (1, 1024), (3, 1500), (4, 100)])
def test_kernel_equals_its_reference(shape, device, assert_close):
    inputs = make_inputs(*shape, device)
    out = torch.full(shape, float("nan"), device=device)
    assert penalise(**inputs, out=out) is out
    assert_close(out, penalise_reference(**inputs), TOLERANCE)
    # In place, too.
    penalise(**inputs, out=inputs["logits"])
    assert torch.equal(inputs["logits"], out)


@pytest.mark.parametrize("function", [penalise, penalise_reference])
def test_neutral_penalties_change_no_bit(function, device):
    inputs = make_inputs(2, 300, device)
    neutral = {"presence": 0.0, "frequency": 0.0, "repetition": 1.0}
    inputs |= {name: torch.full((2,), value, device=device) for name, value in neutral.items()}
    before = inputs["logits"].clone()
    assert torch.equal(function(**inputs), before)
    assert torch.equal(inputs["logits"], before)


@pytest.mark.parametrize("function", [penalise, penalise_reference])
def test_each_penalty_touches_its_own_tokens(function, device):
    """Tokens: untouched, in the prompt, generated once, generated twice."""
    logits = torch.tensor([[1.0, 1.0, 1.0, -1.0]], device=device)
    counts = torch.tensor([[0, 0, 1, 2]], dtype=torch.int32, device=device)
    in_prompt = torch.tensor([[False, True, False, False]], device=device)

    def with_penalties(presence, frequency, repetition):
        values = (torch.tensor([v], device=device) for v in (presence, frequency, repetition))
        return function(logits, counts, in_prompt, *values)[0].tolist()

    assert with_penalties(0.5, 0.0, 1.0) == [1.0, 1.0, 0.5, -1.5]
    assert with_penalties(0.0, 0.5, 1.0) == [1.0, 1.0, 0.5, -2.0]
    assert with_penalties(0.0, 0.0, 2.0) == [1.0, 0.5, 0.5, -2.0]


def test_repetition_is_what_transformers_computes():
    inputs = make_inputs(1, 50, torch.device("cpu"))
    inputs["presence"].zero_()
    inputs["frequency"].zero_()
    seen = ((inputs["output_counts"] > 0) | inputs["in_prompt"])[0].nonzero().view(1, -1)
    processor = RepetitionPenaltyLogitsProcessor(inputs["repetition"].item())
    torch.testing.assert_close(
        penalise_reference(**inputs), processor(seen, inputs["logits"].clone())
    )


def test_bad_arguments_are_told_apart(device):
    inputs = make_inputs(2, 30, device)
    for changed, text in (
        ({"logits": inputs["logits"].half()}, r"logits must be one of .*; found torch.float16: "),
        ({"output_counts": inputs["output_counts"].long()}, r"output_counts must be torch.int32"),
        ({"in_prompt": inputs["in_prompt"].int()}, r"in_prompt must be torch.bool; found"),
        ({"presence": inputs["presence"][:1]}, r"presence must have shape \[2\]; found \[1\]: "),
    ):
        with pytest.raises(ValueError, match=text):
            penalise(**(inputs | changed))
