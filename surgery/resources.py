"""Where the grammar and the specs lie: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def _folder(name: str) -> Path:
    packaged = _PACKAGE / "_data" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def grammar_file() -> Path:
    """The definition of the syntax."""
    return _folder("grammar") / "surgery.lark"


def methods_dir() -> Path:
    """The folder that is the registry of methods: one file each, by name."""
    return _folder("specs") / "methods"


def formats_dir() -> Path:
    """The folder of checkpoint formats: one file each."""
    return _folder("specs") / "formats"
