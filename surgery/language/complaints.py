"""What the parser could not read, in words that a person who wrote the text would use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from surgery.errors import Diagnostic, Source, Span
from surgery.language.outline import STATEMENTS

if TYPE_CHECKING:
    from lark import Lark

_TERMINALS = {
    "NAME": "a name",
    "NUMBER": "a number",
    "MULTIPLE": "a multiple such as `16x`",
    "_MULTIPLE": "`)x`",
    "TEXT": "a text in double quotes",
    "REGEX": "a /regex/",
    "GLOB": "a name or glob",
    "TRUTH": "`true` or `false`",
    "SIGN": "`+` or `-`",
    "TIMES": "`@`, `/`, `//` or `%`",
    "STAR": "`*`",
    "POWER": "`**`",
    "COMPARISON": "a comparison",
    "TRANSPOSED": "`ᵀ`",
}

# Terminals that stand for one thing where all of `needed` may come.
_GROUPS: tuple[tuple[str, frozenset[str], frozenset[str]], ...] = (
    (
        "an expression",
        frozenset({"NAME", "NUMBER", "TEXT", "LPAR"}),
        frozenset({"NAME", "NUMBER", "TEXT", "LPAR", "TRUTH", "SIGN", "NOT", "IN"}),
    ),
    (
        "an operator",
        frozenset({"SIGN", "STAR", "TIMES"}),
        frozenset(
            {"SIGN", "STAR", "TIMES", "POWER", "COMPARISON", "TRANSPOSED", "AND", "OR", "LSQB"}
        ),
    ),
    (
        "a selector",
        frozenset({"REGEX", "GLOB", "LPAR"}),
        frozenset({"REGEX", "GLOB", "ROLE", "LPAR", "NOT"}),
    ),
    ("a container", frozenset({"REGEX", "GLOB"}), frozenset({"REGEX", "GLOB", "ROLE"})),
    (
        "a statement",
        frozenset(s.upper() for s in STATEMENTS),
        frozenset(s.upper() for s in STATEMENTS),
    ),
)

_ITEMS = ("train", "frozen", "shared", "let", "if", "else")
_WORD_BEFORE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\s*$")
_QUOTES = 'texts stand in double quotes, as in `"out"`'
_CLAUSES = (
    "the order is: match S in SCOPE where COND except S apply METHOD(name = value) "
    "then METHOD(name = value) expect N"
)
_LONGEST = 40

_ALSO = "`A | B` selects what either does"
_MINUS = "`A & not B` selects what A does and B does not"
_ONCE = "`|` and `&` are one sign each, with a selector before and behind it"
_ROLE = "a role is one word: `@query`"
_SCOPES = "a scope is a path of containers, or some of them: `in a[0:2].b | c[*]`"

# What other notations have where this one has something else: by terminals that may come there.
_INSTEAD: tuple[tuple[frozenset[str], Mapping[str, str]], ...] = (
    (
        frozenset({"AMPERSAND"}),
        {"or": _ALSO, ",": _ALSO, "+": _ALSO, "-": _MINUS, "and": "`A & B` selects what both do"},
    ),
    (
        frozenset({"REGEX", "NOT"}),
        {"|": _ONCE, "&": _ONCE, "!": "`not A` selects what A does not", "@": _ROLE},
    ),
    (frozenset({"REGEX"}), {"(": _SCOPES, "not": _SCOPES, "@": _ROLE}),
    (frozenset({"DOT"}), {"&": _SCOPES, "and": _SCOPES, ",": _SCOPES}),
    (frozenset({"EXCEPT", "COMPARISON"}), {"=": "`==` compares, as in `type == Linear`"}),
)


@dataclass(frozen=True, slots=True)
class Place:
    """What stands where the parser stopped, and what could have stood there (terminals)."""

    source: Source
    start: int
    text: str
    expected: frozenset[str]
    spelled: Mapping[str, str]
    unclosed: Span | None

    @property
    def wanted(self) -> str:
        """The expected in words."""
        return described(self.expected, self.spelled)

    @property
    def related(self) -> tuple[tuple[str, Span], ...]:
        """The bracket that may be the reason."""
        return () if self.unclosed is None else (("this is not closed", self.unclosed),)


def complaint(
    error: Any, source: Source, base: int, unclosed: Iterable[int], parser: Lark
) -> Diagnostic:
    """What a lark `UnexpectedInput` says, for a piece of the source that begins at `base`.

    `unclosed` are the offsets of brackets without a partner.
    """
    at, text = _stop(error)
    start = base + at
    before = [at for at in unclosed if base <= at < start]
    place = Place(
        source,
        start,
        text or source.text[start],
        frozenset(map(str, error.interactive_parser.accepts())) - {"$END", "_SEMI"},
        {t.name: t.pattern.value for t in parser.terminals if t.pattern.type == "str"},
        Span(source, before[-1], before[-1] + 1) if before else None,
    )
    return _unexpected(place) if text else _unfinished(place)


def _stop(error: Any) -> tuple[int, str]:
    """Where the parser stopped and what it found; nothing, behind the last token, if at the end."""
    if not hasattr(error, "token"):
        return error.pos_in_stream, error.char
    token = error.token
    if token.type == "$END":
        return max(0, (token.end_pos or 0) - 1), ""
    return token.start_pos, str(token)


def _unfinished(place: Place) -> Diagnostic:
    return Diagnostic(
        "E003",
        "this statement is not finished",
        Span(place.source, place.start, place.start + 1),
        hint=_hint(place.wanted),
        related=place.related,
    )


def _unexpected(place: Place) -> Diagnostic:
    text = place.text
    span = Span(place.source, place.start, place.start + len(text))
    if _is_unclosed(place):
        return _unclosed(place)
    if place.expected == frozenset({"QUOTE", "_BECOMES"}):
        return _no_equation(place)
    message = f"unexpected {_shown(text)}"
    if text in STATEMENTS:
        message = f"`{text}` begins a statement, but the one before is not finished"
    return Diagnostic("E003", message, span, _nearest(place), _advice(place), place.related)


def _unclosed(place: Place) -> Diagnostic:
    rest = place.source.text[place.start :].partition("\n")[0].rstrip()
    what = "text" if place.text == '"' else "regex"
    return Diagnostic(
        "E006",
        f"this {what} is not closed on its line",
        Span(place.source, place.start, place.start + len(rest)),
        hint=f"end it with `{place.text}`",
    )


def _no_equation(place: Place) -> Diagnostic:
    """A word that begins an item of a method, but is no keyword and has no `'` behind it."""
    before = _WORD_BEFORE.search(place.source.text, max(0, place.start - 200), place.start)
    start, end = before.span(1) if before else (place.start, place.start + len(place.text))
    span = Span(place.source, start, end)
    word = span.text
    near = get_close_matches(word, _ITEMS, 1)
    label = f"did you mean `{near[0]}`?" if near else ""
    hint = "a method holds `train`, `frozen`, `shared`, `let`, `if` and equations such as `W' = …`"
    return Diagnostic("E003", f"unexpected {_shown(word)}", span, label, hint)


def _is_unclosed(place: Place) -> bool:
    """A quote or slash alone: with an end on its line it would have been a token."""
    return place.text == '"' or (place.text == "/" and "REGEX" in place.expected)


def _nearest(place: Place) -> str:
    words = sorted(w for n, w in place.spelled.items() if n in place.expected and w.isalpha())
    near = get_close_matches(place.text, words, 1)
    return f"did you mean `{near[0]}`?" if near else ""


def _advice(place: Place) -> str:
    if place.text == "'":
        return _QUOTES
    for terminals, advice in _INSTEAD:
        if terminals <= place.expected and place.text in advice:
            return advice[place.text]
    clause = place.text in ("in", "where", "except", "then")
    if clause and not place.expected.isdisjoint({"MATCH", "APPLY"}):
        return _CLAUSES
    return _hint(place.wanted)


def _hint(wanted: str) -> str:
    return f"expected {wanted}" if wanted else "leave it out"


def _shown(text: str) -> str:
    if not text.isprintable():
        return " ".join(f"U+{ord(c):04X}" for c in text[:4])
    return f"`{text}`" if len(text) <= _LONGEST else f"`{text[:_LONGEST]}…`"


def described(terminals: frozenset[str], spelled: Mapping[str, str]) -> str:
    """A set of terminals in words, such as "an operator, `,` or `)`"."""
    rest = set(terminals)
    names: list[str] = []
    for name, needed, covered in _GROUPS:
        if needed <= rest:
            names.append(name)
            rest -= covered
    names += sorted(_TERMINALS.get(t) or f"`{spelled.get(t, t.lower())}`" for t in rest)
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
