"""The one interpreter. Over tensors it gives the merge and the reference; over proxies, the graph.

What a site offers comes in as a `Port`; the rest is the operator table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from surgery.algebra.applying import Vector
from surgery.algebra.arranged import arranged
from surgery.algebra.axes import Scalar, evaluate
from surgery.algebra.chance import drawn, dropped
from surgery.algebra.cost import apply_cost, cheapest, numbers, value_cost
from surgery.algebra.derive import Derived, Merged
from surgery.algebra.equations import Equations
from surgery.algebra.expr import (
    BIAS,
    INPUT,
    ORIGIN,
    OUT,
    OUTPUT,
    WEIGHT,
    Expr,
    depends_on,
    number,
    walk,
)
from surgery.algebra.observed import LEAVES as SEEN
from surgery.algebra.ops import OPS, through
from surgery.algebra.products import BITS
from surgery.algebra.rules import constant, make, substitute
from surgery.algebra.sums import difference, vanishes
from surgery.algebra.values import Facts


class Unlowerable(Exception):
    """An equation that cannot run at a site of this kind; the message is the reason."""


class Port(Protocol):
    """What a site offers to an equation. Outputs have their features last."""

    form: Literal["features", "patches", "indices"]
    groups: int

    def base(self, x: Tensor, changed: bool) -> Tensor:
        """The site's own layer on x; `changed` says that x is not as it came."""
        ...

    def apply(self, matrix: Tensor, x: Tensor, whole: bool) -> Tensor:
        """A matrix [k, in] on the input; [..., groups, k] where grouped and not whole."""
        ...

    def features(self, x: Tensor) -> Tensor:
        """The input as features, in the dtype of the parameters."""
        ...

    def widen(self, y: Tensor) -> Tensor:
        """What comes from `base` in the dtype of the parameters."""
        ...

    def scale_channels(self, x: Tensor, factors: Tensor) -> Tensor:
        """Patches times a factor a channel."""
        ...

    def training(self) -> bool:
        """Whether the site is in training mode."""
        ...


@dataclass(frozen=True, slots=True)
class Domain:
    """Where values come from: sizes, leaves, and a tensor to make constants like."""

    names: Mapping[str, int | float]
    leaf: Callable[[Expr], Tensor]
    anchor: Callable[[], Tensor]


_MOST_STEPS = 5000
LEAVES = frozenset({"parameter", "weight", "bias", "merged", "witness", *SEEN})
"""The operators without arguments whose values a domain has."""


class Evaluator:
    """Dense values, each computed once, in the cheapest order."""

    def __init__(self, domain: Domain, reproducible: bool = False, bits: int = BITS) -> None:
        """Evaluate with what a domain offers; `reproducible` in the same bits on any machine.

        bits: of the operands of such products, see `products.product`.
        """
        self.domain = domain
        self.reproducible = reproducible
        self.bits = bits
        self._values: dict[Expr, Tensor] = {}
        self._cost = value_cost(domain.names)
        self._kept = WeakIdKeyDictionary()

    def value(self, expr: Expr) -> Tensor:
        """The value of an expression without activations."""
        if self.reproducible:
            return self._value(arranged(expr, self.domain.names))
        return self._value(cheapest(expr, self._cost))

    def _value(self, expr: Expr) -> Tensor:
        if expr not in self._values:
            self._values[expr] = self._compute(expr)
        return self._values[expr]

    def _compute(self, expr: Expr) -> Tensor:
        if expr.op in LEAVES:
            return self.domain.leaf(expr)
        if expr.op == "number":
            # A Python number takes part in arithmetic as a tensor would, and keeps the dtype.
            return cast(Tensor, evaluate(constant(expr), self.domain.names))
        op = OPS[expr.op]
        arguments = [self._value(a) for a in expr.args]
        if not op.numbers:
            arguments = [self._filled(a) for a in arguments]
        return self.rule(expr)(self.facts(expr), *arguments)

    def rule(self, expr: Expr) -> Callable[..., Tensor]:
        """What makes the value of an operator of its arguments."""
        op = OPS[expr.op]
        return op.exact if self.reproducible and op.exact is not None else op.value

    def _filled(self, value: object) -> Tensor:
        """A number as a tensor, for what takes nothing else."""
        if isinstance(value, int | float):
            return self.domain.anchor().new_full((), value)
        return cast(Tensor, value)

    def facts(self, expr: Expr) -> Facts:
        """The sizes and constants of an expression."""
        names = self.domain.names

        def plain(value: Scalar) -> int | float:
            return evaluate(value, names)

        needs_anchor = not expr.args
        return Facts(
            self.lengths(expr),
            tuple(map(self.lengths, expr.args)),
            dict(expr.attrs),
            self.domain.anchor() if needs_anchor else cast(Tensor, None),
            plain,
            self.bits,
            self._kept,
        )

    def lengths(self, expr: Expr) -> tuple[int, ...]:
        """The shape in elements."""
        return numbers(expr, self.domain.names)


class Interpreter(Evaluator):
    """Applies matrices to vectors at a port, structure by structure; see `ops.Applier`."""

    def __init__(self, domain: Domain, port: Port, has_bias: bool) -> None:
        """Run at a port; `has_bias` says whether the site's own layer adds one."""
        super().__init__(domain)
        self.port = port
        self.has_bias = has_bias
        self._applied: dict[tuple[Expr, Vector], Vector] = {}
        self._steps = 0

    def run(self, derived: Derived, x: Tensor) -> Tensor:
        """The adapted output for an input, features last. Raises Unlowerable."""
        vector = Vector(x, raw=True)
        mixed = derived.equations.joins or mixes_output(derived.equations.output)
        if self.port.groups > 1 and mixed:
            raise Unlowerable("y is made group by group here, and a matrix would mix the groups")
        if derived.beside:
            return self._mixed(derived, vector)
        if derived.merged is None or derived.noisy or _random(derived.merged.bias):
            return self._activation_equations(derived.equations, vector)[OUTPUT].tensor
        return self._weights(derived.merged, vector).tensor

    def _weights(self, merged: Merged, x: Vector) -> Vector:
        """W' x + b'."""
        weight = cheapest(merged.weight, apply_cost(self.domain.names))
        applied = self._plain(self.apply(weight, x))
        offset = merged.bias
        if applied.offset is not None:
            offset = make("add", applied.offset, offset)
        return self._settled(replace(applied, offset=offset))

    # ------------------------------------------------------------------------------- apply

    def value(self, expr: Expr) -> Tensor:
        """The dense value; refused where it would silently leave out randomness."""
        if _random(expr):
            raise Unlowerable("drop(p) stands where no vector passes it at this kind of site")
        return super().value(expr)

    def apply(self, expr: Expr, v: Vector) -> Vector:
        """The matrix `expr` by v, through its structure where it has one, else densely."""
        key = (expr, v)
        if key not in self._applied:
            self._count()
            self._applied[key] = self._structured(expr, v) or self._dense(expr, v)
        return self._applied[key]

    def _count(self) -> None:
        # A product of a matrix with itself, again and again, would be applied factor by factor.
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise Unlowerable(f"it takes more than {_MOST_STEPS:,} steps")

    def _structured(self, expr: Expr, v: Vector) -> Vector | None:
        if expr is WEIGHT:
            return self.base(v)
        rule = OPS[expr.op].apply if through(expr) is not None else None
        return rule(self, expr, v) if rule else None

    def _dense(self, expr: Expr, v: Vector) -> Vector:
        matrix = self.value(expr)
        whole = expr.shape[0] == OUT
        if v.raw:
            y = self.port.apply(matrix, v.tensor, whole)
            split = self.port.groups > 1 and not whole
            return Vector(y if v.factor is None else y * v.factor, grouped=split)
        v = self._wide(v)
        offset = self._moved(expr, v.offset)
        if v.grouped and whole:
            return Vector(_rows_by_group(matrix, v.tensor, self.port.groups), offset=offset)
        return replace(v, tensor=F.linear(v.tensor, matrix), offset=offset)

    def _moved(self, expr: Expr, offset: Expr | None) -> Expr | None:
        return None if offset is None else make("matmul", expr, offset)

    def base(self, v: Vector) -> Vector | None:
        """W by v, by the site's own layer; what it adds as a bias is still to be taken off."""
        if not v.raw and self.port.form != "features":
            return None
        v = self._settled(v)
        y = self.port.base(v.tensor, changed=v.changed or not v.raw)
        found = Vector(y, narrow=True, offset=make("neg", BIAS) if self.has_bias else None)
        if v.factor is None:
            return found
        found = self._settled(found)
        return replace(found, tensor=found.tensor * v.factor)

    def split(self, v: Vector) -> bool:
        """Whether each group of output rows sees a part of v alone."""
        return self.port.groups > 1 and (v.raw or v.grouped)

    def features(self, v: Vector) -> Vector | None:
        """The vector with its features last; None for what only a whole matrix can read."""
        if not v.raw:
            return v
        if self.port.form != "features":
            return None
        return Vector(self.port.features(v.tensor))

    def scale(self, factors: Expr, v: Vector) -> Vector | None:
        """Each element of v by its factor."""
        features = self.features(v)
        if features is not None:
            offset = None if v.offset is None else make("mul", factors, v.offset)
            return replace(features, tensor=features.tensor * self.value(factors), offset=offset)
        if self.port.form == "indices":
            picked = F.embedding(v.tensor, self.value(factors).unsqueeze(-1))
            return replace(v, factor=picked if v.factor is None else v.factor * picked)
        if factors.op != "channelwise":
            return None
        scaled = self.port.scale_channels(v.tensor, self.value(factors.args[0]))
        return replace(v, tensor=scaled, changed=True)

    def drop(self, probability: float, together: str, v: Vector) -> Vector:
        """Dropout of the elements of v; of whole one-hot vectors where v is an index."""
        v = self._settled(v)
        if together != "tokens":
            v = self._plain(v)
            tensor = dropped(v.tensor, probability, together, self.port.training())
            return replace(v, tensor=tensor)
        if not v.raw or self.port.form != "indices":
            v = self.features(v) or v
            return replace(v, tensor=F.dropout(v.tensor, probability, self.port.training()))
        ones = self.domain.anchor().new_ones(()).expand_as(v.tensor).unsqueeze(-1)
        kept = F.dropout(ones, probability, self.port.training())
        return replace(v, factor=kept if v.factor is None else v.factor * kept)

    def multiply(self, factor: Expr, v: Vector) -> Vector:
        """The vector by a number."""
        v = self._wide(self._plain(v))
        offset = None if v.offset is None else make("mul", factor, v.offset)
        negative = factor.op == "number" and constant(factor) == constant(number(-1))
        tensor = -v.tensor if negative else v.tensor * self.value(factor)
        return replace(v, tensor=tensor, offset=offset)

    def add(self, left: Vector, right: Vector, alpha: int) -> Vector:
        """The sum, or the difference where `alpha` is below 0."""
        left, right = self._plain(left), self._plain(right)
        if left.narrow and right.narrow:
            left = self._wide(left)  # else the sum would be rounded, and once more at the end
        tensor = left.tensor + right.tensor if alpha > 0 else left.tensor - right.tensor
        offset = left.offset
        if right.offset is not None:
            op = "add" if alpha > 0 else "sub"
            if offset is not None:
                offset = make(op, offset, right.offset)
            else:
                offset = right.offset if alpha > 0 else make("neg", right.offset)
        return replace(left, tensor=tensor, offset=offset, narrow=False)

    def mapped(self, expr: Expr, v: Vector, function: Callable[[Tensor], Tensor]) -> Vector | None:
        """A function that is the matrix `expr` on features."""
        features = self.features(v)
        if features is None or (features.grouped and expr.shape[0] == OUT):
            return None
        features = self._wide(features)
        tensor = function(features.tensor)
        return replace(features, tensor=tensor, offset=self._moved(expr, v.offset))

    def _wide(self, v: Vector) -> Vector:
        return replace(v, tensor=self.port.widen(v.tensor), narrow=False) if v.narrow else v

    def _settled(self, v: Vector) -> Vector:
        if v.offset is None or vanishes(v.offset):
            return replace(v, offset=None)
        return replace(v, tensor=v.tensor + self.value(v.offset), offset=None)

    def _plain(self, v: Vector) -> Vector:
        """The vector as features, at the price of an identity matrix where it must be read."""
        if not v.raw:
            return v
        return self.features(v) or self._dense(make("eye", size=WEIGHT.shape[1]), v)

    # ------------------------------------------------------------------ activation equations

    def _mixed(self, derived: Derived, x: Vector) -> Tensor:
        """What is mixed as weights, and to it how much each of the others moves the base's y."""
        mixed = derived.equations
        total = self._weights(Merged(mixed.weight or WEIGHT, mixed.bias or BIAS), x)
        for factor, equations in derived.beside:
            changed = self._moved_output(equations, x)
            if changed is not None:
                changed = self.multiply(number(factor), changed) if factor != 1 else changed
                total = self.add(total, changed, 1)
        return total.tensor

    def _moved_output(self, equations: Equations, x: Vector) -> Vector | None:
        """Y' - y, of the y that the base gives."""
        known = self._activation_equations(Equations(()), x)
        if equations.weight or equations.bias or equations.input:
            moved = self._activation_equations(equations, x)[OUTPUT]
            return self.add(self._wide(moved), self._wide(known[OUTPUT]), -1)
        change = difference(equations.output or OUTPUT, OUTPUT)
        return None if change is None else self.change(change, known)

    def change(self, change: Expr, known: dict[Expr, Vector]) -> Vector:
        """How much an output is moved; a vector [n] moves each token alike."""
        if change.is_activation:
            return self.activation(change, known)
        return Vector(self.value(change))

    def _activation_equations(self, equations: Equations, x: Vector) -> dict[Expr, Vector]:
        """X as it came, x' and y', each by what an equation has for it."""
        weight, bias = equations.weight or WEIGHT, equations.bias or BIAS
        known: dict[Expr, Vector] = {ORIGIN: x, INPUT: x}
        if equations.input is not None:
            # Over what came, so that nothing made of it is taken for what is made of x'.
            known[INPUT] = self.activation(substitute(equations.input, {INPUT: ORIGIN}), known)
        site = self._plain(self.apply(weight, known[INPUT]))
        offset = bias if self.has_bias or bias is not BIAS else None
        if site.offset is not None:
            offset = site.offset if offset is None else make("add", site.offset, offset)
        known[OUTPUT] = self._settled(replace(site, offset=offset))
        if equations.output is None:
            return known
        return {**known, OUTPUT: self.activation(equations.output, known)}

    def activation(self, expr: Expr, known: dict[Expr, Vector]) -> Vector:
        """What an expression of x and y comes to, where these are known. Raises Unlowerable."""
        if expr not in known:
            known[expr] = self._act(expr, known)
        return known[expr]

    def _act(self, expr: Expr, known: dict[Expr, Vector]) -> Vector:
        match expr.op:
            case "matmul":
                matrix = make("transpose", expr.args[1])
                return self._settled(self.apply(matrix, self.activation(expr.args[0], known)))
            case "scale":
                scaled = self.scale(expr.args[0], self.activation(expr.args[1], known))
                if scaled is None:
                    raise Unlowerable("x is read in patches here, and cannot be scaled by element")
                return scaled
            case "noise":
                deviation = self._operand(expr.args[0], known)
                return replace(deviation, tensor=drawn(deviation.tensor, self.port.training()))
            case _:
                operands = [self._operand(a, known) for a in expr.args]
                split = {
                    v.grouped for v, a in zip(operands, expr.args, strict=True) if a.is_activation
                }
                if len(split) > 1:
                    raise Unlowerable("x is read group by group here, and the output is not")
                value = OPS[expr.op].value(self.facts(expr), *(v.tensor for v in operands))
                return Vector(value, grouped=True in split)

    def _operand(self, expr: Expr, known: dict[Expr, Vector]) -> Vector:
        if not expr.is_activation:
            return Vector(self.value(expr))
        features = self.features(self.activation(expr, known))
        if features is None:
            raise Unlowerable(
                "x is not a vector of features here; multiply it by a matrix before anything else"
            )
        return self._wide(features)


def mixes_output(output: Expr | None) -> bool:
    """Whether y' is made of a matrix by something that is made of y."""
    products = () if output is None else walk(output)
    return any(e.op == "matmul" and depends_on(e.args[0], OUTPUT) for e in products)


def _random(expr: Expr) -> bool:
    return any(e.op == "drop" for e in walk(expr))


def _rows_by_group(matrix: Tensor, x: Tensor, groups: int) -> Tensor:
    """Each group's rows of a matrix [out, k] by that group's vector; x is [..., groups, k]."""
    # [groups, k, out / groups]
    rows = cast(Tensor, matrix.unflatten(0, (groups, -1))).transpose(-1, -2)
    return torch.matmul(x.unsqueeze(-2), rows).flatten(-3)
