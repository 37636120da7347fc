"""The documents say what is so: their specs are fine, their Python runs, their tables are whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import surgery
from surgery.algebra.beginnings import DISTRIBUTIONS
from surgery.algebra.filters import FACTS
from surgery.algebra.ops import OPS
from surgery.language.library import Library
from surgery.language.parse import RESERVED
from surgery.model.roles import ROLES
from surgery.resources import methods_dir

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGE = (ROOT / "docs" / "language.md").read_text()


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks of a language, each with the line it begins on."""
    text = page.read_text()
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, found.start(1)), found.group(1)


SPECS = [
    pytest.param(text, id=f"{page.name}:{line}")
    for page in PAGES
    for line, text in blocks(page, "peft")
]


@pytest.mark.parametrize("text", SPECS)
def test_every_spec_in_the_documents_is_fine(text: str) -> None:
    assert surgery.check(text) == ()


@pytest.mark.parametrize("page", [p for p in PAGES if [*blocks(p, "python")]], ids=lambda p: p.name)
def test_the_python_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for line, text in blocks(page, "python"):
        exec(compile("\n" * line + text, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", Library.standard().names())
def test_the_language_page_has_every_method_with_its_signature(name: str) -> None:
    text = (methods_dir() / f"{name}.peft").read_text()
    found = re.search(r"^method (\w+\([^)]*\))", text, re.MULTILINE)
    assert found is not None
    signature = re.sub(r"\s+", " ", found.group(1)).replace("( ", "(").replace(" )", ")")
    assert f"`{signature}`" in LANGUAGE


def test_the_language_page_has_every_operator_and_word() -> None:
    spelled = {name for name, op in OPS.items() if op.spelled is not None}
    words = set(re.findall(r"\w+", LANGUAGE))
    assert {*spelled, *DISTRIBUTIONS, *RESERVED} <= words


def test_the_language_page_has_every_role_and_fact() -> None:
    assert set(re.findall(r"`@(\w+)`", LANGUAGE)) == ROLES.keys()
    rows = "\n".join(re.findall(r"^\| `.*", LANGUAGE, re.MULTILINE))
    assert FACTS.keys() <= set(re.findall(r"`(\w+)`", rows))
