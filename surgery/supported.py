"""Which methods stand on which layers, here and in peft: a page that is made of what plans say.

What is so here is tried: each method is planned on a layer of each kind. What peft has is data in
`specs/formats`, which a test compares with peft. `python -m surgery.supported > docs/methods.md`
writes the page.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from surgery.algebra.kinds import KINDS as SITE_KINDS
from surgery.algebra.kinds import MATRIX
from surgery.compiling import plan
from surgery.errors import SurgeryError
from surgery.explanation import layer_model
from surgery.language import syntax as ast
from surgery.language.library import Library
from surgery.mapping import ForeignConfig, Reason, peft_config
from surgery.model.layers import KINDS
from surgery.planned import Plan
from surgery.resources import formats_dir, methods_dir

SIZES = (24, 36)  # fan-in and fan-out, or channels
_SMALL, _LARGE = 4, 8


@dataclass(frozen=True, slots=True)
class Row:
    """One method: where it stands, here and in peft, and how a merge of it is taken back.

    here: for each kind of layer why it does not stand there, "" where it does. peft: what peft does
    with it there: `yes`, `no`, or `other`, where its forward and its own merge differ; none where
    peft has no such method. exchanged: the kinds of layer whose folders both programs read.
    """

    method: str
    says: str
    merge: str
    here: Mapping[str, str]
    peft: Mapping[str, str]
    exchanged: frozenset[str]


def rows() -> Iterator[Row]:
    """Every method of the library on matrices, in alphabetical order."""
    for name in names_on(MATRIX.name):
        yield _row(name)


def names_on(kind: str) -> tuple[str, ...]:
    """The methods of the library on a kind of site, in alphabetical order."""
    library = Library.standard()
    every = ((name, library.method(name)) for name in library.names())
    return tuple(name for name, method in every if method is not None and method.kind == kind)


def small(method: ast.Method) -> dict[str, int]:
    """Arguments with which a method stands on a small layer: what is large by default, made 4."""
    found: dict[str, int] = {}
    for a in method.arguments:
        if a.type == "int" and isinstance(a.default, ast.Number) and a.default.value > _LARGE:
            found[a.name] = _SMALL
    return found


@dataclass(frozen=True, slots=True)
class Tried:
    """A method on one small layer: its plan, and what a config of peft's says of it."""

    plan: Plan
    config: ForeignConfig | Reason


def tried(name: str, kind: str) -> Tried:
    """A method on a small layer of a kind. Raises SurgeryError where it does not stand there."""
    method = Library.standard().method(name)
    given = {} if method is None else small(method)
    call = f"{name}({', '.join(f'{n}={v}' for n, v in given.items())})"
    model = layer_model(kind, *SIZES)
    made = plan(f"match site apply {call}", model)
    return Tried(made, peft_config(made, made.adapters[0], model))


@lru_cache(maxsize=1)
def of_peft() -> Mapping[str, Mapping[str, str]]:
    """What peft does with each method on each kind of layer."""
    text = (formats_dir() / "peft_layers.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _row(name: str) -> Row:
    here: dict[str, str] = {}
    made: dict[str, Tried] = {}
    for kind in KINDS:
        try:
            made[kind.name] = tried(name, kind.name)
            here[kind.name] = ""
        except SurgeryError as error:
            here[kind.name] = error.diagnostics[0].message
    merges = {one.plan.sites[0].form.derived.merge_class for one in made.values()}
    exchanged = {kind for kind, one in made.items() if not isinstance(one.config, Reason)}
    merge = ", ".join(sorted(merges))
    mine = of_peft().get(name, {})
    return Row(name, _says(name), merge, here, mine, frozenset(exchanged))


def _says(name: str) -> str:
    """What the first line of a method's file says of it."""
    first = (methods_dir() / f"{name}.peft").read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").rstrip(".")


# ------------------------------------------------------------------------------------- the page

_INTRODUCTION = """\
# Methods and layers

<!-- Written by `python -m surgery.supported` from specs/methods and specs/formats. -->

Every method of the library beside every kind of layer. A definition is written once, for a matrix,
so a method that is not on some kind is refused there by its own equation. Each was tried on a small
layer; peft is that of 0.21.

| sign | |
| --- | --- |
| ● | stands there, as in peft, and folders go both ways |
| ◐ | stands there; peft has no folder that means the same, or no merge that is its own forward |
| ○ | stands there; in peft not, or it leaves no folder that says what it did |
| – | is refused |

*merge* says how a merged weight goes [back](language.md#what-is-derived): `exact` where none was
changed, `algebraic` by arithmetic alone, `witness` with a small vector that is kept, `snapshot`
with the weight itself.
"""


def page() -> str:
    """The table as a page of Markdown."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield _INTRODUCTION
    kinds = [kind.name for kind in KINDS]
    yield f"| method | {' | '.join(kind.replace('_', ' ') for kind in kinds)} | merge |"
    yield f"| --- |{' :-: |' * len(kinds)} --- |"
    found = [*rows()]
    for row in found:
        signs = " | ".join(sign(row, kind) for kind in kinds)
        yield f"| `{row.method}` | {signs} | {row.merge} |"
    reasons = [(r.method, k, why) for r in found for k, why in r.here.items() if why]
    if reasons:
        yield "\nRefused:\n"
        yield from (f"* `{method}` on {kind}: {why}" for method, kind, why in reasons)
    for kind in (kind for kind in SITE_KINDS.values() if kind.unmerged):
        yield f"\n## On a {kind.name}\n\nThere is no merge: {kind.unmerged}.\n"
        yield "| method | |\n| --- | --- |"
        yield from (f"| `{name}` | {_says(name)} |" for name in names_on(kind.name))


def sign(row: Row, kind: str) -> str:
    """How one method and one kind of layer stand to each other."""
    if row.here[kind]:
        return "–"
    theirs = row.peft.get(kind, "no")
    if kind in row.exchanged and theirs == "yes":
        return "●"
    return "○" if theirs == "no" else "◐"


if __name__ == "__main__":
    sys.stdout.write(page())
