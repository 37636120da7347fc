"""The two ways to an adapted model: compile a spec, attach a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from surgery import lower, materialize, mount
from surgery.adapters import check_name, forget
from surgery.check import Values, adapts_nothing, findings, resolve
from surgery.distributed import refuse_new, refuse_wrapped, unwrapped
from surgery.errors import Diagnostic, Report, SurgeryError, error_of, refuse
from surgery.inverse import remove_site
from surgery.language.library import Library
from surgery.language.parse import parse
from surgery.language.syntax import Spec
from surgery.live import single
from surgery.located import shared_at
from surgery.mixture import live_sites
from surgery.model.holder import base_parameters
from surgery.model.hooked import adopt
from surgery.observation import Data, Loss, Progress, Seen
from surgery.plan import Plan, PlannedSite
from surgery.plan import plan as make_plan
from surgery.recomputing import follow
from surgery.redistribution import looked_at
from surgery.reserving import admit_new
from surgery.runtime import Compiled
from surgery.state import Adapter, State, forget_state, keep_state, require_state, state_of
from surgery.switching import make_live
from surgery.tensors import add_banks

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from surgery.programs import Form

    Model = nn.Module | ExportedProgram

# Names and files are a fifth of all code, and are imported when they are first asked for.

SpecLike = Spec | str | Path

_NOTHING_SEEN: Seen = {}


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
) -> Plan:
    """What a spec would do to a model; neither is touched, and the model may lie on meta.

    values: of the spec's `param`s. dtype: of the adapters' parameters; by default float32 on a
    base of 16 bits or less, else the base's own. mode: as for `compile`. Raises SurgeryError with
    all that does not fit.
    """
    target = target_of(model, mode)
    made = make_plan(resolve(read_spec(spec), Library.standard(), values), target, dtype)
    lower.check(made)
    if made.resolved.live is not None:
        plans = dict.fromkeys(made.adapters, made)
        lower.check_sites(live_sites(made.resolved.live, plans), plans)
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
    made = plan(spec, target, values=values, dtype=dtype)
    if not made.adapters:
        raise error_of([adapts_nothing(made.resolved.spec)])
    _refuse_merged(state_of(target))
    refuse_new(target, made)
    told = None if data is None else Data(data, loss, progress)
    made, seen = looked_at(made, target, told, seed, dtype)
    return _twin_or_not(_put_on(target, made, seed, {}, seen), model)


def target_of(model: Model, mode: Form | None, inplace: bool = True) -> nn.Module:
    """The model that is adapted for one that was given; see `surgery.programs`."""
    whole = isinstance(model, fx.GraphModule) or mode == "graph"
    if isinstance(model, nn.Module) and inplace and not whole:
        return model
    from surgery import programs

    return programs.target_of(model, mode, inplace)


def _put_on(
    model: nn.Module,
    made: Plan,
    seed: int,
    given: Mapping[str, Tensor],
    seen: Seen = _NOTHING_SEEN,
) -> Compiled:
    """Make the holders and all tensors, then mount; undo everything if anything fails."""
    state = state_of(model) or State()
    _refuse_known_names(state, made)
    _refuse_merged(state)
    fresh, live = state_of(model) is None, state.live
    base = base_parameters(model)
    flags = {name: p.requires_grad for name, p in base.items()}
    try:
        holders = [mount.add_holder(s.site.module, *s.holders) for s in made.sites]
        adopt(model)  # a hook may now tell where the sites run, and so where tensors belong
        banks = add_banks(model, made, seed, given)
        tensors = [
            materialize.site_tensors(
                s,
                seed,
                {**materialize.given_at(s, given), **shared_at(model, made, s)},
                seen.get((s.adapter, s.path), {}),
            )
            for s in made.sites
        ]
        for site, holder, values in zip(made.sites, holders, tensors, strict=True):
            _fill(holder, site, values, banks)
        for parameter in base.values():
            parameter.requires_grad_(False)
        _register(model, state, made, seed, flags if fresh else state.flags)
    except BaseException:
        if state.live != live:
            make_live(model, state, live)
        _take_off(model, made, state, flags, fresh)
        raise
    return Compiled(model)


def put_on(model: nn.Module, made: Plan, seed: int, tensors: Mapping[str, Tensor]) -> Compiled:
    """Put a plan's adapters on a model with tensors that are known already.

    tensors: all that the plan has, by their names in the model. Raises as `attach` does for a plan
    that does not fit this model, which is left as it was.
    """
    _refuse_merged(state_of(model))
    lower.check(made)
    refuse_new(model, made)
    return _put_on(model, made, seed, tensors)


def _twin_or_not(compiled: Compiled, model: Model) -> Compiled:
    """The handle; its model shares tensors with one that was given, if it is another."""
    state = require_state(compiled.model)
    state.shares = state.shares or compiled.model is not model
    return compiled


def _refuse_merged(state: State | None) -> None:
    if state is not None and state.is_merged:
        refuse("E402", f"`{state.live}` is merged", hint="unmerge() before adding adapters")


def _refuse_known_names(state: State, made: Plan) -> None:
    report = Report()
    for name in made.adapters:
        check_name(name)
        if name in state.adapters:
            report.error(
                "E412",
                f"the model has an adapter `{name}` already",
                hint=f"name the new one: `adapter {name}_2 {{ … }}`, or unload() first",
            )
    report.stop()


def _fill(
    holder: mount.Holder,
    site: PlannedSite,
    values: Mapping[str, Tensor],
    banks: Mapping[str, mount.Holder],
) -> None:
    trained = frozenset(p.name for p in site.form.parameters if p.trained)
    mount.add_parameters(holder, mount.Tensors(values, trained))
    if site.adapter in banks and any(p.shared for p in site.form.parameters):
        mount.link_shared(holder, banks[site.adapter])
    for follower in site.site.followers:
        mount.link_follower(follower, site.holders, holder)


def _register(
    model: nn.Module, state: State, made: Plan, seed: int, flags: dict[str, bool]
) -> None:
    live = made.resolved.live
    if live is None and not state.live and not state.adapters and made.adapters:
        live = single(made.adapters[0])
    for name in made.adapters:
        state.adapters[name] = Adapter(name, made, seed)
    state.flags = flags
    keep_state(model, state)
    follow(model)  # what is computed again in a backward pass repeats its choice
    admit_new(model, state, made.adapters)
    if live is not None:
        Compiled(model).activate(str(live))


def _take_off(
    model: nn.Module, made: Plan, state: State, flags: dict[str, bool], fresh: bool
) -> None:
    for name in made.adapters:
        forget(model, state, name)
    for site in made.sites:
        remove_site(site)
    for name in made.adapters:
        mount.remove_parameters(model, name)
        state.adapters.pop(name, None)
    if fresh:
        mount.give_back(model)
    mount.set_requires_grad(model, flags)
    if fresh:
        forget_state(model)


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
    _refuse_merged(state_of(target))
    made, loaded = loaded_plan(Path(directory), target, dtype, name)
    lower.check(made)
    refuse_new(target, made)
    if not force:
        check_base(made.sites, loaded.base, str(directory))
    return _twin_or_not(_put_on(target, made, loaded.seed, loaded.tensors), model)


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
