import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from headrace.kernels.sample import (
    MAX_LISTED,
    TOLERANCE,
    noise_reference,
    sample,
    sample_reference,
    sample_work,
    threshold_reference,
)

pytestmark = pytest.mark.gpu
#: With it the first five positions reach every token that the tests of the filters allow.
SEED = 79


def make_tables(inputs, num_slots=None):
    """Scatter the parameters of the rows over the slots of one wide int32 state."""
    num_rows, device = inputs["logits"].shape[0], inputs["logits"].device
    num_slots = num_slots or num_rows + 3
    state = torch.randint(2**31, (num_slots, 9), dtype=torch.int32).to(device)
    rows = torch.randperm(num_slots)[:num_rows].to(torch.int32).to(device)
    columns = state.view(torch.float32)
    tables = {
        "temperature": columns[:, 1],
        "top_k": state[:, 2],
        "top_p": columns[:, 3],
        "min_p": columns[:, 0],
        "seeds": state[:, 4:6],
        "num_output": state[:, 8],
    }
    for name, table in tables.items():
        if name == "seeds":
            table[rows.long()] = inputs["seeds"].view(torch.int32).view(-1, 2)
        elif name == "num_output":
            table[rows.long()] = inputs["positions"].to(torch.int32)
        else:
            table[rows.long()] = inputs[name]
    return {"rows": rows} | tables


def poisoned_work(num_rows, vocab, device):
    work = sample_work(num_rows, vocab, device)
    for name in work.__dataclass_fields__:
        values = getattr(work, name)
        values.fill_(float("nan") if values.dtype.is_floating_point else -(2**30))
    return work


def draw(logits, **params):
    """Call the launcher as sample_reference is called, on poisoned memory: tokens [num_seqs]."""
    num_rows, vocab = logits.shape
    out = torch.full((2, num_rows), -7, dtype=torch.int32, device=logits.device)
    work = poisoned_work(num_rows, vocab, logits.device)
    tables = make_tables({"logits": logits} | params)
    before = logits.clone()
    tokens, _ = sample(logits, **tables, work=work, tokens=out[0], is_finite=out[1])
    assert torch.equal(before, logits)
    assert torch.equal(out[1] == 1, logits.amax(1).isfinite())
    return tokens.long()


BOTH = pytest.mark.parametrize("function", [draw, sample_reference])


def make_inputs(num_seqs, vocab, device, **fixed):
    """Make random logits and every sampling parameter, off unless given."""
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | fixed
    inputs = {
        name: torch.as_tensor(value).expand(num_seqs).contiguous().to(device)
        for name, value in off.items()
    }
    return inputs | {
        "logits": torch.randn(num_seqs, vocab, device=device) * 3,
        "temperature": inputs["temperature"].float(),
        "top_k": inputs["top_k"].to(torch.int32),
        "top_p": inputs["top_p"].float(),
        "min_p": inputs["min_p"].float(),
        "seeds": torch.randint(-(2**62), 2**62, (num_seqs,)).to(device),
        "positions": torch.randint(2**31, (num_seqs,)).to(device),
    }


def assert_is_right(tokens, inputs):
    """Accept what the reference draws, or a token that rounding alone keeps from being drawn.

    Scores within the tolerance are equal; so are filters whose limits differ by that much.
    """
    bound = TOLERANCE[torch.float32]
    expected = sample_reference(**inputs)
    for seq in (tokens != expected).nonzero().flatten().tolist():
        row = {name: value[seq : seq + 1].cpu() for name, value in inputs.items()}
        assert row["temperature"] > 0, f"row {seq}: greedy must agree exactly"
        scaled = row["logits"] / row["temperature"]
        uniform = noise_reference(row["seeds"], row["positions"], scaled.shape[1])
        scores = scaled - torch.log(-torch.log(uniform))
        filters = {name: row[name] for name in ("top_k", "min_p")}
        looser = threshold_reference(scaled, top_p=row["top_p"] + bound, **filters) - bound
        tighter = threshold_reference(scaled, top_p=row["top_p"] - bound, **filters) + bound
        token = int(tokens[seq])
        best = scores[scaled >= torch.minimum(tighter, scaled.max())].max()
        assert scaled[0, token] >= looser, f"row {seq}: token {token} is filtered out"
        assert scores[0, token] >= best - bound, f"row {seq}: token {token} is not the best"


@pytest.mark.parametrize("vocab", [1, 1000, 4096, 4097])
def test_kernel_equals_its_reference_on_a_mixed_batch(vocab, device):
    inputs = make_inputs(
        8, vocab, device,
        temperature=torch.tensor([0.0, 1.0, 0.3, 2.0, 1.0, 0.7, 1.5, 1.0]),
        top_k=torch.tensor([0, 0, 5, 1, 0, 50, 10**6, 0]),
        top_p=torch.tensor([1.0, 1.0, 1.0, 1.0, 0.9, 0.5, 1.0, 0.0]),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.05, 0.2, 0.0]),
    )  # fmt: skip
    assert_is_right(draw(**inputs), inputs)


@pytest.mark.parametrize("k", [1, 2, 40, 999, 1000])
def test_top_k_of_every_size(k, device):
    inputs = make_inputs(2, 1000, device, top_k=k, temperature=5.0)
    assert_is_right(draw(**inputs), inputs)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.95, 0.999999])
def test_top_p_of_every_size(p, device):
    inputs = make_inputs(2, 1000, device, top_p=p, temperature=1.5)
    assert_is_right(draw(**inputs), inputs)


@BOTH
def test_a_row_does_not_depend_on_the_batch(function, device):
    inputs = make_inputs(5, 500, device, top_k=torch.tensor([0, 3, 0, 9, 1]), top_p=0.8)
    together = function(**inputs)
    for seq in (0, 1, 4):
        alone = function(**{name: value[seq : seq + 1] for name, value in inputs.items()})
        assert alone.item() == together[seq].item()


@BOTH
def test_greedy_takes_the_lowest_of_equal_tokens_whatever_the_filters(function, device):
    inputs = make_inputs(1, 6000, device, temperature=0.0, top_k=3, top_p=0.1, min_p=0.9)
    inputs["logits"][0, [5900, 77, 4100]] = 100.0
    assert function(**inputs).item() == 77


@BOTH
def test_values_equal_to_the_threshold_are_all_kept(function, device):
    """Four equal tokens and top_k 2, top_p below one of them: each is drawn within 5 positions."""
    for filters in ({"top_k": 2}, {"top_p": 0.1}, {"min_p": 1.0}):
        inputs = make_inputs(5, 8, device, **filters)
        inputs["seeds"].fill_(SEED)
        inputs["positions"][:] = torch.arange(5)
        inputs["logits"].fill_(-1.0)
        inputs["logits"][:, [1, 3, 4, 6]] = 2.0
        assert set(function(**inputs).tolist()) == {1, 3, 4, 6}


@BOTH
@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 3}, {0, 1, 3}),
        ({"top_p": 0.49}, {3}),
        ({"top_p": 0.51}, {1, 3}),
        ({"top_p": 0.79}, {1, 3}),
        ({"top_p": 0.81}, {0, 1, 3}),
        ({"min_p": 0.61}, {3}),
        ({"min_p": 0.59}, {1, 3}),
        # Of what top-k keeps, 0.5 / 0.8 = 0.625 and 0.375: top-p counts those.
        ({"top_k": 2, "top_p": 0.62}, {3}),
        ({"top_k": 2, "top_p": 0.63}, {1, 3}),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.5}, {1, 3}),
    ],
)
def test_each_filter_keeps_exactly_its_tokens(filters, kept, function, device):
    """Probabilities 0.15, 0.3, 0.05, 0.5; 5 fixed draws reach each token that may be drawn."""
    inputs = make_inputs(5, 4, device, **filters)
    inputs["logits"][:] = torch.tensor([0.15, 0.3, 0.05, 0.5], device=device).log()
    inputs["seeds"].fill_(SEED)
    inputs["positions"][:] = torch.arange(5)
    assert set(function(**inputs).tolist()) == kept


@BOTH
def test_masked_tokens_are_never_drawn(function, device):
    inputs = make_inputs(8, 200, device, temperature=50.0)
    inputs["logits"][:, 3:] = float("-inf")
    assert set(function(**inputs).tolist()) <= {0, 1, 2}
    inputs = make_inputs(2, 200, device, top_k=150, top_p=0.999, min_p=1e-6)
    inputs["logits"][:, :199] = float("-inf")
    assert function(**inputs).tolist() == [199] * 2


@BOTH
def test_a_row_with_nothing_allowed_still_gives_a_token_id(function, device):
    inputs = make_inputs(3, 50, device, temperature=torch.tensor([0.0, 1.0, 1.0]))
    inputs["logits"].fill_(float("-inf"))
    inputs["top_k"][2], inputs["top_p"][2], inputs["min_p"][2] = 7, 0.5, 0.1
    assert function(**inputs).tolist() == [0, 0, 0]


@BOTH
def test_the_same_seed_and_position_draw_the_same_token_again(function, device):
    """Logits are equal, so 16 draws of 300 tokens agree by chance once in 1e37."""
    inputs = make_inputs(16, 300, device)
    inputs["logits"].fill_(0.5)
    first = function(**inputs)
    assert torch.equal(function(**inputs), first)
    assert len(set(first.tolist())) > 1
    inputs["positions"] += 1
    assert not torch.equal(function(**inputs), first)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 0), (2.0, 3)])
def test_tokens_come_as_often_as_their_probability(temperature, top_k):
    """Fixed seeds and logits, so the chi-square (limit: 6 sigma for 5 bins) never flakes."""
    num_draws = 20_000
    logits = torch.tensor([1.0, 0.5, 0.0, -1.0, -2.0])
    inputs = make_inputs(num_draws, 5, "cpu", temperature=temperature, top_k=top_k)
    inputs["logits"] = logits.expand(num_draws, 5).contiguous()
    inputs["seeds"] = torch.full((num_draws,), 1234)
    inputs["positions"] = torch.arange(num_draws)
    counts = torch.bincount(sample_reference(**inputs), minlength=5)
    kept = top_k or 5
    assert counts[kept:].sum() == 0
    expected = torch.softmax(logits[:kept] / temperature, dim=0) * num_draws
    assert ((counts[:kept] - expected) ** 2 / expected).sum() < 4 + 6 * 8**0.5


def test_filters_keep_what_those_of_transformers_keep():
    scaled = torch.randn(20, 300) * 3
    rows = {"top_k": torch.full((20,), 40), "top_p": torch.full((20,), 0.9)}
    threshold = threshold_reference(scaled, **rows, min_p=torch.full((20,), 0.02))
    expected = scaled.double()
    for warper in (TopKLogitsWarper(40), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)):
        expected = warper(None, expected)
    is_kept, is_expected = scaled >= threshold[:, None], expected.isfinite()
    # A sum that lands on the limit to the last bit may go either way: one token in thousands.
    assert (is_kept != is_expected).sum() <= 1
    assert 20 < is_kept.sum() < 800


@pytest.mark.parametrize("vocab", [8193, 20_000])
def test_rows_of_several_tiles_take_every_way_through_the_launches(vocab, device):
    """Listed, too long to list, drawn first, rejected first, and unfiltered, in one batch."""
    inputs = make_inputs(
        8, vocab, device,
        temperature=torch.tensor([1.0, 1.0, 1.0, 3.0, 1.0, 0.0, 1.0, 0.01]),
        top_k=torch.tensor([50, 3000, 40, 0, 0, 7, 0, 9]),
        top_p=torch.tensor([1.0, 0.99, 0.9, 0.3, 0.95, 0.5, 1.0, 1.0]),
        min_p=torch.tensor([0.0, 0.0, 0.1, 0.0, 1e-3, 0.0, 0.0, 0.0]),
    )  # fmt: skip
    assert vocab > MAX_LISTED > 50
    assert_is_right(draw(**inputs), inputs)


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_k": 3000}, {"top_p": 0.3}])
def test_all_equal_logits_are_all_kept(filters, device):
    """More equal logits than the list holds; the noise alone decides, and as in the reference."""
    inputs = make_inputs(2, 9000, device, **filters)
    inputs["logits"].fill_(-2.5)
    assert torch.equal(draw(**inputs), sample_reference(**inputs))


def test_logits_of_any_spread_are_filtered_alike(device):
    """Bins are of the distance to the largest: from all in one bin to all in the last."""
    for spread in (1e-30, 1e-6, 1e3, 1e30):
        inputs = make_inputs(3, 3000, device, top_k=20, temperature=spread)
        inputs["logits"] *= spread
        assert_is_right(draw(**inputs), inputs)


def test_padding_rows_cost_nothing_and_leave_the_others_alone(device):
    inputs = make_inputs(6, 700, device, top_k=torch.tensor([0, 3, 0, 9, 1, 0]), top_p=0.8)
    tables, work = make_tables(inputs), poisoned_work(6, 700, device)
    whole, _ = sample(inputs["logits"], **tables, work=work)
    tables["rows"] = tables["rows"].clone()
    tables["rows"][[1, 4]] = -1
    inputs["logits"][[1, 4]] = float("nan")
    tokens, is_finite = sample(inputs["logits"], **tables, work=work)
    assert tokens.tolist() == [-1 if i in (1, 4) else t for i, t in enumerate(whole.tolist())]
    assert is_finite.tolist() == [1] * 6


def test_filters_beyond_their_range_still_leave_the_largest(device):
    """Such requests are refused earlier; here they must not give a token that is none."""
    for filters in ({"min_p": 7.0}, {"min_p": 7.0, "top_k": 3}, {"top_p": -1.0}):
        inputs = make_inputs(2, 600, device, **filters)
        assert torch.equal(draw(**inputs), inputs["logits"].argmax(1))


def test_rows_of_a_wider_buffer_are_read_at_their_stride(device):
    inputs = make_inputs(3, 300, device, top_p=0.7)
    wide = torch.full((3, 512), float("nan"), device=device)
    wide[:, :300] = inputs["logits"]
    tables, work = make_tables(inputs), poisoned_work(3, 300, device)
    tokens, _ = sample(wide[:, :300], **tables, work=work)
    assert tokens.tolist() == draw(**inputs).tolist()


def test_rows_without_a_finite_maximum_are_reported(device):
    inputs = make_inputs(
        5, 9000, device, top_k=torch.tensor([0, 5, 0, 0, 5]),
        temperature=torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]), top_p=torch.tensor([1, 1, 0.5, 1, 1]),
    )  # fmt: skip
    good = draw(**inputs)
    for bad in (float("nan"), float("inf")):
        logits = inputs["logits"].clone()
        logits[[0, 1, 2], [8999, 0, 4000]] = bad
        tables, work = make_tables(inputs), poisoned_work(5, 9000, device)
        tokens, is_finite = sample(logits, **tables, work=work)
        assert is_finite.tolist() == [0, 0, 0, 1, 1]
        assert tokens.tolist() == [0, 0, 0, *good[3:].tolist()]


def test_bad_arguments_are_told_apart(device):
    inputs = make_inputs(2, 30, device)
    good = {"logits": inputs["logits"], "work": sample_work(2, 30, device)}
    good |= make_tables(inputs)
    for changed, text in (
        ({"logits": good["logits"].bfloat16()}, r"logits must be one of torch.float32; found"),
        ({"logits": good["logits"][:, :0]}, r"logits must be .* vocabulary .*; found shape \[2, 0"),
        ({"logits": good["logits"].t()}, r"logits must be .* dense rows .*; found shape \[30, 2\]"),
        ({"top_k": good["top_k"].long()}, r"top_k must be torch.int32 \[5\] .* found torch.int64"),
        (
            {"seeds": good["seeds"].long()},
            r"seeds must be torch.int32 \[5, 2\] .* found torch.int64",
        ),
        ({"seeds": good["seeds"].flip(1)[:, ::1].t().contiguous().t()}, r"seeds; found strides"),
        ({"min_p": good["min_p"][:1]}, r"min_p must be torch.float32 \[5\] .* found .*\[1\]"),
        ({"rows": good["rows"][:1]}, r"rows must have shape \[2\]; found \[1\]: "),
        (
            {"work": sample_work(1, 30, device)},
            r"work must hold 2 rows of 1 tiles; found room for 1",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            sample(**(good | changed))
