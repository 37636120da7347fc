"""Models of transformers and their files: the base without its adapters, an adapter with its base.

A folder of an adapter says in `base.json` what it was made on, so that both are built again by the
folder alone; folders of peft say so in their config.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

import surgery
from surgery.artifact import CONFIG, FILES, SaveReport
from surgery.distributed import mesh_of, on_first, unwrapped
from surgery.errors import SurgeryError, refuse
from surgery.integrations.factories import said
from surgery.integrations.transformers import HUB_ID, load_model, snapshot
from surgery.model.holder import under_adapters
from surgery.model.layers import base_class
from surgery.runtime import Compiled
from surgery.state import state_of
from surgery.store import (
    Writer,
    json_writer,
    read_json,
    read_text,
    text_writer,
    write_atomic,
    write_directory,
)

# transformers leaves most of its signatures open, so its models are `Any` here.

BASE = "base.json"
"""What an adapter was made on: the name and the revision of the base, and its class."""

CARD = "README.md"

_NAME, _REVISION, _CLASS = "base_model_name_or_path", "revision", "class"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_INDEX = "*.safetensors.index.json"


def module_of(model: Compiled | nn.Module) -> nn.Module:
    """The model of a handle, that which a wrapper keeps, or as it is."""
    return model.model if isinstance(model, Compiled) else unwrapped(model)


# --------------------------------------------------------------------------------- the base


@dataclass(frozen=True, slots=True)
class SavedBase:
    """What `save_base` wrote.

    merged: what is in the weights, as `0.7*a + b`; "" for the base. beside: at how many of its
    sites it is in no weight, and so not in the files.
    """

    files: tuple[Path, ...]
    merged: str
    beside: int = 0

    def __str__(self) -> str:
        """In words."""
        if not self.merged:
            return "the base"
        but = f", but for what runs at {self.beside} of its sites" if self.beside else ""
        return f"the base with `{self.merged}` merged into it{but}"


def save_base(model: Compiled | nn.Module, directory: str | Path, **options: object) -> SavedBase:
    """Write a model of transformers without its adapters, by its own `save_pretrained`.

    The files are those that the model would write if it had never been adapted, and the adapters
    stay on it, live. Where an adapter is merged, what is written are the merged weights, which is
    what becomes of the model without adapters; the result says so.

    options: those of `save_pretrained`, such as `max_shard_size`. Raises ArtifactError: E577 for a
    model that has no such method, or whose weights are spread over processes; E513 if it cannot be
    written, with nothing changed there.
    """
    module, directory = module_of(model), Path(directory)
    save = getattr(type(module), "save_pretrained", None)
    if save is None:
        name = base_class(module).__name__
        hint = "it is for models of transformers; torch.save keeps any other"
        refuse("E577", f"a {name} has no `save_pretrained`", hint=hint)
    if mesh_of(module) is not None:
        hint = "save it before fully_shard, or get_model_state_dict with full_state_dict=True"
        refuse("E577", "the weights of the model are spread over processes", hint=hint)
    with beside(directory) as staged:
        with _without_adapters(module):
            save(module, staged, **options)
        _count_again(staged, module)
        stale = () if "variant" in options else _weights_in(directory)
        files = moved_in(staged, directory, stale)
    state = state_of(module)
    if state is None or not state.is_merged:
        return SavedBase(files, "")
    return SavedBase(files, str(state.live), len(state.beside))


@contextmanager
def _without_adapters(model: nn.Module) -> Generator[None]:
    """Let a model's state dict have the base's names alone.

    A quantised model asks itself for its state dict, so it is no use to hand another one over.
    """

    def take_out(module: nn.Module, state: dict[str, object], prefix: str, local: object) -> None:
        del module, local
        for name in [n for n in state if under_adapters(n.removeprefix(prefix))]:
            del state[name]

    untyped: Any = model  # whose types are not complete
    handle = untyped.register_state_dict_post_hook(take_out)
    try:
        yield
    finally:
        handle.remove()


def _count_again(folder: Path, model: nn.Module) -> None:
    """Let an index say how many parameters the base has; transformers counts all of the model."""
    named = cast("Any", model).named_parameters()
    extra = sum(p.numel() for name, p in named if under_adapters(name))
    for path in folder.glob(_INDEX):
        text = read_text(path)
        counted = re.compile(r'("total_parameters": )(\d+)')
        again = counted.sub(lambda found: f"{found[1]}{int(found[2]) - extra}", text, count=1)
        write_atomic(path, text_writer(again))


def _weights_in(directory: Path) -> list[str]:
    """The names of weights that a folder has from before."""
    names = os.listdir(directory) if directory.is_dir() else []
    return [name for name in names if _WEIGHTS.fullmatch(name)]


@contextmanager
def beside(directory: Path) -> Generator[Path]:
    """A new folder on the file system of another, gone afterwards. Raises ArtifactError (E513)."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{directory.name}.", dir=directory.parent
        ) as made:
            yield Path(made)
    except OSError as error:
        reason = error.strerror or str(error)
        refuse("E513", f"cannot write {directory}: {reason}", hint="nothing was changed there")


def moved_in(staged: Path, directory: Path, stale: Collection[str] = ()) -> tuple[Path, ...]:
    """Move the files of a folder into another, all or none; gives where they are then.

    stale: names there that go unless a file of that name comes. Raises ArtifactError (E513).
    """

    def mover(name: str) -> Writer:
        return lambda path: os.replace(staged / name, path)

    names = sorted(path.name for path in staged.iterdir() if path.is_file())
    return write_directory(directory, {name: mover(name) for name in names}, owned=stale)


# -------------------------------------------------------------------------------- an adapter


def save_pretrained(
    model: Compiled | nn.Module,
    directory: str | Path,
    adapter: str | None = None,
    *,
    base: str | None = None,
    config: Mapping[str, object] | None = None,
) -> SaveReport:
    """Write an adapter with the name of its base, which `from_pretrained` reads; all or nothing.

    It is what `Compiled.save` writes, and `base.json`.

    base: a folder or hub id in place of the one that the model was loaded from. adapter, config,
    and what is raised: as for `Compiled.save`.
    """
    module, directory = module_of(model), Path(directory)
    with beside(directory) as staged:

        def finish() -> tuple[Path, ...]:
            write_base(staged, module, base)
            return moved_in(staged, directory, (*FILES, BASE))

        report = surgery.of(module).save(staged, adapter, config=config)
        files = on_first(module, finish)
    return SaveReport(files, report.peft)


def base_name(model: nn.Module) -> str:
    """The folder or hub id that a model was loaded from, if it says so."""
    about: Any = getattr(model, "config", None)
    return str(getattr(about, "name_or_path", "") or "")


def write_base(folder: Path, model: nn.Module, base: str | None) -> None:
    """Say in a folder what a model is, or what `base` is in its stead; in peft's config as well."""
    about: Any = getattr(model, "config", None)
    own = base_name(model)
    commit: object = getattr(about, "_commit_hash", None) if base in (None, own) else None
    stated = {_NAME: base or own or None, _REVISION: commit, _CLASS: base_class(model).__name__}
    write_atomic(folder / BASE, json_writer(stated))
    config = folder / CONFIG
    if base is not None and config.is_file():
        write_atomic(config, json_writer({**read_json(config), _NAME: base}))


# ------------------------------------------------------------------------------ both together

AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The class that builds a model for a task, as configs of peft call it."""


@dataclass(frozen=True, slots=True)
class Base:
    """The base that a folder names. cls: of transformers; "" where the base itself says it."""

    name: str
    revision: str | None = None
    cls: str = ""


def from_pretrained(
    folder: str | Path,
    model_class: Any = None,
    *,
    base: str | Path | None = None,
    name: str | None = None,
    force: bool = False,
    **options: object,
) -> Compiled:
    """Build the base that a folder of an adapter names, and put the adapter on it.

    folder: ours or peft's, or a hub id. model_class: of transformers, such as
    `AutoModelForCausalLM`; by default the one that the folder names, else the base's own. base: a
    folder or hub id in place of what the folder names. name: of the adapter. force: as for
    `attach`. options: those of the class's `from_pretrained`, such as `dtype` and `device_map`.

    Raises ArtifactError: E575 where no base is named, or it cannot be built, and what `attach`
    raises.
    """
    where = folder_of(folder)
    named = base_of(where) if base is None else Base(str(base), None, base_of(where).cls)
    if not named.name:
        hint = "say what it is: from_pretrained(folder, base='owner/name')"
        refuse("E575", f"`{folder}` does not say what its base is", hint=hint)
    model = _built(named, model_class, options, folder)
    return surgery.attach(where, model, force=force, name=name)


def folder_of(reference: str | Path) -> Path:
    """The folder of an adapter: as it is, or in the hub's cache. Raises ArtifactError (E504)."""
    text = str(reference)
    if isinstance(reference, Path) or os.path.exists(text) or not HUB_ID.fullmatch(text):
        return Path(reference)  # of what is none, attaching says so
    return snapshot(text, [*FILES, BASE, CARD])


def base_of(folder: Path) -> Base:
    """What a folder of an adapter says of its base. Raises ArtifactError (E512)."""
    ours, config = folder / BASE, folder / CONFIG
    stated = read_json(ours) if ours.is_file() else {}
    if not stated.get(_NAME) and config.is_file():
        return _of_config(read_json(config))
    return Base(_text(stated, _NAME), _text(stated, _REVISION) or None, _text(stated, _CLASS))


def _of_config(config: Mapping[str, object]) -> Base:
    """What a config of peft's says of its base."""
    mapping = config.get("auto_mapping")
    stated = cast("dict[str, object]", mapping if isinstance(mapping, dict) else {})
    cls = _text(stated, "base_model_class") or AUTO.get(_text(config, "task_type"), "")
    return Base(_text(config, _NAME), _text(config, _REVISION) or None, cls)


def _text(stated: Mapping[str, object], name: str) -> str:
    value = stated.get(name)
    return value if isinstance(value, str) else ""


def _built(
    base: Base, model_class: Any, options: Mapping[str, object], folder: object
) -> nn.Module:
    """The base, in evaluation mode. Raises ArtifactError (E575)."""
    given = dict(options) if base.revision is None else {"revision": base.revision, **options}
    try:
        cls = model_class or _class(base.cls)
        if cls is None and not given:
            model: Any = load_model(base.name)
        else:
            cls = cls or _own_class(base.name)
            model = cls.from_pretrained(base.name, **given).eval()
        if not getattr(model, "_hf_peft_config_loaded", False):
            return cast(nn.Module, model)
        reason = "an adapter lies beside it, which transformers has put on it by peft"
    except SurgeryError as error:
        reason = error.diagnostics[0].message
    except Exception as error:  # a damaged file may fail anywhere in the reader
        reason = said(error)
    hint = "name it otherwise: from_pretrained(folder, base=…), or attach(folder, model)"
    refuse("E575", f"the base of `{folder}`, `{base.name}`, cannot be built: {reason}", hint=hint)


def _class(name: str) -> Any:
    """A class of transformers by its name, if it has it."""
    import transformers

    return getattr(transformers, name, None) if name else None


def _own_class(name: str) -> Any:
    """The class that a base's config names."""
    import transformers

    library: Any = transformers
    names: list[str] = library.AutoConfig.from_pretrained(name).architectures or ["AutoModel"]
    return getattr(library, names[0])


__all__ = ["AUTO", "BASE", "SavedBase", "from_pretrained", "save_base", "save_pretrained"]
