"""Which trained parameters a backward pass reaches: the net below all other checks of a mount.

A site may be adapted and yet be dead: a module that its owner never calls, a kernel that reads the
base's weight by itself, a detached output. No forward shows it, and training changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from surgery.algebra.equations import Parameter
from surgery.algebra.expr import Expr
from surgery.located import shared_tensor_of
from surgery.mount import parameter_of
from surgery.planned import PlannedSite
from surgery.runtime import Compiled
from surgery.state import Adapter, require_state

Outputs = Callable[[nn.Module], Iterable[Tensor]]


@dataclass(frozen=True, slots=True)
class WithoutGradient:
    """Trained parameters of one site that no gradient reached, and the reason as far as known."""

    adapter: str
    path: str
    parameters: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        """What was not reached, and why."""
        return f"{self.path} ({', '.join(self.parameters)}): {self.reason}"


def without_gradient(compiled: Compiled, run: Outputs) -> tuple[WithoutGradient, ...]:
    """One backward pass an adapter; every site some of whose trained parameters it did not reach.

    run: calls the model on some input and gives its output's tensors. A gradient of zeros is one.
    No `.grad` is written, and the adapter that was live is live afterwards.
    """
    live = compiled.live
    found: list[WithoutGradient] = []
    for adapter in require_state(compiled.model).adapters.values():
        if compiled.live != adapter.name:
            compiled.activate(adapter.name)
        found += _unreached(compiled.model, adapter, run)
    if compiled.live != live:
        compiled.activate(live)
    return tuple(found)


def _unreached(model: nn.Module, adapter: Adapter, run: Outputs) -> Iterator[WithoutGradient]:
    modules = {id(site.site.module): site.site.module for site in adapter.sites}
    with _calls(modules) as called, torch.enable_grad():
        outputs = [t for t in run(model) if t.requires_grad]
    trained = {
        (site.path, p.name): _tensor(model, adapter, site, p)
        for site in adapter.sites
        for p in site.form.parameters
        if p.trained
    }
    reached, failure = _reached(outputs, list(trained.values()))
    for site in adapter.sites:
        names = [p.name for p in site.form.parameters if p.trained]
        dead = [n for n in names if id(trained[site.path, n]) not in reached]
        # A graph calls few modules; what it does not use at all, nothing of it reaches.
        seen = isinstance(model, fx.GraphModule) or id(site.site.module) in called
        here = failure if seen else _NOT_CALLED
        reasons = {n: here if n in _used(site) else _NOT_USED for n in dead}
        for reason in dict.fromkeys(reasons.values()):
            some = tuple(n for n in dead if reasons[n] == reason)
            yield WithoutGradient(adapter.name, site.path, some, reason)


@contextmanager
def _calls(modules: Mapping[int, nn.Module]) -> Generator[set[int]]:
    """The identities of those of the modules that are called inside."""
    called: set[int] = set()

    def note(module: nn.Module, _: object) -> None:
        called.add(id(module))

    handles: list[RemovableHandle] = []
    try:
        handles += [module.register_forward_pre_hook(note) for module in modules.values()]
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _tensor(model: nn.Module, adapter: Adapter, site: PlannedSite, p: Parameter) -> Tensor:
    if not p.shared:
        return parameter_of(site.site.module, site.holders, p.name)
    return shared_tensor_of(model, adapter.plan, site, p)


def _reached(outputs: list[Tensor], trained: list[Tensor]) -> tuple[set[int], str]:
    """The identities of the tensors that have a gradient, and why others have none."""
    wanted = [t for t in {id(t): t for t in trained}.values() if t.requires_grad]
    if not outputs or not wanted:
        return set(), _DETACHED if outputs else _NO_OUTPUT
    try:
        ones = [torch.ones_like(t) for t in outputs]
        found = torch.autograd.grad(outputs, wanted, ones, allow_unused=True)
    except RuntimeError as error:
        return set(), f"the backward pass failed: {str(error).strip().splitlines()[0]}"
    gradients = cast("tuple[Tensor | None, ...]", found)
    pairs = zip(wanted, gradients, strict=True)
    return {id(tensor) for tensor, gradient in pairs if gradient is not None}, _DETACHED


# ------------------------------------------------------------------------------------- reasons


_NOT_USED = "its equation does not use it, or only under stop_gradient"
_NOT_CALLED = "the model did not call this module on this input"
_NO_OUTPUT = "no output has a gradient; is it detached, or does `run` switch gradients off?"
_DETACHED = "what the module gives reaches no output of the model, or is detached on the way"


def _used(site: PlannedSite) -> set[str]:
    """The parameters through which a gradient flows at a site."""
    equations = site.form.derived.equations
    some = (equations.weight, equations.bias, equations.input, equations.output)
    return {name for expr in some if expr is not None for name in _parameters(expr)}


def _parameters(root: Expr) -> Iterator[str]:
    """The parameters in an expression through which a gradient flows."""
    seen, stack = {root}, [root]
    while stack:
        expr = stack.pop()
        if expr.op == "parameter":
            yield expr.text("name")
        below = () if expr.op == "stop_gradient" else expr.args
        stack += [a for a in below if a not in seen]
        seen.update(below)
