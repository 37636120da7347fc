"""What expressions come to on the machine that runs this, as digests.

Run alone it reads them, pickled, and prints these.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from surgery.algebra.cost import numbers as lengths
from surgery.algebra.expr import MERGED, WEIGHT, Expr
from surgery.algebra.interpret import Domain
from surgery.algebra.rows import RowEvaluator, step

SITE = {"in": 96, "out": 128, "channels": 96}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of 32 bits in [-1, 1), the same on every machine, as drawn ones would not be."""
    mixed = torch.arange(math.prod(shape), dtype=torch.int64) + 1000003 * seed + 12345
    for factor in (2654435761, 2246822519):
        mixed = mixed * factor % 2**32
        mixed = mixed ^ (mixed >> 15)
    return (mixed.double() / 2**31 - 1).view(shape)


def digests(roots: Mapping[str, Expr], rows: int) -> dict[str, str]:
    """Of the value of each expression, made by so many rows at a time."""
    made = {name: _made(root, rows).numpy() for name, root in roots.items()}
    return {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in made.items()}


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
    print(json.dumps(digests(pickle.load(sys.stdin.buffer), rows)))
