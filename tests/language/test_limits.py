"""Bytes, files, and the limits to what is parsed."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.errors import ArtifactError, SpecSyntaxError
from surgery.language import syntax as ast
from surgery.language.parse import MAX_BYTES, MAX_DEPTH, MAX_WORDS, load, parse, parse_bytes


def value_of(text: str) -> ast.Expression:
    (statement,) = parse(f"let v = {text}").statements
    assert isinstance(statement, ast.Let)
    return statement.value


def match_of(text: str) -> ast.Match:
    (statement,) = parse(text).statements
    assert isinstance(statement, ast.Match)
    return statement


def test_equal_texts_are_equal_trees() -> None:
    assert parse("match q apply m(r=8)") == parse("match  q\napply m( r = 8 ) # the same")
    assert hash(parse("let a = 1")) == hash(parse("let a=1"))


def test_bytes_and_files(tmp_path: Path) -> None:
    path = tmp_path / "a.peft"
    path.write_bytes("\ufefflet a = 1\r\nlet b = 2".encode())
    assert len(load(path).statements) == len(load(str(path)).statements) == 2
    assert load(path).statements[1].span.source.name == str(path)


@pytest.mark.parametrize("name", ["missing.peft", ".", "a\0b"])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        load(tmp_path / name)
    assert [one.code for one in caught.value.diagnostics] == ["E501"]


def code_of(data: bytes) -> str:
    with pytest.raises(SpecSyntaxError) as caught:
        parse_bytes(data, "a.peft")
    return str(caught.value)


def test_bytes_that_are_no_text() -> None:
    assert "E001" in code_of(b"let a = \xff")
    assert "0xff at offset 8" in code_of(b"let a = \xff")
    with pytest.raises(SpecSyntaxError, match="E001"):
        parse("let a = \ud800")


def test_the_size_is_counted_in_bytes() -> None:
    comment = "# " + "é" * ((MAX_BYTES - 20) // 2)
    assert parse(f"let a = 1 {comment}").statements
    with pytest.raises(SpecSyntaxError, match="E002"):
        parse(f"let a = 1 {comment}{'é' * 10}")
    assert "E002" in code_of(b"#" * (MAX_BYTES + 1))


def test_nesting() -> None:
    def nested(depth: int) -> str:
        return "let a = " + "(" * depth + "1" + ")" * depth

    assert parse(nested(MAX_DEPTH)).statements
    with pytest.raises(SpecSyntaxError, match="E002") as caught:
        parse(nested(MAX_DEPTH + 1))
    span = caught.value.diagnostics[0].span
    assert span is not None
    assert (span.text, span.start) == ("(", len("let a = ") + MAX_DEPTH)


def test_brackets_in_comments_texts_and_regexes_do_not_nest() -> None:
    many = "(" * 2 * MAX_DEPTH
    assert parse(f'let a = f("{many}") # {many}').statements
    escaped = r"\(" * 2 * MAX_DEPTH
    selector = match_of(f"match /{escaped}/ apply m()").selection.selector
    assert selector.span.text == f"/{escaped}/"


CHAINS = {
    "signs": "let a = " + "- " * 5000 + "1",
    "powers": "let a = 2" + " ** 2" * 5000,
    "sums": "let a = 1" + " + 1" * 5000,
    "nots": "let a = " + "not " * 5000 + "b",
    "conditionals": "let a = " + "1 if b else " * 5000 + "1",
    "transposes": "let a = A" + "ᵀ" * 5000,
    "subscripts": "let a = A" + "[:]" * 5000,
    "branches": "method m() on matrix { if a == 1 { } " + "else if a == 1 { } " * 5000 + "}",
}


@pytest.mark.parametrize("text", CHAINS.values(), ids=CHAINS)
def test_long_chains_are_refused(text: str) -> None:
    with pytest.raises(SpecSyntaxError) as caught:
        parse(text)
    assert [one.code for one in caught.value.diagnostics] == ["E002"]


def test_a_long_list_is_no_chain() -> None:
    assert isinstance(value_of("f(" + "1, " * 3000 + "1)"), ast.Call)
    assert len(parse("match q apply m()\n" * 1000).statements) == 1000


def test_words_are_counted() -> None:
    text = "match q apply m()\n" * (MAX_WORDS // 6)
    assert parse(text + "# a comment is one, however long it is").statements
    with pytest.raises(SpecSyntaxError, match="10,000 words and signs"):
        parse(text + "match q apply m()")
    assert parse(text + "match q apply m()", words=2 * MAX_WORDS).statements
