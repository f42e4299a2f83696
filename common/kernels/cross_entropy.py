"""Cross-entropy of a softmax over a vocabulary, and its gradient in place of the logits.

    nll = log(sum(exp(logits))) - logits[target],  d nll / d logits = softmax(logits) - 1 at the target

It computes in fp32 and rounds the gradient once, to the logits' dtype. The kernel goes over the logits twice, and once
without the gradient. The first pass keeps a maximum, and a sum of exponentials relative to it, that are corrected as it
goes on (online softmax, arXiv:1805.02867).
"""

import torch
from torch import Tensor

from common.kernels import constexpr, jit, next_power_of_2, register, tl

# Entries of a row that a program holds at a time, by 32 warps: 16 a thread, in 50 to 60 registers on sm_75 to sm_90 by
# ptxas; twice as many spill. So a multiprocessor has one row at a time. The 132 rows of an H100 are 34 MB in bf16 at
# Llama 3's vocabulary, within its L2 cache, where the second pass finds them.
VOCABULARY_BLOCK = 16384
# Entries that the reference computes at a time: what it allocates in fp32 is small beside the logits, whatever their
# number, and stays in a CPU's cache.
REFERENCE_ENTRIES = 1 << 20


def _cross_entropy_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    nll = torch.empty_like(targets, dtype=torch.float32)
    rows = max(1, REFERENCE_ENTRIES // logits.shape[1])
    for start in range(0, len(logits), rows):
        tile, target = logits[start : start + rows], targets[start : start + rows, None]
        highest = tile.amax(-1, keepdim=True).float()
        target_logit = tile.gather(-1, target).float()
        probabilities = torch.sub(tile, highest).exp_()  # fp32: so is one of the two
        partition = probabilities.sum(-1, keepdim=True)
        nll[start : start + rows] = (partition.log() + (highest - target_logit))[:, 0]
        if scale:
            probabilities.div_(partition)
            probabilities[torch.arange(len(tile), device=tile.device), target[:, 0]] -= 1
            tile.copy_(probabilities.mul_(scale))
    return nll


@jit
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, targets_ptr, nll_ptr, size, scale, BLOCK: constexpr, HAS_GRADIENT: constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * size  # 64 bits: a tile may have more than 2^31 entries
    target = tl.load(targets_ptr + row)
    # A target outside of the vocabulary gives NaN, which stops a run, instead of what lies beside the logits.
    known = (target >= 0) & (target < size)
    target_logit = tl.load(logits_ptr + target, known, other=float("nan")).to(tl.float32)

    # A maximum and a sum for each of BLOCK columns: they meet once, at the end.
    columns = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)  # finite: -inf less -inf is NaN
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        x = tl.load(logits_ptr + start + columns, start + columns < size, other=float("-inf")).to(tl.float32)
        # Of exp(x - maximum) and the correction of the sum one is 1, and the other this.
        smaller = tl.exp(-tl.abs(x - highest))
        total = tl.where(x > highest, total * smaller + 1, total + smaller)
        highest = tl.maximum(highest, x)
    maximum = tl.max(highest, 0)
    partition = tl.sum(total * tl.exp(highest - maximum), 0)
    tl.store(nll_ptr + row, tl.log(partition) + (maximum - target_logit))

    if HAS_GRADIENT:
        inverse = 1 / partition
        for start in range(0, size, BLOCK):
            entries = start + columns
            x = tl.load(logits_ptr + entries, entries < size, other=float("-inf")).to(tl.float32)
            probability = tl.exp(x - maximum) * inverse
            grad = tl.where(entries == target, probability - 1, probability)
            tl.store(logits_ptr + entries, (grad * scale).to(logits_ptr.dtype.element_ty), entries < size)


def cross_entropy_triton_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    assert logits.is_contiguous()
    targets = targets.contiguous()
    nll = torch.empty_like(targets, dtype=torch.float32)
    rows, size = logits.shape
    block = min(VOCABULARY_BLOCK, next_power_of_2(size))
    constants = {"BLOCK": block, "HAS_GRADIENT": scale != 0, "num_warps": max(block // 512, 1)}
    _cross_entropy_kernel[(rows,)](logits, targets, nll, size, scale, **constants)
    return nll


# Returns the negative log-likelihood of each row's target, in nats: fp32 (rows,). logits: (rows, vocabulary),
# contiguous, any float dtype. They are overwritten with `scale` times the gradient of their own row's, which is in
# [-1, 1]; with a scale of 0 they stay. targets: int64 (rows,), in 0..vocabulary - 1.
cross_entropy_ = register(
    "cross_entropy_(Tensor(a!) logits, Tensor targets, float scale) -> Tensor",
    _cross_entropy_,
    lambda logits, targets, scale: torch.empty_like(targets, dtype=torch.float32),
    cross_entropy_triton_,
)
