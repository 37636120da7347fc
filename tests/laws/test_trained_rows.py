"""`train table[5, 9]`: an adapter's own copies of rows, put into the table where it is read."""

from __future__ import annotations

import copy
import pickle
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import moved
from torch import Tensor, nn

import surgery
from surgery.errors import SurgeryError

TOKENS, WIDTH = 13, 6
untyped = cast(Any, torch)


class Net(nn.Module):
    """A table of tokens, a head that may share it, and a kernel of four axes."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.image = nn.Conv2d(1, 5, (2, 3))
        cast(Any, self.image).to(memory_format=torch.channels_last)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [n] to [n, TOKENS + 5]."""
        x = self.table(tokens)
        seen = self.image(x[:, None, None].expand(-1, -1, 2, -1)).mean((-1, -2))
        return torch.cat((self.head(x), seen), 1)


def built(dtype: torch.dtype = torch.float32, tied: bool = False) -> Net:
    untyped.manual_seed(3)
    return Net(tied).to(dtype).eval()


def output(model: nn.Module) -> Tensor:
    return cast(Tensor, model(torch.arange(TOKENS))).detach()


def listed(rows: list[int]) -> str:
    return f"[{', '.join(map(str, rows))}]"


def written(rows: dict[str, list[int]], values: dict[str, Tensor], model: Net) -> Net:
    """The model without an adapter, with the values of the copies in its own rows."""
    with torch.no_grad():
        for name, some in rows.items():
            model.get_parameter(name)[some] = values[name].to(model.table.weight.dtype)
    return model


some_rows = st.lists(st.integers(-TOKENS, TOKENS - 1), min_size=1, unique_by=lambda i: i % TOKENS)
kernels = st.lists(st.integers(0, 4), min_size=1, unique=True)


@settings(max_examples=8, deadline=None)
@given(some_rows, kernels, st.sampled_from((torch.float64, torch.float32, torch.bfloat16)))
def test_the_laws(
    tmp_path_factory: pytest.TempPathFactory, some: list[int], few: list[int], dtype: torch.dtype
) -> None:
    model, tmp_path = built(dtype), tmp_path_factory.mktemp("out")
    at_first = output(model)
    own = {n: p for n, p in model.named_parameters()}
    compiled = surgery.compile(f"train table{listed(some)} train image.weight{listed(few)}", model)
    assert torch.equal(output(model), at_first)
    assert compiled.plan.trainable == len(some) * WIDTH + len(few) * 6
    moved(compiled)
    adapted = output(model)
    assert not torch.equal(adapted, at_first)
    values = {
        name: value
        for name in ("table", "image")
        for key, value in compiled.parameters().items()
        if key.startswith(name)
    }
    rows = {"table.weight": some, "image.weight": few}
    found = {f"{name}.weight": value for name, value in values.items()}
    assert torch.equal(adapted, output(written(rows, found, built(dtype))))
    for other in (copy.deepcopy(model), cast(nn.Module, pickle.loads(pickle.dumps(model)))):
        assert torch.equal(output(other), adapted)
    compiled.save(tmp_path)
    assert torch.equal(output(surgery.attach(tmp_path, built(dtype)).model), adapted)
    compiled.inverse.merge()
    assert torch.equal(output(model), adapted)
    compiled.inverse.unmerge()
    assert torch.equal(output(model), adapted)
    compiled.inverse.unload()
    assert torch.equal(output(model), at_first)
    assert all(model.get_parameter(name) is p for name, p in own.items())


def test_gradients_are_those_of_the_rows() -> None:
    model = built()
    surgery.compile("train table[9, 2, 5]", model)
    model(torch.arange(TOKENS)).square().sum().backward()
    (rows,) = (p for p in model.parameters() if p.requires_grad)
    whole = built()
    whole(torch.arange(TOKENS)).square().sum().backward()
    torch.testing.assert_close(rows.grad, cast(Tensor, whole.table.weight.grad)[[9, 2, 5]])


@pytest.mark.parametrize("tie", ["share", "untie"])
def test_a_tied_head_follows_where_it_shares(tie: str) -> None:
    model = built(tied=True)
    at_first = output(model)
    compiled = surgery.compile(f"train table[4, 11] {tie}", model)
    moved(compiled)
    adapted = output(model)
    ((_, rows),) = compiled.parameters().items()
    wanted = written({"table.weight": [4, 11]}, {"table.weight": rows}, built(tied=True))
    if tie == "untie":
        wanted.head.weight = built(tied=True).table.weight
    torch.testing.assert_close(adapted, output(wanted), atol=0, rtol=0)
    compiled.inverse.merge()
    assert torch.equal(output(model), adapted)
    compiled.inverse.unload()
    assert torch.equal(output(model), at_first)
    assert model.head.weight is model.table.weight


def test_adapters_mix_row_by_row() -> None:
    model = built(torch.float64)
    w = model.table.weight.detach().clone()
    spec = "adapter a { train table[1, 7] } adapter b { train table[1, 7] } activate 0.7*a + 0.3*b"
    compiled = surgery.compile(spec, model)
    moved(compiled, adapter="a")
    moved(compiled, adapter="b")
    a, b = compiled.parameters("a").values(), compiled.parameters("b").values()
    mixed = w[[1, 7]] + 0.7 * (next(iter(a)) - w[[1, 7]]) + 0.3 * (next(iter(b)) - w[[1, 7]])
    read = model.table.weight.detach()
    torch.testing.assert_close(read[[1, 7]], mixed.detach())
    assert torch.equal(read[[0, 2, 12]], w[[0, 2, 12]])


def test_rows_that_meet_cannot_be_live_together() -> None:
    spec = "adapter a { train table[1, 7] } adapter b { train table[7, 8] } activate a + b"
    with pytest.raises(SurgeryError, match="E309"):
        surgery.compile(spec, built())
    apart = "adapter a { train table[1, 7] } adapter b { train table[8] } activate a + b"
    assert len(surgery.compile(apart, built()).plan.sites) == 2


@pytest.mark.parametrize(
    ("text", "path", "shape"),
    [
        ("table[5]", "table.weight.row_5", [1, 6]),
        ("table[-1, 0]", "table.weight.rows_12_and_0", [2, 6]),
        ("table[2:4]", "table.weight.rows_2_4", [2, 6]),
        ("table[9, 1, 2, 3, 4]", "table.weight.rows_9_and_4_more", [5, 6]),
        ("table[:]", "table.weight", [13, 6]),
        ("image.weight[-2:]", "image.weight.rows_3_5", [2, 1, 2, 3]),
        ("table[n, n + 1]", "table.weight.rows_3_5", [2, 6]),
    ],
)
def test_what_rows_are_called(text: str, path: str, shape: list[int]) -> None:
    plan = surgery.plan(f"let n = 3 train {text}", built())
    (site,) = cast("list[dict[str, Any]]", plan.as_json()["sites"])
    assert (plan.sites[0].path, site["parameters"]["T"]["shape"]) == (path, shape)
