"""The verbs for adapters that models of transformers have, doing what they do there, without peft.

They lie on one model and not on its class. What they say of it is kept where everything else is, so
they and a handle of the model may be used side by side.
"""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn

import surgery
from surgery.adapters import check_name
from surgery.artifact import CONFIG
from surgery.check import DEFAULT_ADAPTER, Values
from surgery.compiling import SpecLike, read_spec
from surgery.errors import Report, Source, Span, refuse
from surgery.integrations.hub import Pushed, push_to_hub
from surgery.integrations.imported import read_config, spec_of
from surgery.integrations.pretrained import folder_of, save_base, save_pretrained
from surgery.language import syntax as ast
from surgery.language.parse import parse
from surgery.live import Live, single, unknown_adapter
from surgery.mapping import Reason, mapping_of, peft_config
from surgery.mapping.fields import ConfigFile
from surgery.mapping.keys import ADAPTED, NATIVE
from surgery.mapping.spelling import dialect_of
from surgery.observation import Loss
from surgery.runtime import Compiled
from surgery.state import require_state, state_of
from surgery.switching import chosen
from surgery.tensors import tensors_of
from surgery.trainable import set_trainable

NAMES = (
    "add_adapter",
    "load_adapter",
    "set_adapter",
    "enable_adapters",
    "disable_adapters",
    "delete_adapter",
    "active_adapters",
    "get_adapter_state_dict",
    "save_pretrained",
    "push_to_hub",
)
"""What `enable` puts on a model."""


@runtime_checkable
class _Config(Protocol):
    """A config of peft's, of whichever library."""

    def to_dict(self) -> Mapping[str, object]: ...


ConfigLike = SpecLike | _Config | Mapping[str, object]
"""A spec as everywhere; a config of peft's as an object, its fields, a file or its folder."""

Model = TypeVar("Model", bound=nn.Module)


def enable(model: Model) -> Model:
    """Put the verbs for adapters on a model: `model.add_adapter(…)`, `model.set_adapter(…)`, ….

    They take the place of transformers' own on this one model, whose class stays as it is. Copies
    and pickles of the model have them too. Gives the model. Raises StateError (E414) for one that
    has adapters of peft's on it.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        hint = "save them with save_pretrained, and load them again after this"
        refuse("E414", "the model has adapters of peft's on it", hint=hint)
    now = getattr(vars(model).get(NAMES[0]), "__self__", None)
    if not isinstance(now, Verbs):
        verbs = Verbs(model)
        vars(model).update({name: getattr(verbs, name) for name in NAMES})
    return model


class Verbs:
    """The verbs of one model. It is not kept alive by them."""

    def __init__(self, model: nn.Module) -> None:
        """For a model; the adapters may come later."""
        self._model = weakref.ref(model)
        self._aside: Live | None = None

    def __getstate__(self) -> tuple[nn.Module, Live | None]:
        """The model as it is, so that a copy has the copy."""
        return self.model, self._aside

    def __setstate__(self, state: tuple[nn.Module, Live | None]) -> None:
        """Belong to a copy of the model."""
        model, self._aside = state
        self._model = weakref.ref(model)

    @property
    def model(self) -> nn.Module:
        """The model. Raises ReferenceError once it is gone."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model of these verbs is gone; keep it in a variable")
        return model

    # ------------------------------------------------------------------------------- coming

    def add_adapter(
        self,
        adapter_config: ConfigLike,
        adapter_name: str | None = None,
        *,
        seed: int = 0,
        values: Values | None = None,
        dtype: torch.dtype | None = None,
        data: Iterable[Any] | None = None,
        loss: Loss | None = None,
    ) -> Compiled:
        """Put a new adapter on the model, and let it alone run and be trained.

        adapter_config: a spec, or a config of peft's, which is translated to one. adapter_name: by
        default as in the spec, else `default`. The others: as for `compile`. Where adapters are
        disabled they stay so. Raises what `compile` and `import_config` raise, and StateError
        (E443) for what is no name, or one name of several adapters; the model is then as it was.
        """
        model = self.model
        spec = named(self._spec(adapter_config), adapter_name)
        before, disabled = self._there, self._disabled
        compiled = surgery.compile(
            spec, model, seed=seed, values=values, dtype=dtype, data=data, loss=loss
        )
        state = require_state(model)
        said = any(isinstance(s, ast.Activate) for s in spec.statements)
        first = next(name for name in state.adapters if name not in before)
        self._choose(state.live if said else single(first), disabled)
        return compiled

    def load_adapter(
        self,
        peft_model_id: str | Path,
        adapter_name: str | None = None,
        *,
        is_trainable: bool = False,
        hotswap: bool = False,
        dtype: torch.dtype | None = None,
        force: bool = False,
    ) -> Compiled:
        """Put a saved adapter on the model, and let it alone run.

        peft_model_id: a folder, ours or peft's, or a hub id. adapter_name: by default as in the
        folder, which of peft's is `default`. is_trainable: else nothing of it is trained, and the
        model is put in evaluation mode. hotswap: give the adapter of this name, which is there
        already, the weights of the folder. dtype, force: as for `attach`. Raises what `attach` and
        `hotswap` raise.
        """
        model, folder = self.model, folder_of(peft_model_id)
        if hotswap:
            compiled = surgery.of(model)
            compiled.hotswap(adapter_name or DEFAULT_ADAPTER, folder)
            return compiled
        before, disabled = self._there, self._disabled
        compiled = surgery.attach(folder, model, dtype=dtype, force=force, name=adapter_name)
        (fresh,) = (name for name in compiled.adapters if name not in before)
        self._choose(single(fresh), disabled, trained=is_trainable)
        if not is_trainable:
            model.eval()
        return compiled

    # ----------------------------------------------------------------------------- choosing

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Let an adapter, or the sum of several, run and be trained, and no other.

        Where adapters are disabled, it is what runs once they are enabled. Raises StateError: E411
        for what is not there, E402 while one is merged; PlanError (E309) for adapters that cannot
        be live together.
        """
        names = self._known([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        if not names:
            hint = "disable_adapters() lets the base run alone"
            refuse("E411", "no adapter is named", hint=hint)
        self._choose(Live(tuple((1.0, name) for name in names)), self._disabled)

    def disable_adapters(self) -> None:
        """Let the base run alone, and train nothing, until `enable_adapters`."""
        state = require_state(self.model)
        if state.live:
            self._choose(state.live, disabled=True, trained=False)

    def enable_adapters(self) -> None:
        """Let run and be trained again what did before `disable_adapters`."""
        state = require_state(self.model)
        if self._aside is not None and not state.live:
            self._choose(self._aside, disabled=False)

    def active_adapters(self) -> list[str]:
        """The adapters that run, or that would if adapters were not disabled."""
        state = require_state(self.model)
        aside = self._aside or Live()
        return [*(state.live or aside).adapters]

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters off the model, active or not; with the last of them it is the base again.

        What of the active ones is left stays active; if that is nothing, the first of the others by
        name is, and a warning says so. Raises StateError: E411 with all that are not there, E402
        while one is merged.
        """
        model = self.model
        given = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        names = self._known(given)
        state, compiled = require_state(model), surgery.of(model)
        if state.is_merged:
            refuse("E402", f"`{state.live}` is merged", hint="unmerge() first")
        rest = sorted(state.adapters.keys() - set(names))
        if not rest:
            compiled.inverse.unload()
            self._aside = None
            return
        active, disabled = state.live or self._aside or Live(), self._disabled
        left = active.within(rest)
        if active and not left:
            left = single(rest[0])
            told = f"{', '.join(names)} was active; now {rest[0]} is"
            warnings.warn(told, UserWarning, stacklevel=2)
        if left != active:
            self._choose(left, disabled)
        for name in names:
            compiled.delete(name)

    # ------------------------------------------------------------------------------- saving

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """An adapter's tensors by the names that peft has for them below the model, if it has any.

        adapter_name: the active one by default. state_dict: of the model, to take them from.
        """
        model = self.model
        one = chosen(require_state(model), self._one(adapter_name))
        tensors = tensors_of(model, one)
        if state_dict is not None:
            tensors = {name: state_dict.get(name, tensor) for name, tensor in tensors.items()}
        found = peft_config(one.plan, one.name, model)
        form = NATIVE if isinstance(found, Reason) else found.format.name
        mapping = mapping_of(one.plan).of_adapter(one.name)
        prefix = dialect_of(form).site
        renamed = mapping.rename(tensors, ADAPTED, form)
        return {name.removeprefix(prefix): tensor for name, tensor in renamed.items()}

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: object,
    ) -> object:
        """Write the active adapter with the name of its base; without any, the model itself.

        state_dict, options: of transformers' own `save_pretrained`, for the model itself: an
        adapter is one file, of what it is now. Raises as `Compiled.save` does, and StateError
        (E416) where several are active.
        """
        model = self.model
        state = state_of(model)
        if state is None or state.is_merged:
            given = {"is_main_process": is_main_process, "state_dict": state_dict}
            return save_base(model, save_directory, **given, **options)
        return save_pretrained(model, save_directory, self._one(None)) if is_main_process else None

    def push_to_hub(self, repo_id: str, **options: Any) -> Pushed:
        """Send the active adapter with its card to the hub, as `models.push_to_hub` does."""
        return push_to_hub(self.model, repo_id, self._one(None), **options)

    # --------------------------------------------------------------------------- what is meant

    @property
    def _disabled(self) -> bool:
        """Whether adapters are there, and set aside."""
        state = state_of(self.model)
        return state is not None and self._aside is not None and not state.live

    def _choose(self, live: Live, disabled: bool, trained: bool = True) -> None:
        """Let something be what runs, now or once adapters are enabled again."""
        model = self.model
        Compiled(model).activate(None if disabled else str(live))
        self._aside = live if disabled else None
        set_trainable(model, live.adapters if trained else ())

    @property
    def _there(self) -> tuple[str, ...]:
        state = state_of(self.model)
        return () if state is None else tuple(state.adapters)

    def _known(self, names: Iterable[str]) -> list[str]:
        """Names that adapters have. Raises StateError (E411) with all that none has."""
        known, found = tuple(require_state(self.model).adapters), [*dict.fromkeys(names)]
        report = Report()
        report.extend(unknown_adapter(n, known, code="E411") for n in found if n not in known)
        report.stop()
        return found

    def _one(self, name: str | None) -> str:
        """The adapter that is meant: by name, else the one that is active (E416)."""
        if name is not None:
            return self._known([name])[0]
        first, *others = self.active_adapters() or [*require_state(self.model).adapters]
        if others:
            names = ", ".join(f"`{n}`" for n in (first, *others))
            refuse("E416", f"{names} are active", hint="set_adapter(name) to the one that is meant")
        return first

    def _spec(self, given: ConfigLike) -> ast.Spec:
        """The spec that a config is, or as it is."""
        if isinstance(given, Mapping | _Config):
            return parse(spec_of(config_of(given), self.model, begins=True))
        if isinstance(given, ast.Spec):
            return given
        path = Path(given) if len(str(given)) < _LONGEST else None
        if path is not None and (path.suffix == ".json" or (path / CONFIG).is_file()):
            return parse(spec_of(read_config(path), self.model, begins=True))
        return read_spec(given)


_LONGEST = 1024  # of a text that may be a path


def config_of(config: _Config | Mapping[str, object]) -> ConfigFile:
    """A config of peft's that is in no file."""
    values = config if isinstance(config, Mapping) else config.to_dict()
    text = json.dumps(dict(values), indent=2, default=_plain)
    return ConfigFile(
        cast("dict[str, object]", json.loads(text)), Span(Source("<config>", text), 0, 1)
    )


def _plain(value: object) -> object:
    match value:
        case Enum():
            return cast(object, value.value)
        case set() | frozenset():
            return sorted(map(str, cast("set[object]", value)))
        case _Config():
            return value.to_dict()
        case _:
            return str(value)


def named(spec: ast.Spec, name: str | None) -> ast.Spec:
    """A spec whose one adapter has another name.

    Raises StateError (E443) where it has several, and for what is no name.
    """
    if name is None:
        return spec
    check_name(name)
    plain = [s for s in spec.statements if isinstance(s, ast.Match | ast.Train)]
    blocks = [s for s in spec.statements if isinstance(s, ast.Adapter)]
    made = [s for s in spec.statements if isinstance(s, ast.Derived)]
    names = [DEFAULT_ADAPTER] * bool(plain) + [one.name for one in (*blocks, *made)]
    if len(set(names)) > 1:
        shown = ", ".join(f"`{n}`" for n in names)
        hint = "add each of them with a spec of its own, or leave them the names they have"
        refuse("E443", f"`{name}` cannot be the name of {shown}", hint=hint)
    body = (*plain, *(one for block in blocks for one in block.body))
    if not body and not made:
        return spec
    given = (ast.Match, ast.Train, ast.Adapter, ast.Derived)
    rest = tuple(s for s in spec.statements if not isinstance(s, given))
    if body:
        return ast.Spec((*rest, ast.Adapter(name, body, span=body[0].span)), span=spec.span)
    again = (ast.Derived(name, s.expression, s.way, span=s.span) for s in made)
    return ast.Spec((*rest, *again), span=spec.span)


__all__ = ["ConfigLike", "Verbs", "config_of", "enable", "named"]
