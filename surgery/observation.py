"""What data shows of the sites of a plan, for beginnings that read it.

The model runs over the batches once, as it is without adapters and in evaluation mode; of each site
there is kept what does not grow with the data. Afterwards the model is what it was.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from surgery.algebra.observed import seen_by
from surgery.errors import Report, refuse
from surgery.model.holder import parameters_of
from surgery.model.hooked import execution_device
from surgery.model.storage import matrix_of
from surgery.planned import PlannedSite

Progress = Callable[[int, "int | None"], None]
"""Called after each batch with how many there were, and how many there are, where that is known."""

Loss = Callable[[nn.Module, Any], Tensor]
"""The loss of a model on a batch."""

Seen = Mapping[tuple[str, str], Mapping[str, Tensor]]
"""By adapter and path of a site, what data shows of it by name."""

_GRADIENT = "gradient"
_random: Any = torch.random  # its functions carry no types


@dataclass(frozen=True, slots=True)
class Data:
    """Batches, and what to do with them.

    batches: each is what the model is called with: a dict of named arguments, a tuple or a list of
        positional ones, or one alone. loss: of a batch; None for what the model's output has as
        `loss`. progress: called after each batch.
    """

    batches: Iterable[Any]
    loss: Loss | None = None
    progress: Progress | None = None


def needs(site: PlannedSite) -> frozenset[str]:
    """The names of what data must show for a site to begin."""
    return seen_by(site.form.derived.equations)


def is_meta(site: PlannedSite) -> bool:
    """Whether a site's weights have no data yet."""
    return execution_device(site.site.module).type == "meta"


def check_data(sites: Iterable[PlannedSite], data: Data | None) -> None:
    """Whether there is data where a site needs it (E421), of a kind that can show it (E422).

    Where weights are on meta, nothing begins yet, and data can still be missing.
    """
    report = Report()
    for site in _one_a_class(s for s in sites if needs(s)):
        if data is None and is_meta(site):
            continue
        names = ", ".join(f"{n}({'W' if n == _GRADIENT else 'x'})" for n in sorted(needs(site)))
        if data is None:
            report.error(
                "E421",
                f"{site.form.named} begins with {names}, which only data shows",
                site.span,
                hint="pass batches: `surgery.compile(spec, model, data=loader)`",
            )
            continue
        reason = _blind(site)
        if reason:
            report.error(
                "E422",
                f"{names} cannot be seen at `{site.path}`: {reason}",
                site.span,
                hint="exclude such sites with `except`, or begin them otherwise",
            )
    report.stop()


def _one_a_class(sites: Iterable[PlannedSite]) -> Iterator[PlannedSite]:
    yield from {id(s.form): s for s in reversed([*sites])}.values()


def _blind(site: PlannedSite) -> str:
    """Why data shows nothing of a site, or ""."""
    if is_meta(site):
        return "its weights are on the meta device"
    if not needs(site) - {_GRADIENT}:
        return ""
    if site.form.kind.input == "indices":
        return "its input is the numbers of rows, and no vectors"
    if site.form.mode == "value":
        return "its weight is read by another module, and what it is applied to is not known"
    return ""


def observe(model: nn.Module, sites: Sequence[PlannedSite], data: Data) -> Seen:
    """What the batches show of each site that needs it; the model runs what is live on it.

    Raises StateError (E422) where they show nothing: there is no batch, no loss, or a layer that is
    never called.
    """
    watched = [_watch(site) for site in sites if needs(site)]
    weights = _weights(watched)
    with _undisturbed(model, weights), _hooks(watched):
        for count, batch in enumerate(data.batches, 1):
            _run(model, batch, data.loss, watched, weights)
            if data.progress is not None:
                data.progress(count, _length(data.batches))
    return {(w.site.adapter, w.site.path): w.shown() for w in watched}


def _length(batches: Iterable[object]) -> int | None:
    return len(batches) if isinstance(batches, Sized) else None


# ---------------------------------------------------------------------------------- the batches


def _run(
    model: nn.Module,
    batch: object,
    loss: Loss | None,
    watched: Sequence[_Watched],
    weights: Sequence[nn.Parameter],
) -> None:
    masks = _masks(batch)
    for one in watched:
        one.masks = masks
    if not weights:
        with torch.no_grad():
            called(model, batch)
        return
    with torch.enable_grad():
        value = _loss(model, batch) if loss is None else loss(model, batch)
    if not value.requires_grad:
        return  # none of the weights has a part in it
    gradients = torch.autograd.grad(value, weights, allow_unused=True)
    by_weight = {id(w): g for w, g in zip(weights, gradients, strict=True)}
    for one in watched:
        one.add_gradient(by_weight)


def called(model: nn.Module, batch: object) -> object:
    """The model's output for a batch."""
    match batch:
        case dict() | Mapping():
            return model(**cast("dict[str, Any]", batch))
        case tuple() | list():
            return model(*cast("Sequence[Any]", batch))
        case _:
            return model(batch)


def _loss(model: nn.Module, batch: object) -> Tensor:
    value = getattr(called(model, batch), "loss", None)
    if not isinstance(value, Tensor):
        _refuse("the model's output has no loss", "give batches labels, or pass `loss=`")
    return value


def _refuse(message: str, hint: str) -> NoReturn:
    refuse("E422", message, hint=hint)


def _masks(batch: object) -> Mapping[tuple[int, ...], Tensor]:
    """Of a batch with named arguments, which tokens count, by the shape of the tokens.

    No padding does, and where there are labels no token that has none.
    """
    masks: dict[tuple[int, ...], Tensor] = {}
    named = cast("Mapping[str, object]", batch if isinstance(batch, Mapping) else {})
    for name, absent in (("attention_mask", 0), ("labels", -100)):
        found = named.get(name)
        if isinstance(found, Tensor) and found.dim() == 2:
            shape, mask = tuple(found.shape), found != absent
            masks[shape] = masks[shape] & mask if shape in masks else mask
    return masks


# ------------------------------------------------------------------------------------- one site


@dataclass(slots=True)
class _Watched:
    """A site, and what was seen of it so far, in float64.

    mean [in], comoment, moment [in, in], gradient [out, in] or a batch of such.
    """

    site: PlannedSite
    weight: nn.Parameter
    masks: Mapping[tuple[int, ...], Tensor] = field(default_factory=dict[tuple[int, ...], Tensor])
    inputs: int = 0
    calls: int = 0
    batches: int = 0
    mean: Tensor | None = None
    sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def called(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A hook before the layer's own forward."""
        del module
        x = args[0] if args else named[self.site.form.kind.argument]
        with torch.no_grad():
            self.add_inputs(self._rows(x.detach()))

    def add_inputs(self, x: Tensor) -> None:
        """Inputs [n, in] of one call."""
        if not len(x):
            return
        self.calls += 1
        if "moment" in needs(self.site):
            scaled = x / x.max().abs()
            self._add("moment", scaled.mT @ scaled)
        if "comoment" in needs(self.site):
            self._add_deviations(x)
        self.inputs += len(x)

    def _add_deviations(self, x: Tensor) -> None:
        mean = x.mean(0)
        apart = x - mean
        self._add("comoment", apart.mT @ apart)
        if self.mean is None:
            self.mean = mean
            return
        share = len(x) / (self.inputs + len(x))
        moved = mean - self.mean
        self._add("comoment", torch.outer(moved, moved) * (self.inputs * share))
        self.mean = self.mean + share * moved

    def add_gradient(self, gradients: Mapping[int, Tensor | None]) -> None:
        """The gradient of one batch, by the identity of weights."""
        found = gradients.get(id(self.weight))
        if found is not None:
            self.batches += 1
            self._add(_GRADIENT, matrix_of(self.site.form.kind, self.site.site.at, found).double())

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _rows(self, x: Tensor) -> Tensor:
        """The inputs [n, in] of which W is a matrix, without those that do not count."""
        form = self.site.form
        if form.kind.input == "patches":
            one = torch.eye(form.sizes.fan_in, dtype=torch.float64, device=x.device)
            x = form.kind.apply(one, x.double(), form.sizes, form.geometry, False)
        elif tuple(x.shape[:2]) in self.masks:
            x = x[self.masks[tuple(x.shape[:2])].to(x.device)]
        return x.reshape(-1, form.sizes.fan_in).double()

    def shown(self) -> Mapping[str, Tensor]:
        """What was seen, by name. Raises StateError (E422) where it is nothing, or no number."""
        counts = {"comoment": 1, "moment": self.calls, _GRADIENT: self.batches}
        for name in sorted(needs(self.site)):
            if name not in self.sums:
                self._refuse_unseen(name)
            if not bool(torch.isfinite(self.sums[name]).all()):
                message = f"the {name} that the data shows at `{self.site.path}` is not finite"
                _refuse(message, "look for inputs that are infinite, or no number")
        return {name: self.sums[name] / counts[name] for name in needs(self.site)}

    def _refuse_unseen(self, name: str) -> NoReturn:
        what = "no gradient reaches it" if name == _GRADIENT else "its layer is never called"
        message = f"the data shows no {name} at `{self.site.path}`: {what}"
        _refuse(message, "pass at least one batch that goes through it")


def _watch(site: PlannedSite) -> _Watched:
    weight = parameters_of(site.site.module)[site.site.at.parameter]
    assert weight is not None  # it is a site by its weight
    if site.form.kind.packed and _GRADIENT in needs(site):
        message = f"the data shows no {_GRADIENT} at `{site.path}`: its weight is quantised"
        _refuse(message, "observe the base before it is quantised, and attach the adapter to this")
    return _Watched(site, weight)


def _weights(watched: Iterable[_Watched]) -> list[nn.Parameter]:
    """The weights of which gradients are needed, each once."""
    found = (w.weight for w in watched if _GRADIENT in needs(w.site))
    return [*{id(weight): weight for weight in found}.values()]


# ------------------------------------------------------------------------- as the model was before


@contextmanager
def _hooks(watched: Iterable[_Watched]) -> Generator[None]:
    inputs = [w for w in watched if needs(w.site) - {_GRADIENT}]
    handles = [
        w.site.site.module.register_forward_pre_hook(w.called, with_kwargs=True) for w in inputs
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _undisturbed(model: nn.Module, weights: Sequence[nn.Parameter]) -> Generator[None]:
    """Evaluation mode, gradients for some weights alone; modes, flags, generators come back."""
    modes = {module: module.training for module in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    devices = sorted({p.device.index or 0 for p in flags if p.device.type == "cuda"})
    drawn = random.getstate()
    with _random.fork_rng(devices=devices):
        try:
            model.eval()
            for parameter in flags:
                parameter.requires_grad_(False)
            for weight in weights:
                weight.requires_grad_(True)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            random.setstate(drawn)


__all__ = ["Data", "Loss", "Progress", "Seen", "check_data", "needs", "observe"]
