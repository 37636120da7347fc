"""The rows of tables that a config of peft's trains, as statements.

Read from peft 0.21: a list of rows is of the input embedding, a table of lists names modules by
the ends of their paths; rows of tables that the model's config ties are the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from torch import nn

from surgery.errors import refuse
from surgery.integrations.peft_tokens import BESIDE, ROWS, of_rows, rows_said, tie_of
from surgery.integrations.targets import Chosen, all_of, ending, matching, named
from surgery.mapping.fields import ConfigFile
from surgery.mapping.forms import shown
from surgery.model.holder import parameters_of
from surgery.model.inventory import joined, survey


def row_statements(config: ConfigFile, model: nn.Module | None) -> Iterator[str]:
    """`train …[rows]` for each table of which a config names rows.

    Raises ArtifactError: E515 for a field of another form than peft gives it, or a table that the
    model alone tells; E516 where the model has no such table, E518 for rows that it has not.
    """
    field = ROWS.field if of_rows(config) else BESIDE
    if not config.get(field):
        return
    tables = _tables(config, field, model)
    if model is None:
        for one in tables:
            yield f"train {one.tail}[{_rows(config, one.tail, field)}]"
        return
    seen: set[int] = set()
    for path, table in _there(tables, config, field, model):
        tie = tie_of(path, model)
        if tie == "share" and id(table) in seen:
            continue
        seen.add(id(table))
        rows = _rows(config, path, field, len(table))
        selector = named(joined(path, "weight")).selector
        yield " ".join(filter(None, (f"train {selector}[{rows}]", tie, "expect 1")))


def _tables(config: ConfigFile, field: str, model: nn.Module | None) -> tuple[Chosen, ...]:
    """The tables that are named; without a model, those that have a plain name."""
    stated: Any = config.get(field)
    find: Callable[[str], Chosen] = ending
    if of_rows(config):
        stated, find = config.get("target_modules"), named
    elif isinstance(stated, list):
        stated = None  # of the input embedding
    elif not isinstance(stated, Mapping):
        hint = "it is a list of rows, or a table of such lists by modules"
        refuse("E515", f"`{field}` is {shown(stated)}", config.span(field), hint=hint)
    if stated is None and model is not None:
        stated = [_embedding(model)]
    if isinstance(stated, str):
        found = (matching(stated, config.span("target_modules")),)
    else:
        names = [*map(str, cast("list[object]", stated or []))]
        found = all_of(names, named if model is None else find)
    plain = bool(found) and all(one.tail and one.selector == one.tail for one in found)
    if model is None and not plain:
        hint = "give the model"
        refuse("E515", f"`{field}`: the model alone says of what", config.span(field), hint=hint)
    return found


def _embedding(model: nn.Module) -> str:
    own = getattr(model, "get_input_embeddings", None)
    table = own() if callable(own) else None
    return next((e.path for e in survey(model).entries if e.module is table), "embed_tokens")


def _there(
    tables: tuple[Chosen, ...], config: ConfigFile, field: str, model: nn.Module
) -> list[tuple[str, nn.Parameter]]:
    """The paths of the tables of a model, with their weights. Raises ArtifactError (E516)."""
    found = [
        (entry.path, weight)
        for entry in survey(model).entries
        if any(one.takes(entry.path) for one in tables)
        and (weight := parameters_of(entry.module).get("weight")) is not None
        and weight.dim() > 1
    ]
    if not found:
        hint = "it is for another model"
        refuse("E516", "the model has no table of the config's", config.span(field), hint=hint)
    return found


def _rows(config: ConfigFile, path: str, field: str, there: int | None = None) -> str:
    """The rows of a table, as a statement has them. Raises ArtifactError (E515, E518)."""
    rows = rows_said(config, path)
    if not rows or len({*rows}) < len(rows):
        stated = config.get(field)
        kind = cast("Mapping[str, object]", stated) if isinstance(stated, Mapping) else stated
        message, hint = f"`{field}` is {shown(kind)}", "name each row once, by number"
        refuse("E515", message, config.span(field), hint=hint)
    wrong = next((row for row in rows if row < 0 or (there is not None and row >= there)), None)
    if wrong is not None:
        hint = "resize the embeddings as they were"
        refuse("E518", f"`{path}` has no row {wrong}", config.span(field), hint=hint)
    return ", ".join(map(str, rows))
