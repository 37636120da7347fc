"""A config of peft's: a bag of the fields that its `peft_type` has, with peft's defaults.

What fields those are stands in the formats and in `peft_configs.toml`; what they mean is read by
what reads an `adapter_config.json`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from difflib import get_close_matches
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from surgery.artifact import CONFIG
from surgery.compat.peft.folders import folder_of
from surgery.compat.peft.kinds import PeftType, TaskType
from surgery.errors import Report, Source, Span, refuse
from surgery.integrations.peft import kind_of, refuse_kind
from surgery.language.library import Library
from surgery.mapping.fields import ConfigFile
from surgery.mapping.forms import default_of, fields_of, shown
from surgery.resources import formats_dir
from surgery.store import json_writer, read_json, write_atomic

VERSION = "0.21.0"
"""The version of peft that the formats follow."""

COMMON: Mapping[str, object] = {
    "task_type": None,
    "peft_type": None,
    "auto_mapping": None,
    "peft_version": VERSION,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": False,
}
"""The fields that every config has."""

_RUNNING = "runtime_config"  # of a running program, and of no folder
_SETS = ("target_modules", "exclude_modules", "feedforward_modules")
_APART = ("unset", "free")  # in a table of `peft_configs.toml`, what is no field


@lru_cache(maxsize=1)
def _tables() -> Mapping[str, Mapping[str, Any]]:
    text = (formats_dir() / "peft_configs.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@lru_cache(maxsize=64)
def defaults_of(kind: str) -> Mapping[str, object]:
    """The fields of a `peft_type`, each with its default."""
    found = dict(COMMON)
    if not kind:
        return found
    formats = (f for f in Library.standard().all_formats() if f.name == "peft")
    for item in (i for f in formats if kind_of(f) == kind for i in fields_of(f)):
        known = found.get(item.name)
        if "." not in item.name and known is None and item.name not in COMMON:
            found[item.name] = default_of(item)
    table = _tables().get(kind, {})
    found |= dict.fromkeys(table.get("unset", ()))
    found |= {name: value for name, value in table.items() if name not in _APART}
    return {**found, "peft_type": kind}


def free_in(kind: str) -> frozenset[str]:
    """The fields whose value changes nothing of how a new adapter begins or what it computes."""
    return frozenset(_tables().get(kind, {}).get("free", ()))


class PeftConfig:
    """What peft's config of the same name is: fields by name, with peft's defaults.

    Raises ArtifactError (E560) for a field that there is not, or that another one excludes.
    """

    kind: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type[PeftConfig]]] = {}

    def __init_subclass__(cls, kind: str = "", **rest: Any) -> None:
        """Let a class be the one of a `peft_type`."""
        super().__init_subclass__(**rest)
        if kind:
            cls.kind = kind
            PeftConfig.kinds[kind] = cls

    def __init__(self, **fields: Any) -> None:
        """Fields by name; see the class."""
        known = defaults_of(self.kind)
        report = Report()
        for name in fields.keys() - known.keys():
            message = f"{type(self).__name__} has no field `{name}`"
            report.error("E560", message, hint=_near(name, known))
        report.stop()
        values = {
            **deepcopy(dict(known)),
            **fields,
            **({"peft_type": self.kind} if self.kind else {}),
        }
        vars(self).update({name: _taken(name, value) for name, value in values.items()})
        _check(self)

    def __getattr__(self, name: str) -> Any:
        """What is no field. Raises AttributeError."""
        near = _near(name, defaults_of(type(self).kind))
        raise AttributeError(f"{type(self).__name__} has no field `{name}`; {near}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field. Raises ArtifactError (E560) for what is none."""
        known = defaults_of(self.kind)
        if name not in known and not name.startswith("_"):
            message = f"{type(self).__name__} has no field `{name}`"
            refuse("E560", message, hint=_near(name, known))
        vars(self)[name] = _taken(name, value)

    def __repr__(self) -> str:
        """The fields by name."""
        shown_fields = ", ".join(f"{n}={v!r}" for n, v in self._fields())
        return f"{type(self).__name__}({shown_fields})"

    def __eq__(self, other: object) -> bool:
        """Whether another config says the same."""
        return type(self) is type(other) and vars(self) == vars(other)

    def _fields(self) -> Iterable[tuple[str, Any]]:
        return ((n, v) for n, v in vars(self).items() if not n.startswith("_"))

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the adapter is of an input, and not of weights; none here is."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether it is one of attention's caches; none here is."""
        return False

    # ---------------------------------------------------------------------------------- files

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as they are."""
        return {name: deepcopy(value) for name, value in self._fields() if name != _RUNNING}

    def plain(self) -> dict[str, object]:
        """The fields as an `adapter_config.json` has them."""
        return {name: _plain(value) for name, value in self._fields() if name != _RUNNING}

    def as_file(self) -> ConfigFile:
        """The config as if it had been read, so that findings can point into it."""
        values = self.plain()
        text = json.dumps(values, indent=2)
        return ConfigFile(values, Span(Source(type(self).__name__, text), 0, 1))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write an `adapter_config.json` to a folder. Raises ArtifactError (E513)."""
        write_atomic(Path(save_directory) / CONFIG, json_writer(self.plain()))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **hub: Any
    ) -> Self:
        """The config of a folder, or of a repository of the hub, in the class of its `peft_type`.

        Raises ArtifactError: E504 if there is no such folder and the hub has none, E511, E512 and
        E516 for its file, E560 for fields that peft's config has not.
        """
        folder = folder_of(pretrained_model_name_or_path, subfolder, hub)
        fields = cls.from_json_file(folder / CONFIG)
        known = defaults_of(str(fields.get("peft_type") or ""))
        # Other versions of peft write fields of their own, which say nothing where they are off.
        kept = {n: v for n, v in fields.items() if n in known or not _is_off(v)}
        return cast(Self, cls.from_peft_type(**kept))

    @staticmethod
    def from_json_file(path_json_file: str | Path) -> dict[str, Any]:
        """The fields of a file. Raises ArtifactError (E511, E512)."""
        found = dict(read_json(Path(path_json_file)))
        found.pop(_RUNNING, None)
        return found

    @classmethod
    def from_peft_type(cls, **fields: Any) -> PeftConfig:
        """A config of the class of its `peft_type`, by default this one. Raises E516, E560."""
        kind = fields.pop("peft_type", None)
        if kind is None:
            return cls(**fields)
        return class_of(str(_plain(kind)))(**fields)


def class_of(kind: str) -> type[PeftConfig]:
    """The class of a `peft_type`. Raises ArtifactError (E516) for one that is not here."""
    found = PeftConfig.kinds.get(kind)
    if found is None:
        text = json.dumps({"peft_type": kind})
        known = [f for f in Library.standard().all_formats() if f.name == "peft"]
        refuse_kind(ConfigFile({"peft_type": kind}, Span(Source("config", text), 0, 1)), known)
    return found


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The config that some fields are, by their `peft_type`. Raises E516, E560."""
    return PeftConfig.from_peft_type(**config_dict)


class Nested(dict[str, Any]):
    """A config within a config: fields by name, which are its attributes too."""

    defaults: ClassVar[Mapping[str, object]] = {}

    def __init__(self, **fields: Any) -> None:
        """Fields by name. Raises ArtifactError (E560) for one that there is not."""
        report = Report()
        for name in fields.keys() - self.defaults.keys():
            message = f"{type(self).__name__} has no field `{name}`"
            report.error("E560", message, hint=_near(name, self.defaults))
        report.stop()
        super().__init__(**{**self.defaults, **fields})

    def __getattr__(self, name: str) -> Any:
        """A field. Raises AttributeError."""
        if name not in self:
            raise AttributeError(f"{type(self).__name__} has no field `{name}`")
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field. Raises ArtifactError (E560) for what is none."""
        if name not in self.defaults:
            message = f"{type(self).__name__} has no field `{name}`"
            refuse("E560", message, hint=_near(name, self.defaults))
        self[name] = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """One of the same class."""
        return type(self)(**deepcopy(dict(self), memo))


# ------------------------------------------------------------------------------------- values


def _is_off(value: object) -> bool:
    return value is None or value is False or value in ([], {}, "")


def _taken(name: str, value: Any) -> Any:
    return set(cast("list[Any]", value)) if name in _SETS and isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    match value:
        case Enum():
            return value.value
        case set() | frozenset():
            return sorted(map(_plain, cast("set[Any]", value)))
        case Mapping():
            items = cast("Mapping[Any, Any]", value).items()
            return {str(_plain(k)): _plain(v) for k, v in items}
        case list() | tuple() | range():
            return [_plain(v) for v in cast("list[Any]", value)]
        case _:
            return value


def _near(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = get_close_matches(name, names, 1)
    return f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(names)}"


def _check(config: PeftConfig) -> None:
    """E560 for fields that exclude one another, as they do in peft."""
    report = Report()
    get = vars(config).get
    task = _plain(get("task_type"))
    if task is not None and task not in [t.value for t in TaskType]:
        report.error("E560", f"there is no task {shown(task)}", hint=_near(str(task), _TASKS))
    if get("layers_pattern") and get("layers_to_transform") is None:
        message, hint = "`layers_pattern` says nothing alone", "give `layers_to_transform` as well"
        report.error("E560", message, hint=hint)
    if isinstance(get("target_modules"), str) and get("layers_to_transform") is not None:
        message = "`layers_to_transform` goes with names in `target_modules`, not with a regex"
        report.error("E560", message, hint="let the regex say which layers, or give a list")
    if isinstance(get("target_parameters"), str):
        message = "`target_parameters` is a text"
        report.error("E560", message, hint="give a list of names")
    if config.kind == PeftType.OFT.value and bool(get("r")) is bool(get("oft_block_size")):
        message = f"r = {get('r')} and oft_block_size = {get('oft_block_size')}"
        report.error("E560", message, hint="one of the two follows from the other: let it be 0")
    report.stop()


_TASKS = tuple(t.value for t in TaskType)
