"""One config of another format for a whole adapter, or the reason why there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from surgery.algebra.scalars import Scalars, plain
from surgery.arguments import Arguments, told
from surgery.errors import Source, Span, refuse
from surgery.language import syntax as ast
from surgery.mapping.copies import about, copied
from surgery.mapping.fields import ConfigFile, ConfigReader
from surgery.mapping.forms import (
    Anything,
    Biases,
    BySite,
    KeptBySite,
    OneOf,
    Parameters,
    Sites,
    Table,
    Tied,
    TrainedRows,
    Value,
    constant,
    default_of,
    fields_of,
    form_of,
    holds_at,
    nested,
    same,
    shown,
    written,
)
from surgery.mapping.paths import at_start, ending, exactly
from surgery.mapping.seats import Seat, copies_alone, divided, seats_of
from surgery.mapping.spelling import DIALECTS, Formats, chosen_format, dialect_of, rows_of
from surgery.mapping.tables import tables_of
from surgery.planned import Plan, PlannedSite, SiteClass

PEFT = "peft"


@dataclass(frozen=True, slots=True)
class ForeignConfig:
    """A config of another format: plain data, to be written as JSON."""

    format: ast.Format
    values: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why no one config says what an adapter is."""

    text: str


def peft_config(
    plan: Plan,
    adapter: str,
    model: nn.Module | None = None,
    formats: Formats | None = None,
) -> ForeignConfig | Reason:
    """The one peft config that expresses an adapter, or why there is none."""
    return foreign_config(plan, adapter, PEFT, model, formats)


def foreign_config(
    plan: Plan,
    adapter: str,
    name: str,
    model: nn.Module | None = None,
    formats: Formats | None = None,
) -> ForeignConfig | Reason:
    """The one config of a format that expresses an adapter, or why there is none.

    What is written is read back at every site, so a config says all that the adapter is.

    model: says what the base is, and which copies are whole modules; without it an adapter that has
    copies has no config. formats: as in `mapping_of`. Raises DefinitionError for a wrong format.
    """
    sites = [s for s in plan.sites if s.adapter == adapter]
    if not sites:
        return Reason("the adapter has no site")
    if any(site.form.places for site in sites):
        return Reason(f"{name} has no config for some of the tokens")
    if any(site.site.tie == "share" and not site.site.at.picked for site in sites):
        return Reason(f"{name} has no place for an adapter of a weight that several layers share")
    if dialect_of(name).copies is not None and copies_alone(sites):
        return _of_copies(name, sites, model)
    tables = tables_of(sites, model)
    if isinstance(tables, str):
        return Reason(f"{name}: {tables}")
    if len(tables) == len(sites):
        return _of_rows(name, sites, tables, model)
    fmt = _format_of(plan, name, sites, formats or plan.resolved.library.formats)
    if isinstance(fmt, Reason):
        return fmt
    config = _whole_config(fmt, sites, model)
    return config if isinstance(config, Reason) or not tables else _with_rows(config, tables)


def saying(formats: Formats, name: str, values: Mapping[str, object]) -> Formats:
    """The format statements that write some fields so; those of other names as they are.

    They raise ArtifactError (E524) for a method that has statements of the name, and none of these
    that does.
    """

    def chosen(method: str) -> tuple[ast.Format, ...]:
        known = formats(method)
        fits = tuple(f for f in known if f.name != name or _says(f, values))
        if known and not fits:
            asked = " and ".join(f"{field} = {shown(v)}" for field, v in values.items())
            others = (_constants(f).get(field) for f in known for field in values)
            there = ", ".join(dict.fromkeys(map(shown, others)))
            message = f"no format of {name} for `{method}` writes {asked}"
            refuse("E524", message, hint=f"there are: {there}")
        return fits

    return chosen


def _says(fmt: ast.Format, values: Mapping[str, object]) -> bool:
    constants = _constants(fmt)
    return all(n in constants and same(constants[n], value) for n, value in values.items())


def _constants(fmt: ast.Format) -> dict[str, object]:
    """The fields that are written with one value, whatever the arguments."""
    found: dict[str, object] = {}
    for item in fields_of(fmt):
        match form_of(item):
            case Value(ast.Text() | ast.Number() | ast.Truth() as leaf):
                found[item.name] = constant(leaf)
            case OneOf((first, *_)):
                found[item.name] = first
            case _:
                continue
    return found


def _of_copies(name: str, sites: Sequence[PlannedSite], model: nn.Module | None) -> ForeignConfig:
    """The config of an adapter that is copies of whole modules and nothing else."""
    copies = dialect_of(name).copies
    assert copies is not None  # else there is no such config
    paths = list(dict.fromkeys(site.site.owner for site in sites))
    modules = paths if all("." in path for path in paths) else exactly(paths)
    values = {"peft_type": copies[0], "target_modules": modules}
    fmt = ast.Format(name, sites[0].form.method.name, (), (), span=sites[0].span)
    return ForeignConfig(fmt, {**values, **({} if model is None else about(model, ()))})


def _of_rows(
    name: str,
    sites: Sequence[PlannedSite],
    tables: Mapping[str, list[int]],
    model: nn.Module | None,
) -> ForeignConfig | Reason:
    """The config of an adapter that is rows of tables and nothing else."""
    rows = dialect_of(name).rows
    if rows is None:
        return Reason(f"{name} has no adapters that are rows of tables alone")
    first = next(iter(tables.values()))
    other = next((path for path, some in tables.items() if some != first), None)
    if other is not None:
        return Reason(f"{name} has the same rows of every table, and `{other}` has others")
    modules = [*tables] if all("." in path for path in tables) else exactly(tables)
    values = {"peft_type": rows.kind, "target_modules": modules, rows.field: first}
    fmt = ast.Format(name, sites[0].form.method.name, (), (), span=sites[0].span)
    return ForeignConfig(fmt, {**values, **({} if model is None else about(model, ()))})


def _with_rows(config: ForeignConfig, tables: Mapping[str, list[int]]) -> ForeignConfig | Reason:
    """A config that has rows of tables as well."""
    fmt = config.format
    field = next((f.name for f in fields_of(fmt) if isinstance(form_of(f), TrainedRows)), None)
    if field is None:
        return Reason(f"{fmt.name} has no rows of tables beside {fmt.method}")
    return ForeignConfig(fmt, {**config.values, field: dict(tables)})


def _format_of(
    plan: Plan, name: str, every: Sequence[PlannedSite], formats: Formats
) -> ast.Format | Reason:
    """The one statement that spells all sites but copies."""
    chain = next((s for s in every if len(s.form.links) > 1), None)
    if chain is not None:
        return Reason(f"{name} has one method a layer, and `{chain.path}` has {chain.form.named}")
    sites = [s for s in every if not s.site.at.tensor]
    if not sites:
        some = every[0].path
        return Reason(f"{name} names no single parameters to be trained, such as `{some}`")
    methods = tuple(dict.fromkeys(s.form.method.name for s in sites))
    if len(methods) != 1:
        return Reason(f"{name} has one method an adapter, and this has {' and '.join(methods)}")
    known = tuple(f for f in formats(methods[0]) if f.name == name)
    if not known:
        text = f"{name} does not know `{methods[0]}` as it is defined here"
        return Reason(f"{text}; `surgery convert --to` may make a method of it that it knows")
    return _common_format(known, sites)


@dataclass(frozen=True, slots=True)
class _Named:
    """A site as a config has it: what it is called, and as what kind of layer it is seen."""

    path: str
    kind: str
    form: SiteClass
    arguments: Arguments
    parameter: bool


def _named(
    sites: Sequence[PlannedSite], seats: Sequence[Seat], name: str
) -> tuple[_Named, ...] | Reason:
    """The sites by their names in a config, those that have one name once."""
    found: dict[str, _Named] = {}
    joints: dict[str, int] = {}
    for site, seat in zip(sites, seats, strict=True):
        if site.site.at.tensor:
            continue
        if seat.joint is not None:
            joints[seat.named] = joints.get(seat.named, 0) + 1
        said = divided(site.form.arguments, seat.times)
        one = _Named(seat.named, seat.kind, site.form, said, seat.parameter)
        first = found.setdefault(seat.named, one)
        if first.arguments != said:
            return Reason(_unlike(name, site, seat))
    alone = next((path for path, count in joints.items() if count != 2), None)
    if alone is not None:
        return Reason(f"{name} adapts all projections of `{alone}` together, and here is one alone")
    return tuple(found.values())


def _unlike(name: str, site: PlannedSite, seat: Seat) -> str:
    times = " and ".join(f"{factor} times the {n}" for n, factor in seat.times)
    but = f", and means {times} at `{site.path}`" if times else ""
    return f"{name} has the same arguments for all that is in `{seat.named}`{but}"


def _whole_config(
    fmt: ast.Format, every: Sequence[PlannedSite], model: nn.Module | None
) -> ForeignConfig | Reason:
    seats = seats_of(every, dialect_of(fmt.name))
    sites = _named(every, seats, fmt.name)
    if isinstance(sites, Reason):
        return sites
    forms = tuple(form_of(item) for item in fields_of(fmt))
    if any(isinstance(form, Tied) for form in forms):
        if model is None:
            return Reason(f"{fmt.name} tells groups by the order of the sites in the model")
        sites = _in_order(sites, model)
    own = next((form.own for form in forms if isinstance(form, Biases)), None)
    copies = copied(every, model, own)
    if isinstance(copies, str):
        return Reason(f"{fmt.name}: {copies}")
    config = _config(fmt, sites, copies.biases)
    if isinstance(config, Reason):
        return config
    saved = {"modules_to_save": list(copies.modules)} if copies.modules else {}
    base = {} if model is None or fmt.name not in DIALECTS else about(model, copies.modules)
    return ForeignConfig(fmt, {**config.values, **saved, **base})


def _in_order(sites: tuple[_Named, ...], model: nn.Module) -> tuple[_Named, ...]:
    """The sites as the model has them."""
    untyped: Any = model  # whose types are not complete
    every = enumerate(untyped.named_modules(remove_duplicate=False))
    places: dict[str, int] = {name: i for i, (name, _) in every}
    return tuple(sorted(sites, key=lambda site: places.get(site.path, len(places))))


def _common_format(
    formats: tuple[ast.Format, ...], sites: Sequence[PlannedSite]
) -> ast.Format | Reason:
    found: dict[int, ast.Format] = {}
    seats = seats_of(sites, dialect_of(formats[0].name))
    for site, joint in _one_a_class(sites, seats):
        chosen = chosen_format(formats, site.form, joint)
        if chosen is None:
            missing = rows_of(formats[0], site.form, joint)
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


def _one_a_class(
    sites: Sequence[PlannedSite], seats: Sequence[Seat]
) -> Iterator[tuple[PlannedSite, bool]]:
    """A site of each class, and whether it is named together with others."""
    pairs = ((s, seat.joint is not None) for s, seat in zip(sites, seats, strict=True))
    yield from {(id(s.form), joint): (s, joint) for s, joint in reversed([*pairs])}.values()


def _config(fmt: ast.Format, sites: Sequence[_Named], biases: str) -> ForeignConfig | Reason:
    forms = {item.name: form_of(item) for item in fields_of(fmt)}
    patterned = {f.argument: (n, f) for n, f in forms.items() if isinstance(f, BySite)}
    values: dict[str, object] = {}
    for item in fields_of(fmt):
        match forms[item.name]:
            case Value(expression):
                name = expression.id if isinstance(expression, ast.Name) else ""
                reason = _write_value(item, expression, sites, values, patterned.get(name))
                if reason is not None:
                    return reason
            case Biases():
                values[item.name] = biases
            case BySite() | Table() | TrainedRows() | Anything(None):
                pass  # written with its argument's own field, or its own fields; not written
            case Anything(value):
                values[item.name] = value
            case form:
                values[item.name] = _of_all(item, form, sites)
    absent = {n for n, f in forms.items() if isinstance(f, Parameters) and not values[n]}
    values = {name: value for name, value in values.items() if name not in absent}
    return _read_back(ForeignConfig(fmt, nested(values)), sites)


_OfAll = Sites | Parameters | OneOf | KeptBySite | Tied


def _of_all(item: ast.Field, form: _OfAll, sites: Sequence[_Named]) -> object:
    """The value of a field that says something of all sites at once."""
    match form:
        case Sites(condition, inside):
            return _paths(condition, sites, inside)
        case Parameters():
            return [site.path for site in sites if site.parameter]
        case OneOf(options):
            felt = any(holds_at(item, s.kind) for s in sites)
            return options[0] if felt else default_of(item)
        case KeptBySite():
            return _marks(form, sites)
        case Tied(argument):
            groups = {dict(site.arguments)[argument] for site in sites}
            return 1 - len(groups) / len(sites)


def _write_value(
    item: ast.Field,
    expression: ast.Expression,
    sites: Sequence[_Named],
    values: dict[str, object],
    pattern: tuple[str, BySite] | None,
) -> Reason | None:
    """Write a field, and with it the field of those sites whose value is not the common one."""
    by_path = {
        s.path: _plain(written(expression, dict(s.arguments)))
        for s in sites
        if holds_at(item, s.kind)
    }
    counts = Counter(cast("list[Hashable]", list(by_path.values())))
    common = counts.most_common(1)[0][0] if counts else default_of(item)
    values[item.name] = common
    others = {path: value for path, value in by_path.items() if value != common}
    if pattern is not None:
        values[pattern[0]] = _patterns(others, pattern[1])
        return None
    if not others:
        return None
    path, value = next(iter(others.items()))
    first = next(p for p, v in by_path.items() if v == common)
    return Reason(
        f"`{item.name}` is one for all sites, and here it is {shown(common)} at `{first}` and "
        f"{shown(value)} at `{path}`"
    )


def _patterns(by_path: Mapping[str, object], form: BySite) -> dict[str, object]:
    """One regex a value, since every site is matched against every regex; or one an ending."""
    if form.behind:
        return {ending(path): value for path, value in by_path.items()}
    paths: dict[Hashable, list[str]] = {}
    for path, value in by_path.items():
        paths.setdefault(cast(Hashable, value), []).append(path)
    return {at_start(p): value for value, p in paths.items()}


def _marks(form: KeptBySite, sites: Sequence[_Named]) -> dict[str, list[bool]] | None:
    """Which rows are kept, the first ones, of every site where not all are."""
    marks: dict[str, list[bool]] = {}
    for site in sites:
        arguments = dict(site.arguments)
        count, total = (int(str(arguments[n])) for n in (form.argument, form.total))
        if count != total:
            marks[f"{site.path}.{form.key}"] = [i < count for i in range(total)]
    return marks or None


def _plain(value: object) -> object:
    value = plain(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _paths(
    condition: ast.Expression | None, sites: Sequence[_Named], inside: bool
) -> list[str] | str:
    """The paths as a list; as a regex where an ending could take another module as well.

    inside: for who looks for texts anywhere in a path, and takes no regex.
    """
    chosen = [
        s.path
        for s in sites
        if not s.parameter and (condition is None or Scalars(dict(s.arguments)).holds(condition))
    ]
    rest = {s.path for s in sites} - set(chosen)
    if inside:
        return chosen
    if all("." in p for p in chosen) and not any(r.endswith(p) for p in chosen for r in rest):
        return chosen
    return exactly(chosen)


def _read_back(config: ForeignConfig, sites: Sequence[_Named]) -> ForeignConfig | Reason:
    text = Source("adapter_config.json", "")
    file = ConfigFile(config.values, Span(text, 0, 0))
    method = sites[0].form.method
    reader = ConfigReader(config.format, method, file, [s.path for s in sites])
    known = told(method)  # who reads it has all sites, and is told the same
    for site in sites:
        found = reader.read(site.path, site.kind)
        if found.problems:
            return Reason(f"`{site.path}`: {found.problems[0].message}")
        for (name, value), (_, read) in zip(site.arguments, found.arguments, strict=True):
            if value != read and name not in known:
                return Reason(
                    f"{config.format.name} cannot say {name} = {shown(value)} at `{site.path}` "
                    f"({site.kind}); it means {shown(read)} there"
                )
    return config
