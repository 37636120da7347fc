"""One adapter made of several: of those on a model, or of saved ones, as an expression says it.

Adapters are added up by what they do, Σ cᵢ (Wᵢ' - W), and not by their parameters, unless that is
asked for. What is exact says so, and for all else the distance from that sum is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from surgery import deriving
from surgery.adapters import check_name
from surgery.artifact import save_adapter
from surgery.check import DEFAULT_ADAPTER
from surgery.composed import Source
from surgery.composition import Composition
from surgery.conversion import check_output, open_adapter
from surgery.deriving import composed, on_model, some, under
from surgery.digests import base_digests, check_base
from surgery.errors import SurgeryError, refuse
from surgery.folder_shapes import bare_model
from surgery.language.parse import parse_live
from surgery.live import Live, read_live, single
from surgery.recipe import How, Sign
from surgery.runtime import Compiled
from surgery.state import require_state
from surgery.switching import live_of

Folders = Mapping[str, str | Path]
"""Saved adapters by the names that they have in the expression."""


def compose(
    expression: str,
    adapters: Folders | Compiled,
    output: str | Path,
    *,
    how: str = "cat",
    rank: int | None = None,
    to: str | None = None,
    density: float | None = None,
    sign: Sign = "total",
    seed: int = 0,
    base: nn.Module | None = None,
    name: str | None = None,
    force: bool = False,
) -> Composition:
    """Write the adapter that an expression such as `0.7*a + 0.3*b` is, to a new folder.

    adapters: folders, ours or peft's, by their names in the expression; or an adapted model. how,
    rank, to, density, sign, seed: see `recipe.How`. base: the model that folders are for;
    without one, or with one on meta, those that read no weight can be composed. name: of the new
    adapter. force: compose what was made on other bases, or on another than `base`.
    An adapter that is meant as it is (`1.0*a`), without a rank or a density, is written as it is,
    whatever its method.
    Raises ArtifactError, with nothing written: E520 if the folder has files already, E522 for
    another base, E580 where it cannot be composed so, E581 for adapters of different bases, E582
    for an option, E583 for parameters that do not fit together, E584 where the base is needed, and
    as `attach` does for a folder; DefinitionError for the expression; PlanError (E309).
    """
    check_output(Path(output))
    there = isinstance(adapters, Compiled)
    live, sources, model = (
        _there(adapters.model, expression)
        if isinstance(adapters, Compiled)
        else _in_folders(adapters, expression, base, force)
    )
    only = live.only
    called = name or (DEFAULT_ADAPTER if only is None else sources[only].own)
    check_name(called)
    options = How(how, rank, to, density, sign, seed)
    made = composed(live, sources, model, called, options, force or there)
    loaded = made.loaded
    digests = base_digests(model, made.plan.sites) if there else loaded.base
    saved = save_adapter(
        Path(output), made.plan, called, loaded.tensors, loaded.seed, digests, model=model
    )
    return replace(made.told, saved=saved)


def compose_on(
    compiled: Compiled | nn.Module,
    expression: str,
    name: str,
    *,
    how: str = "cat",
    rank: int | None = None,
    to: str | None = None,
    density: float | None = None,
    sign: Sign = "total",
    seed: int = 0,
) -> Composition:
    """Put the adapter that an expression of those on a model is on it, beside them.

    It is not live until it is activated. Arguments as for `compose`. Raises, with the model as it
    was, as `compose` does for what cannot be composed; StateError: E402 while one is merged, E411
    for an unknown adapter, E412 and E443 for a name.
    """
    model = compiled if isinstance(compiled, nn.Module) else compiled.model
    options = How(how, rank, to, density, sign, seed)
    return deriving.compose_on(model, expression, name, options)


# ------------------------------------------------------------------------------ what there is


_Found = tuple[Live, Mapping[str, Source], nn.Module]
"""What an expression says, the adapters that it names, and what they are on."""


def _there(model: nn.Module, expression: str) -> _Found:
    live = some(live_of(expression, require_state(model)), expression)
    return live, on_model(model, live), model


def _in_folders(adapters: Folders, expression: str, base: nn.Module | None, force: bool) -> _Found:
    names, bare = tuple(adapters), base is None
    said = single(expression) if expression in names else None
    live = some(said or read_live(parse_live(expression), names, {}), expression)
    folders = {one: Path(adapters[one]) for one in live.adapters}
    model = bare_model(tuple(folders.values())) if base is None else base
    sources = {one: _opened(at, one, model, force, bare) for one, at in folders.items()}
    return live, sources, model


def _opened(folder: Path, name: str, model: nn.Module, force: bool, bare: bool) -> Source:
    """An adapter of a folder. bare: whether the model is made of what the folders say."""
    try:
        opened = open_adapter(folder, model)
    except SurgeryError as error:
        if not bare or any(one.code not in _UNKNOWN for one in error.diagnostics):
            raise
        first, *others = error.diagnostics
        more = f" (and {len(others)} more)" if others else ""
        message = f"{folder} cannot be read without its model: {first.message}{more}"
        refuse("E584", message, first.span, hint="give the model: base=MODEL, or --base")
    if not force:
        check_base(opened.plan.sites, opened.loaded.base, str(folder))
    return under(name, opened.loaded, opened.plan)


_UNKNOWN = frozenset({"E306", "E516", "E518", "E523"})
"""What is said of a folder whose layers are not all known."""


__all__ = ["Composition", "Folders", "How", "compose", "compose_on"]
