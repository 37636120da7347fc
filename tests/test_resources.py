"""Where the grammar and the specs are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery import resources


def test_a_checkout() -> None:
    assert resources.grammar_file().is_file()
    assert resources.grammar_file("surgery.lalr.json").is_file()
    assert resources.specs_dir().is_dir()
    assert resources.methods_dir().parent == resources.specs_dir()
    assert resources.formats_dir().parent == resources.specs_dir()


def test_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "surgery"
    for folder in ("grammar", "specs"):
        (package / "_data" / folder).mkdir(parents=True)
    monkeypatch.setattr(resources, "_PACKAGE", package)
    assert resources.grammar_file() == package / "_data" / "grammar" / "surgery.lark"
    assert resources.specs_dir() == package / "_data" / "specs"
