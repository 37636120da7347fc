"""Where the grammar and the specs lie: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def grammar_file(name: str = "surgery.lark") -> Path:
    """A file that defines the syntax: the grammar, or the tables made of it."""
    return _folder("grammar") / name


def specs_dir() -> Path:
    """The folder of everything that is written in the language itself."""
    return _folder("specs")


def methods_dir() -> Path:
    """The folder that is the registry of methods: one file each, by name."""
    return specs_dir() / "methods"


def statements_dir() -> Path:
    """The folder of what statements other than `match` put on their sites: a method each."""
    return specs_dir() / "statements"


def formats_dir() -> Path:
    """The folder of checkpoint formats: one file each."""
    return specs_dir() / "formats"


def errors_dir() -> Path:
    """The folder of the catalogue of errors: a file for each family of codes."""
    return specs_dir() / "errors"


def _folder(name: str) -> Path:
    # An editable install runs the package in its checkout, so two places are all there are.
    packaged = _PACKAGE / "_data" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name
