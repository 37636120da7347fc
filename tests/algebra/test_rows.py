"""Rows of blocks, put together, are the whole value: of every merge and of every way back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from library_calls import CASES, SITE, derived
from library_calls import leaf as drawn
from torch import Tensor

from surgery.algebra.axes import Size, size, symbol
from surgery.algebra.cost import numbers
from surgery.algebra.cuts import CUTS
from surgery.algebra.expr import BIAS, IN, MERGED, OUT, WEIGHT, Expr, number, parameter
from surgery.algebra.interpret import Domain, Evaluator
from surgery.algebra.ops import OPS
from surgery.algebra.products import BITS, kept_bytes
from surgery.algebra.rows import RowEvaluator, by_rows, step, whole_bytes
from surgery.algebra.rules import make

WHOLE = {call for call, _ in CASES if call.startswith(("deft", "peanut"))}
"""The calls whose merge needs more than the same rows: products with W on the right."""

every_call = pytest.mark.parametrize("call", [call for call, _ in CASES])


@cache
def leaf(expr: Expr) -> Tensor:
    if expr.op == "parameter" and expr.shape[0] == size(2) and expr.text("name") == "P":
        places = torch.arange(numbers(expr, SITE)[1])  # off a diagonal
        return torch.stack([places % 12, (5 * places + 1) % 12])
    return drawn(expr)


def domain(known: Mapping[str, Tensor] | None = None) -> Domain:
    given = known or {}

    def found(expr: Expr) -> Tensor:
        name = expr.text("name") if expr.op == "witness" else expr.op
        return given[name] if name in given else leaf(expr)

    return Domain(SITE, found, lambda: torch.zeros((), dtype=torch.float64))


def in_rows(root: Expr, known: Mapping[str, Tensor], cuts: list[int]) -> Tensor:
    evaluator = RowEvaluator(domain(known))
    bases = {WEIGHT: leaf(WEIGHT), **({MERGED: known["merged"]} if "merged" in known else {})}
    blocks = [
        evaluator.rows(root, a, b, {e: t[a:b] for e, t in bases.items()}) for a, b in pairwise(cuts)
    ]
    return torch.cat(blocks)


def some_cuts(root: Expr, seed: int) -> list[int]:
    """From 0 to the end, by multiples of the step, of which there may be none between."""
    every, end = step(root, SITE), numbers(root, SITE)[0]
    inner = range(every, end, every)
    return [0, *sorted(random.Random(seed).sample(inner, min(len(inner), 3))), end]


@cache
def roots(call: str) -> tuple[tuple[Expr, dict[str, Tensor]], ...]:
    """All that a merge with a call computes, each with what it is computed of beside parameters."""
    return tuple(_roots(call))


def _roots(call: str) -> Iterator[tuple[Expr, dict[str, Tensor]]]:
    found = derived(call)
    assert found.still is not None
    yield found.still.weight, {}
    if found.still.bias is not BIAS:
        yield found.still.bias, {}
    if found.inverse.weight is not None and found.inverse.weight is not MERGED:
        known = {"merged": Evaluator(domain()).value(found.still.weight)}
        for name, witness in found.inverse.witnesses:
            known[name] = Evaluator(domain()).value(witness)
            yield witness, {}
        yield found.inverse.weight, known


@every_call
def test_rows_put_together_are_the_whole(call: str) -> None:
    for root, known in roots(call):
        if not by_rows(root):
            assert call in WHOLE
            continue
        cuts = some_cuts(root, len(call))
        made = in_rows(root, known, cuts)
        assert torch.equal(made, Evaluator(domain(known), reproducible=True).value(root))
        plain = Evaluator(domain(known)).value(root)
        torch.testing.assert_close(made, plain, rtol=1e-11, atol=1e-12)


@every_call
def test_the_merges_that_need_the_whole_weight_are_few(call: str) -> None:
    (merged, _), *_ = roots(call)
    assert by_rows(merged) == (call not in WHOLE)


@every_call
def test_values_made_at_once_and_in_place_are_those_made_alone(call: str) -> None:
    for reproducible, (made, known) in product((True, False), at_once(call)):
        start, stop = max((step(root, SITE) for root in made), default=1), 20
        alone, together = (RowEvaluator(domain(known), reproducible) for _ in range(2))
        bases = {WEIGHT: leaf(WEIGHT), MERGED: known.get("merged", leaf(WEIGHT))}
        own = {expr: value[start:stop].clone() for expr, value in bases.items()}
        single = [alone.rows(root, start, stop, own) for root in made]
        assert all(torch.equal(value, bases[expr][start:stop]) for expr, value in own.items())
        for _ in range(2):  # what is kept is not overwritten
            spent = {expr: value.clone() for expr, value in own.items()}
            both = together.all_rows(made, start, stop, spent, spent=True)
            for one, other in zip(single, both, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
                assert not reproducible or torch.equal(one, other)


@pytest.mark.parametrize("call", ["lora(r=5, alpha=3)", "miss(r=4)"])
def test_rows_that_may_be_overwritten_are(call: str) -> None:
    (root, _), *_ = roots(call)
    for reproducible in (True, False):
        own = {WEIGHT: leaf(WEIGHT).clone()}
        (made,) = RowEvaluator(domain(), reproducible).all_rows((root,), 0, 20, own, spent=True)
        assert made.data_ptr() == own[WEIGHT].data_ptr()


def at_once(call: str) -> Iterator[tuple[list[Expr], dict[str, Tensor]]]:
    """What a merge makes of W by rows, and what it makes of W', each with what else is known."""
    there = [root for root, known in roots(call) if not known and by_rows(root)]
    yield there, {}
    for root, known in roots(call):
        if known and by_rows(root):
            yield [root], known


def test_blocks_end_where_the_equation_cannot_be_cut() -> None:
    steps = {call: step(roots(call)[0][0], SITE) for call, _ in CASES if call not in WHOLE}
    assert {call.partition("(")[0]: n for call, n in steps.items() if n > 1} == {
        "road": 10,
        "bat": 4,
        "miss": 4,
    }


def test_what_needs_the_whole_weight_is_refused_in_blocks_and_made_at_once() -> None:
    (root, _), *_ = roots("peanut(r=3)")
    with pytest.raises(ValueError, match="not made by rows"):
        step(root)
    evaluator = RowEvaluator(domain())
    with pytest.raises(ValueError, match="rows"):
        evaluator.rows(root, 0, 7, {WEIGHT: leaf(WEIGHT)[:7]})
    made = evaluator.rows(root, 0, 20, {WEIGHT: leaf(WEIGHT)})
    assert torch.equal(made, Evaluator(domain(), reproducible=True).value(root))


def test_a_block_that_ends_within_a_step_is_refused() -> None:
    (root, _), *_ = roots("bat(r=4)")
    with pytest.raises(ValueError, match="rows 0:8 of W are needed"):
        RowEvaluator(domain()).rows(root, 0, 7, {WEIGHT: leaf(WEIGHT)[:7]})


# ------------------------------------------------------------------------------------ structure

X = parameter("X", (symbol("out") / 4, size(4), size(4)))
A = parameter("a", (size(5), IN))
V = parameter("v", (OUT,))


def test_rotated_outputs_are_made_by_blocks_of_rows() -> None:
    turned = make("matmul", make("blockdiag", X), WEIGHT)
    assert by_rows(turned)
    assert step(turned, SITE) == 4
    made = in_rows(turned, {}, [0, 8, 12, 20])
    plain = Evaluator(domain()).value(turned)
    torch.testing.assert_close(made, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "root",
    [
        make("scale_cols", make("colnorm", WEIGHT), WEIGHT),
        make("matmul", parameter("s", (OUT, OUT)), WEIGHT),
        make("rearrange", WEIGHT, pattern="(k n) i -> (n k) i", axes=(("k", size(4)),)),
        make("matmul", WEIGHT, make("transpose", WEIGHT)),
        make("slice", make("concat", WEIGHT, WEIGHT, axis=0), bounds=((size(3), OUT + 3),)),
        make("mul", make("trace", make("matmul", WEIGHT, make("transpose", WEIGHT))), WEIGHT),
    ],
)
def test_what_mixes_rows_is_not_made_by_rows(root: Expr) -> None:
    assert not by_rows(root)


def test_what_is_kept_is_small() -> None:
    (lora, _), *_ = roots("lora(r=5, alpha=3)")
    own = 8 * 5 * 12  # A, of which every row needs all
    assert whole_bytes(lora, SITE) == own + kept_bytes((5, 12), BITS)
    assert whole_bytes(lora, SITE, bits=24) == 8 * 5 * 12 * 2
    (bone, _), *_ = roots("bone(r=5)")
    assert whole_bytes(bone, SITE) == 0
    (oft, _), *_ = roots("oft(block_size=4, use_cayley_neumann=false)")
    blocks = 8 * 3 * 4 * 4  # and no matrix [in, in]
    assert whole_bytes(oft, SITE, bits=24) == 2 * blocks


def test_what_is_kept_is_made_once() -> None:
    asked = list[str]()
    known = domain()

    def found(expr: Expr) -> Tensor:
        asked.append(expr.text("name"))
        return known.leaf(expr)

    (root, _), *_ = roots("oft(block_size=4, use_cayley_neumann=false)")
    evaluator = RowEvaluator(Domain(SITE, found, known.anchor))
    for start in range(20):
        evaluator.rows(root, start, start + 1, {WEIGHT: leaf(WEIGHT)[start : start + 1]})
    assert asked == ["v"]


def test_leaves_are_cut_before_they_are_widened() -> None:
    narrow = {e: leaf(e).bfloat16() for e in (A, parameter("b", (OUT, size(5))))}
    root = make("add", WEIGHT, make("matmul", parameter("b", (OUT, size(5))), A))
    stored = Domain(SITE, narrow.__getitem__, domain().anchor)
    made = RowEvaluator(stored).rows(root, 3, 11, {WEIGHT: leaf(WEIGHT)[3:11]})
    widened = Domain(SITE, lambda e: narrow[e].double(), domain().anchor)
    same = RowEvaluator(widened).rows(root, 3, 11, {WEIGHT: leaf(WEIGHT)[3:11]})
    assert made.dtype is torch.float64
    assert torch.equal(made, same)


def test_fewer_bits_are_as_many_in_every_block() -> None:
    (root, _), *_ = roots("hra(r=4)")
    few = [RowEvaluator(domain(), bits=34) for _ in range(2)]
    whole = few[0].rows(root, 0, 20, {WEIGHT: leaf(WEIGHT)})
    part = few[1].rows(root, 3, 11, {WEIGHT: leaf(WEIGHT)[3:11]})
    assert torch.equal(part, whole[3:11])
    plain = Evaluator(domain()).value(root)
    assert 0 < (whole - plain).abs().max() < 2.0**-26 * plain.abs().max()


def test_a_bias_is_cut_where_it_lies() -> None:
    root = make("add", BIAS, make("matmul", WEIGHT, parameter("c", (IN,))))
    made = in_rows(root, {}, [0, 7, 20])
    assert torch.equal(made, Evaluator(domain(), reproducible=True).value(root))


# ---------------------------------------------------------------------------- rule by rule

K = symbol("out")
M, N = parameter("M", (K, size(6))), parameter("N", (K, size(6)))
B3 = parameter("b", (K / 2, size(2), size(3)))
ENTRIES = parameter("entries", (size(2), size(9)))


def _rearranged(op: str, pattern: str, a: Expr, **axes: Size) -> Expr:
    return make(op, a, pattern=pattern, axes=tuple(axes.items()))


PARTS = (
    make("tile", make("transpose", parameter("d", (size(5), K))), columns=size(13)),
    make("kron", parameter("p", (K / 4, size(3))), parameter("q", (size(4), size(5)))),
    make("circulant", parameter("k", (K / 4, size(3), size(4)))),
    make("blockdiag", B3),
    make("transpose", make("blockdiag", make("transpose", B3))),
    make("add", number(1), make("diag", V)),
    make("sub", make("eye", size=K), make("matmul", M, make("transpose", N))),
    make("scatter", parameter("w", (size(9),)), ENTRIES, rows=OUT, columns=IN),
    make("rownorm", make("scale_rows", V, make("div", M, N))),
    make("colnorm", make("transpose", M)),
    make("softmax", make("topk", M, k=size(3))),
    make("cayley", make("skew", parameter("s", (K, size(6))), size=size(4))),
    make("concat", M, make("slice", N, bounds=((size(0), K), (size(1), size(4)))), axis=1),
    make("rotate_half", make("scale_cols", parameter("c", (size(6),)), M), size=size(10)),
    make("reduce", B3, pattern="n p q -> (n p)", by="mean", axes=()),
    make("slice", parameter("long", (K + 7, size(2))), bounds=((size(3), K + 3),)),
    _rearranged("repeat", "o -> o i", V, i=IN),
    _rearranged("repeat", "i -> o i", parameter("c", (size(6),)), o=OUT),
    _rearranged("rearrange", "n p q -> (n q) p", B3),
    _rearranged("rearrange", "(k n) i -> (n k) i", M, k=size(4)),
    _rearranged("rearrange", "(n k) i -> n (k i)", M, k=size(2)),
)


@given(st.sampled_from(PARTS), st.data())
def test_a_part_of_any_value_is_what_it_is_of_the_whole(root: Expr, data: st.DataObject) -> None:
    whole = Evaluator(domain(), reproducible=True).value(root)
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    assert torch.equal(RowEvaluator(domain()).rows(root, start, stop, {}), whole[start:stop])
    plain = Evaluator(domain()).value(root)
    torch.testing.assert_close(whole, plain, rtol=1e-11, atol=1e-12)
    made = RowEvaluator(domain(), reproducible=False).rows(root, start, stop, {})
    torch.testing.assert_close(made, plain[start:stop], rtol=1e-11, atol=1e-12)


def test_every_rule_is_an_operators() -> None:
    assert set(CUTS) <= set(OPS)
