"""What merges come to on the machine that runs this, as digests; run alone it prints them."""

from __future__ import annotations

import hashlib
import json
import math
import sys

import torch
from library_calls import derived
from torch import Tensor

from surgery.algebra.cost import numbers as lengths
from surgery.algebra.expr import MERGED, WEIGHT, Expr
from surgery.algebra.interpret import Domain
from surgery.algebra.rows import RowEvaluator, step

SITE = {"in": 96, "out": 128, "channels": 96}
CALLS = (
    "lora(r=16, alpha=3)",
    "dora(r=16, alpha=3)",
    "oft(block_size=32, use_cayley_neumann=false)",
    "oft(block_size=8, coft=true, block_share=true)",
    "hra(r=5, apply_GS=true)",
    "hra(r=4)",
    "boft(block_size=8, n_butterfly_factor=2)",
    "bat(r=16)",
    "delora(r=5)",
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of 32 bits in [-1, 1), the same on every machine, as drawn ones would not be."""
    mixed = torch.arange(math.prod(shape), dtype=torch.int64) + 1000003 * seed + 12345
    for factor in (2654435761, 2246822519):
        mixed = mixed * factor % 2**32
        mixed = mixed ^ (mixed >> 15)
    return (mixed.double() / 2**31 - 1).view(shape)


def digests(rows: int) -> dict[str, str]:
    """Of the merge with each call and of the way back, made by so many rows at a time."""
    return {
        f"{call} {way}": hashlib.sha256(_made(root, rows).numpy().tobytes()).hexdigest()
        for call in CALLS
        for way, root in _roots(call).items()
    }


def _roots(call: str) -> dict[str, Expr]:
    found = derived(call, site=SITE)
    assert found.still is not None
    assert found.inverse.weight is not None
    return {"merged": found.still.weight, "back": found.inverse.weight}


def _made(root: Expr, rows: int) -> Tensor:
    evaluator = RowEvaluator(Domain(SITE, _leaf, lambda: torch.zeros((), dtype=torch.float64)))
    weight, end = numbers(SITE["out"], SITE["in"]), SITE["out"]
    assert rows % step(root, SITE) == 0
    blocks = [(at, min(at + rows, end)) for at in range(0, end, rows)]
    return torch.cat(
        [evaluator.rows(root, a, b, {WEIGHT: weight[a:b], MERGED: weight[a:b]}) for a, b in blocks]
    )


def _leaf(expr: Expr) -> Tensor:
    name = expr.text("name")
    return numbers(*lengths(expr, SITE), seed=sum(map(ord, name))) * 0.3


if __name__ == "__main__":
    threads, rows = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    print(json.dumps(digests(rows)))
