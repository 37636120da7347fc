"""Configs of peft's adapters that are copies and nothing else, as specs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn

from surgery.errors import Report, refuse
from surgery.integrations.clauses import clauses_of, described
from surgery.integrations.peft import INFORMATIVE
from surgery.integrations.peft_tokens import FIELDS, ROWS
from surgery.integrations.table_clauses import row_statements
from surgery.integrations.targets import all_of, matching, taken_where_absent
from surgery.mapping.fields import ConfigFile, unknown_values

ASKED = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)
"""The fields that say where an adapter is."""


def of_tables(config: ConfigFile, model: nn.Module | None) -> Iterator[str]:
    """The spec of an adapter that is rows of tables and nothing else."""
    report = Report()
    report.extend(unknown_values(config, {*INFORMATIVE, *FIELDS}, ROWS.kind))
    report.stop()
    yield from described(config, None, INFORMATIVE, model)
    yield from row_statements(config, model)


def of_modules(config: ConfigFile, model: nn.Module | None) -> Iterator[str]:
    """The spec of an adapter that is copies of whole modules and nothing else."""
    report, known = Report(), {*INFORMATIVE, *ASKED, "peft_type"}
    report.extend(unknown_values(config, known, str(config.get("peft_type"))))
    report.stop()
    stated = config.get("target_modules")
    some = taken_where_absent(config, "target_modules", model) if stated is None else stated
    if isinstance(some, str):
        chosen = (matching(some, config.span("target_modules")),)
    else:
        chosen = all_of(map(str, cast("list[object]", some)))
    clauses = clauses_of(config, model)
    there = [c for c in chosen if model is None or clauses.selects(c)]
    if not there:
        span, hint = config.span("target_modules"), "it is for another model"
        refuse("E516", "the config names no module of the model", span, hint=hint)
    yield from described(config, None, INFORMATIVE, model)
    selector = " | ".join(c.selector for c in there)
    yield f"train {selector} {clauses.around('', '', lambda p: any(c.takes(p) for c in there))}"
    yield from clauses.trained("", chosen, ())
