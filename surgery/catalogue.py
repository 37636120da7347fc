"""The catalogue of errors: for each code its meaning, and an example that has it and one mended.

The entries are data in `specs/errors`. They are run by the tests, and `docs/errors.md` is what they
say: `python -m surgery.catalogue > docs/errors.md` writes it.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from textwrap import indent
from typing import Any, Literal

from surgery.resources import errors_dir

FAMILIES = ("syntax", "definitions", "selection", "plan", "state", "files")
"""The files of the catalogue, in the order of the codes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What there is to say of one code.

    wrong, right: an example that gives the code, and the same example mended, in a `language`.
    model: the name of the model that the examples are run on, "" for none.
    printed: what the wrong example prints.
    """

    code: str
    title: str
    when: str
    wrong: str
    right: str
    printed: str = ""
    language: Literal["peft", "python"] = "peft"
    model: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """A model of the examples: what it is, and the Python that makes it as `model`."""

    name: str
    says: str
    python: str


@dataclass(frozen=True, slots=True)
class Family:
    """The codes that one exception stands for."""

    name: str
    title: str
    exception: str
    says: str
    entries: tuple[Entry, ...]


@lru_cache(maxsize=1)
def families() -> tuple[Family, ...]:
    """The whole catalogue, in the order of the codes."""
    return tuple(map(_family, FAMILIES))


@lru_cache(maxsize=1)
def entries() -> Mapping[str, Entry]:
    """Every entry by its code, in order."""
    return {entry.code: entry for family in families() for entry in family.entries}


@lru_cache(maxsize=1)
def models() -> Mapping[str, Example]:
    """The models of the examples by name."""
    return {name: Example(name, **fields) for name, fields in _read("models").items()}


def entry(code: str) -> Entry | None:
    """What there is to say of a code such as `E201`, or None for one that there is not.

    >>> entry("E201").title
    'a selector that selects nothing'
    """
    return entries().get(code)


def _family(name: str) -> Family:
    fields = _read(name)
    codes = {code: fields.pop(code) for code in sorted(fields) if isinstance(fields[code], dict)}
    listed = tuple(Entry(code, **_stripped(value)) for code, value in codes.items())
    return Family(name, fields["family"], fields["exception"], fields["says"], listed)


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((errors_dir() / f"{name}.toml").read_text(encoding="utf-8"))


def _stripped(fields: Mapping[str, str]) -> dict[str, Any]:
    return {name: text.strip("\n") for name, text in fields.items()}


# ------------------------------------------------------------------------------------ as text


def render(entry: Entry) -> str:
    """An entry as plain text: what it means, the example, what is printed, and the mend."""
    parts = [
        f"{entry.code}: {entry.title}",
        entry.when,
        _heading("This has it", entry),
        indent(entry.wrong, "    "),
        "It prints:",
        indent(entry.printed, "    "),
        "And this has not:",
        indent(entry.right, "    "),
    ]
    return "\n\n".join(parts) + "\n"


def _heading(what: str, entry: Entry) -> str:
    return f"{what}, on {models()[entry.model].says}:" if entry.model else f"{what}:"


# ------------------------------------------------------------------------------------ as a page

_INTRODUCTION = """\
# Errors

<!-- Written by `python -m surgery.catalogue` from specs/errors. -->

Whatever is wrong is said with a code, the place, what was found and what to do; one run says all
that it can find. `surgery explain CODE` prints an entry of this page. In Python the findings are
the `diagnostics` of a `surgery.SurgeryError`; its class is named below for each family of codes.

Every example here is run by the tests: the first of each entry gives what is printed below it, and
the second gives no finding."""

_MODELS = """\
## The models of the examples

Each is small, and made as written here. The examples in Python have `import json`, `import torch`,
`import surgery`, `from torch import nn`, `from pathlib import Path` and
`from safetensors.torch import load_file, save_file` before them, and begin in an empty folder."""


def page() -> str:
    """The catalogue as a page of Markdown."""
    return "\n\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield _INTRODUCTION
    for family in families():
        first = family.entries[0].code[:2]
        yield f"## {first}: {family.title}"
        yield f"{family.says} In Python: `{family.exception}`."
        for one in family.entries:
            yield from _section(one)
    yield _MODELS
    for model in models().values():
        # Not marked as python, so that a page's own examples are told from the catalogue's.
        yield f"**{model.name}**: {model.says}."
        yield _fenced("py", model.python.strip("\n"))


def _section(entry: Entry) -> Iterator[str]:
    yield f"### {entry.code}: {entry.title}"
    yield entry.when
    if entry.model:
        yield f"On {models()[entry.model].says} ([{entry.model}](#the-models-of-the-examples)):"
    yield _fenced("text" if entry.language == "peft" else "py", entry.wrong)
    yield _fenced("text", entry.printed)
    yield "Instead:"
    yield _fenced("peft" if entry.language == "peft" else "py", entry.right)


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


if __name__ == "__main__":
    sys.stdout.write(page())
