"""What one thread has live on a model in place of its default: for a batch, or by sample."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from surgery.errors import Report, SurgeryError, refuse
from surgery.live import Live
from surgery.mixture import live_sites
from surgery.model.layers import kind_of
from surgery.plan import PlannedSite
from surgery.state import State
from surgery.switch import Routed, Switch
from surgery.switching import live_of, prepare


@contextmanager
def using(model: nn.Module, state: State, expression: str | None) -> Generator[None]:
    """Let something be live in this thread; see `Compiled.using`."""
    _check_state(model, state)
    live = live_of(expression, state)
    uses = (prepare(model, state, live),)
    with state.switch.chosen(str(live), uses):
        yield


@contextmanager
def route(model: nn.Module, state: State, samples: Sequence[str | None]) -> Generator[None]:
    """Let each sample of a batch have its own live adapters; see `Compiled.route`."""
    _check_state(model, state)
    if isinstance(samples, str) or not samples:
        refuse("E434", "no sample is routed", hint="give a list: a name, or None, for each sample")
    lives = _read(samples, state)
    every = {str(live): live for live in lives}
    report = Report()
    for live in every.values():
        for site in live_sites(live, state.plans):
            _check_site(site, report)
    report.stop()
    uses = tuple(prepare(model, state, live) for live in every.values())
    routed = Routed(tuple(map(str, lives)))
    _follow_generation(model, state.switch)
    with state.switch.chosen(routed, uses):
        yield


def _read(samples: Sequence[str | None], state: State) -> list[Live]:
    """What each sample is to have, each text read once. Raises all that is wrong with any."""
    known: dict[str | None, Live] = {}
    report = Report()
    for expression in dict.fromkeys(samples):
        try:
            known[expression] = live_of(expression, state)
        except SurgeryError as error:
            report.extend(error.diagnostics)
    report.stop()
    return [known[expression] for expression in samples]


def _check_state(model: nn.Module, state: State) -> None:
    if state.is_merged:
        refuse("E402", f"`{state.live}` is merged", hint="unmerge() first")
    if isinstance(model, fx.GraphModule):
        refuse(
            "E433",
            "a model that is one graph runs the same for all threads and samples",
            hint="activate() what is to be live, or compile the model that the graph was made of",
        )


def _check_site(site: PlannedSite, report: Report) -> None:
    """E435 where samples cannot be told apart."""
    reason = ""
    if site.site.batch is not None:
        reason = "its matrices are chosen token by token"
    elif site.form.mode == "value":
        reason = "it is read by a forward of its owner's, which is not called sample by sample"
    elif any(kind_of(follower) is None for follower in site.site.followers):
        reason = "a layer that shares its weight is not called sample by sample"
    if reason:
        report.error(
            "E435",
            f"`{site.path}` cannot be routed: {reason}",
            site.span,
            label=f"this is `{site.adapter}`",
            hint="leave such sites out of adapters that are routed, or run batches of one adapter",
        )


# ------------------------------------------------------------------------------------ generate


_EXPANDS, _GENERATES = "_expand_inputs_for_generation", "generate"


@dataclass(frozen=True, slots=True)
class _Following:
    """A method of a model, in whose call a routed batch may come to have several rows a sample.

    It is on the instance, and goes by the class, so that copies and pickles have it too.
    """

    model: nn.Module
    switch: Switch
    method: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own method, followed."""
        run: Callable[..., Any] = getattr(type(self.model), self.method)
        before = self.switch.own
        if not isinstance(before, Routed):
            return run(self.model, *args, **kwargs)
        if self.method == _EXPANDS:
            self.switch.choose(before.repeated(kwargs.get("expand_size", 1)))
            return run(self.model, *args, **kwargs)
        with self.switch.chosen(before):  # what it is expanded to ends with it
            return run(self.model, *args, **kwargs)


def _follow_generation(model: nn.Module, switch: Switch) -> None:
    """Let beams and returned sequences of a sample have the adapters of the sample."""
    if all(hasattr(type(model), name) for name in (_EXPANDS, _GENERATES)):
        for name in (_EXPANDS, _GENERATES):
            vars(model).setdefault(name, _Following(model, switch, name))


def unfollow(model: nn.Module) -> None:
    """Take back what a route left on a model."""
    for name in (_EXPANDS, _GENERATES):
        if isinstance(vars(model).get(name), _Following):
            del vars(model)[name]
