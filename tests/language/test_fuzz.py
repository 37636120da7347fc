"""No text and no bytes make the parser raise anything but what it promises."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import example, given
from hypothesis import strategies as st

from surgery.algebra.mentions import nodes
from surgery.errors import Diagnostic, Report, SpecSyntaxError
from surgery.language import syntax as ast
from surgery.language.parse import parse, parse_bytes
from surgery.language.patterns import compile_selector
from surgery.resources import specs_dir

CORPUS = [path.read_text(encoding="utf-8") for path in sorted(specs_dir().rglob("*.peft"))]

WORDS = (
    *("match", "in", "except", "apply", "expect", "param", "let", "adapter", "method", "on", "if"),
    *("train", "frozen", "shared", "else", "format", "config", "tensor", "as", "true", "false"),
    *("and", "or", "not", "int", "float", "text", "bool", "where", "then", "save", "use", "init"),
    *("q_proj", "mlp.*", "{a,b}", "a", "W", "b", "x", "y", "8", "0.5", "1e-4", '"a"', '"', "/q|v/"),
    *("optional", "@query", "@layers", "@", "activate", "none"),
    *("(", ")", "[", "]", "{", "}", ",", ":", ";", "=", "==", "<", "+", "-", "*", "**", "/", "//"),
    *("%", "@", "'", "~", ".", "|", "&", "ᵀ", "#", "\\", "\n"),
)


def outcome(text: str) -> str:
    """What is said about a text, each finding of which must be complete and printable."""
    try:
        spec = parse(text)
    except SpecSyntaxError as error:
        findings = error.diagnostics
    else:
        return checked(spec, text)
    assert findings
    for one in findings:
        check(one, text)
    return "\n".join(map(str, findings))


def checked(spec: ast.Spec, text: str) -> str:
    assert spec.statements
    for statement in spec.statements:
        assert 0 <= statement.span.start < statement.span.end <= len(text)
        if isinstance(statement, ast.Match):
            report = Report()
            for pattern in nodes(statement.selection.selector):
                if isinstance(pattern, ast.Regex | ast.Glob):
                    compile_selector(pattern, report)
            for one in report.found:
                check(one, text)
    hash(spec)
    return repr(spec)


def check(found: Diagnostic, text: str) -> None:
    assert found.code.startswith("E0")
    assert found.message
    assert found.hint or found.label
    assert found.span is not None or found.code in ("E001", "E002", "E005")
    if found.span is not None:
        least = 0 if found.code == "E005" else 1  # an empty text has no place
        assert 0 <= found.span.start <= found.span.end - least <= len(text) - least
    assert str(found)
    assert found.as_json()


@given(st.text())
@example("\ud800")
@example("\0")
@example("match q apply m(\u2028=)")
@example("let a = ²")
@example("let a = ٣")
def test_any_text(text: str) -> None:
    outcome(text)


@given(st.binary())
def test_any_bytes(data: bytes) -> None:
    with suppress(SpecSyntaxError):
        parse_bytes(data, "a.peft")


@given(st.lists(st.sampled_from(WORDS), max_size=60))
def test_any_words(words: list[str]) -> None:
    outcome(" ".join(words))


@given(st.lists(st.sampled_from(WORDS), max_size=60))
def test_any_words_without_spaces(words: list[str]) -> None:
    outcome("".join(words))


@given(st.sampled_from(CORPUS), st.data())
def test_specs_with_a_stretch_replaced(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    inside = data.draw(st.one_of(st.just(""), st.sampled_from(WORDS), st.text(max_size=3)))
    outcome(text[:start] + inside + text[end:])


@given(st.sampled_from(CORPUS), st.sampled_from(CORPUS), st.data())
def test_the_beginning_of_one_spec_and_the_end_of_another(
    first: str, second: str, data: st.DataObject
) -> None:
    head = first[: data.draw(st.integers(0, len(first)))]
    outcome(head + second[data.draw(st.integers(0, len(second))) :])


@given(st.sampled_from(CORPUS))
def test_the_same_text_says_the_same(text: str) -> None:
    assert outcome(text) == outcome(text)
