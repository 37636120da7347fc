"""Selectors against Python's `re`, their alternatives, and what is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from surgery.errors import Diagnostic, Report, Source, Span
from surgery.language import syntax as ast
from surgery.language.patterns import MAX_STATES, Pattern, compile_selector

LINE = "match {} apply m()"


def node_of(text: str) -> ast.Regex | ast.Glob:
    """The selector that `text` is, standing in a statement so that spans have an offset."""
    source = Source("<spec>", LINE.format(text))
    span = Span(source, 6, 6 + len(text))
    if text.startswith("/"):
        return ast.Regex(text[1:-1], span=span)
    return ast.Glob(text, span=span)


def compiled(text: str) -> Pattern:
    report = Report()
    found = compile_selector(node_of(text), report)
    assert found is not None, report.found
    return found


def refused(text: str) -> Diagnostic:
    report = Report()
    assert compile_selector(node_of(text), report) is None
    (found,) = report.found
    assert found.code == "E007"
    assert found.hint
    return found


def tails(path: str) -> list[str]:
    names = path.split(".")
    return [".".join(names[i:]) for i in range(len(names))]


# ------------------------------------------------------------------------------ semantics

PROJECTION = "layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("/q_proj/", True),
        (r"/self_attn\.q_proj/", True),
        ("/q/", False),
        ("/.*proj/", True),
        ("/proj/", False),
        ("/q_proj|v_proj/", True),
        (r"/layers\.\d+\..*/", True),
        ("/[qv]_proj/", True),
        ("/[^k]_proj/", True),
        ("/[^q]_proj/", False),
        ("/q_pro?j{1}/", True),
        ("/(?:q|k)_(proj)/", True),
        ("q_proj", True),
        ("self_attn.q_proj", True),
        ("self_attn.*", True),
        ("layers.*", False),
        ("layers.**", True),
        ("**", True),
        ("*", True),
        ("*_proj", True),
        ("{q,v}_proj", True),
        ("{k,v}_proj", False),
        ("layers.{0,{3,4}}.**", True),
        ("attn.q_proj", False),
    ],
)
def test_the_rule_of_the_tail(text: str, matches: bool) -> None:
    assert compiled(text).matches_tail(PROJECTION) is matches


def test_the_whole_path() -> None:
    assert compiled("layers.**").matches_whole(PROJECTION)
    assert not compiled("q_proj").matches_whole(PROJECTION)
    assert compiled("q_proj").matches_whole("q_proj")


# -------------------------------------------------------------------------- against `re`

LETTERS = "ab_.0"
ATOMS = ["a", "b", "_", "0", r"\.", ".", r"\d", r"\w", r"\D", "[ab]", "[^a]", "[a-b_]", r"[\d.]"]


def _grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    repeats = st.sampled_from(["?", "*", "+", "{2}", "{0,2}", "{1,}", "{0}"])
    group = st.sampled_from(["({})", "(?:{})"])
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.builds(str.format, group, st.lists(inner, max_size=3).map("|".join)),
        st.builds("({}){}".format, inner, repeats),
    )


regexes = st.recursive(st.sampled_from(ATOMS), _grown, max_leaves=8)
paths = st.text(alphabet=LETTERS, max_size=9)


@given(regexes, st.lists(paths, min_size=1, max_size=8))
def test_regexes_agree_with_re(text: str, many: list[str]) -> None:
    pattern = compile_selector(node_of(f"/{text}/"), Report())
    assume(pattern is not None)
    assert pattern is not None
    oracle = re.compile(text, re.DOTALL | re.ASCII)
    for path in many:
        assert pattern.matches_whole(path) == bool(oracle.fullmatch(path))
        assert pattern.matches_tail(path) == any(map(oracle.fullmatch, tails(path)))


def _glob_grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda all_: f"{{{','.join(all_)}}}"),
    )


globs = st.recursive(st.sampled_from([*"ab_0.", "*", "**"]), _glob_grown, max_leaves=8)
TRANSLATED = {"*": "[^.]*", "{": "(?:", "}": ")", ",": "|", ".": r"\."}


def translated(glob: str) -> str:
    parts: list[str] = re.findall(r"\*\*|.", glob)
    return "".join(".*" if part == "**" else TRANSLATED.get(part, part) for part in parts)


@given(globs, st.lists(paths, min_size=1, max_size=8))
def test_globs_agree_with_re(glob: str, many: list[str]) -> None:
    assume("***" not in glob)
    pattern = compiled(glob)
    oracle = re.compile(translated(glob), re.DOTALL)
    for path in many:
        assert pattern.matches_whole(path) == bool(oracle.fullmatch(path))
        assert pattern.matches_tail(path) == any(map(oracle.fullmatch, tails(path)))


# -------------------------------------------------------------------------- alternatives


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("/q_porj|v_proj/", ["7:q_porj", "14:v_proj"]),
        ("/a|b|c/", ["7:a", "9:b", "11:c"]),
        ("/(a|b)/", ["8:a", "10:b"]),
        ("/(a|b)c/", ["7:(a|b)c"]),
        ("/q/", ["7:q"]),
        ("{up,down}_proj", ["7:up", "10:down"]),
        ("x.{a,b}.{c,d}", ["9:a", "11:b", "15:c", "17:d"]),
        ("{a,{b,c}d}", ["7:a", "10:b", "12:c"]),
        ("mlp.*", ["6:mlp.*"]),
    ],
)
def test_where_alternatives_stand(text: str, places: list[str]) -> None:
    found = compiled(text).alternatives
    assert [f"{span.start}:{span.text}" for _, span in found] == places


def test_what_an_alternative_matches() -> None:
    (up, _), (down, _) = compiled("{up,down}_proj").alternatives
    assert up.matches_tail("mlp.up_proj")
    assert not up.matches_tail("mlp.down_proj")
    assert down.matches_tail("mlp.down_proj")
    assert (up.literal, down.literal) == (None, None) or up.literal != down.literal


@given(st.one_of(regexes.map(lambda r: f"/{r}|b/"), globs), st.lists(paths, max_size=8))
def test_alternatives_together_are_the_pattern(text: str, many: list[str]) -> None:
    pattern = compile_selector(node_of(text), Report())
    assume(pattern is not None)
    assert pattern is not None
    for path in many:
        parts = [one.matches_tail(path) for one, _ in pattern.alternatives]
        assert any(parts) == pattern.matches_tail(path)


@pytest.mark.parametrize(
    ("text", "literal"),
    [
        ("/q_proj/", "q_proj"),
        (r"/self\.q/", "self.q"),
        ("self_attn.q", "self_attn.q"),
        ("/[q]/", "q"),
        ("/q?/", None),
        ("/q|v/", None),
        ("mlp.*", None),
        ("/./", None),
    ],
)
def test_literals(text: str, literal: str | None) -> None:
    assert compiled(text).literal == literal


# -------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("/(a*)*b/", "7:(a*)*"),
        ("/x(a+b)+/", "8:(a+b)+"),
        ("/((a|b*)c){2,}/", "7:((a|b*)c){2,}"),
        ("/a**/", "7:a**"),
        ("/a+?/", "7:a+?"),
        ("/a{1,99999999}/", "8:{1,99999999}"),
        ("/a{1,99999}/", "7:a{1,99999}"),
        ("/ab{3,2}/", "9:{3,2}"),
        ("/a{x}/", "8:{x}"),
        ("/a{,3}/", "8:{,3}"),
        ("/a{2/", "8:{"),
        ("/*a/", "7:*"),
        ("/(|+)/", "9:+"),
        ("/^a/", "7:^"),
        ("/a$/", "8:$"),
        ("/a(?=b)/", "8:(?="),
        ("/(?P<n>a)/", "7:(?P"),
        (r"/(a)\1/", r"10:\1"),
        (r"/a\b/", r"8:\b"),
        ("/(ab/", "7:("),
        ("/ab)/", "9:)"),
        ("/a()/", "8:()"),
        ("/[ab/", "7:["),
        ("/x[b-a]/", "9:b-a"),
        (r"/[a-\d]/", r"8:a-\d"),
        (r"/[^\D]/", r"9:\D"),
        ("{a,b", "6:{"),
        ("a}", "7:}"),
        ("{a,{b}", "6:{"),
    ],
)
def test_what_cannot_be_compiled(text: str, place: str) -> None:
    span = refused(text).span
    assert span is not None
    assert f"{span.start}:{span.text}" == place


ADVERSE = {
    "alternatives": "(a|a)*b",
    "optionals": "(a?){30}a{30}",
    "dots": "(.?){4900}",
    "windows": "(.{0,90}a?){90}",
    "choices": "(aa|a|ab|ba|.?.?){300}",
    "memory": "(a|b)*a(a|b){200}",
}


@pytest.mark.parametrize("text", ADVERSE.values(), ids=ADVERSE)
def test_adverse_patterns_end(text: str) -> None:
    pattern = compiled(f"/{text}/")
    many = ["a" * 40 + "." + format(i, "012b").translate({48: "a", 49: "b"}) for i in range(500)]
    assert isinstance(sum(map(pattern.matches_tail, many)), int)


HUGE = {
    "nested": "(((a{9999}){9999}){9999}){9999}",
    "nothing": "(a{0}){99999}",
    "deep": "(" * 101 + "a" + ")" * 101,
    "long": "a" * (MAX_STATES + 1),
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_huge_patterns_are_refused(text: str) -> None:
    refused(f"/{text}/")


def test_huge_globs_are_refused() -> None:
    refused("{" * 101 + "a" + "}" * 101)
    refused("{" + ",".join(["a"] * 1000) + "}" + "b" * 3000)
    refused("a" * (MAX_STATES + 1) + "*")


def test_a_pattern_forgets_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.language.patterns._MAX_MEMBERS", 3)
    pattern = compiled("/(a|b)*a(a|b){3}/")
    for path in ("abbab.abab", "bbbbb", "a.b.aaaa", ""):
        oracle = re.compile("(a|b)*a(a|b){3}")
        assert pattern.matches_tail(path) == any(map(oracle.fullmatch, tails(path)))
