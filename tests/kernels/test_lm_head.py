import pytest
import torch

from headrace.kernels.lm_head import (
    TOLERANCE,
    LmHeadTile,
    lm_head_draw,
    lm_head_draw_reference,
    lm_head_work,
)

pytestmark = pytest.mark.gpu


def make_inputs(num_rows, vocab, hidden, dtype, device, num_slots=16):
    """Make rows in scattered slots, and tables that are columns of one wider state."""
    state = torch.zeros(num_slots, 7, dtype=torch.int32, device=device)
    rows = torch.randperm(num_slots)[:num_rows].to(torch.int32).to(device)
    tables = {
        "temperature": state.view(torch.float32)[:, 1],
        "seeds": state[:, 3:5],
        "num_output": state[:, 6],
    }
    tables["temperature"][:] = torch.rand(num_slots, device=device) + 0.5
    tables["seeds"][:] = torch.randint(-(2**31), 2**31, (num_slots, 2)).to(torch.int32).to(device)
    tables["num_output"][:] = torch.randint(10_000, (num_slots,)).to(torch.int32).to(device)
    x = torch.randn(num_rows, hidden, device=device).to(dtype)
    weight = (torch.randn(vocab, hidden, device=device) * 2 / hidden**0.5).to(dtype)
    return {"x": x, "weight": weight, "rows": rows} | tables


def draw(inputs, **more):
    """Draw into poisoned outputs."""
    num_rows, device = inputs["x"].shape[0], inputs["x"].device
    outputs = {
        "tokens": torch.full((num_rows,), -7, dtype=torch.int32, device=device),
        "best": torch.full((num_rows,), float("nan"), device=device),
        "is_finite": torch.full((num_rows,), -7, dtype=torch.int32, device=device),
    }
    work = lm_head_work(num_rows, inputs["weight"].shape[0], device)
    work.scores.fill_(float("nan"))
    work.ids.fill_(-7)
    lm_head_draw(**inputs, **outputs, work=work, **more)
    return outputs


def expected(inputs):
    slots = inputs["rows"].long().clamp(min=0)
    seeds = inputs["seeds"][slots].contiguous().view(torch.int64).squeeze(1)
    return lm_head_draw_reference(
        inputs["x"], inputs["weight"], inputs["temperature"][slots], seeds,
        inputs["num_output"][slots].long(),
    )  # fmt: skip


def assert_is_right(outputs, inputs):
    """Accept the reference's token, or one whose score is as good within the tolerance."""
    tokens, scores = expected(inputs)
    bound = TOLERANCE[inputs["x"].dtype]
    real = inputs["rows"] >= 0
    assert (outputs["tokens"][~real] == -1).all()
    assert (outputs["is_finite"] == 1).all()
    drawn = outputs["tokens"][real].long()
    gap = scores[real].amax(1) - scores[real].gather(1, drawn[:, None])[:, 0]
    assert (gap <= bound * scores[real].amax(1).abs().clamp(min=1)).all()
    assert (drawn == tokens[real]).float().mean() > 0.5
    wanted = scores[real].gather(1, drawn[:, None])[:, 0]
    torch.testing.assert_close(outputs["best"][real], wanted, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_rows", "vocab", "hidden"), [(1, 1, 64), (3, 1000, 72), (5, 257, 16), (16, 300, 256)]
)
def test_kernel_equals_its_reference(num_rows, vocab, hidden, dtype, device):
    inputs = make_inputs(num_rows, vocab, hidden, dtype, device)
    inputs["temperature"][inputs["rows"][::2].long()] = 0.0
    assert_is_right(draw(inputs), inputs)


@pytest.mark.parametrize("max_parts", [1, 3, 100])
def test_tiles_shared_out_in_any_way_give_the_same_tokens(max_parts, device):
    inputs = make_inputs(9, 500, 32, torch.bfloat16, device)
    inputs["rows"][4] = -1
    tile = LmHeadTile(64, 16, 32, 4, 2, max_parts)
    outputs = draw(inputs, tile=tile)
    assert_is_right(outputs, inputs)
    whole = draw(inputs, tile=LmHeadTile(64, 16, 32, 4, 2))
    for name, values in outputs.items():
        assert torch.equal(values, whole[name])


def test_a_row_does_not_depend_on_the_batch(device):
    inputs = make_inputs(7, 300, 64, torch.float16, device)
    together = draw(inputs)
    for row in (0, 3, 6):
        alone = inputs | {"x": inputs["x"][row : row + 1], "rows": inputs["rows"][row : row + 1]}
        for name, values in draw(alone).items():
            assert torch.equal(values, together[name][row : row + 1])


def test_the_lowest_of_equal_tokens_wins_across_tiles(device):
    inputs = make_inputs(2, 400, 32, torch.float16, device)
    inputs["temperature"].zero_()
    inputs["weight"][[70, 130, 131, 399]] = inputs["x"][0] * 3
    for max_parts in (1, 2, 99):
        tile = LmHeadTile(64, 16, 32, 4, 2, max_parts)
        assert draw(inputs, tile=tile)["tokens"][0].item() == 70


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_rows_without_a_finite_maximum_are_reported(device):
    inputs = make_inputs(5, 200, 32, torch.float32, device)
    inputs["x"][0, 3] = float("nan")
    inputs["x"][1], inputs["weight"][150] = 1.0, float("inf")
    inputs["x"][2:] = inputs["x"][2:].abs()
    inputs["weight"][150] = 0.0
    inputs["weight"][150, 7] = float("inf")
    inputs["x"][2:, 7] = torch.tensor([1.0, -1.0, 0.0])
    inputs["rows"][3] = -1
    outputs = draw(inputs)
    # The last: 0 x infinity is a NaN in one logit, which the other 199 must not hide.
    assert outputs["is_finite"].tolist() == [0, 0, 0, 1, 0]
    assert outputs["tokens"].tolist() == [0, 0, 0, -1, 0]


def test_a_row_of_nothing_but_minus_infinity_is_reported(device):
    inputs = make_inputs(2, 70, 32, torch.float32, device)
    inputs["x"][0] = -1.0
    inputs["weight"][:, 0] = float("inf")
    inputs["x"][1], inputs["weight"][:, 0] = 0.5, 3e38
    inputs["x"][0, 0] = float("-inf")
    outputs = draw(inputs)
    assert outputs["is_finite"].tolist() == [0, 1]
    assert outputs["tokens"][0].item() == 0


def test_tiny_temperatures_are_greedy_and_finite(device):
    inputs = make_inputs(3, 150, 32, torch.float32, device)
    inputs["temperature"].fill_(1e-42)
    outputs = draw(inputs)
    logits = inputs["x"] @ inputs["weight"].t()
    assert outputs["tokens"].tolist() == logits.argmax(1).tolist()
    assert outputs["is_finite"].tolist() == [1] * 3


def test_a_batch_of_padding_draws_nothing(device):
    inputs = make_inputs(3, 100, 32, torch.float32, device)
    inputs["rows"].fill_(-1)
    outputs = draw(inputs)
    assert outputs["tokens"].tolist() == [-1] * 3
    assert outputs["is_finite"].tolist() == [1] * 3


def test_bad_arguments_are_told_apart(device):
    inputs = make_inputs(2, 100, 32, torch.float32, device)
    for changed, text in (
        ({"weight": inputs["weight"].half()}, r"weight must be torch.float32; found"),
        ({"weight": inputs["weight"][:0]}, r"weight must be \[vocab, 32\] .*; found \[0, 32\]: "),
        ({"rows": inputs["rows"].long()}, r"rows must be torch.int32; found torch.int64: "),
        ({"seeds": inputs["seeds"][:, :1]}, r"seeds must be torch.int32 \[16, 2\] .* found"),
        ({"num_output": inputs["num_output"].long()}, r"num_output must be torch.int32 \[16\]"),
        ({"work": lm_head_work(1, 64, device)}, r"work must hold 2 x 2 scores; found 1: "),
    ):
        work = lm_head_work(2, 100, device)
        with pytest.raises(ValueError, match=text):
            lm_head_draw(**({"work": work} | inputs | changed))
