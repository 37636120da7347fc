"""Selection against an oracle that goes through all paths and all their tails."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from surgery.errors import Diagnostic, Report
from surgery.language.parse import parse
from surgery.language.syntax import Expression, Match, Number, Unary
from surgery.model.facts import Facts
from surgery.model.holder import modules_of
from surgery.model.sites import Site, select, survey


def value(expression: Expression) -> object:
    match expression:
        case Number(number):
            return number
        case Unary("-", Number(number)):
            return -number
        case _:
            raise AssertionError(expression)


def holds(where: Expression, facts: Facts) -> bool | None:
    raise AssertionError(where, facts)


def run(model: nn.Module, text: str) -> tuple[tuple[Site, ...], list[Diagnostic]]:
    (statement,) = parse(text).statements
    assert isinstance(statement, Match)
    report = Report()
    sites = select(statement.selection, survey(model), report, value, holds)
    return sites, report.found


class Box(nn.Module):
    """A module with named children and no forward of its own."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


NAMES = ["q", "v", "qv", "a", "layers"]


@st.composite
def trees(draw: st.DrawFn, depth: int = 4) -> nn.Module:
    """A random tree of boxes and lists with linear and norm leaves."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return nn.Linear(2, 3) if draw(st.integers(0, 3)) else nn.LayerNorm(2)
    count = draw(st.integers(1, 3))
    below = [draw(trees(depth=depth - 1)) for _ in range(count)]
    if draw(st.booleans()):
        return nn.ModuleList(below)
    names = draw(st.lists(st.sampled_from(NAMES), min_size=count, max_size=count, unique=True))
    return Box(**dict(zip(names, below, strict=True)))


def takes(pattern: str, path: str) -> bool:
    parts = path.split(".")
    every_tail = (".".join(parts[i:]) for i in range(len(parts)))
    return any(re.fullmatch(pattern, tail) for tail in every_tail)


def parts_of(model: nn.Module, container: str, taken: slice) -> list[str]:
    """The paths of the chosen children of all outermost answers."""
    paths = [path for path, _ in modules_of(model) if path]
    answers = [path for path in paths if takes(container, path)]
    outer = [a for a in answers if not any(a.startswith(f"{b}.") for b in answers)]
    children = [
        [f"{a}.{name}" for name, _ in model.get_submodule(a).named_children()] for a in outer
    ]
    return [path for group in children for path in group[taken]]


def expected(model: nn.Module, pattern: str, leave: str, parts: list[str] | None) -> list[str]:
    linear = [p for p, m in modules_of(model) if isinstance(m, nn.Linear)]
    inside = [
        p for p in linear if parts is None or any(p == e or p.startswith(f"{e}.") for e in parts)
    ]
    return [p for p in inside if takes(pattern, p) and not (leave and takes(leave, p))]


PATTERNS = st.lists(
    st.sampled_from([*NAMES, "q.?", ".*", r"a\.q", r"[0-9]", r"layers\.0"]),
    min_size=1,
    max_size=3,
    unique=True,
)
BOUNDS = st.none() | st.integers(-3, 3)


@settings(deadline=None)
@given(
    model=trees(),
    patterns=PATTERNS,
    leave=st.sampled_from(["", "q", "0", r"layers\..*"]),
    container=st.sampled_from(["", "layers", "a", "[0-9]", ".*"]),
    bounds=st.tuples(BOUNDS, BOUNDS, st.sampled_from([None, 1, 2, -1])),
)
def test_selection_agrees_with_the_oracle(
    model: nn.Module,
    patterns: list[str],
    leave: str,
    container: str,
    bounds: tuple[int | None, int | None, int | None],
) -> None:
    index = ":".join("" if bound is None else str(bound) for bound in bounds)
    within = f"in /{container}/[{index}]" if container else ""
    parts = parts_of(model, container, slice(*bounds)) if container else None
    exclude = f"except /{leave}/" if leave else ""
    results: list[list[str]] = []
    for ordered in (patterns, patterns[::-1]):
        sites, found = run(model, f"match /{'|'.join(ordered)}/ {within} {exclude} apply m()")
        results.append([site.path for site in sites])
        everything = expected(model, "|".join(patterns), "", parts)
        errors = [d.code for d in found if d.severity == "error"]
        empty = [p for p in patterns if not expected(model, p, "", parts)]
        if parts == []:
            assert errors in (["E203"], ["E214"])
        else:
            assert (errors.count("E201") > 0) == bool(empty or not results[-1])
        dead = bool(leave and everything and results[-1] == everything)
        assert ("E202" in errors) == dead
    assert results[0] == results[1] == expected(model, "|".join(patterns), leave, parts)
