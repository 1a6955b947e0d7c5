"""Presence, frequency and repetition penalties on the logits.

    repetition r, for tokens in the prompt or the output:   x = x / r if x > 0 else x * r
    frequency f and presence p, for tokens in the output:   x = x - f * count - p * [count > 0]

Repetition first, as vLLM does; repetition as in transformers (prompt and output), frequency and
presence as OpenAI defines them (output only). 1, 0, 0 leave a row exactly as it was.
Numerics: fp32 throughout.
"""

import torch


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
