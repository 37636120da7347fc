"""The whole of selection against an oracle: plain sets of paths, and `re.fullmatch` on all tails.

The oracle is written from the meaning alone. A selector is a table of what it takes: each module,
by its first path, with the paths by which it answers. `|`, `&` and `not` are operations on tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import assert_never

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from surgery.algebra.filters import Filter, asks
from surgery.algebra.names import Names
from surgery.algebra.scalars import Scalars, plain
from surgery.errors import Report
from surgery.language.parse import parse
from surgery.language.syntax import Expression, Match
from surgery.model.facts import Facts
from surgery.model.sites import select, survey

# ------------------------------------------------------------------------------------- models


class Box(nn.Module):
    """A module with named children and no forward of its own."""

    def __init__(self, children: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


NAMES = ("q", "v", "a", "layers")
LEAVES: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.Linear(2, 3),
    lambda: nn.Linear(2, 3),
    lambda: nn.Linear(5, 2, dtype=torch.float64),
    lambda: nn.Embedding(7, 2),
    lambda: nn.LayerNorm(2),
    lambda: nn.Bilinear(2, 3, 5),
)


@st.composite
def trees(draw: st.DrawFn) -> nn.Module:
    """Boxes and lists of leaves, some of which are met again elsewhere or share a weight."""
    made: list[nn.Module] = []

    def below(depth: int) -> nn.Module:
        if made and draw(st.integers(0, 7)) == 0:
            return draw(st.sampled_from(made))
        module = (
            parent(depth) if depth and draw(st.integers(0, 3)) else draw(st.sampled_from(LEAVES))()
        )
        if isinstance(module, nn.Linear) and draw(st.integers(0, 9)) == 0:
            tie(module)
        made.append(module)
        return module

    def parent(depth: int) -> nn.Module:
        count = draw(st.integers(2, 3))
        children = [below(depth - 1) for _ in range(count)]
        if draw(st.booleans()):
            return nn.ModuleList(children)
        names = draw(st.permutations(NAMES))[:count]
        return Box(dict(zip(names, children, strict=True)))

    def tie(module: nn.Linear) -> None:
        same = (
            m for m in made if isinstance(m, nn.Linear) and m.weight.shape == module.weight.shape
        )
        module.weight = next((m.weight for m in same), module.weight)

    return parent(3)


# --------------------------------------------------------------------------------- statements


@dataclass(frozen=True)
class Atom:
    """A pattern as it is written, and each of its alternatives as Python's regex."""

    text: str
    alternatives: tuple[str, ...]


@dataclass(frozen=True)
class Union:
    left: Selector
    right: Selector


@dataclass(frozen=True)
class Common:
    left: Selector
    right: Selector


@dataclass(frozen=True)
class Without:
    operand: Selector


Selector = Atom | Union | Common | Without

REGEXES = ("q", ".?", ".*", r"a\.q", "[0-9]", r"layers\.0", "a|v", r"(a|layers|v)\..*", "0|v|q")
GLOBS = {
    "q": ("q",),
    "*": ("[^.]*",),
    "**": (".*",),
    "q*": ("q[^.]*",),
    "a.*": (r"a\.[^.]*",),
    "layers.**": (r"layers\..*",),
    "{q,v}": ("q", "v"),
    "{a,1}.{q,v}": (r"a\.(q|v)", r"1\.(q|v)", r"(a|1)\.q", r"(a|1)\.v"),
    "*.0": (r"[^.]*\.0",),
}
ATOMS = st.sampled_from(
    [
        *(Atom(f"/{r}/", tuple(r.split("|")) if "(" not in r else (r,)) for r in REGEXES),
        *(Atom(text, alternatives) for text, alternatives in GLOBS.items()),
    ]
)


def compounds(inner: st.SearchStrategy[Selector]) -> st.SearchStrategy[Selector]:
    return st.one_of(
        st.builds(Union, inner, inner), st.builds(Common, inner, inner), st.builds(Without, inner)
    )


SELECTORS: st.SearchStrategy[Selector] = st.recursive(ATOMS, compounds, max_leaves=5)


def written(node: Selector, tightness: int = 0) -> str:
    """The text of a selector, with parentheses only where they are needed."""
    match node:
        case Atom(text, _):
            return text
        case Union(left, right):
            own, text = 0, f"{written(left, 0)} | {written(right, 1)}"
        case Common(left, right):
            own, text = 1, f"{written(left, 1)} & {written(right, 2)}"
        case Without(operand):
            own, text = 2, f"not {written(operand, 2)}"
        case _:
            assert_never(node)
    return f"({text})" if own < tightness else text


Known = Mapping[str, object]
Asked = tuple[frozenset[str], Callable[[Known], bool]]

CONDITIONS: Mapping[str, Asked] = {
    "type == Linear": (frozenset({"type"}), lambda f: f["type"] == "Linear"),
    "type != Embedding": (frozenset({"type"}), lambda f: f["type"] != "Embedding"),
    'type == "Module"': (frozenset({"type"}), lambda f: True),
    "name == q": (frozenset({"name"}), lambda f: f["name"] == "q"),
    'path != "a.q"': (frozenset({"path"}), lambda f: f["path"] != "a.q"),
    "layer < 2": (frozenset({"layer"}), lambda f: f["layer"] in (0, 1)),
    "layer % 2 == 0": (frozenset({"layer"}), lambda f: f["layer"] in (0, 2)),
    "in == 2": (frozenset({"in"}), lambda f: f["in"] == 2),
    "in < out": (frozenset({"in", "out"}), lambda f: (f["in"], f["out"]) == (2, 3)),
    "numel >= 10": (frozenset({"numel"}), lambda f: f["numel"] not in (6,)),
    "dtype == float64": (frozenset({"dtype"}), lambda f: f["dtype"] == "float64"),
    "tied": (frozenset({"tied"}), lambda f: f["tied"] is True),
    "true": (frozenset(), lambda f: True),
}


def either(one: Asked, other: Asked) -> Asked:
    return one[0] | other[0], lambda f: one[1](f) or other[1](f)


def both(one: Asked, other: Asked) -> Asked:
    return one[0] | other[0], lambda f: one[1](f) and other[1](f)


def negated(one: Asked) -> Asked:
    return one[0], lambda f: not one[1](f)


@st.composite
def conditions(draw: st.DrawFn) -> tuple[str, Asked]:
    """A condition of one to three parts, as text and as a function."""
    text, asked = draw(st.sampled_from([*CONDITIONS.items()]))
    for _ in range(draw(st.integers(0, 2))):
        more, also = draw(st.sampled_from([*CONDITIONS.items()]))
        if draw(st.booleans()):
            more, also = f"not ({more})", negated(also)
        if draw(st.booleans()):
            text, asked = f"({text}) or {more}", either(asked, also)
        else:
            text, asked = f"({text}) and {more}", both(asked, also)
    return text, asked


@dataclass(frozen=True)
class Step:
    """A container and what is taken of its children: None, all, a slice or indices."""

    container: Atom
    index: slice | tuple[int, ...] | None

    def __str__(self) -> str:
        match self.index:
            case None:
                return self.container.text
            case slice(start=start, stop=stop, step=step):
                inside = ":".join("" if part is None else str(part) for part in (start, stop, step))
            case tuple():
                inside = ", ".join(map(str, self.index))
        return f"{self.container.text}[{inside}]"


BOUNDS = st.none() | st.integers(-3, 3)
INDICES = st.one_of(
    st.none(),
    st.just(slice(None)),
    st.just(slice(None)),
    st.builds(slice, BOUNDS, BOUNDS, st.sampled_from([None, 1, 2, -1])),
    st.lists(st.integers(-1, 1), min_size=1, max_size=2).map(tuple),
)
CONTAINERS = st.sampled_from(
    [
        Atom("layers", ("layers",)),
        Atom("/a|layers|v/", ("a", "layers", "v")),
        Atom("/[0-9]/", ("[0-9]",)),
        Atom("**", (".*",)),
        Atom("{a,layers}", ("a", "layers")),
        Atom("a.*", (r"a\.[^.]*",)),
    ]
)


@st.composite
def paths_of_steps(draw: st.DrawFn) -> list[Step]:
    """One or two steps; a dot behind one without an index would be the glob's own."""
    last = Step(draw(CONTAINERS), draw(INDICES))
    index = draw(INDICES)
    return [last] if index is None else [Step(draw(CONTAINERS), index), last]


SCOPES = paths_of_steps()


@dataclass(frozen=True)
class Statement:
    selector: Selector
    scopes: list[list[Step]] = field(default_factory=list[list[Step]])
    where: tuple[str, Asked] | None = None
    leave: Selector | None = None
    optional: bool = False

    def __str__(self) -> str:
        parts = ["optional match" if self.optional else "match", written(self.selector)]
        if self.scopes:
            parts += ["in", " | ".join(".".join(map(str, scope)) for scope in self.scopes)]
        parts += [] if self.where is None else ["where", self.where[0]]
        parts += [] if self.leave is None else ["except", written(self.leave)]
        return " ".join([*parts, "apply m()"])


STATEMENTS = st.builds(
    Statement,
    SELECTORS,
    st.lists(SCOPES, max_size=1) | st.just([]) | st.lists(SCOPES, max_size=2),
    st.none() | conditions() | st.none(),
    st.none() | SELECTORS | st.none(),
    st.booleans(),
)

# ------------------------------------------------------------------------------------- oracle

Table = Mapping[str, frozenset[str]]


def takes(pattern: str, path: str) -> bool:
    parts = path.split(".")
    return any(re.fullmatch(pattern, ".".join(parts[i:])) for i in range(len(parts)))


def walked(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every path, in order; no module here is below itself."""
    yield path, module
    for name, child in module._modules.items():  # pyright: ignore[reportPrivateUsage]
        assert child is not None
        yield from walked(child, f"{path}.{name}" if path else name)


def inside(path: str, above: str) -> bool:
    return not above or path == above or path.startswith(f"{above}.")


class Oracle:
    """What a statement means on a model: the paths of its sites, and the codes of what is wrong."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(walked(model))
        first: dict[int, str] = {}
        for path, module in self.modules.items():
            first.setdefault(id(module), path)
        self.first = {path: first[id(module)] for path, module in self.modules.items()}
        self.candidates = [p for p, m in self.modules.items() if isinstance(m, _WITH_WEIGHT)]
        self.wrong: set[str] = set()

    def __call__(self, statement: Statement) -> tuple[list[str], set[str]]:
        self.wrong = set()
        regions = self.regions(statement.scopes)
        if self.wrong and not statement.optional:
            return [], self.wrong
        self.scope = {
            path: next(r for r in regions if inside(path, r[0]))
            for path in self.candidates
            if any(inside(path, above) for above, _ in regions)
        }
        found = self.table(statement.selector)
        if found and statement.where is not None:
            found = self.filtered(found, *statement.where[1])
        if found and statement.leave is not None:
            found = self.reduced(found, statement.leave)
        sites = [path for path in self.modules if path in found and self.fits(path)]
        return sites, self.wrong - (LIFTED if statement.optional else set())

    def table(self, node: Selector) -> Table:
        """What a selector takes; each part of it should take something."""
        match node:
            case Atom(_, alternatives):
                for one in alternatives:
                    self.note("E201", not any(takes(one, path) for path in self.scope))
                return self.grouped(lambda p: any(takes(one, p) for one in alternatives))
            case Union(left, right):
                a, b = self.table(left), self.table(right)
                return {s: a.get(s, frozenset()) | b.get(s, frozenset()) for s in {**a, **b}}
            case Common(left, right):
                a, b = self.table(left), self.table(right)
                found = {s: (a[s] & b[s]) or (a[s] | b[s]) for s in a if s in b}
                self.note("E201", not found)
                return found
            case Without(operand):
                a, everything = self.table(operand), self.grouped(lambda p: True)
                found = {s: paths for s, paths in everything.items() if s not in a}
                self.note("E201", not found)
                return found
            case _:
                assert_never(node)

    def grouped(self, taken: Callable[[str], bool]) -> Table:
        paths = [path for path in self.scope if taken(path)]
        sites = {self.first[path] for path in paths}
        return {s: frozenset(p for p in paths if self.first[p] == s) for s in sites}

    def note(self, code: str, wrong: bool) -> None:
        self.wrong |= {code} if wrong else set()

    def filtered(
        self, found: Table, asked: frozenset[str], holds: Callable[[Known], bool]
    ) -> Table:
        kept = {
            site: frozenset(p for p in paths if asked <= (f := self.facts(p)).keys() and holds(f))
            for site, paths in found.items()
        }
        self.note("E211", not any(kept.values()))
        return {site: paths for site, paths in kept.items() if paths}

    def reduced(self, found: Table, leave: Selector) -> Table:
        """What is left; each part of a top-level `|` of `except` should take something away."""
        match leave:
            case Union(left, right):
                a, b = self.reduced(found, left), self.reduced(found, right)
                gone = {s for s in found if s not in a or s not in b}
            case Atom(_, alternatives):
                paths = [p for p in self.scope if self.first[p] in found]
                for one in alternatives:
                    self.note("E202", not any(takes(one, path) for path in paths))
                gone = {self.first[p] for p in paths if any(takes(one, p) for one in alternatives)}
            case Common() | Without():
                before, gone = set(self.wrong), set(self.table(leave)) & found.keys()
                self.wrong = before  # inside a part, what takes nothing is as it may be
                self.note("E202", not gone)
            case _:
                assert_never(leave)
        self.note("E201", not found.keys() - gone)
        return {s: paths for s, paths in found.items() if s not in gone}

    def fits(self, path: str) -> bool:
        """Whether a module can be adapted."""
        module = self.modules[path]
        known = isinstance(module, nn.Linear | nn.Embedding)
        self.note("E208", not known)
        self.note("E207", known and self.tied(path))
        return known and not self.tied(path)

    def tied(self, path: str) -> bool:
        mine = self.modules[path]
        others = {id(m): m for m in self.modules.values() if m is not mine}.values()
        return any(m.weight is mine.weight for m in others if isinstance(m, _WITH_WEIGHT))

    def layer(self, path: str) -> int | None:
        """The position in the container that the scope indexes, else in the outermost list."""
        if self.scope[path][1] is not None:
            return self.scope[path][1]
        names = path.split(".")
        for i in range(len(names)):
            if isinstance(self.modules[".".join(names[:i])], nn.ModuleList):
                return int(names[i])
        return None

    def facts(self, path: str) -> Known:
        module = self.modules[path]
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        sizes = tuple(weight.shape) if isinstance(module, nn.Linear | nn.Embedding) else ()
        sizes = sizes[::-1] if isinstance(module, nn.Linear) else sizes
        layer = self.layer(path)
        return {
            "type": type(module).__name__,
            "name": path.split(".")[-1],
            "path": path,
            "numel": weight.numel(),
            "dtype": {torch.float32: "float32", torch.float64: "float64"}[weight.dtype],
            "tied": self.tied(self.first[path]),
            **({} if layer is None else {"layer": layer}),
            **dict(zip(("in", "out"), sizes, strict=False)),
        }

    # A region is a path with the position of its first index.

    def regions(self, scopes: list[list[Step]]) -> list[tuple[str, int | None]]:
        found: list[tuple[str, int | None]] = []
        for scope in scopes:
            regions: list[tuple[str, int | None]] = [("", None)]
            for step in scope:
                regions = self.descended(step, regions) if regions else []
            found += regions
        return found if scopes else [("", None)]

    def descended(
        self, step: Step, regions: list[tuple[str, int | None]]
    ) -> list[tuple[str, int | None]]:
        answers: list[tuple[str, int | None]] = []
        named: set[str] = set()
        for above, layer in regions:
            below = [p for p in self.modules if inside(p, above) and p != above]
            short = {p: p[len(above) :].lstrip(".") for p in below}
            named |= {*short.values()}
            taken = [
                p for p in below if any(takes(a, short[p]) for a in step.container.alternatives)
            ]
            answers += [
                (p, layer) for p in taken if not any(p != q and inside(p, q) for q in taken)
            ]
        missing = [a for a in step.container.alternatives if not any(takes(a, n) for n in named)]
        self.note("E203", bool(missing))
        before, self.wrong = self.wrong, set()
        chosen = [part for answer in answers for part in self.indexed(step.index, *answer)]
        self.note("E214", not (chosen or missing or self.wrong))
        self.wrong |= before
        return chosen

    def indexed(
        self, index: slice | tuple[int, ...] | None, path: str, layer: int | None
    ) -> list[tuple[str, int | None]]:
        children = [f"{path}.{n}" for n in self.modules[path]._modules]  # pyright: ignore[reportPrivateUsage]
        match index:
            case None:
                return [(path, layer)]
            case slice():
                positions = [*range(len(children))[index]]
            case tuple():
                there = [i for i in index if -len(children) <= i < len(children)]
                self.note("E204", len(there) < len(index))
                positions = [range(len(children))[i] for i in there]
        return [(children[i], i if layer is None else layer) for i in sorted({*positions})]


_WITH_WEIGHT = nn.Linear | nn.Embedding | nn.Bilinear
LIFTED = {"E201", "E202", "E203", "E211", "E214"}

# ------------------------------------------------------------------------------------- the law


def run(model: nn.Module, text: str) -> tuple[list[str], set[str]]:
    """The paths that are selected, and the codes of the errors."""
    (statement,) = parse(text).statements
    assert isinstance(statement, Match)
    report, names = Report(), Names({}, {})

    def holds(where: Expression, facts: Facts) -> bool:
        known = asks(where, names) <= facts.keys()
        return known and Filter(names.at(facts)).holds(where)

    def number(expression: Expression) -> object:
        return plain(Scalars(names)(expression))

    sites = select(statement.selection, survey(model), report, number, holds)
    return [s.path for s in sites], {d.code for d in report.found if d.severity == "error"}


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trees(), st.lists(STATEMENTS, min_size=4, max_size=4))
def test_selection_agrees_with_the_oracle(model: nn.Module, statements: list[Statement]) -> None:
    oracle = Oracle(model)
    for statement in statements:
        assert run(model, str(statement)) == oracle(statement), str(statement)
