"""What a misspelt name may have meant: up to three names, the best of them in the question."""

from __future__ import annotations

from collections import Counter
from difflib import SequenceMatcher

from hypothesis import given
from hypothesis import strategies as st

from surgery.model.nearest import closest

NAMES = Counter({"q_proj": 12, "k_proj": 12, "v_proj": 12, "o_proj": 3, "gate": 12, "norm": 1})
WORDS = st.text("abcdef_", min_size=1, max_size=7)


def test_a_name_that_is_nearer_than_the_others_is_asked_for_alone() -> None:
    near = closest("q_porj", NAMES)
    assert near.names[0] == "q_proj"
    assert near.best == ("q_proj",)
    assert near.question("12 modules") == "did you mean `q_proj`? 12 modules"
    assert near.others(NAMES) == "near as well: `k_proj` (12), `v_proj` (12)"


def test_names_that_are_as_near_are_asked_for_together() -> None:
    near = closest("x_proj", NAMES)
    assert near.best == ("q_proj", "k_proj", "v_proj")
    assert near.question("no matter") == "did you mean `q_proj`, `k_proj` or `v_proj`?"
    assert near.others(NAMES) == ""
    two = Counter({"x_one": 1, "y_one": 2})
    assert closest("z_one", two).question() == "did you mean `y_one` or `x_one`?"


def test_nothing_is_near() -> None:
    for names in (NAMES, Counter[str]()):
        near = closest("embedding", names)
        assert near.names == near.best == ()
        assert near.question("what") == near.others(names) == ""


@given(WORDS, st.dictionaries(WORDS, st.integers(1, 9)))
def test_no_other_name_is_nearer(name: str, known: dict[str, int]) -> None:
    counts = Counter(known)
    near = closest(name, counts)
    assert len(near.names) <= 3
    assert near.best == near.names[: len(near.best)]
    ratios = {found: SequenceMatcher(None, found, name).ratio() for found in counts}
    close = [r for r in ratios.values() if r >= 0.6]
    assert [ratios[n] for n in near.names] == sorted(close, reverse=True)[:3]
