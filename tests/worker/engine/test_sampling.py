"""sampling.py against the kernels' references, and its independence of the batch."""

import math

import numpy as np
import pytest
import torch

from headrace.kernels.logprobs import logprobs_reference
from headrace.kernels.penalise import penalise_reference
from headrace.kernels.sample import sample_reference
from headrace.worker.engine import sampling
from headrace.worker.engine.sampled import check_params
from headrace.worker.engine.sequence import Sequence, SequenceError
from headrace.worker.frames import SamplingParams

VOCAB = 500
PARAMS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "hot": {"temperature": 3.0},
    "cold": {"temperature": 0.05},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.1},
    "filters": {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "huge_seed": {"seed": 2**64 - 1},
}


@pytest.fixture
def sequence(admit):
    def build(seq_id=1, output=(4, 4, 5), prompt=(3, 9), **params):
        asked = admit(seq_id, prompt, 50, output, params=SamplingParams(**params))
        return Sequence.from_admit(asked, seq_id)

    return build


def make_logits(num_rows, seed=0, scale=4.0):
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def reference(logits, seqs):
    params = [seq.asked.params for seq in seqs]

    def column(name, dtype=torch.float32):
        return torch.tensor([getattr(p, name) for p in params], dtype=dtype)

    return sample_reference(
        logits,
        column("temperature"),
        column("top_k", torch.int32),
        column("top_p"),
        column("min_p"),
        torch.tensor([sampling.signed_seed(p.seed) for p in params]),
        torch.tensor([seq.num_output for seq in seqs]),
    ).tolist()


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("scale", [0.0, 0.3, 4.0])
def test_tokens_are_those_of_the_reference(name, scale, sequence):
    rows = 40
    seqs = [sequence(i, **{"seed": i * 77 - 1000, **PARAMS[name]}) for i in range(rows)]
    logits = make_logits(rows, scale=scale)
    expected = reference(logits.clone(), seqs)
    assert sampling.sample(logits, seqs).tokens.tolist() == expected


def test_noise_does_win_over_logits_at_times(sequence):
    seqs = [sequence(i, seed=i) for i in range(200)]
    logits = make_logits(1, scale=1.0).repeat(200, 1)
    tokens = sampling.sample(logits, seqs).tokens
    assert len(set(tokens.tolist())) > 5


def test_invariant_1_a_row_does_not_depend_on_the_batch(sequence):
    asks = [{**params, "seed": i} for i, params in enumerate(PARAMS.values())]
    asks += [
        {"presence_penalty": 0.5, "frequency_penalty": 0.7, "repetition_penalty": 1.3, "seed": 5},
        {"logit_bias": {7: 5.0, 8: -100.0}, "seed": 6, "logprobs": 3},
    ]
    seqs = [sequence(i, **ask) for i, ask in enumerate(asks)]
    logits = make_logits(len(seqs), seed=1)
    together = sampling.sample(logits.clone(), seqs)
    for row, seq in enumerate(seqs):
        alone = sampling.sample(logits[row : row + 1].clone(), [seq])
        assert alone.tokens[0] == together.tokens[row]
    order = torch.randperm(len(seqs), generator=torch.Generator().manual_seed(2))
    shuffled = sampling.sample(logits[order].clone(), [seqs[i] for i in order])
    assert shuffled.tokens.tolist() == together.tokens[order.numpy()].tolist()


def test_the_token_depends_on_seed_and_position_only(sequence):
    logits = make_logits(1, scale=1.0)

    def draw(**ask):
        return int(sampling.sample(logits.clone(), [sequence(**ask)]).tokens[0])

    same = {draw(seq_id=i, output=output, seed=9) for i, output in enumerate([(1, 2), (3, 4)])}
    assert len(same) == 1
    assert len({draw(seed=seed) for seed in range(30)}) > 3
    assert len({draw(output=range(1, n)) for n in range(2, 30)}) > 3


@pytest.mark.parametrize(
    "penalty",
    [{"presence_penalty": 1.5}, {"frequency_penalty": 0.8}, {"repetition_penalty": 1.7}],
)
def test_penalties_are_those_of_the_reference(penalty, sequence):
    seq = sequence(temperature=0.0, output=[4, 4, 5], prompt=[3, 9], **penalty)
    logits = torch.zeros(1, VOCAB)
    logits[0, [3, 4, 5, 9, 30]] = torch.tensor([2.0, 2.4, 2.2, 2.1, 1.5])
    counts = torch.zeros(1, VOCAB, dtype=torch.int32)
    counts[0, 4], counts[0, 5] = 2, 1
    in_prompt = torch.zeros(1, VOCAB, dtype=torch.bool)
    in_prompt[0, [3, 9]] = True
    columns = [torch.tensor([getattr(seq.asked.params, f"{name}_penalty")]) for name in PENALTIES]
    expected = penalise_reference(logits.clone(), counts, in_prompt, *columns)
    assert expected.argmax() != logits.argmax()
    assert sampling.sample(logits, [seq]).tokens.tolist() == expected.argmax(-1).tolist()


PENALTIES = ("presence", "frequency", "repetition")


def test_a_bias_forbids_and_forces_tokens(sequence):
    logits = make_logits(2)
    best = int(logits[0].argmax())
    seqs = [
        sequence(temperature=0.0, logit_bias={best: -100.0}),
        sequence(temperature=1.0, logit_bias={17: 100.0}),
    ]
    expected = int(logits[0].topk(2).indices[1])
    assert sampling.sample(logits, seqs).tokens.tolist() == [expected, 17]


def test_logprobs_are_of_the_raw_logits(sequence):
    logits = make_logits(3)
    seqs = [
        sequence(temperature=0.0),
        sequence(temperature=0.0, logit_bias={17: 100.0}, logprobs=4, presence_penalty=1.0),
        sequence(temperature=2.0, top_k=5, logprobs=0),
    ]
    raw = logits.clone()
    sampled = sampling.sample(logits, seqs)
    assert sorted(sampled.logprobs) == [1, 2]
    chosen, ids, values = logprobs_reference(raw, torch.from_numpy(sampled.tokens), 4)
    assert sampled.logprobs[1][0] == pytest.approx(float(chosen[1]))
    np.testing.assert_array_equal(sampled.logprobs[1][1], ids[1])
    np.testing.assert_allclose(sampled.logprobs[1][2], values[1], rtol=1e-6)
    assert sampled.logprobs[2][0] == pytest.approx(float(chosen[2]))
    assert len(sampled.logprobs[2][1]) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("ask", [{"temperature": 0.0}, {"top_p": 0.5}, {"logprobs": 2}])
def test_invariant_2_rows_that_are_no_numbers_are_reported_and_others_go_on(bad, ask, sequence):
    logits = make_logits(2)
    expected = sampling.sample(logits.clone(), [sequence(1, **ask), sequence(2, seed=4)])
    logits[0, 3] = bad
    sampled = sampling.sample(logits, [sequence(1, **ask), sequence(2, seed=4)])
    assert sampled.is_finite.tolist() == [False, True]
    assert sampled.tokens[1] == expected.tokens[1]


BAD = [
    {"temperature": -0.1},
    {"temperature": math.inf},
    {"temperature": math.nan},
    {"top_p": -0.1},
    {"top_p": 1.01},
    {"top_k": -1},
    {"top_k": 2**31},
    {"min_p": 2.0},
    {"seed": 2**64},
    {"presence_penalty": math.nan},
    {"frequency_penalty": math.inf},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": -1.0},
    {"logprobs": -1},
    {"logprobs": 21},
    {"logit_bias": {VOCAB: 1.0}},
    {"logit_bias": {-1: 1.0}},
    {"logit_bias": {1: math.nan}},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_parameters_out_of_range_are_refused_by_name(bad):
    with pytest.raises(SequenceError, match=next(iter(bad))) as refused:
        check_params(SamplingParams(**bad), VOCAB)
    assert refused.value.code == "bad_sampling"


def test_the_extremes_that_are_allowed_pass():
    for params in ({"top_p": 0.0}, {"min_p": 1.0}, {"seed": -(2**63)}, {"logprobs": 20}, {}):
        check_params(SamplingParams(**params), VOCAB)


def test_values_tied_at_the_threshold_beyond_the_leaders_are_counted(sequence):
    logits = torch.full((1, VOCAB), -50.0)
    # With 300 tied values the first has 58 % and top_p keeps the others; with 255 it had 62 %.
    logits[0, :301] = torch.tensor([math.log(420.0)] + [0.0] * 300)
    seqs = [sequence(seed=seed, top_k=2, top_p=0.6) for seed in range(60)]
    rows = logits.repeat(60, 1)
    tokens = sampling.sample(rows.clone(), seqs).tokens.tolist()
    assert tokens == reference(rows, seqs)
    assert len(set(tokens)) > 10
