"""The shipped tables are those of the grammar, and are what the parser is made from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from surgery.language import tables
from surgery.language.build import BUILDERS
from surgery.resources import grammar_file

LINE = "match /q_proj|v_proj/ in layers[0:12] apply bone(r=8)"


def parsed() -> Any:
    parser: Any = tables.load_parser()
    return parser.parse(LINE)


def test_the_tables_are_current() -> None:
    text = tables.tables_file().read_text(encoding="utf-8")
    assert text == tables.built(), "run `python -m surgery.language.tables`"


def test_the_tables_are_the_same_in_every_process() -> None:
    program = "import sys; from surgery.language.tables import built; sys.stdout.write(built())"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    made = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed},
        check=True,
        capture_output=True,
        text=True,
    )
    assert made.stdout == tables.built()


def test_no_grammar_is_constructed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("the grammar was constructed")

    monkeypatch.setattr(tables, "_from_grammar", refuse)
    assert parsed().data == "start"


def test_the_lexer_is_contextual() -> None:
    parser = tables.load_parser()
    assert (parser.options.parser, parser.options.lexer) == ("lalr", "contextual")


@pytest.mark.parametrize("change", ["missing", "damaged", "another lark", "another grammar"])
def test_without_tables_the_grammar_is_enough(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = json.loads(tables.tables_file().read_text(encoding="utf-8"))
    path = tmp_path / "tables.json"
    match change:
        case "damaged":
            path.write_bytes(b"\xff{")
        case "another lark":
            path.write_text(json.dumps({**stored, "lark": "0"}), encoding="utf-8")
        case "another grammar":
            path.write_text(json.dumps({**stored, "grammar": ""}), encoding="utf-8")
        case _:
            pass
    shipped = parsed()
    monkeypatch.setattr(tables, "tables_file", lambda: path)
    assert parsed() == shipped


def test_every_rule_has_its_builder() -> None:
    made = {
        rule.alias or rule.options.template_source or rule.origin.name
        for rule in tables.load_parser().rules
    }
    rules = {str(name) for name in made if not str(name).startswith("_")}
    text = grammar_file().read_text(encoding="utf-8")
    inlined = {line.split(":")[0].strip("?!") for line in text.splitlines() if line[:1] == "?"}
    assert rules - inlined <= BUILDERS.keys()
    assert BUILDERS.keys() <= rules
