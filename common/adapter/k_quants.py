"""llama.cpp's k-quants: weights in 4.5, 5.5 or 6.56 bits each, in blocks of 256 values.

A block is cut into parts, each with a scale of its own, which is quantized itself:

    Q4_K, Q5_K  8 parts of 32:   value = d * scale * code - dmin * minimum; codes to 15 or 31, scale, minimum to 63
    Q6_K        16 parts of 16:  value = d * scale * (code - 32); codes to 63, scale -128 to 127

d and dmin are fp16. The layout of the bytes is that of ggml (ggml-common.h, block_q4_K, block_q5_K, block_q6_K), and is
read back by the gguf package and llama.cpp in the tests. The scales of a part are found by trying some roundings, and
for each the least squares fit of scale and minimum to its codes.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

K_BLOCK = 256  # values
VALUES_AT_A_TIME = 1 << 20  # what is computed at once stays in a CPU's cache, and small on a card
MOST_SCALE = 63  # of a part's scale and minimum in Q4_K and Q5_K


def quantize_k(weight: Tensor, kind: Kind) -> npt.NDArray[np.uint8]:
    """The bytes of a weight (rows, columns), any float dtype: uint8 (rows, bytes of a row).

    kind: one of K_QUANTS. columns: a multiple of K_BLOCK.
    """
    blocks = weight.reshape(-1, K_BLOCK)
    parts = blocks.split(max(1, VALUES_AT_A_TIME // K_BLOCK))
    packed = torch.cat([K_QUANTS[kind](part.float()) for part in parts])
    return packed.reshape(len(weight), -1).cpu().numpy()


def _q4_k(blocks: Tensor) -> Tensor:
    head, codes = _with_minimum(blocks, 15)
    low, high = codes.view(-1, 4, 2, 32).unbind(2)  # a byte holds two parts' codes
    return torch.cat([head, (low | high << 4).flatten(1)], 1)


def _q5_k(blocks: Tensor) -> Tensor:
    head, codes = _with_minimum(blocks, 31)
    low, high = (codes & 15).view(-1, 4, 2, 32).unbind(2)
    fifth = (codes >> 4) << torch.arange(8, device=codes.device, dtype=torch.uint8)[:, None]  # a bit for each part
    return torch.cat([head, fifth.sum(1, dtype=torch.uint8), (low | high << 4).flatten(1)], 1)


def _q6_k(blocks: Tensor) -> Tensor:
    parts = blocks.view(-1, 16, 16)
    scales = _fit_scales(parts)
    largest = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    d = (largest / -128).half()
    scales = torch.round(scales / _nonzero(d.float())).clamp_(-128, 127)
    codes = torch.round(parts / _nonzero(d.float() * scales)[..., None]).clamp_(-32, 31).add_(32).to(torch.uint8)
    quarters = codes.view(-1, 2, 4, 32)  # of each half of a block
    low, high = quarters & 15, quarters >> 4
    bits = torch.tensor([0, 2, 4, 6], device=codes.device, dtype=torch.uint8)[:, None]
    return torch.cat(
        [
            (low[:, :, :2] | low[:, :, 2:] << 4).flatten(1),
            (high << bits).sum(2, dtype=torch.uint8).flatten(1),
            scales.to(torch.int8).view(torch.uint8),
            d.view(torch.uint8),
        ],
        1,
    )


K_QUANTS: dict[Kind, Callable[[Tensor], Tensor]] = {Kind.Q4_K: _q4_k, Kind.Q5_K: _q5_k, Kind.Q6_K: _q6_k}


def _with_minimum(blocks: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The first 16 bytes of each block, d, dmin, and scales and minima; and the codes, uint8 (blocks, 8, 32)."""
    parts = blocks.view(-1, 8, 32)
    scales, minima = _fit_scales_and_minima(parts, most)
    d, dmin = ((part.amax(1, keepdim=True) / MOST_SCALE).half() for part in (scales, minima))
    scales, minima = (
        torch.round(part / _nonzero(unit.float())).clamp_(0, MOST_SCALE) for part, unit in ((scales, d), (minima, dmin))
    )
    codes = _codes(parts, d, dmin, scales, minima, most)
    d, dmin = _fit_units(parts, codes * scales[..., None], minima, d, dmin)
    codes = _codes(parts, d, dmin, scales, minima, most).to(torch.uint8)
    scales, minima = scales.to(torch.uint8), minima.to(torch.uint8)
    # Six bits each in 12 bytes: those of the first four parts whole, and above them the upper two of the others.
    packed = [
        scales[:, :4] | scales[:, 4:] >> 4 << 6,
        minima[:, :4] | minima[:, 4:] >> 4 << 6,
        scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4,
    ]
    return torch.cat([d.view(torch.uint8), dmin.view(torch.uint8), *packed], 1), codes


def _codes(parts: Tensor, d: Tensor, dmin: Tensor, scales: Tensor, minima: Tensor, most: int) -> Tensor:
    shifted = parts + (dmin.float() * minima)[..., None]
    return torch.round(shifted / _nonzero(d.float() * scales)[..., None]).clamp_(0, most)


def _fit_units(parts: Tensor, scaled: Tensor, minima: Tensor, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
    """d and dmin, fp16 (blocks, 1), by least squares once all else of a block is known. scaled: codes times scales."""
    sum_ss, sum_sm = scaled.square().sum((1, 2)), (scaled.sum(2) * minima).sum(1)
    sum_mm = parts.shape[2] * minima.square().sum(1)
    sum_sx, sum_mx = (scaled * parts).sum((1, 2)), (parts.sum(2) * minima).sum(1)
    determinant = sum_ss * sum_mm - sum_sm.square()
    is_solvable = (determinant > 0)[:, None]
    new_d = ((sum_sx * sum_mm - sum_mx * sum_sm) / _nonzero(determinant))[:, None]
    new_dmin = ((sum_sx * sum_sm - sum_mx * sum_ss) / _nonzero(determinant))[:, None]
    return torch.where(is_solvable, new_d.half(), d), torch.where(is_solvable, new_dmin.half(), dmin)


def _fit_scales_and_minima(parts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each part (blocks, parts, values), both at least 0: value = scale * code - minimum.

    Large values count more: what a weight's error does to an output grows with the weight's size.
    """
    weight = parts.abs() + parts.square().mean(-1, keepdim=True).sqrt_()
    lowest = parts.amin(-1, keepdim=True).clamp_(max=0)
    span = _nonzero(parts.amax(-1, keepdim=True) - lowest)
    sum_w, sum_x = weight.sum(-1), (weight * parts).sum(-1)
    best: list[Tensor] = []
    for more in np.arange(-1.0, 1.05, 0.1):
        codes = torch.round((parts - lowest) * ((most + more) / span)).clamp_(0, most)
        weighted = weight * codes
        sum_l, sum_ll, sum_xl = weighted.sum(-1), (weighted * codes).sum(-1), (weighted * parts).sum(-1)
        scale = (sum_w * sum_xl - sum_x * sum_l) / _nonzero(sum_w * sum_ll - sum_l.square())
        minimum = (sum_l * sum_xl - sum_ll * sum_x) / _nonzero(sum_w * sum_ll - sum_l.square())
        alone = minimum < 0  # the least squares fit with a minimum of 0
        scale = torch.where(alone, sum_xl / _nonzero(sum_ll), scale).clamp_(min=0)
        minimum = minimum.clamp_(min=0)
        error = (weight * (scale[..., None] * codes - minimum[..., None] - parts).square()).sum(-1)
        if not best:
            best = [error, scale, minimum]
        better = error < best[0]
        best = [torch.where(better, new, old) for new, old in zip((error, scale, minimum), best, strict=True)]
    return best[1], best[2]


def _fit_scales(parts: Tensor) -> Tensor:
    """The scale of each part (blocks, parts, values) for codes from -32 to 31: value = scale * code."""
    weight = parts.square()
    largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    best: list[Tensor] = []
    for more in np.arange(-0.9, 0.95, 0.1):
        codes = torch.round(parts * ((-32 + more) / _nonzero(largest))).clamp_(-32, 31)
        weighted = weight * codes
        sum_ll, sum_xl = (weighted * codes).sum(-1), (weighted * parts).sum(-1)
        scale = sum_xl / _nonzero(sum_ll)
        gain = scale * sum_xl  # what the fit takes off the squared error
        if not best:
            best = [gain, scale]
        better = gain > best[0]
        best = [torch.where(better, new, old) for new, old in zip((gain, scale), best, strict=True)]
    return best[1]


def _nonzero(x: Tensor) -> Tensor:
    """x, and 1 where it is 0: what is divided by it is 0 there."""
    return torch.where(x == 0, torch.ones_like(x), x)
