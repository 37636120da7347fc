"""Products of small matrices, reflections, butterflies and blocks, written out by hand [out, in].

Each takes the weight, the parameters by name, and the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]
Arguments = Mapping[str, Any]

untyped = cast(Any, torch)


def core(a: Tensor, t: Tensor, b: Tensor) -> Tensor:
    """A[p, o], a core [p, q, kernel] and B[q, c] as a matrix [o, c * kernel]."""
    return torch.einsum("po,pqu,qc->ocu", a, t, b).flatten(1)


def loha(w: Tensor, p: Parameters, a: Arguments) -> Tensor:
    """Two low-rank matrices, element by element."""
    if "T1" in p:
        one, two = core(p["A1"], p["T1"], p["B1"]), core(p["A2"], p["T2"], p["B2"])
    else:
        one, two = p["A1"] @ p["B1"], p["A2"] @ p["B2"]
    return w + a["alpha"] / a["r"] * one * two


def lokr(w: Tensor, p: Parameters, a: Arguments) -> Tensor:
    """Block (i, j) of the change is an element of the one times the other."""
    left = p["C1"] if "C1" in p else p["A1"] @ p["B1"]
    right = p.get("C2")
    if right is None:
        right = core(p["A2"], p["T2"], p["B2"]) if "T2" in p else p["A2"] @ p["B2"]
    rows = [torch.cat([element * right for element in row], 1) for row in left]
    return w + a["alpha"] / a["r"] * torch.cat(rows)


def hra(w: Tensor, p: Parameters, a: Arguments) -> Tensor:
    """One reflection after the other."""
    directions: list[Tensor] = []
    for u in p["u"].t():
        for other in directions if a["apply_GS"] else ():
            u = u - (other @ u) * other
        directions.append(u / u.square().sum().sqrt())
    for u in directions:
        w = w - 2 * torch.outer(w @ u, u)
    return w


def boft(w: Tensor, p: Parameters, a: Arguments) -> Tensor:
    """One factor after the other, each a permutation of a block diagonal."""
    del a
    for level, blocks in enumerate(p["R"]):
        b = blocks.shape[-1]
        one, made = torch.eye(b).double(), list[Tensor]()
        for r in blocks:
            q = (r - r.t()) / 2
            made.append((one - q) @ cast(Tensor, untyped.linalg.inv(one + q)))
        order = gathered(w.shape[1], b * 2**level, b // 2) if level else list(range(w.shape[1]))
        mixed = torch.eye(w.shape[1]).double()[order]
        w = w @ (mixed @ cast(Tensor, untyped.block_diag(*made)) @ mixed.t()).t()
    return p["s"][:, None] * w


def gathered(length: int, group: int, half: int) -> list[int]:
    """In each group the half-blocks of even place, and then the others."""
    order: list[int] = []
    for begin in range(0, length, group):
        for first in (begin, begin + half):
            for at in range(first, begin + group, 2 * half):
                order += range(at, at + half)
    return order


def gralora(w: Tensor, p: Parameters, a: Arguments) -> Tensor:
    """Block (i, j) of the change is of rank r / k."""
    k, part, new = a["k"], a["r"] // a["k"], torch.zeros_like(w)
    out, into = w.shape[0] // k, w.shape[1] // k
    for i in range(k):
        for j in range(k):
            up = p["B"][i][:, j * part : (j + 1) * part]
            down = p["A"][j][i * part : (i + 1) * part]
            new[i * out : (i + 1) * out, j * into : (j + 1) * into] = up @ down
    if a["hybrid_r"]:
        new = new + p["B_general"] @ p["A_general"]
    return w + a["alpha"] / (a["r"] + a["hybrid_r"]) * new


STRUCTURED = {"loha": loha, "lokr": lokr, "hra": hra, "boft": boft, "gralora": gralora}
