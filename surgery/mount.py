"""Putting an adapter on a live model, and taking it off: the only place that changes a module.

A site's class becomes a cached subclass of its own, whose `forward` looks up the code of its site
graph; the adapter's parameters live in a child of the site. Nothing else of the module changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, fx, nn

from surgery.calls.positions import stacks_of
from surgery.lower import Lowerings
from surgery.model.holder import (
    ADAPTERS,
    SHARED,
    Holder,
    base_parameters,
    children_of,
    holder_of,
    link_name,
)
from surgery.model.hooked import swap_class
from surgery.model.layers import base_class
from surgery.model.stacked import restacked
from surgery.mounted import RUNS, Form, Runs, mounted_class, runs_of
from surgery.switch import Switch

# ------------------------------------------------------------------------------- mounting


def mount(module: nn.Module, keys: Lowerings, live: str, switch: Switch, path: str = "") -> None:
    """Let a module run some sites while something is live; their parameters must be in place."""
    base = base_class(module)
    runs = runs_of(module) or Runs(switch, base, path)
    runs.add(live, keys)
    if switch.frozen:
        runs.freeze(module, (live,))
    runs.bank = None if switch.bank is None else switch.bank.at(module)
    vars(module)[RUNS] = runs
    _let_be(module, runs)


def place(model: nn.Module, switch: Switch) -> None:
    """Let a model's calls say which tokens they bring, for the sites that are for some of them."""
    for module in stacks_of(model):
        base = base_class(module)
        runs = runs_of(module) or Runs(switch, base, "")
        runs.widen(Form(placed=True))
        vars(module)[RUNS] = runs
        _let_be(module, runs)


def unplace(model: nn.Module) -> None:
    """Undo `place`, where nothing else runs at such a module."""
    for module in stacks_of(model):
        runs = runs_of(module)
        if runs is not None and not runs.keys and runs.bank is None:
            dismount(module)


def _let_be(module: nn.Module, runs: Runs) -> None:
    """Let a module be of the class that its runs need."""
    cls = restacked(type(module), mounted_class(runs.base, runs.form))
    if type(module) is not cls:
        swap_class(module, cls)


def mount_all(
    model: nn.Module,
    modules: Sequence[tuple[nn.Module, Lowerings]],
    live: str,
    switch: Switch,
    paths: Mapping[int, str],
) -> None:
    """Let a model run some of its modules' sites; in its own graph, where it is one.

    live: the text of what they are. paths: of the modules, by their identity.
    """
    if isinstance(model, fx.GraphModule):
        from surgery.whole import run_with

        modules = run_with(model, modules)
    for module, keys in modules:
        mount(module, keys, live, switch, paths.get(id(module), ""))


def run_base(model: nn.Module) -> None:
    """Let a model that is one graph run it as it was; any other does what its modules do."""
    if isinstance(model, fx.GraphModule):
        from surgery.whole import run_base

        run_base(model)


def forget(module: nn.Module, live: str) -> None:
    """Undo `mount` of what runs while something is live."""
    runs = drop(module, live)
    if runs is None:
        return
    if (
        not runs.keys and runs.bank is None and not runs.form.placed
    ):  # of which a compiled graph may know the class
        dismount(module)


def drop(module: nn.Module, live: str) -> Runs | None:
    """The same with the module's class as it is, also where it has nothing to run any more."""
    runs = runs_of(module)
    if runs is not None:
        runs.drop(live)
    return runs


def dismount(module: nn.Module) -> None:
    """Let a module run its own forward again; its adapters stay in place."""
    vars(module).pop(RUNS, None)
    cls = restacked(type(module), base_class(module))
    if type(module) is not cls:
        swap_class(module, cls)


def give_back(model: nn.Module, keep: bool = False) -> None:
    """Let a model that has no adapter any more be what it was; `keep` what was merged."""
    if isinstance(model, fx.GraphModule):
        from surgery.whole import give_back

        give_back(model, keep)


def is_mounted(module: nn.Module) -> bool:
    """Whether the module runs a site graph."""
    return hasattr(type(module), "surgery_base")


# ------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True)
class Tensors:
    """The parameters of one adapter at one site: name to tensor, and which are trained."""

    values: Mapping[str, Tensor]
    trained: frozenset[str]


def add_holder(module: nn.Module, *names: str) -> Holder:
    """The holder of an adapter's parameters, `<module>.surgery.<name>…`; made if need be."""
    holder = holder_of(module)
    if holder is None:
        holder = Holder()
        holder.training = module.training
        module.add_module(ADAPTERS, holder)
    return holder_at(holder, *names)


def add_parameters(holder: Holder, tensors: Tensors) -> None:
    """Let a holder keep some parameters."""
    for name, value in tensors.values.items():
        holder.register_parameter(name, nn.Parameter(value, requires_grad=name in tensors.trained))


def holder_at(holder: nn.Module, *names: str) -> Holder:
    """The holder below a holder, made if need be."""
    for name in names:
        child = children_of(holder).get(name)
        if child is None:
            child = Holder()
            child.training = holder.training
            holder.add_module(name, child)
        holder = child
    return cast(Holder, holder)


def link_follower(follower: nn.Module, holders: Sequence[str], holder: Holder) -> None:
    """Let a layer that shares an adapted weight reach the adapter, without owning it.

    holders: the names of the holder from the site's module on.
    """
    vars(follower)[link_name(*holders)] = holder


def unlink_follower(follower: nn.Module, holders: Sequence[str]) -> Holder | None:
    """Take back what `link_follower` did; gives the holder, if it was done."""
    return vars(follower).pop(link_name(*holders), None)


def link_shared(child: Holder, bank: Holder) -> None:
    """Let a site reach the parameters it shares, without owning them a second time.

    The bank is a child of the root alone: as a plain attribute it is in no state dict twice, and
    copies and pickles keep it one object.
    """
    vars(child)[SHARED] = bank


def remove_parameters(module: nn.Module, adapter: str) -> None:
    """Take an adapter's parameters out, and the holder too once it is empty."""
    holder = holder_of(module)
    if holder is None:
        return
    children_of(holder).pop(adapter, None)
    if not children_of(holder):
        children_of(module).pop(ADAPTERS, None)


def parameter_of(module: nn.Module, holders: Sequence[str], name: str) -> nn.Parameter:
    """One parameter of an adapter at a site. KeyError if it has none of that name."""
    at: nn.Module | None = holder_of(module)
    for holder in holders:
        at = None if at is None else children_of(at)[holder]
    if at is None:
        raise KeyError(name)
    return cast("dict[str, nn.Parameter]", vars(at)["_parameters"])[name]


def set_requires_grad(model: nn.Module, flags: Mapping[str, bool]) -> None:
    """Set the flags of the base's parameters, by name."""
    for name, parameter in base_parameters(model).items():
        if name in flags:
            parameter.requires_grad_(flags[name])
