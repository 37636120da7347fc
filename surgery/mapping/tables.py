"""What a config says of trained rows of tables, or the reason why it cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from surgery.model.holder import modules_of, parameters_of
from surgery.model.layers import kind_of
from surgery.planned import PlannedSite

_TABLES = frozenset({"embedding", "linear"})
"""The kinds of layers whose weight is a table to other programs."""


def tables_of(sites: Sequence[PlannedSite], model: nn.Module | None) -> dict[str, list[int]] | str:
    """The rows of each table that an adapter trains, by its path; why no config can say them.

    A table is named by the end of its path, and one that the model's config ties to the input
    embedding is trained with it.
    """
    found: dict[str, list[int]] = {}
    for site in sites:
        if not site.site.at.picked:
            continue
        reason = _objection(site, model)
        if site.site.owner in found:
            reason = f"it has one tensor of rows a table, and two are of `{site.site.owner}`"
        if reason:
            return reason
        found[site.site.owner] = [*site.site.at.picked]
    return _clash(found, model) or found


def _objection(site: PlannedSite, model: nn.Module | None) -> str:
    """Why there is no place for the rows of one site, or ""."""
    path, module = site.site.owner, site.site.module
    kind = kind_of(module)
    if site.site.at.parameter != "weight" or kind is None or kind.name not in _TABLES:
        return f"it has rows of embeddings and linear layers alone, and `{site.path}` is none"
    if parameters_of(module).get("bias") is not None:
        return f"where rows of a weight are trained it passes over the bias, and `{path}` has one"
    if model is None:
        return f"what rows are tied to is seen in the model alone, such as those of `{path}`"
    if _ties(model, module) is not (site.site.tie == "share"):
        return (
            f"it ties the rows of a head to those of the embedding as the model's config does, "
            f"and here those of `{path}` are {'apart' if site.site.tie != 'share' else 'shared'}"
        )
    return ""


def _ties(model: nn.Module, table: nn.Module) -> bool:
    """Whether a model's config ties a head to a table, which is the input's."""
    config = getattr(model, "config", None)
    tied = getattr(model, "_tied_weights_keys", None)
    if not getattr(config, "tie_word_embeddings", False) or not tied:
        return False
    return cast(Any, model).get_input_embeddings() is table


def _clash(tables: Mapping[str, object], model: nn.Module | None) -> str:
    """Why some names would mean more than their own tables, for they are taken as endings."""
    every = () if model is None or not tables else modules_of(model)
    for path, _ in every:
        for name in tables:
            if path != name and path.endswith(name) and path not in tables:
                return f"`{name}` is the end of `{path}` too, and it names tables by such an end"
    return ""
