"""An adapted model in several processes: what a wrapper wraps, what is refused, who writes.

A model that is adapted may be wrapped or sharded afterwards, by `DistributedDataParallel`,
`fully_shard` or a library that calls them. Once it is, adapters neither come nor go: what
synchronises its gradients knows the parameters that there were, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

from torch import Tensor, nn

from surgery.errors import Report, SurgeryError, error_of, refuse
from surgery.model.holder import children_of, every_module
from surgery.model.layers import qualified_name
from surgery.model.sharded import Mesh, is_managed, mesh_of, put_apart, whole
from surgery.mount import parameter_of
from surgery.planned import Plan, PlannedSite
from surgery.state import Adapter, State, state_of

T = TypeVar("T")

INSIDE = ("module", "_orig_mod", "_fsdp_wrapped_module")
"""The children under which wrappers keep the model that they wrap."""

WRAPPED = "_surgery_wrapped"
"""The attribute by which a wrapper says which model is in it, where that is no such child."""

REPLICATING = frozenset(
    {
        "torch.nn.parallel.distributed.DistributedDataParallel",
        "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
    }
)
"""Wrappers that synchronise the parameters that there were when they were made."""

# ------------------------------------------------------------------------------- wrappers


def unwrapped(model: nn.Module) -> nn.Module:
    """The adapted model in a wrapper; the model itself where it is adapted, or nothing in it is."""
    return next((one for one in _inwards(model) if state_of(one) is not None), model)


def _inwards(model: nn.Module) -> Iterator[nn.Module]:
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        below = {WRAPPED: vars(inner).get(WRAPPED), **children_of(inner)}
        named = (below.get(name) for name in (WRAPPED, *INSIDE))
        inner = next((found for found in named if found is not None), None)


def _is_replicating(module: nn.Module) -> bool:
    return any(qualified_name(cls) in REPLICATING for cls in type(module).__mro__)


# ------------------------------------------------------------------------------- refusals


def refuse_wrapped(model: nn.Module) -> None:
    """Whether adapters may be put on a model, and not on one in it. Raises StateError (E460)."""
    if unwrapped(model) is not model:
        refuse(
            "E460",
            f"this {type(model).__name__} wraps a model that has adapters",
            hint="put others on that model before it is wrapped: surgery.of(model).model is it",
        )
    if _is_replicating(model):
        _refuse_replicating(model)


def refuse_new(model: nn.Module, made: Plan) -> None:
    """Whether adapters may come to the sites of a plan. Raises StateError (E460)."""
    modules = [site.site.module for site in made.sites]
    modules += [model] * bool(made.shared)  # which keeps what sites share
    if any(map(is_managed, modules)):
        refuse(
            "E460",
            f"{_named([site.path for site in _managed(made.sites)])} sharded already, and nothing "
            "would synchronise new adapters",
            hint="compile or attach first, then fully_shard, then make the optimizer",
        )
    wanted = set(map(id, modules))
    for module in every_module(model):
        if _is_replicating(module) and not wanted.isdisjoint(map(id, every_module(module))):
            _refuse_replicating(module)


def _refuse_replicating(module: nn.Module) -> None:
    refuse(
        "E460",
        f"a {type(module).__name__} synchronises the parameters that it was made with, "
        "and no new adapters",
        hint="compile or attach first, then wrap the model, then make the optimizer",
    )


Doing = Literal["merged", "unmerged", "unloaded", "materialized", "frozen", "stacked in a bank"]

_INSTEAD: Mapping[Doing, str] = {
    "merged": "save() it and merge it in one process, or its files: surgery.merge_files",
    "unmerged": "unmerge before fully_shard, or load the base again",
    "unloaded": "activate(None) runs the base; unload before fully_shard, or load the base again",
    "materialized": "load the base's weights and call materialize() before fully_shard",
    "frozen": "freeze in one process, where all parameters are whole",
    "stacked in a bank": "reserve in one process, where all parameters are whole",
}


def refuse_sharded(model: nn.Module, state: State, what: Doing) -> None:
    """Whether what is to be done may be done to an adapted model. Raises StateError (E461).

    What shards a model knows its parameters one by one: it would go on with those that it knows,
    whatever the modules hold.
    """
    found = [s.path for one in state.adapters.values() for s in _managed(one.sites)]
    if found or is_managed(model):
        refuse(
            "E461",
            f"{_named(found)} sharded over processes, and cannot be {what}",
            hint=_INSTEAD[what],
        )


def _managed(sites: Iterable[PlannedSite]) -> Iterator[PlannedSite]:
    return (site for site in sites if is_managed(site.site.module))


def _named(paths: Sequence[str]) -> str:
    """Some sites, or none, as what a sentence is about."""
    match paths:
        case []:
            return "the model is"
        case [path]:
            return f"`{path}` is"
        case [path, *others]:
            return f"`{path}` and {len(others)} other site{'s' * (len(others) > 1)} are"
        case _:
            raise AssertionError(paths)


# ------------------------------------------------------------------------------- as a whole


def put_together(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an adapter, whole in each process; a collective where they are sharded.

    Raises StateError (E462) for what this process has a part of that cannot be completed.
    """
    _check_shapes(adapter)
    return {name: whole(tensor) for name, tensor in tensors.items()}


def settle(model: nn.Module, adapter: Adapter) -> None:
    """Let what ran whole be sharded again, so that what is read is whole and what is written stays.

    Raises StateError (E462) where a module above the model keeps it whole.
    """
    put_apart(model)
    if any(_managed(adapter.sites)) and mesh_of(model) is None:
        refuse(
            "E462",
            f"what shards `{adapter.name}` has it whole now, or is not known here",
            hint="reshard() the module that fully_shard was applied to",
        )


def _check_shapes(adapter: Adapter) -> None:
    report = Report()
    for site in adapter.sites:
        for p in (p for p in site.form.parameters if not p.shared):
            found = [*parameter_of(site.site.module, site.holders, p.name).shape]
            wanted = [*site.form.stored[p.name]]
            if found != wanted:
                report.error(
                    "E462",
                    f"`{site.adapted(p.name)}` has shape {found} in this process, and is {wanted} "
                    "as a whole",
                    hint="whatever shards it must gather it first; use fully_shard, of which the "
                    "parts are gathered here",
                )
    report.stop()


def on_first(model: nn.Module, run: Callable[[], T]) -> T:
    """What the first process of those that a sharded model is spread over makes, for all of them.

    Each of them must call it. What the first raises, all raise. Of a model that is not sharded,
    every process makes it for itself.
    """
    mesh = mesh_of(model)
    if mesh is None:
        return run()
    told: list[object] = [None, None]
    if not any(mesh.get_coordinate() or ()):
        try:
            told[0] = run()
        except SurgeryError as error:
            told[1] = error.diagnostics
        except Exception as error:
            _told(mesh, [None, f"{type(error).__name__}: {error}"])
            raise
    made, wrong = _told(mesh, told)
    if isinstance(wrong, str):
        refuse("E513", f"the first process failed: {wrong}", hint="see what it says itself")
    if wrong is not None:
        raise error_of(cast(Any, wrong))
    return cast(T, made)


def _told(mesh: Mesh, what: list[object]) -> list[object]:
    """What the first process of a mesh tells all others, along one dimension after the other."""
    from torch.distributed import broadcast_object_list, get_global_rank

    for dimension in range(mesh.ndim):
        group = mesh.get_group(dimension)
        broadcast_object_list(what, src=get_global_rank(group, 0), group=group)
    return what
