"""Config fields of a format as data: what kind of field each is, and what it is written with.

A field's value is an expression over the method's arguments or one of a few calls; `form_of` sorts
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from surgery.algebra.scalars import CONSTANTS, Scalars, plain
from surgery.errors import refuse
from surgery.language import syntax as ast


@dataclass(frozen=True, slots=True)
class Value:
    """An expression over the method's arguments."""

    expression: ast.Expression


@dataclass(frozen=True, slots=True)
class Sites:
    """`sites()`, `sites(side == "in")`: the paths where a condition holds.

    inside: `sites_with(…)`, which is the same for who looks for a text anywhere in a path.
    """

    condition: ast.Expression | None
    inside: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """`table(…)`: a table must stand there, whose own fields are read by themselves."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """`parameters()`: the paths of the sites that are named as parameters, if there are any."""


@dataclass(frozen=True, slots=True)
class TrainedRows:
    """`rows()`: path to the rows of tables that are trained besides, if there are any."""


@dataclass(frozen=True, slots=True)
class Biases:
    """`biases("m_only")`: whose biases are trained copies.

    own: what says those of the sites; `none` and `all` say none, and those of the model.
    """

    own: str


@dataclass(frozen=True, slots=True)
class BySite:
    """`by_site(r)`: path to value, where it is not the value of the argument's own field.

    behind: `by_ending(r)`, which is the same for who takes an ending that stands behind a dot.
    """

    argument: str
    behind: bool = False


@dataclass(frozen=True, slots=True)
class Tied:
    """`tied(group)`: which part of the sites, cut in groups by their order, has none of its own."""

    argument: str


@dataclass(frozen=True, slots=True)
class OneOf:
    """`one_of(a, b, reason = "…")`: the first is written, the others are read as well.

    refused: of `any_but(a, b, written = v, reason = "…")`, which are read as anything but these.
    """

    values: tuple[object, ...]
    reason: str
    refused: tuple[object, ...] | None = None

    def takes(self, value: object) -> bool:
        """Whether a value that is read is one of them."""
        if self.refused is not None:
            return not any(same(value, v) for v in self.refused)
        return any(same(value, v) for v in self.values)


@dataclass(frozen=True, slots=True)
class KeptBySite:
    """`kept_by_site(r, n, "E")`: path and key to which of `total` rows are kept, where not all.

    argument: how many are.
    """

    argument: str
    total: str
    key: str


@dataclass(frozen=True, slots=True)
class Anything:
    """`any()`, `any(1)`: of no consequence; not written, or always the one value."""

    value: object = None


Form = (
    Value
    | Sites
    | Parameters
    | TrainedRows
    | Biases
    | Table
    | BySite
    | KeptBySite
    | Tied
    | OneOf
    | Anything
)


def fields_of(fmt: ast.Format) -> Iterator[ast.Field]:
    """The fields of a format; behind one that is a table those in it, as `table.field`."""
    for item in fmt.fields:
        yield item
        if isinstance(item.value, ast.Call) and item.value.function == "table":
            for inner in item.value.keywords:
                name = f"{item.name}.{inner.name}"
                yield ast.Field(name, inner.value, None, item.kinds, span=inner.span)


def nested(values: Mapping[str, object]) -> dict[str, object]:
    """Values by name, in which `table.field` is put into its table."""
    found: dict[str, object] = {}
    for name, value in values.items():
        table, dot, field_name = name.partition(".")
        if dot:
            inside = cast("dict[str, object]", found.setdefault(table, {}))
            inside[field_name] = value
        else:
            found[name] = value
    return found


_CALLS = frozenset(
    {
        "sites",
        "sites_with",
        "parameters",
        "rows",
        "biases",
        "table",
        "by_site",
        "by_ending",
        "kept_by_site",
        "tied",
        "any",
        "one_of",
    }
)


def form_of(item: ast.Field) -> Form:
    """What kind of field it is. Raises DefinitionError (E104) for a call with wrong arguments."""
    return _form(item.value)


def _form(expression: ast.Expression) -> Form:
    found = _of_paths(expression) or _of_values(expression)
    if found is None and isinstance(expression, ast.Call) and expression.function in _CALLS:
        refuse(
            "E104",
            "this is no way to call it",
            expression.span,
            hint="there are sites(…), sites_with(CONDITION), parameters(), rows(), biases(NAME), "
            "by_site(ARGUMENT), by_ending(ARGUMENT), kept_by_site(KEPT, ALL, KEY), tied(ARGUMENT), "
            "table(FIELD = …), any(), one_of(VALUE, …) and any_but(VALUE, …, written = …)",
        )
    return found or Value(expression)


def _of_paths(expression: ast.Expression) -> Form | None:
    """What is said of paths."""
    match expression:
        case ast.Call("sites", ()):
            return Sites(None)
        case ast.Call("sites" | "sites_with" as name, (condition,)):
            return Sites(condition, name == "sites_with")
        case ast.Call("parameters" | "rows" as name, ()):
            return Parameters() if name == "parameters" else TrainedRows()
        case ast.Call("biases", (ast.Text(value=own),)):
            return Biases(own)
        case ast.Call("by_site" | "by_ending" as call, (ast.Name(id=name),)):
            return BySite(name, call == "by_ending")
        case ast.Call("kept_by_site", (ast.Name(id=name), ast.Name(id=total), ast.Text(value=key))):
            return KeptBySite(name, total, key)
        case ast.Call("tied", (ast.Name(id=name),)):
            return Tied(name)
        case _:
            return None


def _of_values(expression: ast.Expression) -> Form | None:
    """Values that are no expressions over arguments, and tables."""
    match expression:
        case ast.Call("any", () | (_,) as given):
            return Anything(*map(constant, given))
        case ast.Call("one_of", values, keywords) if values:
            reasons = [k.value.value for k in keywords if isinstance(k.value, ast.Text)]
            return OneOf(tuple(map(constant, values)), " ".join(reasons))
        case ast.Call("any_but", refused, keywords):
            given = {k.name: constant(k.value) for k in keywords}
            reason = str(given.get("reason", ""))
            return OneOf((given.get("written"),), reason, tuple(map(constant, refused)))
        case ast.Call("table", (), keywords) if keywords:
            return Table()
        case _:
            return None


def chosen(expression: ast.Expression, names: Mapping[str, object]) -> Value | OneOf:
    """What a field's conditionals come to: an expression, or some values of which any will do."""
    while isinstance(expression, ast.Conditional):
        holds = Scalars(names).holds(expression.condition)
        expression = expression.then if holds else expression.other
    found = _form(expression)
    return found if isinstance(found, OneOf) else Value(expression)


def written(expression: ast.Expression, names: Mapping[str, object]) -> object:
    """The value that a field is written with."""
    match chosen(expression, names):
        case OneOf(values):
            return values[0]
        case Value(leaf):
            return Scalars(names)(leaf)


def constant(expression: ast.Expression) -> object:
    """The value of an expression without names. Raises DefinitionError."""
    return plain(Scalars({})(expression))


def default_of(item: ast.Field) -> object:
    """What an absent field means; None where the format does not say."""
    return None if item.default is None else constant(item.default)


def gives(expression: ast.Expression, value: object) -> bool:
    """Whether a branch of a field has a value; an argument's name may have any."""
    form = _form(expression)
    if isinstance(form, OneOf):
        return form.takes(value)
    named = isinstance(expression, ast.Name) and expression.id not in CONSTANTS
    return not named and same(constant(expression), value)


def holds_at(item: ast.Field, kind: str) -> bool:
    """Whether a field has an effect at sites of a kind."""
    return not item.kinds or kind in item.kinds


def same(left: object, right: object) -> bool:
    """Equal as a config's values are: `1` and `1.0` are, `1` and `true` are not."""
    return left == right and isinstance(left, bool) is isinstance(right, bool)


def shown(value: object) -> str:
    """A value as a config file has it."""
    import json

    return json.dumps(value, default=str)
