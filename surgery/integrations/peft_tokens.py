"""Rows of tables that peft trained: what `train embed_tokens[5, 9]` is here.

Read from peft 0.21, `tuners/trainable_tokens`: the rows are put into the table, not added to it,
and a head that the model's config ties to the embedding has the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Literal, cast

import torch
from torch import Tensor, nn

from surgery.arguments import Link
from surgery.errors import Report
from surgery.language.library import trained
from surgery.mapping.fields import ConfigFile, unknown_values
from surgery.mapping.spelling import dialect_of
from surgery.model.holder import parameters_of
from surgery.model.inventory import Entry, joined, survey
from surgery.model.parts import ParameterSlice
from surgery.plan import Assignment
from surgery.store import TensorFile

BESIDE = "trainable_token_indices"
"""The field of an adapter that has such rows besides."""

_CALLED = dialect_of("peft").rows
assert _CALLED is not None  # the dialect's own row says so

ROWS = _CALLED
"""How peft calls trained rows."""

FIELDS = ("peft_type", "target_modules", ROWS.field, "init_weights")
"""What a config of an adapter that is rows and nothing else has."""

_ENDINGS = (f".{ROWS.inside}.{ROWS.tensor}", f".{ROWS.tensor}")


def trained_rows(
    config: ConfigFile, file: TensorFile, model: nn.Module
) -> tuple[TensorFile, dict[str, Assignment]]:
    """The file with each table's rows once, and the sites that they are, by the tables' names.

    Raises ArtifactError: E516 for a module that the model has not, E515 for rows that the config
    does not say, E518 for rows that the table has not.
    """
    report, found = Report(), dict[str, Assignment]()
    entries = {entry.path: entry for entry in survey(model).entries}
    shared: dict[int, str] = {}
    order = {path: index for index, path in enumerate(entries)}
    # Of tables that share their rows the first is the site, as with any weight that is shared.
    for key, path in sorted(_keys(file), key=lambda row: order.get(row[1], -1)):
        entry = entries.get(path)
        table = None if entry is None else parameters_of(entry.module).get("weight")
        if entry is None or table is None:
            near = get_close_matches(path, entries, 1)
            hint = f"the nearest is `{near[0]}`" if near else "it was made for another model"
            report.error("E516", f"the model has no table `{path}`", hint=hint)
            continue
        rows = rows_said(config, path)
        site = _site(entry, config, model, tuple(rows))
        first = shared.setdefault(id(table), key) if site.tie == "share" else key
        problem = _problem(rows, table, file, key, first)
        if problem is not None:
            report.error(problem[0], f"`{key}`: {problem[1]}", hint=problem[2])
        elif first != key:
            file = file.without(key)
        else:
            found[joined(path, "weight")] = site
    report.stop()
    return file, found


def _keys(file: TensorFile) -> Iterator[tuple[str, str]]:
    """The keys of rows, each with the path of its table."""
    prefix = dialect_of("peft").site
    for key in tuple(file.shapes):
        ending = next((e for e in _ENDINGS if key.endswith(e)), None)
        if ending is not None and key.startswith(prefix):
            yield key, key.removeprefix(prefix).removesuffix(ending)


def of_rows(config: ConfigFile) -> bool:
    """Whether a config is of an adapter that is rows of tables and nothing else."""
    return config.get("peft_type") == ROWS.kind


def rows_alone(
    config: ConfigFile, tables: dict[str, Assignment], informative: Collection[str]
) -> dict[str, Assignment]:
    """The tables of such an adapter. Raises ArtifactError: E515 for a field that is not known."""
    report = Report()
    report.extend(unknown_values(config, {*informative, *FIELDS}, ROWS.kind))
    if not tables:
        message = "no tensor of the folder is rows of one of the model's tables"
        report.error("E516", message, config.source, hint="it was made for another model")
    report.stop()
    return tables


def rows_said(config: ConfigFile, path: str) -> list[int]:
    """The rows of a table that a config names; none if it does not say."""
    stated = config.get(ROWS.field) if of_rows(config) else config.get(BESIDE)
    if isinstance(stated, Mapping):
        named = cast("Mapping[str, object]", stated)
        stated = next((rows for name, rows in named.items() if path.endswith(name)), None)
    rows = cast("list[object]", stated) if isinstance(stated, list) else []
    return cast("list[int]", rows) if all(type(row) is int for row in rows) else []


def _problem(
    rows: list[int], table: Tensor, file: TensorFile, key: str, first: str
) -> tuple[str, str, str] | None:
    """What is against some rows of a table: a code, what it is, what to do.

    first: the key that has the same rows of a table that is shared.
    """
    shape, wanted = file.shapes[key], (len(rows), *table.shape[1:])
    if not rows or len(set(rows)) != len(rows):
        return "E515", "the config does not say which rows it is", "name each row once, by number"
    if not all(0 <= row < len(table) for row in rows):
        wrong = next(row for row in rows if not 0 <= row < len(table))
        return "E518", f"the table has no row {wrong}", "resize the embeddings as they were"
    if shape != wanted:
        return "E518", f"its shape is {list(shape)}, not {list(wanted)}", "copy the folder again"
    if key != first and not torch.equal(file[key], file[first]):
        return "E518", f"it is another than `{first}`, and the two are tied", "copy it again"
    return None


def _site(entry: Entry, config: ConfigFile, model: nn.Module, rows: tuple[int, ...]) -> Assignment:
    at = ParameterSlice("weight", bias="", tensor=True, picked=rows)
    span = config.span(ROWS.field if of_rows(config) else BESIDE)
    return Assignment(entry.path, (Link(trained(), ()),), span, at, tie_of(entry.path, model))


def tie_of(path: str, model: nn.Module) -> Literal["share", "untie"] | None:
    """What becomes of a table that is tied: a head that the config ties has the same rows."""
    if joined(path, "weight") not in survey(model).ties:
        return None
    config = getattr(model, "config", None)
    return "share" if getattr(config, "tie_word_embeddings", False) else "untie"
