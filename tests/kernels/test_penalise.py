import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from headrace.kernels.penalise import (
    MAX_COUNT,
    TOLERANCE,
    count_prompt,
    penalise_reference,
    penalise_rows,
)

pytestmark = pytest.mark.gpu


def make_tables(inputs, num_slots, device):
    """Scatter the parameters of the rows over the slots of wide tables."""
    num_rows, vocab = inputs["logits"].shape
    rows = torch.randperm(num_slots)[:num_rows].to(torch.int32).to(device)
    state = torch.randint(2**31, (num_slots, 5), dtype=torch.int32).to(device)
    tables = {"rows": rows, "num_bias": state[:, 3]}
    for column, name in enumerate(("frequency", "presence", "repetition")):
        tables[name] = state.view(torch.float32)[:, column]
        tables[name][rows.long()] = inputs[name]
    tables["counts"] = torch.full((num_slots, vocab + 5), 7, dtype=torch.int16, device=device)
    tables["counts"] = tables["counts"][:, :vocab]
    held = inputs["output_counts"] * 2 + inputs["in_prompt"]
    tables["counts"][rows.long()] = held.to(torch.int16)
    tables["num_bias"].zero_()
    tables["bias_ids"] = torch.full((num_slots, 6), 3, dtype=torch.int32, device=device)
    tables["bias_values"] = torch.full((num_slots, 6), float("nan"), device=device)
    return tables


def penalise(logits, *params, **named):
    """Call the launcher as penalise_reference is called."""
    names = ("output_counts", "in_prompt", "presence", "frequency", "repetition")
    inputs = dict(zip(names, params, strict=False)) | named
    logits = logits.clone()
    tables = make_tables({"logits": logits} | inputs, logits.shape[0] + 2, logits.device)
    assert penalise_rows(logits, **tables) is logits
    return logits


def make_inputs(num_seqs, vocab, device):
    return {
        "logits": torch.randn(num_seqs, vocab, device=device) * 3,
        "output_counts": torch.randint(0, 3, (num_seqs, vocab), dtype=torch.int32).to(device),
        "in_prompt": torch.rand(num_seqs, vocab, device=device) < 0.3,
        "presence": torch.rand(num_seqs, device=device) * 4 - 2,
        "frequency": torch.rand(num_seqs, device=device) * 4 - 2,
        "repetition": torch.rand(num_seqs, device=device) * 2 + 0.1,
    }


@pytest.mark.parametrize("shape", [(1, 1), (1, 4096), (3, 5000), (4, 100)])
def test_kernel_equals_its_reference(shape, device, assert_close):
    inputs = make_inputs(*shape, device)
    assert_close(penalise(**inputs), penalise_reference(**inputs), TOLERANCE)


def test_only_rows_that_ask_are_touched(device):
    """Rows: penalised, neutral, padding, biased; a NaN of the middle two stays."""
    inputs = make_inputs(4, 300, device)
    for name, value in (("presence", 0.0), ("frequency", 0.0), ("repetition", 1.0)):
        inputs[name][[1, 3]] = value
    inputs["logits"][1:3, 7] = float("nan")
    tables = make_tables(inputs, 9, device)
    biased = tables["rows"][3].long()
    tables["num_bias"][biased] = 1
    tables["bias_ids"][biased, 0], tables["bias_values"][biased, 0] = 299, 2.5
    tables["rows"][2] = -1
    logits = inputs["logits"].clone()
    penalise_rows(logits, **tables)
    expected = inputs["logits"].clone()
    expected[:1] = penalise_reference(**{name: value[:1] for name, value in inputs.items()})
    expected[3, 299] += 2.5
    bound = TOLERANCE[torch.float32]
    torch.testing.assert_close(logits, expected, atol=bound, rtol=bound, equal_nan=True)


def test_bias_is_added_after_the_penalties_to_the_listed_tokens(device):
    inputs = make_inputs(2, 9000, device)
    tables = make_tables(inputs, 5, device)
    slots = tables["rows"].long()
    ids = torch.tensor([0, 4095, 4096, 8999, -1, 3], dtype=torch.int32, device=device)
    values = torch.tensor([1.0, -100.0, -3e38, 5.0, 1.0, 9.0], device=device)
    tables["bias_ids"][slots[1]], tables["bias_values"][slots[1]] = ids, values
    # The last is beyond the number that counts.
    tables["num_bias"][slots[1]] = 5
    logits = inputs["logits"].clone()
    penalise_rows(logits, **tables)
    expected = penalise_reference(**inputs)
    expected[1, ids[:4].long()] += values[:4]
    bound = TOLERANCE[torch.float32]
    torch.testing.assert_close(logits, expected, atol=bound, rtol=bound)


def test_a_slot_starts_with_its_prompt_and_what_it_had_generated(device):
    counts = torch.full((3, 6), 77, dtype=torch.int16, device=device)
    prompt = torch.tensor([1, 1, 4], device=device)
    count_prompt(counts, 1, prompt, torch.tensor([4, 0, 4, 4], device=device))
    assert counts.tolist() == [[77] * 6, [2, 1, 0, 0, 7, 0], [77] * 6]
    count_prompt(counts, 1, prompt)
    assert counts[1].tolist() == [0, 1, 0, 0, 1, 0]
    count_prompt(counts, 0, prompt, torch.full((MAX_COUNT + 9,), 1, device=device))
    assert counts[0].tolist() == [0, 32767, 0, 0, 1, 0]


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
    good = {"logits": inputs["logits"]} | make_tables(inputs, 4, device)
    for changed, text in (
        ({"logits": inputs["logits"].half()}, r"logits must be one of .*; found torch.float16: "),
        ({"counts": good["counts"].int()}, r"counts must be torch.int16 \[4, 30\] .* torch.int32"),
        ({"counts": good["counts"][:, :29]}, r"counts must be torch.int16 \[4, 30\] .* \[4, 29\]"),
        ({"presence": good["presence"].double()}, r"presence must be torch.float32 \[4\]"),
        (
            {"bias_ids": good["bias_ids"][:, :0]},
            r"bias_ids must be \[num_slots, 1 to 300\]; found",
        ),
        ({"bias_values": good["bias_values"][:, :2]}, r"bias_values must be .* \[4, 6\]"),
        ({"rows": good["rows"].long()}, r"rows must be torch.int32; found torch.int64: "),
    ):
        with pytest.raises(ValueError, match=text):
            penalise_rows(**(good | changed))
    with pytest.raises(ValueError, match=r"counts must be \[num_slots, vocab\] int16 .*; found"):
        count_prompt(good["counts"].int(), 0, good["rows"].long())
