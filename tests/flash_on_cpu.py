"""torch's flash attention over packed rows on a CPU, where torch has none: its two operators, by their formula.

Importing this module gives them to torch.ops.torch_attn for CPU tensors, for the whole process. All else that calls
them is then what runs on a GPU.
"""

import torch
from torch import Tensor
from torch.nn.attention import varlen


def attend(query: Tensor, key: Tensor, starts: Tensor, longest: int, window: list[int]) -> tuple[Tensor, Tensor]:
    """The probabilities of each pair of tokens and the log-sum-exp of each token, (heads, tokens, ...)."""
    tokens, heads, dim = query.shape
    bounds = starts.tolist()
    assert bounds[0] == 0 and bounds[-1] == tokens
    assert longest >= max(end - start for start, end in zip(bounds, bounds[1:], strict=False))
    example = torch.bucketize(torch.arange(tokens), starts[1:].long(), right=True)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    seen = (example[:, None] == example[None]) & (distance >= 0)
    if window[0] >= 0:
        seen &= distance <= window[0]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * dim**-0.5
    scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1), scores.logsumexp(-1)


@varlen._varlen_attn.register_kernel("cpu")
def forward(
    query, key, value, starts, ends, longest, longest_key, is_causal=False, scale=None, window_size=None, *_, **__
):
    window = window_size or [-1, -1]
    assert window[1] == 0 and is_causal == (window == [-1, 0]) and scale is None and torch.equal(starts, ends)
    probabilities, lse = attend(query, key, starts, longest, window)
    values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    output = torch.einsum("hqk,khd->qhd", probabilities, values)
    return output.contiguous(), lse.float(), torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def backward(
    grad,
    query,
    key,
    value,
    output,
    lse,
    starts,
    ends,
    longest,
    longest_key,
    is_causal,
    rng,
    scale=None,
    window_size=None,
):
    """From the saved output and log-sum-exp, as flash attention (arXiv:2205.14135, algorithm 4)."""
    assert grad.is_contiguous() and output.is_contiguous() and is_causal == (window_size == [-1, 0])
    heads, kv_heads, dim = query.shape[1], key.shape[1], query.shape[2]
    share = heads // kv_heads
    keys, values = (x.repeat_interleave(share, 1) for x in (key, value))
    seen = attend(query, key, starts, longest, window_size)[0] > 0
    scores = torch.einsum("qhd,khd->hqk", query, keys) * dim**-0.5
    probabilities = (scores - lse[:, :, None].to(scores.dtype)).exp() * seen
    of_values = torch.einsum("hqk,qhd->khd", probabilities, grad)
    of_probabilities = torch.einsum("qhd,khd->hqk", grad, values)
    of_scores = probabilities * (of_probabilities - (grad * output).sum(-1).t()[:, :, None]) * dim**-0.5
    of_query = torch.einsum("hqk,khd->qhd", of_scores, keys)
    of_keys = torch.einsum("hqk,qhd->khd", of_scores, query)
    sums = [x.unflatten(1, (kv_heads, share)).sum(2) for x in (of_keys, of_values)]
    return of_query.contiguous(), *sums
