"""The page of methods and layers is what the plans say now."""

from __future__ import annotations

from pathlib import Path

from surgery.language.library import Library
from surgery.model.layers import KINDS
from surgery.supported import page, tried

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


def test_the_page_is_fresh() -> None:
    hint = "write it anew: python -m surgery.supported > docs/methods.md"
    assert PAGE.read_text(encoding="utf-8") == page(), hint


def test_every_method_stands_in_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in Library.standard().names())


def test_the_small_layer_is_of_the_kind_that_was_asked_for() -> None:
    for kind in KINDS:
        (site,) = tried("bone", kind.name).plan.sites
        assert site.form.kind.name == kind.name
