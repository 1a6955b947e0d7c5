"""Sampling noise: a pure function of (seed, position, token id), the same on CPU and GPU.

    keys  = chain(seed, position, A), chain(seed, position, B)              two words a row
    bits  = mix(mix(token ^ key_0) + key_1)                                 one word a token
    noise = ((bits >> 9) + 1/2) / 2^23                                      in (0, 1), exact in fp32

mix is `lowbias32` (C. Wellons, hash-prospector: found by search for a low avalanche bias among
multiply-xorshift hashes), two multiplications a call. A chain folds in the low and the high word of
seed and of position, one mix each. Two key words, because with one, two rows among 2^16 would be
expected to draw the same noise.

Invariants:
1. The same (seed, position, token) gives the same bits in torch and in Triton, on any device,
   in any batch: a job resumed on another worker draws what it would have drawn.
2. Noise is strictly between 0 and 1, so both logarithms of the Gumbel transform are finite.

Called by sample.py and lm_head.py inside their kernels, and by the CPU engine, which draws noise
for the surviving candidates only.
"""

import torch

from headrace.kernels.checks import check_leading, check_tensor
from headrace.kernels.triton_seam import tl, triton

_WORD = 0xFFFFFFFF
#: Start words of the two key chains: the first digits of pi and e, nothing-up-my-sleeve numbers.
CHAIN_A = 0x3243F6A8
CHAIN_B = 0x2B7E1516
_START_A = tl.constexpr(CHAIN_A)  # pyright: ignore[reportCallIssue]
_START_B = tl.constexpr(CHAIN_B)  # pyright: ignore[reportCallIssue]


def _mix_reference(word: torch.Tensor) -> torch.Tensor:
    """Hash 32-bit words held in int64, where a wrapped product keeps its low word right."""
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D & _WORD
    word = word ^ (word >> 15)
    word = word * 0x846CA68B & _WORD
    return word ^ (word >> 16)


def _key_reference(
    seeds: torch.Tensor,  # [num_seqs] int64
    positions: torch.Tensor,  # [num_seqs] int64
    start: int,
) -> torch.Tensor:
    """Fold seed and position into one word a row: [num_seqs] int64."""
    key = _mix_reference((seeds & _WORD) ^ start)
    key = _mix_reference(key + (seeds >> 32 & _WORD) & _WORD)
    key = _mix_reference(key ^ (positions & _WORD))
    return _mix_reference(key + (positions >> 32 & _WORD) & _WORD)


def noise_at_reference(
    seeds: torch.Tensor,  # [num_seqs] int64
    positions: torch.Tensor,  # [num_seqs] int64, index of the token to be drawn
    token_ids: torch.Tensor,  # [num_seqs, k] integer, the tokens whose noise is wanted
) -> torch.Tensor:
    """Return the noise of the given tokens: [num_seqs, k] fp32 in (0, 1)."""
    key_a = _key_reference(seeds, positions, CHAIN_A)[:, None]
    key_b = _key_reference(seeds, positions, CHAIN_B)[:, None]
    bits = _mix_reference((token_ids.long() & _WORD) ^ key_a)
    bits = _mix_reference(bits + key_b & _WORD)
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def noise_reference(
    seeds: torch.Tensor,  # [num_seqs] int64
    positions: torch.Tensor,  # [num_seqs] int64
    vocab: int,
) -> torch.Tensor:
    """Return the noise of every token: [num_seqs, vocab] fp32 in (0, 1)."""
    return noise_at_reference(seeds, positions, torch.arange(vocab, device=seeds.device)[None, :])


@triton.jit
def _mix(word) -> tl.tensor:
    """Hash uint32 words; products wrap."""
    word ^= word >> 16
    word *= 0x7FEB352D
    word ^= word >> 15
    word *= 0x846CA68B
    word ^= word >> 16
    return word


@triton.jit
def _key(seed_low, seed_high, position_low, position_high, start: tl.constexpr) -> tl.tensor:
    """Fold seed and position, each two 32-bit words of any integer type, into one uint32."""
    key = _mix(seed_low.to(tl.uint32) ^ start)
    key = _mix(key + seed_high.to(tl.uint32))
    key = _mix(key ^ position_low.to(tl.uint32))
    return _mix(key + position_high.to(tl.uint32))


@triton.jit
def noise_keys(seed_low, seed_high, position) -> tuple[tl.tensor, tl.tensor]:
    """Return both key words of some rows: seeds as two int32 words, positions int32, not below 0.

    Scalars or vectors. Kept apart from noise_of, as a row's keys serve all of its tokens.
    """
    high = position * 0
    key_a = _key(seed_low, seed_high, position, high, _START_A)
    key_b = _key(seed_low, seed_high, position, high, _START_B)
    return key_a, key_b


@triton.jit
def noise_of(key_a, key_b, token_ids) -> tl.tensor:
    """Return the noise of tokens under a row's keys, fp32 in (0, 1); shapes broadcast."""
    bits = _mix(token_ids.to(tl.uint32) ^ key_a)
    bits = _mix(bits + key_b)
    return ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)


@triton.jit
def gumbel_of(key_a, key_b, token_ids) -> tl.tensor:
    """Return what is added to a scaled logit before the largest is taken, fp32, finite."""
    return -tl.log(-tl.log(noise_of(key_a, key_b, token_ids)))


@triton.jit
def _noise_kernel(
    seeds_ptr,  # in: [num_seqs] int64
    positions_ptr,  # in: [num_seqs] int64
    out_ptr,  # out: [num_seqs, vocab] fp32
    vocab,
    BLOCK: tl.constexpr,
) -> None:
    seq = tl.program_id(0).to(tl.int64)
    token_ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed, position = tl.load(seeds_ptr + seq), tl.load(positions_ptr + seq)
    key_a = _key(seed, seed >> 32, position, position >> 32, _START_A)
    key_b = _key(seed, seed >> 32, position, position >> 32, _START_B)
    noise = noise_of(key_a, key_b, token_ids)
    tl.store(out_ptr + seq * vocab + token_ids, noise, mask=token_ids < vocab)


def noise(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Return the noise of every token: [num_seqs, vocab] fp32 in (0, 1).

    Args:
        seeds: [num_seqs] int64.
        positions: [num_seqs] int64.
        vocab: number of tokens.
    """
    check_leading("seeds", seeds, 1, (torch.int64,))
    check_tensor("positions", positions, tuple(seeds.shape), torch.int64, seeds.device)
    out = torch.empty((seeds.shape[0], vocab), dtype=torch.float32, device=seeds.device)
    if out.numel() > 0:
        grid = (seeds.shape[0], triton.cdiv(vocab, 1024))
        _noise_kernel[grid](seeds, positions, out, vocab, BLOCK=1024)
    return out


#: Integer arithmetic and two exact fp32 operations: equal to the last bit.
TOLERANCE = {torch.float32: 0.0}
