"""Which adapters of a model are in its bank, and letting others in while it is in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from weakref import ref

from torch import nn

from surgery.bank import Bank, ModuleBank, stack_of
from surgery.distributed import refuse_sharded
from surgery.errors import refuse
from surgery.families import Family, family_of
from surgery.live import single
from surgery.located import parameters_at
from surgery.model.holder import every_module
from surgery.model.hooked import execution_device
from surgery.mounted import runs_of
from surgery.plan import Plan, PlannedSite
from surgery.site_class import SiteClass
from surgery.state import Adapter, State
from surgery.switching import prepare


def reserve(
    model: nn.Module, state: State, rank: int, adapters: int, batch: int, terms: int
) -> Bank:
    """Declare a bank, and let the model's adapters in; see `Compiled.reserve`."""
    if min(rank, adapters, batch, terms) < 1:
        refuse("E445", "a bank has at least one of everything", hint="give numbers from 1 on")
    if state.is_merged:
        refuse("E402", f"`{state.live}` is merged", hint="unmerge() first")
    refuse_sharded(model, state, "stacked in a bank")
    if state.switch.own is not None:
        refuse("E445", "something is chosen in this thread", hint="reserve() outside of the `with`")
    bank = Bank(rank, adapters, batch, terms, next(model.parameters()).device)
    for adapter in state.adapters.values():
        admit(model, bank, adapter)
    for name in state.adapters:  # so that no class changes below a compiled graph
        prepare(model, state, single(name))
    state.switch.declare(bank)
    link(model, bank)
    return bank


def link(model: nn.Module, bank: Bank) -> None:
    """Let the mounted modules know their stacks."""
    for module in every_module(model):
        runs = runs_of(module)
        if runs is not None:
            runs.bank = bank.at(module)


def admit(model: nn.Module, bank: Bank, adapter: Adapter) -> None:
    """Let an adapter in, at all of its sites or at none; why not is noted."""
    number = bank.number_for(adapter.name)
    sites, families = [*adapter.sites], dict[SiteClass, Family | str]()
    if number is None:
        bank.left[adapter.name] = f"all {bank.adapters} numbers are taken"
        return
    for site in sites:
        if site.form not in families:
            families[site.form] = family_of(site.form, bank.rank)
        found = families[site.form]
        if site.site.followers or isinstance(found, str):
            reason = found if isinstance(found, str) else "its weight is shared with other layers"
            bank.left[adapter.name] = f"at `{site.path}` {reason}"
            return
    bank.numbers[adapter.name] = number
    for site in sites:
        family = families[site.form]
        assert isinstance(family, Family)
        _put(model, bank, adapter, site, family)


def admit_new(model: nn.Module, state: State, names: Iterable[str]) -> None:
    """Let adapters in that came since; nothing where no bank is declared."""
    bank = state.switch.bank
    if not isinstance(bank, Bank):
        return
    for name in names:
        admit(model, bank, state.adapters[name])
        prepare(model, state, single(name))
    link(model, bank)


def admit_again(model: nn.Module, bank: Bank, adapter: Adapter, before: Adapter) -> None:
    """Let another adapter have the number that one had, at sites where its family is."""
    number = bank.numbers[before.name]
    for site in before.sites:
        for stack in bank.stacks(site.site.module):
            stack.drop(before.name, number)
    for site in adapter.sites:
        _put(model, bank, adapter, site, None)


def strangers(bank: Bank, plan: Plan) -> Iterator[PlannedSite]:
    """The sites of a plan at which a bank has no stack for what it puts there."""
    for site in plan.sites:
        if bank.member_stack(site.site.module, site.form) is None:
            yield site


def _put(
    model: nn.Module, bank: Bank, adapter: Adapter, site: PlannedSite, family: Family | None
) -> None:
    """Let a site's parameters be parts of a stack, a new one of its family if there is none."""
    module = site.site.module
    found = bank.member_stack(module, site.form)
    if found is None and family is not None:
        own = bank.modules.setdefault(id(module), ModuleBank(site.site.owner))
        own.stacks.append(stack_of(family, bank.adapters, execution_device(module)))
        found = bank.member_stack(module, site.form)
    assert found is not None
    stack, numbers = found
    values = parameters_at(model, adapter.plan, site)
    parts = stack.put(adapter.name, bank.numbers[adapter.name], values, numbers)
    for name, part in parts.items():
        values[name].data = part  # the same parameter, which an optimizer may know
        bank.seen[adapter.name] = ref(values[name]), part
