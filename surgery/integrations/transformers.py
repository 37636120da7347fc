"""Hugging Face models: how one is read, and small inputs to run it on.

A reference is a folder with a `config.json`, a hub id, or `python:package.module:factory`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError, refuse
from surgery.integrations.factories import PYTHON, given_by, said

# transformers leaves most of its signatures open, so its classes and configs are `Any` here.

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""What names a repository of the hub."""

_SUBFOLDERS = ("", "0_Transformer")
_INSTALL = "install the `models` extra: pip install 'model-surgery[models]'"


def load_model(reference: str, *, meta: bool = False, trust: bool = False) -> nn.Module:
    """The model, in evaluation mode.

    meta: build it on the meta device, from its config alone; no weights are read. A factory is
        called as it is.
    trust: allow `python:package.module:factory`, which runs code.

    Raises ArtifactError: E501 if the reference is nothing that can be read, E502 if the model or
    its weights cannot be, E503 if the factory fails, E504 if the hub does not answer, E505 if
    code would run without `trust`.

    >>> load_model("python:torch.nn:Identity", trust=True)
    Identity()
    """
    if reference.startswith(PYTHON):
        return _from_factory(reference, trust)
    # os.path, since a reference may be longer than a path can be.
    known = os.path.exists(reference)
    return _from_folder(_local(Path(reference)) if known else _from_hub(reference, meta), meta)


# ------------------------------------------------------------------------------ references


def _from_factory(reference: str, trust: bool) -> nn.Module:
    model = given_by(reference, "the model", trust=trust)
    if isinstance(model, nn.Module):
        return model.eval()
    refuse(
        "E503",
        f"`{reference}` gives a {type(model).__name__}, and not a torch.nn.Module",
        hint=_FACTORY_IS,
    )


def _local(path: Path) -> Path:
    """The folder with the config, which sentence-transformers may keep one level down."""
    if not path.is_dir():
        refuse("E501", f"`{path}` is a file", hint="give the folder that holds its config.json")
    for name in _SUBFOLDERS:
        if (path / name / "config.json").is_file():
            return path / name
    names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir())
    shown = ", ".join(names[:8]) + ", …" * (len(names) > 8)
    refuse(
        "E501",
        f"`{path}` has no config.json, so it is not a model folder",
        hint=f"it holds: {shown}" if names else "it is empty",
    )


def _from_hub(reference: str, meta: bool) -> Path:
    """A folder in the hub's cache with the model, or with its config alone."""
    wanted = ["config.json"] if meta else ["*.json", "*.safetensors"]
    return _local(snapshot(reference, wanted))


def snapshot(reference: str, wanted: Sequence[str]) -> Path:
    """A folder in the hub's cache with some files of a repository, by patterns of their names.

    Raises ArtifactError: E501 for what names none, E504 if the hub does not answer.
    """
    if not HUB_ID.fullmatch(reference):
        refuse("E501", f"`{reference}` does not exist", hint=_near_folder(reference))
    hub = _import("huggingface_hub")
    try:
        with _quiet():
            folder = cast(str, hub.snapshot_download(reference, allow_patterns=[*wanted]))
    except Exception as error:  # the hub's errors, those of its transport and of the file system
        refuse(
            "E504",
            f"`{reference}` is no folder here, and cannot be had from the hub: {said(error)}",
            hint=_near_folder(reference),
        )
    return Path(folder)


def _near_folder(reference: str) -> str:
    path = Path(reference)
    try:
        names = [p.name for p in path.parent.iterdir() if p.is_dir()]
    except OSError:
        names = []
    near = get_close_matches(path.name, names, 1)
    if near:
        return f"did you mean `{path.parent / near[0]}`?"
    return "give a folder with a config.json, or a hub id such as `owner/name`"


# ----------------------------------------------------------------------------------- models


def _from_folder(folder: Path, meta: bool) -> nn.Module:
    transformers = _import("transformers")
    try:
        with _quiet():
            return _build(transformers, folder, meta)
    except SurgeryError:
        raise
    except Exception as error:  # a damaged file may fail anywhere in the reader
        refuse(
            "E502",
            f"`{folder}` cannot be read as a model: {said(error)}",
            hint="what AutoModel.from_pretrained reads is read here; download or copy it again",
        )


def _build(transformers: Any, folder: Path, meta: bool) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    cls = _model_class(transformers, config, folder)
    if meta:
        with torch.device("meta"):
            return cast(nn.Module, cls._from_config(config).eval())
    model, loaded = cls.from_pretrained(
        folder, local_files_only=True, dtype="auto", output_loading_info=True
    )
    _refuse_incomplete(folder, loaded)
    return cast(nn.Module, model.eval())


def _model_class(transformers: Any, config: Any, folder: Path) -> Any:
    """The class that the config names; AutoModel's choice where it names none."""
    named = cast("list[str] | None", getattr(config, "architectures", None))
    if named:
        cls = getattr(transformers, named[0], None)
        if cls is None:
            refuse(
                "E502",
                f"`{folder}` is a {named[0]}, which this transformers does not have",
                hint="install a newer one, or name a factory of yours: python:module:factory",
            )
        return cls
    try:
        return transformers.MODEL_MAPPING[type(config)]
    except KeyError:
        refuse(
            "E502",
            f"`{folder}` names no architecture, and `{config.model_type}` has none",
            hint='add `"architectures": [CLASS]` to its config.json',
        )


def _refuse_incomplete(folder: Path, loaded: Mapping[str, Any]) -> None:
    """Weights that are not in the file would be random, and never the same twice."""
    missing = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
    if missing:
        shown = ", ".join(missing[:3]) + ", …" * (len(missing) > 3)
        refuse(
            "E502",
            f"the weights in `{folder}` lack {len(missing)} tensors: {shown}",
            hint="they would be random; is `architectures` in config.json the class they are of?",
        )


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        refuse("E502", f"reading this model needs {name}", hint=_INSTALL)


@contextmanager
def _quiet() -> Generator[None]:
    """No bars and no chatter, of the hub's either; what was set is put back."""
    log = _import("transformers").utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.set_verbosity_error()
        log.disable_progress_bar()
        try:
            yield
        finally:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


_FACTORY_IS = "name a function that is called without arguments and returns the model"


# --------------------------------------------------------------------------- example inputs


_BATCH, _LENGTH, _TARGET_LENGTH, _SAMPLES = 2, 7, 5, 4001


@dataclass(frozen=True, slots=True)
class _Draw:
    """What a row draws from: the model's config, its float dtype, and a stream of its own."""

    config: Any
    dtype: torch.dtype
    generator: torch.Generator

    def tokens(self, config: Any, length: int) -> Tensor:
        """[batch, length] of token ids, none of them padding."""
        high = int(config.vocab_size)
        ids = torch.randint(high, (_BATCH, length), generator=self.generator)
        padding = getattr(config, "pad_token_id", None)
        return ids if padding is None else torch.where(ids == padding, (padding + 1) % high, ids)

    def floats(self, *shape: int) -> Tensor:
        """Standard normal numbers of a shape after the batch."""
        return torch.randn(_BATCH, *shape, generator=self.generator).to(self.dtype)


def _text(draw: _Draw) -> Tensor:
    return draw.tokens(draw.config.get_text_config(), _LENGTH)


def _target(draw: _Draw) -> Tensor:
    return draw.tokens(draw.config.get_text_config(decoder=True), _TARGET_LENGTH)


def _image(draw: _Draw) -> Tensor:
    config = getattr(draw.config, "vision_config", draw.config)
    # Models without a fixed image size are convolutions, down to one thirty-second.
    size = cast("int | list[int] | None", getattr(config, "image_size", None)) or 64
    height, width = (size, size) if isinstance(size, int) else size
    return draw.floats(int(config.num_channels), height, width)


def _spectrum(draw: _Draw) -> Tensor:
    return draw.floats(int(draw.config.num_mel_bins), 2 * int(draw.config.max_source_positions))


def _waveform(draw: _Draw) -> Tensor:
    return draw.floats(_SAMPLES)


_ROWS: Mapping[str, Callable[[_Draw], Tensor]] = {
    "input_ids": _text,
    "decoder_input_ids": _target,
    "pixel_values": _image,
    "input_features": _spectrum,
    "input_values": _waveform,
}
"""How each argument of a forward is drawn."""


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Small inputs for `model(**inputs)`, the same every time, on the model's device.

    Token ids are [2, 7] ([2, 5] for a decoder's); images, spectra and waveforms have the sizes that
    the config states, and the model's dtype. The global generators are not touched. A model without
    a config may have them ready as `dummy_inputs`, as transformers calls them.

    Raises StateError (E413) for a model that has neither, or that asks for anything else.
    """
    config = cast(Any, getattr(model, "config", None))
    ready = cast(object, getattr(model, "dummy_inputs", None)) if config is None else None
    if isinstance(ready, Mapping):
        return dict(cast("Mapping[str, Tensor]", ready))
    if not hasattr(config, "get_text_config"):
        name = type(model).__name__
        refuse("E413", f"`{name}` has no config to make example inputs from", hint=_READY)
    names = _needed(model)
    unknown = [n for n in names if n not in _ROWS]
    if unknown or not names:
        asked = ", ".join(unknown) or "nothing known"
        refuse("E413", f"`{type(model).__name__}` asks for {asked}", hint=_READY)
    tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    draw = _Draw(config, tensor.dtype, torch.Generator().manual_seed(0))
    return {name: _ROWS[name](draw).to(tensor.device) for name in names}


_READY = "in Python, give verify() a `run` of your own"


def _needed(model: nn.Module) -> list[str]:
    """The arguments of the forward that must be given, in its order."""
    arguments = inspect.signature(model.forward).parameters
    wanted = {str(getattr(model, "main_input_name", ""))}
    wanted |= {
        n
        for n, p in arguments.items()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    }
    if getattr(cast(Any, model.config), "is_encoder_decoder", False):
        wanted.add("decoder_input_ids")
    if hasattr(model, "text_model") and hasattr(model, "vision_model"):
        wanted |= {"input_ids", "pixel_values"}  # two towers, both of them read
    return [name for name in arguments if name in wanted]


# ---------------------------------------------------------------------------- what stands beside

_LATER = {
    **dict.fromkeys(("AdapterCheckpoints", "AdapterTraining", "Trainer"), "trainer"),
    **dict.fromkeys(("card", "push_to_hub"), "hub"),
    **dict.fromkeys(("from_pretrained", "save_base", "save_pretrained"), "pretrained"),
    "enable": "verbs",
}
"""What else there is for such models, and the module beside this one that has it."""


def __getattr__(name: str) -> object:
    """A name of the table, whose module is imported when it is asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"surgery.integrations.{_LATER[name]}"), name)
