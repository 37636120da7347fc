"""Trying an adapter out on a model: does merged agree with forward, and does the base come back?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from surgery.algebra.beginnings import stream
from surgery.check import Values
from surgery.compiling import SpecLike, compile_model, target_of
from surgery.errors import refuse
from surgery.model.holder import under_adapters
from surgery.observation import Loss
from surgery.plan import Plan
from surgery.runtime import Compiled
from surgery.state import require_state, state_of

if TYPE_CHECKING:
    from surgery.compiling import Model
    from surgery.gradients import WithoutGradient
    from surgery.programs import Form

Run = Callable[[nn.Module], object]

_NUDGE = 0.02  # how far parameters are moved from where they begin, so that they do something
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Verification:
    """What was seen. Differences are the largest between two outputs, over all their elements.

    sites: how many were adapted.
    start: adapted against base before any training; 0 where the method begins as the identity.
    effect: adapted against base once the parameters were moved.
    forward_vs_merged: adapted against merged, at the same parameters.
    unmerge_exact, unload_exact: whether every bit of every base tensor came back.
    mergeable: whether there is a merged weight at every site; if not, `reason` says why.
    without_gradient: the sites with trained parameters that a backward pass did not reach.
    """

    sites: int
    start: float
    effect: float
    forward_vs_merged: float
    unmerge_exact: bool
    unload_exact: bool
    mergeable: bool = True
    reason: str = ""
    without_gradient: tuple[WithoutGradient, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the base came back, merged agrees with forward, and gradients reach all."""
        agrees = self.forward_vs_merged <= 1e-3 * max(1.0, self.effect)
        back = self.unmerge_exact and self.unload_exact
        return back and not self.without_gradient and (agrees or not self.mergeable)

    def as_json(self) -> dict[str, object]:
        """The findings as plain data."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        """The findings as sentences."""
        lines = [
            f"{self.sites} sites were adapted; at first the output moved by {self.start:.2g}.",
            f"With parameters moved, the adapter changes the output by up to {self.effect:.2g}.",
        ]
        if self.mergeable:
            lines.append(
                f"Merged into the weights it gives the same output to {self.forward_vs_merged:.2g}."
            )
            came = "came back to the bit" if self.unmerge_exact else "DID NOT COME BACK"
            lines.append(f"After unmerge the base weights {came}.")
        else:
            lines.append(f"It cannot be merged: {self.reason}.")
        lines += _told_gradients(self.without_gradient)
        came = "is the model it was, to the bit" if self.unload_exact else "IS NOT WHAT IT WAS"
        lines.append(f"After unload the model {came}.")
        return "\n".join(lines)


def _told_gradients(dead: tuple[WithoutGradient, ...]) -> Iterator[str]:
    if not dead:
        yield "A backward pass reaches every trained parameter."
        return
    yield f"A backward pass DOES NOT REACH trained parameters at {len(dead)} sites:"
    yield from (f"  {one}" for one in dead[:_SHOWN])
    if len(dead) > _SHOWN:
        yield f"  and {len(dead) - _SHOWN} more"


def verify(
    spec: SpecLike,
    model: Model,
    run: Run,
    *,
    seed: int = 0,
    values: Values | None = None,
    progress: Callable[[str], None] = lambda step: None,
    mode: Form | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Verification:
    """Compile a spec, move the parameters, go backward, merge, unmerge, merge again and unload.

    run: calls the model on some input and gives its output; it is called in evaluation mode,
        without gradients but for the backward pass. progress: told the name of each step. mode: as
        for `compile`; `run` is given the graph, where there is one. data, loss: as for `compile`.
    The model is as it was afterwards, whatever happens. Raises SurgeryError as `compile` does, and
    StateError (E414) for a model that is adapted already.
    """
    model = target_of(model, mode)
    if state_of(model) is not None:
        refuse("E414", "the model has adapters already", hint="unload() them, or verify a copy")
    before = _snapshot(model)
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        progress("base")
        base = _outputs(run, model)
        progress("compile")
        compiled = compile_model(spec, model, seed=seed, values=values, data=data, loss=loss)
        return _observed(compiled, run, base, before, seed, progress)
    finally:
        if state_of(model) is not None:
            Compiled(model).inverse.unload()
        for module, training in modes.items():
            module.training = training


def _observed(
    compiled: Compiled,
    run: Run,
    base: list[Tensor],
    before: Mapping[str, Tensor],
    seed: int,
    progress: Callable[[str], None],
) -> Verification:
    model, plan = compiled.model, compiled.plan
    progress("forward")
    start = _distance(base, _outputs(run, model))
    _nudge(compiled, seed)
    adapted = _outputs(run, model)
    progress("backward")
    dead = _without_gradient(compiled, run)
    reason = _obstacle(model)
    distance, unmerged = 0.0, True
    if not reason:
        progress("merge")
        compiled.inverse.merge()
        distance = _distance(adapted, _outputs(run, model))
        progress("unmerge")
        compiled.inverse.unmerge()
        unmerged = _same(before, _snapshot(model))
        compiled.inverse.merge()
    progress("unload")
    compiled.inverse.unload()
    return Verification(
        sites=_count(plan),
        start=start,
        effect=_distance(base, adapted),
        forward_vs_merged=distance,
        unmerge_exact=unmerged,
        unload_exact=_same(before, _snapshot(model)),
        mergeable=not reason,
        reason=reason,
        without_gradient=dead,
    )


def _obstacle(model: nn.Module) -> str:
    """Why what is live cannot be merged, or ""."""
    state = require_state(model)
    if not state.live:
        return "no adapter is live"
    return next((s.form.derived.reason for s in state.sites if not s.form.derived.merged), "")


def _without_gradient(compiled: Compiled, run: Run) -> tuple[WithoutGradient, ...]:
    from surgery.gradients import without_gradient

    return without_gradient(compiled, lambda model: tensors_in(run(model)))


def _count(plan: Plan) -> int:
    return len({site.path for site in plan.sites})


def _nudge(compiled: Compiled, seed: int) -> None:
    with torch.no_grad():
        for name, parameter in compiled.model.named_parameters():
            if under_adapters(name) and parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=stream(seed, "verify", name))
                parameter.add_(_NUDGE * noise.to(parameter.device, parameter.dtype))


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return {n: t.detach().clone() for n, t in named if not under_adapters(n)}


def _same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(_bits_equal(before[n], after[n]) for n in before)


def _bits_equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)


def _outputs(run: Run, model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [t.detach().double() for t in tensors_in(run(model)) if t.is_floating_point()]


def tensors_in(output: object) -> Iterator[Tensor]:
    """Every tensor of a model's output: a tensor, or tensors in tuples, lists and mappings."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in cast("Mapping[str, Any]", output).values():
            yield from tensors_in(value)
    elif isinstance(output, tuple | list):
        for value in cast("tuple[Any, ...]", output):
            yield from tensors_in(value)


def _distance(left: list[Tensor], right: list[Tensor]) -> float:
    pairs = zip(left, right, strict=True)
    return max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)
