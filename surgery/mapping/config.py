"""One config of another format for a whole adapter, or the reason why there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from surgery.algebra.scalars import Scalars, plain
from surgery.errors import Source, Span
from surgery.language import syntax as ast
from surgery.mapping.fields import (
    Anything,
    BySite,
    ConfigFile,
    ConfigReader,
    KeptBySite,
    OneOf,
    Sites,
    Value,
    default_of,
    form_of,
    holds_at,
    shown,
    written,
)
from surgery.mapping.paths import at_start, exactly
from surgery.mapping.spelling import chosen_format, rows_of
from surgery.planned import Plan, PlannedSite, SiteClass


@dataclass(frozen=True, slots=True)
class ForeignConfig:
    """A config of another format: plain data, to be written as JSON."""

    format: ast.Format
    values: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why no one config says what an adapter is."""

    text: str


def peft_config(plan: Plan, adapter: str) -> ForeignConfig | Reason:
    """The one peft config that expresses an adapter, or why there is none."""
    return foreign_config(plan, adapter, "peft")


def foreign_config(plan: Plan, adapter: str, name: str) -> ForeignConfig | Reason:
    """The one config of a format that expresses an adapter, or why there is none.

    What is written is read back at every site, so a config says all that the adapter is. Raises
    DefinitionError for a format statement that is itself wrong.
    """
    sites = [s for s in plan.sites if s.adapter == adapter]
    if not sites:
        return Reason("the adapter has no site")
    chain = next((s for s in sites if len(s.form.links) > 1), None)
    if chain is not None:
        return Reason(f"{name} has one method a layer, and `{chain.path}` has {chain.form.named}")
    copy = next((s for s in sites if s.site.at.tensor), None)
    if copy is not None:
        return Reason(f"{name} names no single parameters to be trained, such as `{copy.path}`")
    methods = tuple(dict.fromkeys(s.form.method.name for s in sites))
    if len(methods) != 1:
        return Reason(f"{name} has one method an adapter, and this has {' and '.join(methods)}")
    if any(site.site.tie == "share" for site in sites):
        return Reason(f"{name} has no place for an adapter of a weight that several layers share")
    known = plan.resolved.library.formats(methods[0])
    formats = tuple(f for f in known if f.name == name)
    if not formats:
        return Reason(f"{name} does not know `{methods[0]}` as it is defined here")
    fmt = _common_format(formats, sites)
    return fmt if isinstance(fmt, Reason) else _config(fmt, sites)


def _common_format(
    formats: tuple[ast.Format, ...], sites: Sequence[PlannedSite]
) -> ast.Format | Reason:
    found: dict[int, ast.Format] = {}
    for site in _one_a_class(sites):
        chosen = chosen_format(formats, site.form)
        if chosen is None:
            missing = rows_of(formats[0], site.form)
            return Reason(
                f"{formats[0].name} has no tensor for {missing} of {site.form.method.name} on "
                f"`{site.path}` ({_described(site.form)})"
            )
        found[id(chosen[0])] = chosen[0]
    if len(found) > 1:
        return Reason(f"{formats[0].name} spells these sites in different ways")
    return next(iter(found.values()))


def _described(form: SiteClass) -> str:
    arguments = ", ".join(f"{n}={shown(v)}" for n, v in form.arguments)
    groups = f" in {form.sizes.groups} groups" if form.sizes.groups > 1 else ""
    return f"{form.kind.name}{groups}, {arguments}"


def _one_a_class(sites: Sequence[PlannedSite]) -> Iterator[PlannedSite]:
    yield from {id(s.form): s for s in reversed(sites)}.values()


def _config(fmt: ast.Format, sites: Sequence[PlannedSite]) -> ForeignConfig | Reason:
    forms = {item.name: form_of(item) for item in fmt.fields}
    patterned = {f.argument: name for name, f in forms.items() if isinstance(f, BySite)}
    values: dict[str, object] = {}
    for item in fmt.fields:
        match forms[item.name]:
            case Value(expression):
                name = expression.id if isinstance(expression, ast.Name) else ""
                reason = _write_value(item, expression, sites, values, patterned.get(name))
                if reason is not None:
                    return reason
            case Sites() | OneOf() | KeptBySite() as form:
                values[item.name] = _of_all(item, form, sites)
            case BySite() | Anything(None):
                pass  # written with its argument's own field; not written
            case Anything(value):
                values[item.name] = value
    return _read_back(ForeignConfig(fmt, values), sites)


def _of_all(
    item: ast.Field, form: Sites | OneOf | KeptBySite, sites: Sequence[PlannedSite]
) -> object:
    """The value of a field that says something of all sites at once."""
    match form:
        case Sites(condition):
            return _paths(condition, sites)
        case OneOf(options, _):
            felt = any(holds_at(item, s.form.kind.name) for s in sites)
            return options[0] if felt else default_of(item)
        case KeptBySite():
            return _marks(form, sites)


def _write_value(
    item: ast.Field,
    expression: ast.Expression,
    sites: Sequence[PlannedSite],
    values: dict[str, object],
    pattern: str | None,
) -> Reason | None:
    """Write a field, and with it the field of those sites whose value is not the common one."""
    by_path = {
        s.path: _plain(written(expression, dict(s.form.arguments)))
        for s in sites
        if holds_at(item, s.form.kind.name)
    }
    counts = Counter(cast("list[Hashable]", list(by_path.values())))
    common = counts.most_common(1)[0][0] if counts else default_of(item)
    values[item.name] = common
    others = {path: value for path, value in by_path.items() if value != common}
    if pattern is not None:
        values[pattern] = _patterns(others)
        return None
    if not others:
        return None
    path, value = next(iter(others.items()))
    first = next(p for p, v in by_path.items() if v == common)
    return Reason(
        f"`{item.name}` is one for all sites, and here it is {shown(common)} at `{first}` and "
        f"{shown(value)} at `{path}`"
    )


def _patterns(by_path: Mapping[str, object]) -> dict[str, object]:
    """One regex a value, since every site is matched against every regex."""
    paths: dict[Hashable, list[str]] = {}
    for path, value in by_path.items():
        paths.setdefault(cast(Hashable, value), []).append(path)
    return {at_start(p): value for value, p in paths.items()}


def _marks(form: KeptBySite, sites: Sequence[PlannedSite]) -> dict[str, list[bool]] | None:
    """Which rows are kept, the first ones, of every site where not all are."""
    marks: dict[str, list[bool]] = {}
    for site in sites:
        arguments = dict(site.form.arguments)
        count, total = (int(str(arguments[n])) for n in (form.argument, form.total))
        if count != total:
            marks[f"{site.path}.{form.key}"] = [i < count for i in range(total)]
    return marks or None


def _plain(value: object) -> object:
    value = plain(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _paths(condition: ast.Expression | None, sites: Sequence[PlannedSite]) -> list[str] | str:
    """The paths as a list; as a regex where an ending could take another module as well."""
    chosen = [
        s.path
        for s in sites
        if condition is None or Scalars(dict(s.form.arguments)).holds(condition)
    ]
    rest = {s.path for s in sites} - set(chosen)
    if all("." in p for p in chosen) and not any(r.endswith(p) for p in chosen for r in rest):
        return chosen
    return exactly(chosen)


def _read_back(config: ForeignConfig, sites: Sequence[PlannedSite]) -> ForeignConfig | Reason:
    text = Source("adapter_config.json", "")
    file = ConfigFile(config.values, Span(text, 0, 0))
    reader = ConfigReader(config.format, sites[0].form.method, file)
    for site in sites:
        form = site.form
        found = reader.read(site.path, form.kind.name)
        if found.problems:
            return Reason(f"`{site.path}`: {found.problems[0].message}")
        for (name, value), (_, read) in zip(form.arguments, found.arguments, strict=True):
            if value != read:
                return Reason(
                    f"{config.format.name} cannot say {name} = {shown(value)} at `{site.path}` "
                    f"({form.kind.name}); it means {shown(read)} there"
                )
    return config
