"""The noise is a fixed function, so these statistics are of fixed numbers: they never flake."""

import pytest
import torch

from headrace.kernels.noise import noise, noise_at_reference, noise_reference

pytestmark = pytest.mark.gpu
NUM_BINS = 256
#: Six standard deviations of a chi-square with 255 degrees of freedom over its mean.
CHI_SQUARE_LIMIT = 255 + 6 * (2 * 255) ** 0.5
EDGE_SEEDS = [0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63)]


def chi_square(values: torch.Tensor, num_bins: int = NUM_BINS) -> float:
    counts = torch.histc(values.float().flatten(), bins=num_bins, min=0.0, max=1.0)
    expected = values.numel() / num_bins
    return float(((counts - expected) ** 2 / expected).sum())


def noise_by_hand(seed: int, position: int, token: int) -> float:
    """Compute one value in plain integers, as the docstring's formula says."""

    def mix(word: int) -> int:
        word ^= word >> 16
        word = word * 0x7FEB352D % 2**32
        word ^= word >> 15
        word = word * 0x846CA68B % 2**32
        return word ^ word >> 16

    def chain(start: int) -> int:
        seed_bits, position_bits = seed % 2**64, position % 2**64
        key = mix(seed_bits % 2**32 ^ start)
        key = mix((key + seed_bits // 2**32) % 2**32)
        key = mix(key ^ position_bits % 2**32)
        return mix((key + position_bits // 2**32) % 2**32)

    bits = mix((mix(token ^ chain(0x3243F6A8)) + chain(0x2B7E1516)) % 2**32)
    return ((bits >> 9) + 0.5) / 2**23


def test_kernel_and_reference_are_equal_to_the_last_bit(device):
    seeds = torch.tensor([*EDGE_SEEDS, 123456789], device=device)
    positions = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**40 + 3, 7, 0, -1], device=device)
    for vocab in (1, 1000, 1024, 2049):
        drawn = noise(seeds, positions, vocab)
        assert torch.equal(drawn.cpu(), noise_reference(seeds.cpu(), positions.cpu(), vocab))


def test_the_reference_is_the_formula():
    for seed in EDGE_SEEDS:
        for position in (0, 5, 2**33 + 1):
            row = noise_reference(torch.tensor([seed]), torch.tensor([position]), 300)[0]
            for token in (0, 1, 299):
                assert row[token].item() == noise_by_hand(seed, position, token)


def test_these_values_never_change():
    # A job resumed by a later version draws from the same noise: a change here breaks invariant 1.
    row = noise_reference(torch.tensor([42]), torch.tensor([7]), 4)[0]
    assert (row * 2**24).to(torch.int64).tolist() == [13592571, 4030383, 16047091, 7846863]


def test_given_tokens_get_the_noise_of_the_full_row():
    seeds, positions = torch.tensor([5, -9]), torch.tensor([0, 11])
    token_ids = torch.tensor([[3, 999, 0], [3, 3, 512]], dtype=torch.int32)
    full = noise_reference(seeds, positions, 1000)
    assert torch.equal(
        noise_at_reference(seeds, positions, token_ids), full.gather(1, token_ids.long())
    )


def test_noise_is_strictly_between_zero_and_one():
    values = noise_reference(torch.arange(64), torch.arange(64), 50_000)
    assert 0 < values.min() < 1e-5
    assert 1 - 1e-5 < values.max() < 1


def test_noise_is_uniform_over_tokens():
    values = noise_reference(torch.arange(64), torch.zeros(64, dtype=torch.int64), 4096)
    assert chi_square(values) < CHI_SQUARE_LIMIT
    for row in values[:8]:
        assert chi_square(row) < CHI_SQUARE_LIMIT


def test_noise_is_uniform_over_positions_and_over_seeds():
    many, one = torch.arange(1 << 16), torch.ones(1 << 16, dtype=torch.int64)
    for token in (0, 1, 31999):
        tokens = torch.full((1 << 16, 1), token)
        assert chi_square(noise_at_reference(one * 77, many, tokens)) < CHI_SQUARE_LIMIT
        assert chi_square(noise_at_reference(many, one * 77, tokens)) < CHI_SQUARE_LIMIT


@pytest.mark.parametrize("bit", range(64))
def test_rows_one_bit_apart_are_independent(bit):
    """Pairs (noise, neighbour's noise) fill a 16 x 16 grid evenly, for seeds and for positions."""
    flip = 1 << bit if bit < 63 else -(1 << 63)
    base, zero = torch.tensor([42, 42 ^ flip]), torch.tensor([3, 3])
    for seeds, positions in ((base, zero), (zero, base)):
        one, other = noise_reference(seeds, positions, 1 << 15)
        cells = (one * 16).floor() / 16 + other / 16
        assert chi_square(cells) < CHI_SQUARE_LIMIT


def test_neighbouring_seeds_positions_and_tokens_are_independent():
    square = torch.cartesian_prod(torch.arange(40), torch.arange(40))
    values = noise_reference(square[:, 0], square[:, 1], 128).view(40, 40, 128)
    for one, other in (
        (values[1:], values[:-1]),
        (values[:, 1:], values[:, :-1]),
        (values[:, :, 1:], values[:, :, :-1]),
        (values[1:, :-1], values[:-1, 1:]),  # (seed + 1, position) and (seed, position + 1)
    ):
        assert chi_square((one * 16).floor() / 16 + other / 16) < CHI_SQUARE_LIMIT


def test_bad_arguments_are_told_apart(device):
    seeds = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"seeds must be one of torch.int64; found torch.int32: "):
        noise(seeds.int(), seeds, 10)
    with pytest.raises(ValueError, match=r"positions must have shape \[2\]; found \[1\]: "):
        noise(seeds, seeds[:1], 10)
