"""The parser's tables, made ahead: making them from the grammar would take 0.1 to 0.4 s.

`python -m surgery.language.tables` writes them anew; a test holds them to the grammar.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import lark
from lark import Lark

from surgery.resources import grammar_file

_OPTIONS: dict[str, Any] = {
    "parser": "lalr",
    "lexer": "contextual",
    "propagate_positions": True,
    "maybe_placeholders": False,
}


def tables_file() -> Path:
    """Where the tables lie: beside the grammar."""
    return grammar_file("surgery.lalr.json")


def built() -> str:
    """The text of the tables for the grammar as it stands; the same in every process."""
    from lark.grammar import Rule
    from lark.lexer import TerminalDef

    data, memo = _from_grammar().memo_serialize([TerminalDef, Rule])
    data["options"]["import_paths"] = []
    data["parser"]["parser"] = _in_order(data["parser"]["parser"])
    stored = {"lark": lark.__version__, "grammar": _digest(), "data": data, "memo": memo}
    return json.dumps(stored, sort_keys=True, separators=(",", ":")) + "\n"


def load_parser() -> Lark:
    """A parser from the shipped tables.

    Where they are not those of this grammar and this lark, it is made from the grammar: later, and
    just as right.
    """
    stored = _stored()
    if stored.get("lark") == lark.__version__ and stored.get("grammar") == _digest():
        # `load` takes what `save` would pickle as plain data too; no pickle is involved.
        return cast("Any", Lark).load(stored)
    return _from_grammar()


def _stored() -> dict[str, Any]:
    try:
        stored = json.loads(tables_file().read_bytes())
        parser = stored["data"]["parser"]["parser"]
        stored["memo"] = _numbered(stored["memo"])
        parser["tokens"] = _numbered(parser["tokens"])
        parser["states"] = {int(s): _numbered(row) for s, row in parser["states"].items()}
        return stored
    except (OSError, ValueError, KeyError):
        return {}


def _digest() -> str:
    """Of the grammar's text, whatever the ends of its lines."""
    text = grammar_file().read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def _from_grammar() -> Any:
    return Lark(grammar_file().read_text(encoding="utf-8"), **_OPTIONS)


def _numbered(table: dict[str, Any]) -> dict[int, Any]:
    """The same table, with keys that are numbers again; JSON has only texts for keys."""
    return {int(key): value for key, value in table.items()}


# ------------------------------------------------------------------------------------- order

# lark numbers tokens and states as its sets happen to give them. Numbered by name, and by the first
# way there from the start, they are the same for the same grammar.

_SHIFT = 0


def _in_order(parser: dict[str, Any]) -> dict[str, Any]:
    names = {old: name for old, name in parser["tokens"].items()}
    tokens = {old: new for new, old in enumerate(sorted(names, key=names.__getitem__))}
    rows = {
        state: sorted((tokens[token], *action) for token, action in row.items())
        for state, row in parser["states"].items()
    }
    states = _reached(rows, sorted(parser["start_states"].values()))
    return {
        **parser,
        "tokens": {tokens[old]: name for old, name in names.items()},
        "states": {states[old]: _row(row, states) for old, row in rows.items()},
        "start_states": {rule: states[old] for rule, old in parser["start_states"].items()},
        "end_states": {rule: states[old] for rule, old in parser["end_states"].items()},
    }


def _reached(rows: dict[int, list[Any]], starts: list[int]) -> dict[int, int]:
    """The new number of each state, in the order of a breadth-first walk."""
    order = dict.fromkeys(starts)
    queue = list(order)
    for state in queue:
        after = [to for _, action, to in rows[state] if action == _SHIFT and to not in order]
        order |= dict.fromkeys(after)
        queue += dict.fromkeys(after)
    return {old: new for new, old in enumerate(order)}


def _row(row: list[Any], states: dict[int, int]) -> dict[int, Any]:
    return {token: (action, states[to] if action == _SHIFT else to) for token, action, to in row}


if __name__ == "__main__":
    tables_file().write_text(built(), encoding="utf-8")
