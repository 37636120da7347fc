"""A config of peft's as an adapter on a model, by the same way as an `adapter_config.json`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

import surgery
from surgery.adapters import check_name
from surgery.compat.peft.config import PeftConfig, defaults_of, free_in
from surgery.errors import Report, SurgeryError, refuse
from surgery.integrations.imported import reading_of, spec_of
from surgery.integrations.peft import INFORMATIVE
from surgery.integrations.peft_modules import of_copies
from surgery.integrations.peft_tokens import of_rows
from surgery.language import syntax as ast
from surgery.language.parse import parse
from surgery.live import unknown_adapter
from surgery.low_rank import obstacle, read_of
from surgery.mapping.fields import ConfigFile
from surgery.mapping.forms import Anything, fields_of, form_of, same, shown
from surgery.runtime import Compiled
from surgery.state import require_state, state_of
from surgery.trainable import require_gradients

_OTHER_BASE = "E522"
_CONFIGS = "peft_config"


def configs_of(model: nn.Module) -> dict[str, PeftConfig]:
    """The configs of a model's adapters by name; kept on it, as peft does."""
    return vars(model).setdefault(_CONFIGS, {})


def forget_configs(model: nn.Module) -> None:
    """The model is as if it had never had any."""
    vars(model).pop(_CONFIGS, None)


def put_on(model: nn.Module, config: PeftConfig, name: str, *, autocast: bool = True) -> Compiled:
    """Put a new adapter on a model as a config says; it is live if it is the first.

    autocast: let its parameters be float32 on a base of 16 bits; else they are as the base. The
    random beginnings follow from `torch.initial_seed()`. Raises ArtifactError: E515 and E516 for
    the config, E561 for a field that cannot be followed; StateError (E412, E443) for the name;
    PlanError. The model is left as it was.
    """
    check_name(name)
    spec = spec_for(config, model, name)
    seed = torch.initial_seed() % 2**31
    compiled = surgery.compile(spec, model, seed=seed, dtype=None if autocast else _dtype(model))
    set_trained(model, (name,), not config.inference_mode)
    return compiled


def load_on(model: nn.Module, folder: Path, name: str, *, autocast: bool = True) -> Compiled:
    """Put a saved adapter on a model; one that was made on another base is, with a warning.

    Raises as `surgery.attach` does, but for E522.
    """
    dtype = None if autocast else _dtype(model)
    try:
        return surgery.attach(folder, model, name=name, dtype=dtype)
    except SurgeryError as error:
        if any(found.code != _OTHER_BASE for found in error.diagnostics):
            raise
        warnings.warn(str(error), stacklevel=3)
    return surgery.attach(folder, model, name=name, dtype=dtype, force=True)


def spec_for(config: PeftConfig, model: nn.Module | None, name: str) -> ast.Spec:
    """The spec that a config is, as one adapter of a name. Raises ArtifactError, as `put_on`."""
    file = config.as_file()
    _check_followed(config, file, no_model=model is None)
    spec = parse(spec_of(file, model, begins=True), f"<{type(config).__name__}>")
    body = tuple(s for s in spec.statements if isinstance(s, ast.Match | ast.Train))
    adapter = ast.Adapter(name, body, span=spec.span)
    return ast.Spec((adapter,), span=spec.span)


def _check_followed(config: PeftConfig, file: ConfigFile, *, no_model: bool) -> None:
    """E561 for fields that would be passed over, and that would change something in peft."""
    if of_copies(file) or of_rows(file):
        return
    reading = reading_of(file, no_model, begins=True)
    defaults, free = defaults_of(config.kind), free_in(config.kind)
    passed = {*reading.others, *_without_meaning(reading.fmt, file, defaults)}
    report = Report()
    for field in sorted(passed - free):
        usual = defaults.get(field)
        if same(file.get(field), usual):
            continue
        message = f"`{field}` is {shown(file.get(field))}, which is not followed here"
        hint = f"leave it at {shown(usual)}; a trained adapter is loaded whatever it says"
        report.error("E561", message, file.span(field), hint=hint)
    report.stop()


def _without_meaning(
    fmt: ast.Format, file: ConfigFile, defaults: Mapping[str, object]
) -> Iterator[str]:
    """The fields that have no meaning here, and have another value than peft gives them."""
    for item in fields_of(fmt):
        form = form_of(item)
        if not isinstance(form, Anything) or item.name in INFORMATIVE or item.name not in file:
            continue
        usual = defaults.get(item.name, form.value)
        value = file.get(item.name)
        if not (same(value, usual) or value is None):
            yield item.name


def _dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of a model whose parameters have one."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return next(iter(found)) if len(found) == 1 else None


# ----------------------------------------------------------------------------------- trained


def set_trained(model: nn.Module, names: Iterable[str], flag: bool = True) -> None:
    """Let adapters be trained, or not. Raises StateError (E401, E411)."""
    state, some = require_state(model), tuple(names)
    require_gradients(model, [state.adapters[name] for name in some], some if flag else ())


# --------------------------------------------------------------------------------- together


def together(model: nn.Module, names: Iterable[str]) -> str:
    """What is live where several adapters are: the sum of their changes.

    Raises ArtifactError (E562) where the change of one is made of a weight that another changes,
    of which there is more than one meaning.
    """
    state = state_of(model)
    wanted = tuple(dict.fromkeys(names))
    if state is None or len(wanted) < 2:
        return wanted[0] if wanted else ""
    report, seen = Report(), dict[str, str]()
    for name in wanted:
        for site in state.adapters[name].sites:
            first = seen.setdefault(site.path, name)
            if first == name:
                continue
            if site.site.at.tensor or obstacle(site.form) or read_of(site.form)[0]:
                message = f"`{first}` and `{name}` both change `{site.path}`, and not by a sum"
                hint = f'say what is meant: surgery.of(model).activate("{first} then {name}")'
                report.error("E562", message, hint=hint)
                break
    report.stop()
    return " + ".join(wanted)


def known(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Some names, each of an adapter on the model. Raises StateError (E411)."""
    there = tuple(require_state(model).adapters)
    report, found = Report(), tuple(names)
    report.extend(unknown_adapter(n, there, code="E411") for n in found if n not in there)
    report.stop()
    return found


def refuse_option(name: str, value: object, hint: str) -> None:
    """E561 for an option of a call that cannot be followed."""
    refuse("E561", f"`{name}` is {value!r}, which is not followed here", hint=hint)
