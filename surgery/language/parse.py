"""Text to syntax tree. No text makes it raise anything but `SurgeryError`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from surgery.errors import Diagnostic, Report, Source, Span, SurgeryError, error_of, refuse
from surgery.language import syntax as ast
from surgery.language.build import BUILDERS
from surgery.language.tables import load_parser

MAX_BYTES = 256 * 1024
MAX_DEPTH = 100

_KEYWORDS = ("match", "param", "let", "adapter", "method", "format")
_STATEMENT = re.compile(rf"^(?:{'|'.join(_KEYWORDS)})\b", re.MULTILINE)
_WORD = re.compile(r"[A-Za-z_]\w*")

# What later versions of the language begin statements and clauses with.
LATER = ("where", "optional", "then", "train", "save", "activate", "use")
RESERVED = ("share", "untie", "at", "init", "lr", "stack", "parallel", "average", "fuse")

_FRIENDLY = {
    "NAME": "a name",
    "NUMBER": "a number",
    "TEXT": "a text in double quotes",
    "REGEX": "a /regex/",
    "GLOB": "a name or glob",
    "TRUTH": "true or false",
    "SIGN": "+ or -",
    "TIMES": "@, / or %",
    "STAR": "*",
    "POWER": "**",
    "COMPARISON": "a comparison",
    "TRANSPOSED": "ᵀ",
    "$END": "the end",
    "_SEMI": ";",
}


def load(path: str | Path) -> ast.Spec:
    """The spec in a file. Raises ArtifactError (E501) if it cannot be read, SpecSyntaxError."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        refuse("E501", f"cannot read {path}: {error.strerror}", hint="check the path")
    return parse_bytes(data, str(path))


def parse_bytes(data: bytes, name: str) -> ast.Spec:
    """The spec in some bytes, which must be UTF-8 (E001)."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(
            "E001",
            f"{name} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}",
            hint="save the file as UTF-8",
        )
    return parse(text, name)


def parse(text: str, name: str = "<spec>") -> ast.Spec:
    """The spec that a text is. Raises SpecSyntaxError with every syntax error that was found."""
    source = Source(name, text)
    _guard(source)
    try:
        spec = _parsed(text, source)
    except SurgeryError as first:
        report = Report()
        report.extend(first.diagnostics)
        report.extend(_further(source, first.diagnostics))
        raise error_of(report.found) from None
    if not spec.statements:
        refuse(
            "E005",
            "the spec is empty",
            hint="a spec is at least one statement: `match /q_proj|v_proj/ apply lora(r=8)`",
        )
    return spec


# ------------------------------------------------------------------------------------ guards


def _guard(source: Source) -> None:
    size = len(source.text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        refuse("E002", f"the spec has {size:,} bytes; {MAX_BYTES:,} is the most")
    depth = 0
    for at, character in enumerate(source.text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth = max(0, depth - 1)
        if depth > MAX_DEPTH:
            refuse("E002", f"nested deeper than {MAX_DEPTH}", Span(source, at, at + 1))


def _guard_depth(node: Any) -> None:
    """Refuse a tree too deep to be walked, such as a sum of a thousand terms."""
    level: list[Any] = [node]
    for _ in range(3 * MAX_DEPTH):
        level = [c for n in level for c in _children(n)]
        if not level:
            return
    refuse("E002", "this expression is too long", level[0].span, hint="name its parts with `let`")


def _children(node: Any) -> Iterator[Any]:
    for name in type(node).__dataclass_fields__:
        value = getattr(node, name)
        for child in value if isinstance(value, tuple) else (value,):
            if isinstance(child, ast.Node):
                yield child


# ------------------------------------------------------------------------------------ parsing


@lru_cache(maxsize=1)
def _parser() -> Any:
    return load_parser()


def _parsed(text: str, source: Source) -> ast.Spec:
    from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

    try:
        tree = _parser().parse(text)
    except UnexpectedToken as error:
        raise error_of([_unexpected_token(error, source)]) from None
    except UnexpectedCharacters as error:
        raise error_of([_unexpected_character(error, source)]) from None
    except UnexpectedInput:
        refuse("E003", "the spec ends in the middle of a statement", _end(source))
    spec = _built(tree, source)
    _guard_depth(spec)
    return spec


def _built(tree: Any, source: Source) -> ast.Spec:
    """The syntax tree, from the leaves up and without recursion."""
    from lark import Tree

    made: dict[int, Any] = {}
    for part in tree.iter_subtrees():
        children = [made[id(c)] if isinstance(c, Tree) else c for c in part.children]
        empty = part.meta.empty
        start, end = (0, 0) if empty else (part.meta.start_pos, part.meta.end_pos)
        made[id(part)] = BUILDERS[part.data](Span(source, start, end), children)
    return made[id(tree)]


def _further(source: Source, found: tuple[Diagnostic, ...]) -> Iterator[Diagnostic]:
    """Syntax errors in the statements that follow the first; each begins its line."""
    at = _offset(found[0])
    while True:
        match = _STATEMENT.search(source.text, at)
        if match is None:
            return
        blank = re.sub(r"[^\n]", " ", source.text[: match.start()])
        try:
            _parsed(blank + source.text[match.start() :], source)
            return
        except SurgeryError as error:
            yield from error.diagnostics
            at = max(match.end(), _offset(error.diagnostics[0]))


def _offset(diagnostic: Diagnostic) -> int:
    return diagnostic.span.start if diagnostic.span is not None else 0


# ------------------------------------------------------------------------------------- errors


def _unexpected_token(error: Any, source: Source) -> Diagnostic:
    token = error.token
    if token.type == "$END":
        return Diagnostic(
            "E003",
            "the spec ends in the middle of a statement",
            _end(source),
            hint=_expected(error.accepts or error.expected),
        )
    start = token.start_pos
    return _unexpected(source, start, str(token), error.accepts or error.expected)


def _unexpected_character(error: Any, source: Source) -> Diagnostic:
    start = error.pos_in_stream
    word = _WORD.match(source.text, start)
    return _unexpected(
        source, start, word.group() if word else source.text[start], error.allowed or ()
    )


def _unexpected(source: Source, start: int, text: str, expected: Any) -> Diagnostic:
    word = _WORD.match(source.text, start)
    text = word.group() if word else text
    span = Span(source, start, start + len(text))
    if text in LATER:
        return Diagnostic("E004", f"`{text}` is not part of this version of the language", span)
    words = [str(e).lower() for e in expected if str(e) not in _FRIENDLY]
    near = get_close_matches(text, words, 1)
    label = f"did you mean `{near[0]}`?" if near else ""
    return Diagnostic("E003", f"unexpected `{text}`", span, label, _expected(expected))


def _expected(terminals: Any) -> str:
    names = sorted({_FRIENDLY.get(str(t), _symbol(str(t))) for t in terminals})
    return f"expected {', '.join(names)}" if names else ""


@lru_cache(maxsize=256)
def _symbol(terminal: str) -> str:
    """The text of a terminal that is one: `LBRACE` is `{`, `MATCH` is `match`."""
    for definition in _parser().terminals:
        if definition.name == terminal and definition.pattern.type == "str":
            return f"`{definition.pattern.value}`"
    return terminal.lower()


def _end(source: Source) -> Span:
    end = len(source.text.rstrip())
    return Span(source, max(0, end - 1), max(end, 1))
