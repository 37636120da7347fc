"""Methods that are made of parts of the weight, or read it, written out by hand [out, in].

Each takes the weight, the parameters by name, and the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

Parameters = Mapping[str, Tensor]
Arguments = Mapping[str, Any]

untyped = cast(Any, torch)


def scale(a: Arguments) -> float:
    """What the change is multiplied by."""
    return a["alpha"] / (math.sqrt(a["r"]) if a["rslora"] else a["r"])


def kasa(w: Tensor, p: Parameters, a: Arguments) -> Tensor:
    """A part is gone, and another of singular values there."""
    return w - p["U"] @ p["V"] + scale(a) * p["B"] @ torch.diag(p["d"]) @ p["A"]


def bdlora(w: Tensor, p: Parameters, a: Arguments) -> Tensor:
    """One of the factors has its rows in as many blocks."""
    n = {"A": (a["nblocks"], 1), "B": (1, a["nblocks"]), "none": (1, 1)}[a["blocks"]]
    down, up = (untyped.block_diag(*p[k].chunk(m)) for k, m in zip("AB", n, strict=True))
    return w + scale(a) * up @ down


def psoft(w: Tensor, p: Parameters, a: Arguments) -> Tensor:
    """Between the parts stands a matrix [r, r]."""
    r = a["r"]
    one = torch.eye(r).double()
    middle = p["T"] if "T" in p else _turned(p["v"], one, a)
    if "vector_a" in p:
        middle = middle @ torch.diag(p["vector_a"])
    if "vector_b" in p:
        middle = torch.diag(p["vector_b"]) @ middle
    return w + p["U"] @ (middle - one) @ p["V"]


def _turned(v: Tensor, one: Tensor, a: Arguments) -> Tensor:
    q = torch.zeros_like(one)
    q[tuple(torch.triu_indices(len(one), len(one), 1))] = v
    q = q - q.t()
    if not a["use_cayley_neumann"]:
        return (one + q) @ cast(Tensor, untyped.linalg.inv(one - q))
    if a["cayley_neumann_eps"]:
        eps = torch.tensor(a["cayley_neumann_eps"], dtype=torch.float64)
        q = q * eps / torch.maximum(cast(Tensor, untyped.linalg.norm(q)), eps)
    terms = 4 if a["num_cayley_neumann_terms"] == 3 else a["num_cayley_neumann_terms"]
    total, power = one, one
    for k in range(1, terms):
        power = power @ q
        total = total + (1 if k == terms - 1 and k > 1 else 2) * power
    return total


def deft(w: Tensor, p: Parameters, a: Arguments) -> Tensor:
    """What is projected away, and what comes instead."""
    left = right = p["P"]
    if a["decomposition_method"] == "qr":
        left = right = cast(Tensor, untyped.linalg.qr(p["P"])[0])
    else:
        right = right.clamp(min=0)
    new = w - left @ right.t() @ w
    if a["para"]:
        return new
    return new + (a["alpha"] / left.shape[1] if a["alpha"] else 1) * left @ p["R"]


def osf(w: Tensor, p: Parameters, a: Arguments) -> Tensor:
    """The least parts are what they have become, and move at right angles to the others."""
    del a
    outer = p["H"] @ (p["H"].t() @ p["U"])
    inner = (p["V"] @ p["G"].t()) @ p["G"]
    u, v = p["U"] - outer + outer.detach(), p["V"] - inner + inner.detach()
    return w - p["U_0"] @ torch.diag(p["S_0"]) @ p["V_0"] + u @ torch.diag(p["S"]) @ v


def peanut(w: Tensor, p: Parameters, a: Arguments) -> Tensor:
    """Down through the layers, and up again beside what was on the way."""
    act = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}[a["act_fn"]]
    h, passed = act(p["A"] @ w), list[Tensor]()
    for k in range(a["depth"]):
        passed.append(h)
        h = act(p[f"E{k}"] @ h)
    for k in range(a["depth"]):
        h = act(p[f"D{k}"] @ h) + passed[-1 - k]
    return w + a["scaling"] * p["B"] @ h


def tinylora(w: Tensor, p: Parameters, a: Arguments) -> Tensor:
    """Some matrices [n, n] in a sum, between two parts of the weight; a table's lie turned."""
    stacked = torch.stack([v * one for v, one in zip(p["v"], p["P"], strict=True)]).sum(0)
    return w + p["B"] @ (stacked.t() if a["kind"] == "embedding" else stacked) @ p["A"]


def qalora(w: Tensor, p: Parameters, a: Arguments) -> Tensor:
    """Each column of A stands for the mean of a group, times the number of groups."""
    g = a["group_size"]
    mean = torch.eye(w.shape[1] // g).double().repeat_interleave(g, 1) / g
    return w + scale(a) * p["B"] @ p["A"] @ (w.shape[1] // g * mean)


def adamss(w: Tensor, p: Parameters, a: Arguments) -> Tensor:
    """Each row of the change is of its cluster; the rows of B stand in the order of these."""
    return w + _by_clusters(p, a)[:, : w.shape[1]]


def adamss_bias(b: Tensor, p: Parameters, a: Arguments) -> Tensor:
    """The bias is the last column."""
    return b + _by_clusters(p, a)[:, -1]


def _by_clusters(p: Parameters, a: Arguments) -> Tensor:
    label, s = list(map(int, p["C"].argmax(1))), p["B"].shape[1]
    assert s <= a["subspace_rank"]
    places = sorted(range(len(label)), key=lambda i: (label[i], i))
    rows = dict[int, Tensor]()
    for row, place in zip(p["B"], places, strict=True):
        rows[place] = row @ p["A"][label[place] * s : (label[place] + 1) * s] @ p["V"]
    return torch.stack([rows[i] for i in range(len(label))])


def frod(w: Tensor, p: Parameters, a: Arguments) -> Tensor:
    """A diagonal, and some places beside it, between two bases."""
    assert a["category"] == "site"
    middle = torch.diag(p["l"])
    for k in range(len(p["s"]) if a["sparse_rate"] else 0):
        row, column = map(int, p["P"][:, k])
        assert row != column
        middle = middle.index_put((torch.tensor(row), torch.tensor(column)), p["s"][k], True)
    return w - w.detach() + p["U"] @ middle @ p["V"].t()


FACTORED = {
    "frod": frod,
    "adamss": adamss,
    "qalora": qalora,
    "tinylora": tinylora,
    "kasa": kasa,
    "bdlora": bdlora,
    "psoft": psoft,
    "deft": deft,
    "osf": osf,
    "peanut": peanut,
}
