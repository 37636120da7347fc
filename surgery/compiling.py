"""The two ways to an adapted model: compile a spec, attach a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx, nn

from surgery import lower
from surgery.check import Values, adapts_nothing, findings, resolve
from surgery.distributed import refuse_new, refuse_wrapped, unwrapped
from surgery.errors import Diagnostic, SurgeryError, error_of
from surgery.language.library import Library
from surgery.language.parse import parse
from surgery.language.syntax import Spec
from surgery.mixture import live_sites
from surgery.model.hooked import adopt
from surgery.observation import Data, Loss, Progress
from surgery.plan import Plan
from surgery.plan import plan as make_plan
from surgery.putting import put_on, refuse_merged
from surgery.redistribution import looked_at
from surgery.runtime import Compiled
from surgery.state import require_state, state_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from surgery.programs import Form

    Model = nn.Module | ExportedProgram

# Names and files are a fifth of all code, and are imported when they are first asked for.

SpecLike = Spec | str | Path


class Tokenizer(Protocol):
    """What a tokenizer of transformers does."""

    def encode(self, text: str, *, add_special_tokens: bool) -> Sequence[int]:
        """The ids of a text's tokens."""
        ...


def ids_by(tokenizer: Tokenizer) -> Callable[[str], tuple[int, ...]]:
    """The ids that a text has within another, without those that begin or end one."""
    return lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))


def read_spec(spec: SpecLike) -> Spec:
    """A spec from a file, from its text, or as it is. Raises SpecSyntaxError, ArtifactError.

    A text that names an existing file, or ends in `.peft`, is a path.
    """
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, Path) or spec.endswith(".peft"):
        from surgery.include import load

        return load(spec)
    return parse(spec)


def check(spec: SpecLike, values: Values | None = None) -> tuple[Diagnostic, ...]:
    """Everything that is wrong with a spec, as far as it can be seen without a model."""
    try:
        return tuple(findings(read_spec(spec), Library.standard(), values))
    except SurgeryError as error:
        return error.diagnostics


def plan(
    spec: SpecLike,
    model: Model,
    *,
    values: Values | None = None,
    dtype: torch.dtype | None = None,
    mode: Form | None = None,
    tokenizer: Tokenizer | None = None,
) -> Plan:
    """What a spec would do to a model; neither is touched, and the model may lie on meta.

    values: of the spec's `param`s. dtype: of the adapters' parameters; by default float32 on a
    base of 16 bits or less, else the base's own. mode: as for `compile`. tokenizer: the model's
    own, for texts behind `at`. Raises SurgeryError with all that does not fit. What is made of
    other adapters is planned by name: how large it becomes is known when it is made.
    """
    target = target_of(model, mode)
    state = state_of(target)
    present = () if state is None else tuple(state.adapters)
    resolved = resolve(read_spec(spec), Library.standard(), values, present)
    made = make_plan(resolved, target, dtype, None if tokenizer is None else ids_by(tokenizer))
    lower.check(made)
    if resolved.live is not None:
        plans = dict.fromkeys(made.adapters, made)
        lower.check_sites(live_sites(resolved.live.within(plans), plans), plans)
    if resolved.derived:
        from surgery.deriving import check

        check(made, target)
    return made


def compile_model(
    spec: SpecLike,
    model: Model,
    *,
    seed: int = 0,
    values: Values | None = None,
    dtype: torch.dtype | None = None,
    inplace: bool = True,
    mode: Form | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    progress: Progress | None = None,
    tokenizer: Tokenizer | None = None,
) -> Compiled:
    """Adapt a model in place, or a twin of it. Whatever goes wrong, the model is left as it was.

    seed: of the random beginnings; each parameter has a stream of its own, so the order does not
    matter. inplace: False leaves the model alone, and the handle's `model` is a twin that shares
    the storage of every parameter and buffer. mode: "graph" for a model that is one graph, which
    the handle's `model` then is; "module" by default, and "graph" for a GraphModule and an exported
    program. A module or a program that becomes a graph stays as it is. data, loss, progress: for
    beginnings that read data; see `observation.Data`. Other arguments as for
    `plan`. A second call adds its adapters beside those that are there. Raises SurgeryError.
    """
    target = target_of(model, mode, inplace)
    refuse_wrapped(target)
    made = plan(spec, target, values=values, dtype=dtype, tokenizer=tokenizer)
    if not made.adapters and not made.resolved.derived:
        raise error_of([adapts_nothing(made.resolved.spec)])
    refuse_merged(state_of(target))
    refuse_new(target, made)
    told = None if data is None else Data(data, loss, progress)
    made, seen = looked_at(made, target, told, seed, dtype)
    put_on(target, made, seed, {}, seen, lambda: _derive(target, made))
    return _twin_or_not(Compiled(target), model)


def _derive(model: nn.Module, made: Plan) -> None:
    """Put on what a plan says is made of adapters that are there by now."""
    if made.resolved.derived:
        from surgery.deriving import derive

        derive(model, made.resolved.derived)


def target_of(model: Model, mode: Form | None, inplace: bool = True) -> nn.Module:
    """The model that is adapted for one that was given; see `surgery.programs`."""
    whole = isinstance(model, fx.GraphModule) or mode == "graph"
    if isinstance(model, nn.Module) and inplace and not whole:
        return model
    from surgery import programs

    return programs.target_of(model, mode, inplace)


def _twin_or_not(compiled: Compiled, model: Model) -> Compiled:
    """The handle; its model shares tensors with one that was given, if it is another."""
    state = require_state(compiled.model)
    state.shares = state.shares or compiled.model is not model
    return compiled


# ------------------------------------------------------------------------------------ attach


def attach(
    directory: str | Path,
    model: Model,
    *,
    dtype: torch.dtype | None = None,
    inplace: bool = True,
    force: bool = False,
    mode: Form | None = None,
    name: str | None = None,
) -> Compiled:
    """Put a saved adapter, ours or peft's, on a model. No code of the folder is run.

    The sites and methods are those that the folder states; nothing is selected again. `inplace` and
    `mode` are as for `compile`. force: attach an adapter that was made on another base than this
    model. name: what the adapter is called here, if not as in the folder. Raises ArtifactError for
    a folder that is not whole or was made on another base (E522), PlanError where it does not fit
    this model, StateError (E412, E443) for a name; the model is left as it was.
    """
    from surgery.digests import check_base
    from surgery.swapping import loaded_plan

    target = target_of(model, mode, inplace)
    refuse_wrapped(target)
    refuse_merged(state_of(target))
    made, loaded = loaded_plan(Path(directory), target, dtype, name)
    lower.check(made)
    refuse_new(target, made)
    if not force:
        check_base(made.sites, loaded.base, str(directory))
    put_on(target, made, loaded.seed, loaded.tensors)
    return _twin_or_not(Compiled(target), model)


def of(model: nn.Module) -> Compiled:
    """The handle of an adapted model again. Raises StateError (E401) if it has no adapter.

    model: it, or what wraps it and keeps it as `module`: DistributedDataParallel, torch.compile.
    A model that was offloaded since, by hooks that place whole submodules, needs this before it is
    trained or merged; its adapter parameters are then new objects.
    """
    model = unwrapped(model)
    require_state(model)
    adopt(model)
    return Compiled(model)


__all__ = ["attach", "check", "compile_model", "of", "plan"]
