"""Presence, frequency and repetition penalties on the logits.

    repetition r, for tokens in the prompt or the output:   x = x / r if x > 0 else x * r
    frequency f and presence p, for tokens in the output:   x = x - f * count - p * [count > 0]

Repetition first, as vLLM does; repetition as in transformers (prompt and output), frequency and
presence as OpenAI defines them (output only). 1, 0, 0 leave a row exactly as it was.
Numerics: fp32 throughout.
"""

import torch

from headrace.kernels.checks import check_leading, check_tensor
from headrace.kernels.triton_seam import tl, triton


def penalise_reference(
    logits: torch.Tensor,  # [num_seqs, vocab] fp32
    output_counts: torch.Tensor,  # [num_seqs, vocab] int32, times each token was generated
    in_prompt: torch.Tensor,  # [num_seqs, vocab] bool
    presence: torch.Tensor,  # [num_seqs] fp32, 0 = off
    frequency: torch.Tensor,  # [num_seqs] fp32, 0 = off
    repetition: torch.Tensor,  # [num_seqs] fp32, 1 = off
) -> torch.Tensor:
    """Return penalised logits: [num_seqs, vocab] fp32; the argument is left alone."""
    in_output = output_counts > 0
    factor = torch.where(in_output | in_prompt, repetition[:, None], 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency[:, None] * output_counts - presence[:, None] * in_output


@triton.jit
def _penalise_kernel(
    logits_ptr,  # in: [num_seqs, vocab] fp32
    output_counts_ptr,  # in: [num_seqs, vocab] int32
    in_prompt_ptr,  # in: [num_seqs, vocab] uint8
    presence_ptr,  # in: [num_seqs] fp32
    frequency_ptr,  # in: [num_seqs] fp32
    repetition_ptr,  # in: [num_seqs] fp32
    out_ptr,  # out: [num_seqs, vocab] fp32
    vocab,
    BLOCK: tl.constexpr,
) -> None:
    seq = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = offsets < vocab
    offsets = seq * vocab + offsets
    x = tl.load(logits_ptr + offsets, mask=is_inside, other=0.0)
    count = tl.load(output_counts_ptr + offsets, mask=is_inside, other=0)
    in_prompt = tl.load(in_prompt_ptr + offsets, mask=is_inside, other=0)
    in_output = count > 0
    factor = tl.where(in_output | (in_prompt != 0), tl.load(repetition_ptr + seq), 1.0)
    x = tl.where(x > 0, x / factor, x * factor)
    x -= tl.load(frequency_ptr + seq) * count.to(tl.float32)
    x -= tl.where(in_output, tl.load(presence_ptr + seq), 0.0)
    tl.store(out_ptr + offsets, x, mask=is_inside)


def penalise(
    logits: torch.Tensor,
    output_counts: torch.Tensor,
    in_prompt: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return penalised logits: [num_seqs, vocab] fp32.

    Args:
        logits: [num_seqs, vocab] fp32, contiguous.
        output_counts: [num_seqs, vocab] int32, times each token was generated.
        in_prompt: [num_seqs, vocab] bool.
        presence: [num_seqs] fp32, 0 = off.
        frequency: [num_seqs] fp32, 0 = off.
        repetition: [num_seqs] fp32, above 0, 1 = off.
        out: like logits; may be logits itself. Allocated when None.
    """
    check_leading("logits", logits, 2, (torch.float32,))
    shape, device = tuple(logits.shape), logits.device
    num_seqs, vocab = shape
    check_tensor("output_counts", output_counts, shape, torch.int32, device)
    check_tensor("in_prompt", in_prompt, shape, torch.bool, device)
    for name, values in (
        ("presence", presence),
        ("frequency", frequency),
        ("repetition", repetition),
    ):
        check_tensor(name, values, (num_seqs,), torch.float32, device)
    if out is None:
        out = torch.empty_like(logits)
    check_tensor("out", out, shape, torch.float32, device)
    if out.numel() > 0:
        _penalise_kernel[(num_seqs, triton.cdiv(vocab, 1024))](
            logits, output_counts, in_prompt.view(torch.uint8), presence, frequency, repetition,
            out, vocab, BLOCK=1024,
        )  # fmt: skip
    return out


#: A division and two subtractions in fp32; a GPU contracts multiply-subtract into one rounding.
TOLERANCE = {torch.float32: 1e-5}
