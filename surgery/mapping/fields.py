"""One site's arguments read off a config: reading undoes what writing does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import assert_never, cast

from surgery.algebra.scalars import Scalars, plain
from surgery.check import Arguments, typed
from surgery.errors import Diagnostic, Span, SurgeryError, refuse
from surgery.language import syntax as ast
from surgery.mapping.forms import (
    Anything,
    Biases,
    BySite,
    Form,
    KeptBySite,
    OneOf,
    Parameters,
    Sites,
    Table,
    Tied,
    TrainedRows,
    Value,
    chosen,
    constant,
    default_of,
    fields_of,
    form_of,
    gives,
    holds_at,
    same,
    shown,
)
from surgery.mapping.paths import group, kept, member, override, within

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

    def get(self, name: str, default: object = None) -> object:
        """The value of a field, or of one of a table as `table.field`."""
        table, dot, inner = name.partition(".")
        if not dot:
            return self.values.get(name, default)
        inside = self.values.get(table)
        return (
            cast("Mapping[str, object]", inside).get(inner, default)
            if _is_table(inside)
            else default
        )

    def __contains__(self, name: str) -> bool:
        """Whether a field is given."""
        nothing = object()
        return self.get(name, nothing) is not nothing

    def span(self, name: str) -> Span:
        """Where a field stands; the beginning of the file if it stands nowhere."""
        name = name.rpartition(".")[2]
        found = re.search(rf'"{re.escape(name)}"\s*:\s*[^\n,]*', self.source.source.text)
        if found is None:
            return self.source
        return Span(self.source.source, found.start(), found.end())


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping)


class ConfigReader:
    """Reads the arguments of a method at many sites off one config of a format.

    Sites of one kind for which the config says the same share their result.
    """

    def __init__(
        self,
        fmt: ast.Format,
        method: ast.Method,
        config: ConfigFile,
        order: Sequence[str] = (),
    ) -> None:
        """Sort the fields. Raises DefinitionError for a format statement that is wrong.

        order: the paths of all sites as the model has them, for fields that tell by it.
        """
        self.order = tuple(order)
        self.fields = tuple((item, form_of(item)) for item in fields_of(fmt))
        self.method = method
        self.config = config
        self._found: dict[str, Found] = {}

    def read(self, path: str, kind: str) -> Found:
        """The arguments at a site, as the config states them."""
        try:
            local = {
                item.name: self._at(path, form, self.config.get(item.name, default_of(item)))
                for item, form in self.fields
                if isinstance(form, BySite | KeptBySite | Sites | Tied)
            }
        except SurgeryError as error:
            return Found((), error.diagnostics)
        key = f"{kind} {local!r}"
        if key not in self._found:
            self._found[key] = self._read(_Site(path, kind, local))
        return self._found[key]

    def _at(self, path: str, form: BySite | KeptBySite | Sites | Tied, value: object) -> object:
        """Whether a list of sites has a path, or what a field has for it, if anything."""
        match form:
            case BySite(_, behind):
                return override(path, value, behind)
            case KeptBySite():
                return kept(path, form.key, value)
            case Sites(condition, inside):
                return condition is not None and (within if inside else member)(path, value)
            case Tied():
                return group(path, self.order, value)

    def _read(self, site: _Site) -> Found:
        try:
            return _Reader(self, site).run()
        except SurgeryError as error:
            return Found((), error.diagnostics)


@dataclass(frozen=True, slots=True)
class _Site:
    """A site as a config sees it; `local` is what fields about paths say of this one."""

    path: str
    kind: str
    local: Mapping[str, object]


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
        return self.config.get(item.name, default_of(item))

    # ----------------------------------------------------------------------------- binding

    def _bind(self, item: ast.Field, form: Form) -> None:
        match form:
            case Value(expression):
                self._solve(expression, self.value(item), item)
            case Sites(condition) if condition is not None:
                if self.site.local[item.name]:
                    self._solve(condition, True, item)
            case BySite(argument) | KeptBySite(argument) | Tied(argument):
                other = self.site.local[item.name]
                if other is not None:
                    self.overridden.add(argument)
                    self._take(argument, other, item)
            case Sites() | Parameters() | TrainedRows() | Biases() | Table() | OneOf() | Anything():
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
                first = gives(then, value)
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
                yield from self._check_value(item, expression, names)
            case OneOf():
                yield from self._check_one(item, form, found)
            case Sites(condition) if condition is not None:
                if Scalars(names).holds(condition) is not self.site.local[item.name]:
                    yield self._mismatch(item, found, f"it does not settle `{self.site.path}`")
            case Parameters() | Biases() | Table():
                wanted = _wanted(form, found)
                if wanted:
                    yield self._mismatch(item, found, f"{self.method.name} has {wanted} there")
            case Sites() | TrainedRows() | BySite() | KeptBySite() | Tied() | Anything():
                pass
            case _:
                assert_never(form)

    def _check_value(
        self, item: ast.Field, expression: ast.Expression, names: Mapping[str, object]
    ) -> Iterator[Diagnostic]:
        found, leaf = self.value(item), chosen(expression, names)
        if isinstance(leaf, OneOf):
            yield from self._check_one(item, leaf, found)
            return
        # A field whose argument stands in a pattern for this site says the others' value.
        pattern = isinstance(expression, ast.Name) and expression.id in self.overridden
        wanted = plain(Scalars(names)(leaf.expression))
        if not pattern and not same(found, wanted):
            yield self._mismatch(item, found, f"{self.method.name} has {shown(wanted)}")

    def _check_one(self, item: ast.Field, form: OneOf, found: object) -> Iterator[Diagnostic]:
        if not form.takes(found):
            yield self._mismatch(item, found, form.reason)

    def _mismatch(self, item: ast.Field, found: object, reason: str) -> Diagnostic:
        given = item.name in self.config
        what = shown(found) if given else f"absent, which means {shown(found)}"
        message = f"`{item.name}` is {what}: {reason}"
        hint = f"what is here of {self.method.name} computes something else; nothing is guessed"
        return Diagnostic("E515", message, self.config.span(item.name), hint=hint)


def _wanted(form: Parameters | Biases | Table, value: object) -> str:
    """What should stand where a value does; "" if it does."""
    match form:
        case Parameters():
            return "" if value is None or isinstance(value, list) else "a list of paths"
        case Biases():
            said = value in ("none", "all") or str(value).endswith("_only")
            return "" if said else "none, all, or a name that ends in _only"
        case Table():
            return "" if _is_table(value) else "a table"


def begun_otherwise(
    fmt: ast.Format, config: ConfigFile, names: Mapping[str, object], informative: Iterable[str]
) -> Iterator[str]:
    """The fields whose value is read as if it were another, which the method has.

    names: the arguments.
    """
    passed = set(informative)
    for item in fields_of(fmt):
        form = form_of(item)
        leaf = chosen(form.expression, names) if isinstance(form, Value) else form
        value = config.get(item.name, default_of(item))
        if isinstance(leaf, OneOf) and item.name not in passed and not same(value, leaf.values[0]):
            yield item.name


def unknown_fields(
    fmt: ast.Format, config: ConfigFile, informative: Iterable[str]
) -> Iterator[Diagnostic]:
    """E515 for every field that the format does not know and that is not off."""
    known = {item.name for item in fields_of(fmt)} | set(informative)
    return unknown_values(config, known, fmt.method)


def unknown_values(config: ConfigFile, known: Set[str], reader: str) -> Iterator[Diagnostic]:
    """E515 for every field that is not known to what reads the config, and that is not off."""
    for name, value in _flat(config.values, known):
        if name not in known and not (value is None or value is False or value in ([], {}, "")):
            yield Diagnostic(
                "E515",
                f"`{name}` is {shown(value)}, which `{reader}` knows nothing of",
                config.span(name),
                hint="it may change what the adapter computes, so it is not passed over",
            )


def _flat(values: Mapping[str, object], known: Set[str]) -> Iterator[tuple[str, object]]:
    """Every value, and those in tables of which some field is known."""
    tables = {name.partition(".")[0] for name in known if "." in name}
    for name, value in values.items():
        yield name, value
        if name in tables and _is_table(value):
            inside = cast("Mapping[str, object]", value).items()
            yield from ((f"{name}.{inner}", found) for inner, found in inside)
