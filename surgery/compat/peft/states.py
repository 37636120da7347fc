"""The tensors of an adapter by the keys that peft's files have for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

import surgery
from surgery.artifact import TENSORS
from surgery.compat.peft.config import PeftConfig
from surgery.compat.peft.folders import folder_of
from surgery.compat.peft.putting import configs_of, known, refuse_option
from surgery.compat.peft.status import LayerStatus, ModelStatus, layer_status, model_status
from surgery.compat.peft.tuner import BaseTuner
from surgery.errors import Report
from surgery.mapping import StateDictMapping, mapping_of
from surgery.mapping.config import PEFT, saying
from surgery.mapping.keys import ADAPTED
from surgery.mapping.pieces import pieces_of
from surgery.mapping.spelling import dialect_of
from surgery.state import require_state
from surgery.store import read_tensors

_WRAPPED = dialect_of(PEFT).site
_BY = ("peft_type", "save_projection")  # the fields by which methods have several formats


class LoadResult(NamedTuple):
    """What a state dict did not have of an adapter, and what it had besides."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def inner_of(model: nn.Module) -> nn.Module:
    """The model within the wrapper, or as it is."""
    inside = vars(model).get("_modules", {}).get("base_model")
    return inside.model if isinstance(inside, BaseTuner) else model


def chosen_by(config: PeftConfig | None) -> dict[str, object]:
    """The fields of a config that say which of a method's formats is meant."""
    if config is None:
        return {}
    values = config.plain()
    # Only where it is false is another format meant.
    return {n: values[n] for n in _BY if n in values and values[n] is not True}


def mapping_for(model: nn.Module, name: str) -> StateDictMapping:
    """The names of an adapter's tensors, in the format that its config means."""
    plan = require_state(model).adapters[name].plan
    fields = chosen_by(configs_of(model).get(name))
    methods = {s.form.method.name for s in plan.sites if not s.site.at.tensor}
    formats = plan.resolved.library.formats
    if fields and methods:
        formats = saying(formats, PEFT, fields)
    return mapping_of(plan, formats=formats).of_adapter(name)


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """The tensors of an adapter by peft's keys, as a file has them.

    state_dict: of the model, to take them from. The keys of a model without the wrapper do not
    begin with `base_model.model.`. Raises StateError (E401, E411), ArtifactError (E518).
    """
    if unwrap_compiled:
        model = cast(nn.Module, getattr(model, "_orig_mod", model))
    if save_embedding_layers is True:
        refuse_option("save_embedding_layers", True, "name them in `modules_to_save`")
    inner = inner_of(model)
    known(inner, (adapter_name,))
    own = surgery.of(inner).parameters(adapter_name)
    if state_dict is not None:
        given = {key.removeprefix(_WRAPPED): value for key, value in state_dict.items()}
        own = {key: given[key] for key in own if key in given}
    found = mapping_for(inner, adapter_name).rename(own, ADAPTED, PEFT)
    return found if inner is not model else {_bare(key): t for key, t in found.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Give an adapter the tensors of a state dict by peft's keys, in place.

    low_cpu_mem_usage: has no effect, since nothing is allocated twice. Raises, with nothing
    changed: StateError (E401, E411), ArtifactError (E563) for tensors of another shape.
    """
    del low_cpu_mem_usage
    if ignore_mismatched_sizes:
        refuse_option("ignore_mismatched_sizes", True, "leave such tensors out of the state dict")
    inner = inner_of(model)
    known(inner, (adapter_name,))
    mapping = mapping_for(inner, adapter_name)
    index = mapping.index(PEFT)
    plain = inner is model
    keys = {_bare(key) if plain else key: key for key in _keys_of(index)}
    given = {keys[key]: value for key, value in peft_model_state_dict.items() if key in keys}
    report = Report()
    for key in sorted(given.keys() & index.keys()):
        shape, wanted = tuple(given[key].shape), index[key].file_shape(PEFT)
        if shape != wanted:
            message = f"`{key}` has shape {list(shape)}, not {list(wanted)}"
            hint = "it is of an adapter with another config; load that one under a name of its own"
            report.error("E563", message, hint=hint)
    report.stop()
    tensors = mapping.rename(given, PEFT, ADAPTED)
    own = surgery.of(inner).parameters(adapter_name)
    with torch.no_grad():
        for name in own.keys() & tensors.keys():
            own[name].copy_(tensors[name])
    missing = [key for key, row in index.items() if row.adapted not in tensors]
    rest = [key for key in peft_model_state_dict if key not in keys]
    return LoadResult(missing, rest)


def _keys_of(index: Iterable[str]) -> Iterator[str]:
    """The keys that a file may have, of tensors that stand there in pieces too."""
    for key in index:
        pieces = pieces_of(key)
        yield from (key,) if pieces is None else pieces.keys


def _bare(key: str) -> str:
    """A key as it is where no wrapper stands around the model."""
    return key.removeprefix(_WRAPPED).removeprefix(dialect_of(PEFT).root)


def load_peft_weights(
    model_id: str | Path, device: str | torch.device | None = None, **options: Any
) -> dict[str, Tensor]:
    """The tensors of an adapter's folder, or of one on the hub, by the keys of its file.

    device: where they are put, by default in memory. options: of the hub, and `subfolder`. Raises
    ArtifactError (E504, E511, E512).
    """
    folder = folder_of(model_id, options.pop("subfolder", None), options)
    file = read_tensors(folder / TENSORS)
    return {key: file[key].to(device or "cpu") for key in file.shapes}


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """Every site of a model, wrapped or not. Raises StateError (E401)."""
    return layer_status(inner_of(model))


def get_model_status(model: nn.Module) -> ModelStatus:
    """The adapters of a model, wrapped or not. Raises StateError (E401)."""
    return model_status(inner_of(model))
