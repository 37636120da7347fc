"""Text to syntax tree. No text makes it raise anything but `SurgeryError`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, cast

from lark.exceptions import UnexpectedInput

from surgery.errors import Diagnostic, Report, Source, Span, error_of, refuse
from surgery.language import syntax as ast
from surgery.language.build import BUILDERS
from surgery.language.outline import RESERVED, Outline, Piece, outline
from surgery.language.tables import load_parser

MAX_BYTES = 256 * 1024
MAX_WORDS = 10_000  # of words and signs; the parser takes about 50 µs for each
MAX_DEPTH = 100

_WORDS = re.compile(r"""\#[^\n]*|"[^"\n]*"|\w+|[^\w\s]""")

# The tree of an expression may be deeper than its brackets, such as a sum of many terms. Passes
# over it recurse, up to four calls a level, and a statement has some levels of its own.
_MAX_LEVELS = MAX_DEPTH + 20
_MAX_FINDINGS = 40


@cache
def _parser() -> Any:
    """The parser, from the first text on: to read its tables takes as long as many an import."""
    return load_parser()


def load(path: str | Path) -> ast.Spec:
    """The spec in a file, as written; `surgery.include` has what it uses from other files.

    Raises ArtifactError (E501) if it cannot be read, SpecSyntaxError.
    """
    return parse_bytes(read_bytes(path), str(path))


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file, or its beginning where it is longer than a spec may be (E501)."""
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        refuse("E501", f"cannot read {path}: {reason}", hint=_nearest_file(Path(path)))


def _nearest_file(path: Path) -> str:
    near = nearest_name(path)
    return f"did you mean `{path.with_name(near)}`?" if near else "check the path"


def nearest_name(path: Path) -> str:
    """The spec beside a path that cannot be read whose name is the nearest, or ""."""
    try:
        beside = [p.name for p in path.parent.glob("*.peft")]
    except (OSError, ValueError):
        return ""
    return next(iter(get_close_matches(path.name, sorted(beside), 1)), "")


def parse_bytes(data: bytes, name: str, words: int = MAX_WORDS) -> ast.Spec:
    """The spec in some bytes, which must be UTF-8 (E001); raises SpecSyntaxError as `parse`."""
    return parse(decoded(data, name), name, words)


def decoded(data: bytes, name: str) -> str:
    """The text in some bytes. Raises SpecSyntaxError: E001 (not UTF-8), E002 (too long)."""
    _guard_size(len(data))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(
            "E001",
            f"{name} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}",
            hint="save the file as UTF-8",
        )
    return text.removeprefix("\ufeff")  # a mark that some editors begin a file with


def parse(text: str, name: str = "<spec>", words: int = MAX_WORDS) -> ast.Spec:
    """The spec that a text is, of at most so many words and signs.

    Raises SpecSyntaxError with every syntax error that was found: E001 (not UTF-8), E002 (too long
    or too deep), E003 (unexpected), E005 (empty), E006 (not closed), E008
    (an argument without its name).
    """
    source = Source(name, text)
    whole = _guard(source, words)
    spec, found = _attempt(source, Piece(0, len(text)), whole)
    report = Report()
    report.extend(found)
    if spec is None:
        report.extend(_further(source, whole, _offset(found[0])))
    if report.failed or spec is None:
        raise error_of(sorted(report.found, key=_offset))
    if not spec.statements:
        refuse(
            "E005",
            "the spec is empty",
            Span(source, 0, 0),
            hint="a spec is at least one statement: `match /q_proj|v_proj/ apply METHOD(r=8)`",
        )
    return spec


_ACTIVATE = "activate "


def parse_live(text: str, name: str = "<activate>") -> ast.Expression:
    """What would stand behind `activate`. Raises SpecSyntaxError as `parse`."""
    spec = parse(f"{_ACTIVATE}{text}", name)
    match spec.statements:
        case (ast.Activate(expression),):
            return expression
        case _:
            refuse(
                "E003",
                "this is more than one statement",
                spec.statements[-1].span,
                hint="write a sum of adapters, such as `0.7*a + 0.3*b`",
            )


@dataclass(frozen=True, slots=True)
class Token:
    """A word or sign of a text, under the name that the grammar's tables have for its kind."""

    kind: str
    start: int
    end: int


def tokens(text: str) -> Iterator[Token]:
    """All of a text that is neither space nor a comment; it must be one that `parse` reads."""
    for token in _parser().parse_interactive(text).iter_parse():
        yield Token(str(token.type), token.start_pos, token.end_pos)


# ------------------------------------------------------------------------------------ guards


def _guard(source: Source, words: int) -> Outline:
    """What can be refused before parsing: the size, and the depth of brackets."""
    try:
        _guard_size(len(source.text.encode("utf-8")))
    except UnicodeEncodeError as error:
        where = Span(source, error.start, error.start + 1)
        message = "half of a surrogate pair is no character"
        refuse("E001", message, where, hint="leave it out")
    if sum(1 for _ in _WORDS.finditer(source.text)) > words:
        refuse("E002", f"the spec has more than {words:,} words and signs", hint=_SHORTER)
    whole = outline(source.text)
    deep = whole.too_deep(MAX_DEPTH)
    if deep is not None:
        where = Span(source, deep, deep + 1)
        refuse("E002", f"nested deeper than {MAX_DEPTH}", where, hint="name its parts with `let`")
    return whole


def _guard_size(size: int) -> None:
    if size > MAX_BYTES:
        refuse(
            "E002",
            f"the spec is longer than {MAX_BYTES:,} bytes",
            hint=_SHORTER,
        )


_SHORTER = "a selector takes many modules at once: `match /q_proj|v_proj/`"


def _too_deep(spec: ast.Spec) -> Iterator[Diagnostic]:
    """Whether the tree is too deep to be walked, such as a sum of a thousand terms."""
    level: list[ast.Node] = [spec]
    for _ in range(_MAX_LEVELS):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    hint = "name its parts with `let`"
    yield Diagnostic("E002", "this expression is too long", level[0].span, hint=hint)


def _children(node: ast.Node) -> Iterator[ast.Node]:
    for name in node.__dataclass_fields__:
        value: Any = getattr(node, name)
        for child in cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,):
            if isinstance(child, ast.Node):
                yield child


# ------------------------------------------------------------------------------------ parsing


def _attempt(
    source: Source, piece: Piece, whole: Outline
) -> tuple[ast.Spec | None, list[Diagnostic]]:
    """The spec that a piece of the source is, or None if it is not one; and what is wrong."""
    try:
        tree = _parser().parse(source.text[piece.start : piece.end])
    except UnexpectedInput as error:
        from surgery.language.complaints import complaint

        return None, [complaint(error, source, piece.start, whole.unclosed(), _parser())]
    parts = list(tree.iter_subtrees())
    found = sorted(_misused(parts, source, piece.start), key=_offset)
    spec = _built(parts, source, piece.start)
    return spec, [*found, *_too_deep(spec)]


def _built(parts: Sequence[Any], source: Source, base: int) -> ast.Spec:
    """The syntax tree, from the leaves up and without recursion; `parts` end with the root."""
    made: dict[int, Any] = {}
    for part in parts:
        children = [made.get(id(child), child) for child in part.children]
        made[id(part)] = BUILDERS[part.data](_span(part, source, base), children)
    return made[id(parts[-1])]


def _span(part: Any, source: Source, base: int) -> Span:
    if part.meta.empty:
        return Span(source, base, base)
    return Span(source, base + part.meta.start_pos, base + part.meta.end_pos)


def _further(source: Source, whole: Outline, at: int) -> Iterator[Diagnostic]:
    """What else is wrong: syntax errors at `at` or after it, and what the grammar lets through."""
    count, good_until = 1, 0
    for piece in whole.pieces():
        known = piece.start < at <= piece.end  # where the parser has stopped already
        if piece.start < good_until or known:
            continue
        spec, found = _attempt(source, piece, whole)
        if spec is not None:
            good_until = piece.end
        elif piece.start < at:
            continue  # its error is the one that is known
        else:
            at = max(_offset(found[0]), piece.start + 1)
        yield from found
        count += len(found)
        if count >= _MAX_FINDINGS:
            return


def _offset(diagnostic: Diagnostic) -> int:
    return diagnostic.span.start if diagnostic.span is not None else 0


# ---------------------------------------------------------------------------- after the grammar


def _misused(parts: Iterable[Any], source: Source, base: int) -> Iterator[Diagnostic]:
    """What the grammar lets through so that it can be said better here."""
    for part in parts:
        if part.data == "arguments_of_method":
            yield from _unnamed(part, source, base)
        # The name of a config field is another program's, so any word will do.
        for child in part.children[1 if part.data == "field" else 0 :]:
            if getattr(child, "type", "") == "NAME" and child in RESERVED:
                yield Diagnostic(
                    "E003",
                    f"`{child}` is reserved: it cannot be a name",
                    Span(source, base + child.start_pos, base + child.end_pos),
                    hint="choose another name",
                )


def _unnamed(part: Any, source: Source, base: int) -> Iterator[Diagnostic]:
    for child in part.children:
        if child.data != "keyword":
            span = _span(child, source, base)
            hint = f"write the name of the argument before it: `NAME = {span.text}`"
            yield Diagnostic("E008", "arguments are given by name", span, hint=hint)
