"""The catalogue is whole and true: every code is in it, every example says what is written.

`SURGERY_GOLDEN=write pytest tests/test_catalogue.py` writes what is printed, and the page, anew;
look at the difference.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import surgery
from surgery import errors
from surgery.catalogue import FAMILIES, Entry, entries, entry, families, models, page, render
from surgery.errors import Diagnostic, SurgeryError
from surgery.resources import errors_dir

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"
# A library whose types are not complete.
files: Any = safetensors.torch

CODE = re.compile(r"E[0-9]{3}")
WRITING = os.environ.get("SURGERY_GOLDEN") == "write"

# What is wrong with a whole file, with a value from outside or with a state has no place in a spec.
PLACELESS = re.compile(r"E001|E005|E117|E306|E308|E320|E4|E5")


@cache
def said(code: str) -> tuple[Diagnostic, ...]:
    """What the wrong example of a code says."""
    return run(entries()[code], entries()[code].wrong)


def run(one: Entry, text: str) -> tuple[Diagnostic, ...]:
    """Everything that an example says, in an empty folder."""
    try:
        return run_python(one, text) if one.language == "python" else run_spec(one, text)
    except SurgeryError as error:
        return error.diagnostics


def run_spec(one: Entry, text: str) -> tuple[Diagnostic, ...]:
    spec = surgery.parse(text, "example.peft")
    found = surgery.check(spec)
    if found or not one.model:
        return found
    return surgery.plan(spec, make(one.model)["model"]).diagnostics


def run_python(one: Entry, text: str) -> tuple[Diagnostic, ...]:
    names = make(one.model) if one.model else prepared()
    exec(compile(text, f"{one.code}.py", "exec"), names)
    return ()


def prepared() -> dict[str, Any]:
    """The names that examples in Python begin with."""
    return {
        "Path": Path,
        "json": json,
        "load_file": files.load_file,
        "nn": nn,
        "save_file": files.save_file,
        "surgery": surgery,
        "torch": torch,
    }


def make(model: str) -> dict[str, Any]:
    """The same, with a model of the catalogue."""
    names = prepared()
    exec(models()[model].python, names)
    return names


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# ------------------------------------------------------------------------------- it is whole


def codes_of(path: Path) -> Iterator[str]:
    """The codes in a module, as texts of their own."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from CODE.findall(node.value) if CODE.fullmatch(node.value) else ()


def test_every_code_of_the_package_has_an_entry_and_every_entry_its_code() -> None:
    used = {code for path in (ROOT / "surgery").rglob("*.py") for code in codes_of(path)}
    assert sorted(used) == sorted(entries())


def test_every_family_has_its_codes_and_its_exception() -> None:
    assert {path.stem for path in errors_dir().glob("*.toml")} == {*FAMILIES, "models"}
    prefixes = [{code.code[:2] for code in family.entries} for family in families()]
    assert prefixes == [{f"E{digit}"} for digit in range(6)]
    for family in families():
        raised = errors.error_of([Diagnostic(family.entries[0].code, "m")])
        assert type(raised).__name__ == family.exception


@pytest.mark.parametrize("code", entries())
def test_an_entry_is_a_line_a_meaning_and_two_examples(code: str) -> None:
    one = entries()[code]
    assert one == entry(code)
    assert one.title
    assert "\n" not in one.title
    assert not one.title.endswith(".")
    assert one.when.endswith(".")
    assert one.wrong != one.right
    assert not one.model or one.model in models()


def test_there_is_nothing_to_say_of_a_code_that_there_is_not() -> None:
    assert entry("E999") is None
    assert entry("") is None


def test_every_model_is_used() -> None:
    assert {one.model for one in entries().values()} - {""} == models().keys()


# -------------------------------------------------------------------------------- it is true


@pytest.mark.parametrize("code", entries())
def test_the_wrong_example_gives_the_code(code: str) -> None:
    found = said(code)
    assert {one.code for one in found} == {code}, [str(one) for one in found]
    for one in found:
        assert one.label or one.hint
        assert (one.span is None) <= bool(PLACELESS.match(code))
        if one.span is not None:
            assert 0 <= one.span.start <= one.span.end <= len(one.span.source.text)


@pytest.mark.parametrize("code", entries())
def test_the_right_example_gives_nothing(code: str) -> None:
    one = entries()[code]
    assert [str(found) for found in run(one, one.right)] == []


@pytest.mark.parametrize("code", entries())
def test_what_is_printed_is_what_is_written(code: str) -> None:
    printed = "\n\n".join(map(str, said(code)))
    assert str(ROOT) not in printed
    if WRITING:
        write_printed(code, printed)
    else:
        assert printed == entries()[code].printed


@pytest.mark.parametrize("code", entries())
def test_a_finding_is_plain_data(code: str) -> None:
    for one in said(code):
        data = one.as_json()
        assert json.loads(json.dumps(data)) == data
        assert data["code"] == code
        assert (data["span"] is None) == (one.span is None)


def write_printed(code: str, printed: str) -> None:
    """Let the file of the catalogue have what an example prints now."""
    assert "'''" not in printed
    for path in errors_dir().glob("*.toml"):
        before, heading, rest = path.read_text(encoding="utf-8").partition(f"[{code}]\n")
        if not heading:
            continue
        own, *others = re.split(r"(?m)^(?=\[E)", rest, maxsplit=1)
        own = re.sub(r"(?ms)^printed = '''.*?'''\n", "", own).rstrip("\n")
        own += f"\nprinted = '''\n{printed}\n'''\n" + "\n" * bool(others)
        path.write_text("".join([before, heading, own, *others]), encoding="utf-8")


# ------------------------------------------------------------------------------- as it is read


@pytest.mark.parametrize("code", entries())
def test_an_entry_reads_as_plain_text(code: str) -> None:
    one = entries()[code]
    text = render(one)
    assert text.startswith(f"{code}: {one.title}\n\n{one.when}\n")
    assert f"error[{code}]" in text or f"warning[{code}]" in text
    assert "```" not in text


def test_the_page_is_current() -> None:
    if WRITING:
        for cached in (families, entries, models):
            cached.cache_clear()
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page()
