"""Config fields of a format as data, and one site's arguments read off a config.

A field's value is an expression over the method's arguments or one of a few calls; `form_of` sorts
them, and reading undoes what writing does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import assert_never

from surgery.algebra.scalars import Scalars, plain
from surgery.check import Arguments, typed
from surgery.errors import Diagnostic, Span, SurgeryError, refuse
from surgery.language import syntax as ast
from surgery.mapping.paths import kept, member, override


@dataclass(frozen=True, slots=True)
class Value:
    """An expression over the method's arguments."""

    expression: ast.Expression


@dataclass(frozen=True, slots=True)
class Sites:
    """`sites()`, `sites(side == "in")`: the paths where a condition holds."""

    condition: ast.Expression | None


@dataclass(frozen=True, slots=True)
class BySite:
    """`by_site(r)`: path to value, where it is not the value of the argument's own field."""

    argument: str


@dataclass(frozen=True, slots=True)
class OneOf:
    """`one_of(a, b, reason = "…")`: the first is written, the others are read as well."""

    values: tuple[object, ...]
    reason: str


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


Form = Value | Sites | BySite | KeptBySite | OneOf | Anything


def form_of(item: ast.Field) -> Form:
    """What kind of field it is. Raises DefinitionError (E104) for a call with wrong arguments."""
    return _form(item.value)


def _form(expression: ast.Expression) -> Form:
    match expression:
        case ast.Call("sites", ()):
            return Sites(None)
        case ast.Call("sites", (condition,)):
            return Sites(condition)
        case ast.Call("by_site", (ast.Name(id=name),)):
            return BySite(name)
        case ast.Call("kept_by_site", (ast.Name(id=name), ast.Name(id=total), ast.Text(value=key))):
            return KeptBySite(name, total, key)
        case ast.Call("any", () | (_,) as given):
            return Anything(*map(constant, given))
        case ast.Call("one_of", values, keywords) if values:
            reasons = [k.value.value for k in keywords if isinstance(k.value, ast.Text)]
            return OneOf(tuple(map(constant, values)), " ".join(reasons))
        case ast.Call("sites" | "by_site" | "kept_by_site" | "any" | "one_of"):
            refuse(
                "E104",
                "this is no way to call it",
                expression.span,
                hint="there are sites(…), by_site(ARGUMENT), kept_by_site(KEPT, ALL, KEY), any() "
                "and one_of(VALUE, …)",
            )
        case _:
            return Value(expression)


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
        case OneOf(values, _):
            return values[0]
        case Value(leaf):
            return Scalars(names)(leaf)


def constant(expression: ast.Expression) -> object:
    """The value of an expression without names. Raises DefinitionError."""
    return plain(Scalars({})(expression))


def default_of(item: ast.Field) -> object:
    """What an absent field means; None where the format does not say."""
    return None if item.default is None else constant(item.default)


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


# ------------------------------------------------------------------------------------ reading


@dataclass(frozen=True, slots=True)
class Found:
    """What a config says at one site: the arguments, or why they cannot be had.

    bound: the arguments that the config itself named.
    """

    arguments: Arguments
    problems: tuple[Diagnostic, ...] = ()
    bound: frozenset[str] = frozenset()


@dataclass(slots=True)
class ConfigFile:
    """A config with its text, so that a finding can point into it."""

    values: Mapping[str, object]
    source: Span = field(repr=False)

    def span(self, name: str) -> Span:
        """Where a field stands; the beginning of the file if it stands nowhere."""
        found = re.search(rf'"{re.escape(name)}"\s*:\s*[^\n,]*', self.source.source.text)
        if found is None:
            return self.source
        return Span(self.source.source, found.start(), found.end())


class ConfigReader:
    """Reads the arguments of a method at many sites off one config of a format.

    Sites of one kind for which the config says the same share their result.
    """

    def __init__(self, fmt: ast.Format, method: ast.Method, config: ConfigFile) -> None:
        """Sort the fields. Raises DefinitionError for a format statement that is wrong."""
        self.fields = tuple((item, form_of(item)) for item in fmt.fields)
        self.method = method
        self.config = config
        self._found: dict[str, Found] = {}

    def read(self, path: str, kind: str) -> Found:
        """The arguments at a site, as the config states them."""
        try:
            local = {
                item.name: _at(path, form, self.config.values.get(item.name, default_of(item)))
                for item, form in self.fields
                if isinstance(form, BySite | KeptBySite | Sites)
            }
        except SurgeryError as error:
            return Found((), error.diagnostics)
        key = f"{kind} {local!r}"
        if key not in self._found:
            self._found[key] = self._read(_Site(path, kind, local))
        return self._found[key]

    def _read(self, site: _Site) -> Found:
        try:
            return _Reader(self, site).run()
        except SurgeryError as error:
            return Found((), error.diagnostics)


def _gives(expression: ast.Expression, value: object) -> bool:
    """Whether a branch of a field has a value; an argument's name may have any."""
    form = _form(expression)
    if isinstance(form, OneOf):
        return any(same(value, v) for v in form.values)
    return not isinstance(expression, ast.Name) and same(constant(expression), value)


@dataclass(frozen=True, slots=True)
class _Site:
    """A site as a config sees it; `local` is what fields about paths say of this one."""

    path: str
    kind: str
    local: Mapping[str, object]


def _at(path: str, form: BySite | KeptBySite | Sites, value: object) -> object:
    """Whether a list of sites has a path, or what a table has for it, if anything."""
    match form:
        case BySite():
            return override(path, value)
        case KeptBySite():
            return kept(path, form.key, value)
        case Sites(condition):
            return condition is not None and member(path, value)


class _Reader:
    """Binds what fields name, takes the method's defaults for the rest, and checks every field."""

    def __init__(self, reader: ConfigReader, site: _Site) -> None:
        self.fields = reader.fields
        self.method = reader.method
        self.config = reader.config
        self.site = site
        self.types: dict[str, ast.ValueType] = {a.name: a.type for a in self.method.arguments}
        self.bound: dict[str, object] = {}
        self.overridden: set[str] = set()

    def run(self) -> Found:
        """The arguments, every field compared with what they mean."""
        for item, form in self.fields:
            self._bind(item, form)
        arguments = tuple(self._completed().items())
        names = dict(arguments)
        problems = tuple(p for item, form in self.fields for p in self._check(item, form, names))
        return Found(arguments, problems, frozenset(self.bound))

    def value(self, item: ast.Field) -> object:
        """What the config says of a field at this site."""
        if not holds_at(item, self.site.kind):
            return default_of(item)
        return self.config.values.get(item.name, default_of(item))

    # ----------------------------------------------------------------------------- binding

    def _bind(self, item: ast.Field, form: Form) -> None:
        match form:
            case Value(expression):
                self._solve(expression, self.value(item), item)
            case Sites(condition) if condition is not None:
                if self.site.local[item.name]:
                    self._solve(condition, True, item)
            case BySite(argument) | KeptBySite(argument):
                other = self.site.local[item.name]
                if other is not None:
                    self.overridden.add(argument)
                    self._take(argument, other, item)
            case Sites() | OneOf() | Anything():
                pass
            case _:
                assert_never(form)

    def _solve(self, expression: ast.Expression, value: object, item: ast.Field) -> None:
        """Bind the argument that makes an expression have a value, where one can be told."""
        match expression:
            case ast.Name(id=name) if name in self.types and name not in self.overridden:
                self._take(name, value, item)
            case ast.Binary("==", ast.Name(id=name), other) if value is True:
                self._take(name, constant(other), item)
            case ast.Conditional(then, ast.Binary("==", ast.Name()) as condition, other):
                first = _gives(then, value)
                self._solve(condition if first else other, True if first else value, item)
            case _:
                pass  # nothing to bind; the check compares

    def _take(self, name: str, value: object, item: ast.Field) -> None:
        span = self.config.span(item.name)
        self.bound[name] = typed(value, self.types[name], item.name, span)

    def _completed(self) -> dict[str, object]:
        values: dict[str, object] = {}
        for argument in self.method.arguments:
            if argument.name in self.bound:
                values[argument.name] = self.bound[argument.name]
            elif argument.default is not None:
                value = Scalars(values)(argument.default)
                values[argument.name] = typed(value, argument.type, argument.name, argument.span)
            else:
                refuse(
                    "E515",
                    f"the config does not say `{argument.name}` of {self.method.name}",
                    self.config.source,
                    hint="the folder was saved by a program that leaves out what it needs; add it",
                )
        return values

    # ---------------------------------------------------------------------------- checking

    def _check(
        self, item: ast.Field, form: Form, names: Mapping[str, object]
    ) -> Iterator[Diagnostic]:
        found = self.value(item)
        match form:
            case Value(expression):
                # A field whose argument stands in a pattern for this site says the others' value.
                pattern = isinstance(expression, ast.Name) and expression.id in self.overridden
                leaf = chosen(expression, names)
                if isinstance(leaf, OneOf):
                    yield from self._check_one(item, leaf, found)
                    return
                wanted = plain(Scalars(names)(leaf.expression))
                if not pattern and not same(found, wanted):
                    yield self._mismatch(item, found, f"{self.method.name} has {shown(wanted)}")
            case OneOf():
                yield from self._check_one(item, form, found)
            case Sites(condition) if condition is not None:
                if Scalars(names).holds(condition) is not self.site.local[item.name]:
                    yield self._mismatch(item, found, f"it does not settle `{self.site.path}`")
            case Sites() | BySite() | KeptBySite() | Anything():
                pass
            case _:
                assert_never(form)

    def _check_one(self, item: ast.Field, form: OneOf, found: object) -> Iterator[Diagnostic]:
        if not any(same(found, v) for v in form.values):
            yield self._mismatch(item, found, form.reason)

    def _mismatch(self, item: ast.Field, found: object, reason: str) -> Diagnostic:
        given = item.name in self.config.values
        what = shown(found) if given else f"absent, which means {shown(found)}"
        message = f"`{item.name}` is {what}: {reason}"
        hint = f"what is here of {self.method.name} computes something else; nothing is guessed"
        return Diagnostic("E515", message, self.config.span(item.name), hint=hint)


def unknown_fields(
    fmt: ast.Format, config: ConfigFile, informative: Iterable[str]
) -> Iterator[Diagnostic]:
    """E515 for every field that the format does not know and that is not off."""
    known = {item.name for item in fmt.fields} | set(informative)
    return unknown_values(config, known, fmt.method)


def unknown_values(config: ConfigFile, known: Set[str], reader: str) -> Iterator[Diagnostic]:
    """E515 for every field that is not known to what reads the config, and that is not off."""
    for name, value in config.values.items():
        if name not in known and not (value is None or value is False or value in ([], {}, "")):
            yield Diagnostic(
                "E515",
                f"`{name}` is {shown(value)}, which `{reader}` knows nothing of",
                config.span(name),
                hint="it may change what the adapter computes, so it is not passed over",
            )
