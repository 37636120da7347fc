"""Numbers rounded to few bits, as a quantised weight has them, and back: what is lost by it.

The values are those that bitsandbytes comes to, which is not needed for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.algebra.values import Facts

_BLOCK = 64

# The 4-bit normal float of Dettmers et al., "QLoRA", 2023, arXiv:2305.14314, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def nf4(facts: Facts, a: Tensor) -> Tensor:
    """[m, n], each 64 elements in turn rounded to the 16 values times their largest magnitude."""
    flat = a.reshape(-1)
    rest = -len(flat) % _BLOCK
    blocks = torch.cat([flat, flat.new_zeros(rest)]).view(-1, _BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    codes = torch.tensor(NF4, dtype=a.dtype, device=a.device)
    shares = blocks / torch.where(largest == 0, 1.0, largest)
    nearest = torch.bucketize(shares, (codes[1:] + codes[:-1]) / 2)
    return (codes[nearest] * largest).view(-1)[: len(flat)].view_as(a)


def int8(facts: Facts, a: Tensor) -> Tensor:
    """[m, n], each row rounded to whole 127ths of its largest magnitude."""
    unit = a.abs().amax(1, keepdim=True) / 127
    return torch.round(a / torch.where(unit == 0, 1.0, unit)) * unit
