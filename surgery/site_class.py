"""A class of sites that are alike: what is put on them, and what is derived once for them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from surgery.algebra.axes import Size, evaluate
from surgery.algebra.beginnings import WHOLE as WHOLE_NUMBERS
from surgery.algebra.derive import Derived
from surgery.algebra.equations import Parameter
from surgery.algebra.expr import WEIGHT, render
from surgery.algebra.places import Places
from surgery.arguments import Arguments, Link, without_counted
from surgery.language import syntax as ast
from surgery.model.layers import Geometry, LayerKind, Mode, Sizes
from surgery.model.parts import WHOLE, ParameterSlice, Part
from surgery.report import shown

if TYPE_CHECKING:
    from surgery.work import Work


SharedKey = tuple[str, str, Arguments, str]
"""An adapter, a method, its arguments and a parameter's name."""


@dataclass(frozen=True)
class SiteClass:
    """A method with its arguments, or a chain of them, at one shape of site.

    links: the methods in the order in which they are applied.
    shapes: of each parameter, in elements, as this site sees it.
    dtype: of the parameters.
    at: which of a layer's parameters the sites are, and which part of it.
    batch: the number of matrices, where a site is a batch of them.
    shape: of the sites' parameter, where it is taken as it lies and not as a matrix.
    mode: how the layer is reached.
    places: which tokens of a text it is for; all, where there are none.
    """

    links: tuple[Link, ...]
    derived: Derived
    kind: LayerKind
    sizes: Sizes
    geometry: Geometry | None
    has_bias: bool
    base_dtype: torch.dtype
    dtype: torch.dtype
    at: ParameterSlice = WHOLE
    batch: int | None = None
    shape: tuple[int, ...] | None = None
    mode: Mode = "call"
    places: tuple[Places, ...] = ()

    def __hash__(self) -> int:
        """The hash of all fields, computed once: a class stands for hundreds of sites."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    def __getstate__(self) -> dict[str, object]:
        """The fields alone; what is derived from them is derived anew, hashes above all."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __deepcopy__(self, memo: dict[int, object]) -> SiteClass:
        """Itself, since it is immutable and shared by all sites that are alike."""
        return self

    @property
    def method(self) -> ast.Method:
        """The one method. ValueError where there are several."""
        (link,) = self.links
        return link.method

    @property
    def arguments(self) -> Arguments:
        """The arguments of the one method. ValueError where there are several."""
        (link,) = self.links
        return link.arguments

    @property
    def named(self) -> str:
        """The methods' names, as a statement has them."""
        return " then ".join(link.method.name for link in self.links)

    @cached_property
    def calls(self) -> tuple[str, ...]:
        """The methods with their arguments, each as a statement has it."""
        return tuple(map(_call, self.links))

    @property
    def call(self) -> str:
        """The methods with their arguments, as a statement has them."""
        return " then ".join(self.calls)

    @cached_property
    def names(self) -> Mapping[str, int | float]:
        """The sizes by their names in equations."""
        return dict(self.sizes.names)

    @property
    def part(self) -> Part | None:
        """Which rows of the matrix the sites are, if not all."""
        return self.at.part

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each parameter in elements, as one matrix has it."""
        return {p.name: self.numbers(p.shape) for p in self.parameters}

    @cached_property
    def stored(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each parameter in elements: for a whole batch, unless it is shared."""
        if self.shape is not None:
            return {n: self.shape if n in self.lying else s for n, s in self.shapes.items()}
        batch = () if self.batch is None else (self.batch,)
        shared = {p.name for p in self.parameters if p.shared}
        return {n: s if n in shared else (*batch, *s) for n, s in self.shapes.items()}

    @cached_property
    def lying(self) -> frozenset[str]:
        """The parameters that lie as the sites' own, of which they are no matrix."""
        if self.shape is None:
            return frozenset()
        return frozenset(p.name for p in self.parameters if p.shape == WEIGHT.shape)

    def matrix(self, name: str, stored: Any) -> Any:
        """A parameter as the equation has it; on tensors and on proxies."""
        return self.kind.to_matrix(stored) if name in self.lying else stored

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The declared parameters, in order."""
        return self.derived.equations.parameters

    def dtype_of(self, p: Parameter) -> torch.dtype:
        """The dtype of a parameter: that of the sites', but of whole numbers their own."""
        return WHOLE_NUMBERS if p.whole else self.dtype

    def bank(self, adapter: str, p: Parameter) -> SharedKey:
        """What names a shared parameter of an adapter, which other sites know by other names."""
        link = self.links[p.link]
        return adapter, link.method.name, self._common[p.link], p.declared_name

    @cached_property
    def _common(self) -> tuple[Arguments, ...]:
        """The arguments of each link that it has in common with the sites that share with it."""
        return tuple(map(without_counted, self.links))

    def numbers(self, shape: tuple[Size, ...]) -> tuple[int, ...]:
        """A symbolic shape in elements."""
        return tuple(int(evaluate(s, self.names)) for s in shape)

    @cached_property
    def work(self) -> Work | None:
        """What a forward takes beyond the base's; None where the equation cannot run there."""
        from surgery.work import extra_work

        return extra_work(self, self.names)

    @cached_property
    def equation(self) -> str:
        """The equation as derived: `W' = …`, and `b' = …` where it is not b."""
        return _equation(self.derived)


def _call(link: Link) -> str:
    given = ", ".join(f"{n}={shown(v)}" for n, v in link.arguments)
    return f"{link.method.name}({given})"


def _equation(derived: Derived) -> str:
    merged, equations = derived.still, derived.equations
    if merged is None:
        weights = (("W'", equations.weight), ("b'", equations.bias))
        given = (*weights, ("x'", equations.input), ("y'", equations.output))
        return ", ".join(f"{name} = {render(e)}" for name, e in given if e is not None)
    parts = [] if merged.weight.op == "weight" else [f"W' = {render(merged.weight)}"]
    if merged.bias.op not in ("bias", "zeros"):
        parts.append(f"b' = {render(merged.bias)}")
    return ", ".join(parts) or "W' = W"
