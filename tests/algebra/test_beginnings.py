"""How parameters begin: one stream each, whatever is drawn before it, and the right spread."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.algebra.beginnings import DISTRIBUTIONS, draw, drawn_again, stream

NAMES = [
    ("default", "layers.0.q", "A"),
    ("default", "layers.0.q", "B"),
    ("code", "layers.0.q", "A"),
]

CONTINUOUS = [name for name, row in DISTRIBUTIONS.items() if not row.told]


@given(st.permutations(range(len(NAMES))), st.integers(0, 2**64))
def test_a_stream_does_not_depend_on_what_is_drawn_before(order: list[int], seed: int) -> None:
    alone = [draw("normal", {}, (5, 3), stream(seed, *names)) for names in NAMES]
    mixed = {i: draw("normal", {}, (5, 3), stream(seed, *NAMES[i])) for i in order}
    assert all(torch.equal(mixed[i], tensor) for i, tensor in enumerate(alone))
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[0], alone[2])


@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_another_seed_is_another_stream(a: int, b: int) -> None:
    same = torch.equal(
        draw("normal", {}, (7,), stream(a, "A")), draw("normal", {}, (7,), stream(b, "A"))
    )
    assert same is (a == b)


def test_names_are_kept_apart() -> None:
    assert stream("a", "bc").initial_seed() != stream("ab", "c").initial_seed()


def test_the_global_generator_is_not_touched() -> None:
    before = torch.get_rng_state()
    for name in CONTINUOUS:
        draw(name, {}, (11, 7), stream(0, name))
    draw("places", {"rows": 11, "columns": 7}, (2, 5), stream(0, "places"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_draws_are_float32_on_the_cpu_whatever_the_default_is(name: str) -> None:
    expected = draw(name, {}, (11, 7), stream(3, name))
    torch.set_default_dtype(torch.float64)
    try:
        found = draw(name, {}, (11, 7), stream(3, name))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert found.device.type == "cpu"
    assert torch.equal(found, expected)


FAN_IN, FAN_OUT = 113, 211

# The standard deviation that each is known for, on a matrix [FAN_OUT, FAN_IN].
SPREADS: list[tuple[str, Mapping[str, float], float, float]] = [
    ("uniform", {"low": -2, "high": 4}, 1.0, 6 / math.sqrt(12)),
    ("normal", {"mean": 3, "std": 2}, 3.0, 2.0),
    ("kaiming_uniform", {"a": math.sqrt(5)}, 0.0, 1 / math.sqrt(3 * FAN_IN)),
    ("paired_kaiming_uniform", {"a": math.sqrt(5)}, 0.0, 1 / math.sqrt(3 * FAN_IN)),
    ("kaiming_normal", {}, 0.0, math.sqrt(2 / FAN_IN)),
    ("xavier_uniform", {"gain": 2}, 0.0, 2 * math.sqrt(2 / (FAN_IN + FAN_OUT))),
    ("xavier_normal", {}, 0.0, math.sqrt(2 / (FAN_IN + FAN_OUT))),
    ("standard_uniform", {}, 0.0, 1.0),
]


def test_every_distribution_has_its_spread() -> None:
    assert {name for name, *_ in SPREADS} == {*CONTINUOUS}


@pytest.mark.parametrize(("name", "arguments", "mean", "std"), SPREADS)
def test_the_spread_is_the_one_it_is_known_for(
    name: str, arguments: Mapping[str, float], mean: float, std: float
) -> None:
    found = draw(name, arguments, (FAN_OUT, FAN_IN), stream(1, name))
    assert float(found.mean()) == pytest.approx(mean, abs=0.03 * std)
    assert float(found.std()) == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("uniform", {"low": 2.0}, "low is above high"),
        ("normal", {"std": -1.0}, "std = -1 is below 0"),
        ("xavier_normal", {"gain": -0.5}, "gain = -0.5 is below 0"),
        ("kaiming_uniform", {"a": 1e31}, "a = 1e+31 is too large"),
        ("dealt", {"numbers": 0.0}, "numbers = 0 is below 1"),
        ("tally", {"cards": 0.0}, "cards = 0 is below 1"),
        ("uniform", {}, ""),
    ],
)
def test_arguments_that_torch_would_not_take_have_an_objection(
    name: str, arguments: Mapping[str, float], reason: str
) -> None:
    row = DISTRIBUTIONS[name]
    assert row.objection({**row.arguments, **arguments}) == reason


@given(st.integers(1, 13), st.integers(1, 11), st.data())
def test_places_are_different_and_in_the_matrix(
    rows: int, columns: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, rows * columns))
    sizes = {"rows": rows, "columns": columns}
    found = draw("places", sizes, (2, count), stream(data.draw(st.integers(0, 99)), "P"))
    assert found.dtype == torch.int32
    flat = found[0].long() * columns + found[1]
    assert len({int(place) for place in flat}) == count
    assert int(found.min()) >= 0
    assert int(found[0].max()) < rows
    assert int(found[1].max()) < columns


def test_places_of_a_seed_are_those_of_torch() -> None:
    sizes = {"rows": 5, "columns": 7}
    chosen = torch.randperm(35, generator=torch.Generator().manual_seed(3))[:11]
    wanted = torch.stack([chosen // 7, chosen % 7])
    for name in ("P", "Q"):
        assert torch.equal(drawn_again("places", sizes, (2, 11), 3, name), wanted.int())


@given(st.integers(1, 11), st.integers(1, 60), st.integers(0, 99))
def test_all_hands_are_one_deck_in_which_each_number_is_as_often_as_another(
    count: int, cards: int, seed: int
) -> None:
    deck = {"numbers": count, "cards": cards}
    cut = cards // 3
    first = drawn_again("dealt", {**deck, "first": 0}, (cut,), seed, "A")
    rest = drawn_again("dealt", {**deck, "first": cut}, (1, cards - cut), seed, "B")
    whole = torch.cat([first, rest[0]])
    assert whole.dtype == torch.int32
    tally = torch.bincount(whole, minlength=count)
    assert int(tally.max() - tally.min()) <= 1
    counted = drawn_again("tally", {"cards": cards}, (count,), seed, "C")
    assert torch.equal(counted, tally.float())
    again = drawn_again("dealt", {**deck, "first": cards}, (cut,), seed, "A")
    assert torch.equal(again, first)  # behind the last card comes the first


def test_a_deck_is_shuffled_as_numpy_does() -> None:
    generator = numpy.random.default_rng(5)
    more = generator.choice(7, size=3, replace=False)
    deck = numpy.concatenate([numpy.repeat(numpy.arange(7), 2), more])
    generator.shuffle(deck)
    found = drawn_again("dealt", {"numbers": 7, "cards": 17, "first": 0}, (17,), 5, "A")
    assert torch.equal(found, torch.tensor(deck, dtype=torch.int32))
