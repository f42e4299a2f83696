"""torch's flash attention over packed rows on a CPU, where torch has none: its two operators, by their formula.

Importing this module gives them to torch.ops.torch_attn for CPU tensors, for the whole process. All that calls them is
then what runs on a GPU. They allocate of torch what they allocate on a GPU, and compute in NumPy, which torch's
profiler does not see.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import varlen


def probabilities_and_lse(query, key, starts: Tensor, longest: int, window: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """What each token gives to each other, (heads, tokens, tokens), and its log-sum-exp, (heads, tokens)."""
    tokens, _, dim = query.shape
    bounds = starts.numpy()
    assert bounds[0] == 0 and bounds[-1] == tokens and longest >= np.diff(bounds).max()
    example = np.searchsorted(bounds[1:], np.arange(tokens), side="right")
    distance = np.arange(tokens)[:, None] - np.arange(tokens)[None]
    seen = (example[:, None] == example[None]) & (distance >= 0)
    if window[0] >= 0:
        seen &= distance <= window[0]
    scores = np.where(seen, np.einsum("qhd,khd->hqk", query, key, optimize=True) * dim**-0.5, -np.inf)
    highest = scores.max(-1, keepdims=True)
    exponentials = np.exp(scores - highest)
    total = exponentials.sum(-1, keepdims=True)
    return exponentials / total, (highest + np.log(total))[..., 0]


def expanded(x: Tensor, heads: int) -> np.ndarray:
    """Keys or values for each query head."""
    return np.repeat(x.numpy(), heads // x.shape[1], 1)


@varlen._varlen_attn.register_kernel("cpu")
def forward(
    query, key, value, starts, ends, longest, longest_key, is_causal=False, scale=None, window_size=None, *_, **__
):
    window = window_size or [-1, -1]
    assert window[1] == 0 and is_causal == (window == [-1, 0]) and scale is None and torch.equal(starts, ends)
    heads = query.shape[1]
    output = torch.empty(query.shape, dtype=query.dtype)
    lse = torch.empty((heads, len(query)))
    probabilities, sums = probabilities_and_lse(query.numpy(), expanded(key, heads), starts, longest, window)
    lse.numpy()[:] = sums
    output.numpy()[:] = np.einsum("hqk,khd->qhd", probabilities, expanded(value, heads), optimize=True)
    return output, lse, torch.zeros(2, dtype=torch.uint64)


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
    heads, dim = query.shape[1:]
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
    # What torch 2.13 allocates inside, in this order (flash_attn/flash_api.cpp, mha_varlen_bwd).
    padded, multiple = len(query) + 128 * (len(starts) - 1), 32 if dim <= 128 else 64
    inside = [torch.empty(heads, padded), torch.empty(padded, heads, (dim + multiple - 1) // multiple * multiple)]
    if key.shape[1] != heads:
        inside += [torch.empty(len(key), heads, dim, dtype=key.dtype) for _ in range(2)]
    del inside
    q, k, v, d_out = query.numpy(), expanded(key, heads), expanded(value, heads), grad.numpy()
    seen = probabilities_and_lse(q, k, starts, longest, window_size)[0] > 0
    scores = np.einsum("qhd,khd->hqk", q, k, optimize=True) * dim**-0.5
    probabilities = np.where(seen, np.exp(np.where(seen, scores - lse.numpy()[:, :, None], 0)), 0).astype(q.dtype)
    of_probabilities = np.einsum("qhd,khd->hqk", d_out, v, optimize=True)
    delta = (d_out * output.numpy()).sum(-1).T[:, :, None]
    of_scores = probabilities * (of_probabilities - delta) * dim**-0.5
    grads[0].numpy()[:] = np.einsum("hqk,khd->qhd", of_scores, k, optimize=True)
    for total, part in zip(
        grads[1:],
        (
            np.einsum("hqk,qhd->khd", of_scores, q, optimize=True),
            np.einsum("hqk,qhd->khd", probabilities, d_out, optimize=True),
        ),
        strict=True,
    ):
        total.numpy()[:] = part.reshape(len(part), key.shape[1], -1, dim).sum(2)
    return tuple(grads)
