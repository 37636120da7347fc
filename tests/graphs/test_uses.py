"""What a graph says of a parameter: which layer it is the weight of, if it is that of one alone."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.errors import SelectionError
from surgery.model.sites import survey

# torch's own, when it copies how a program is called.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

LENGTH, IN, OUT = 3, 5, 7

Run = Callable[[Any, Tensor], Tensor]

untyped = cast(Any, torch)  # for calls whose stubs are not fully typed


class Owner(nn.Module):
    """One module whose weight, bias and other parameters are used by a function."""

    def __init__(self, shape: tuple[int, ...], run: Run) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(OUT))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Model(nn.Module):
    """An owner, and one beside it."""

    def __init__(self, shape: tuple[int, ...], run: Run) -> None:
        super().__init__()
        self.layer = Owner(shape, run)
        self.other = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def graphs(model: nn.Module, x: Tensor, decomposed: bool = False) -> list[Any]:
    """The model as a trace, as a program's graph, and as that of a decomposed program."""
    program = torch.export.export(model, (x,))
    more = [cast(Any, program).run_decompositions().module()] if decomposed else []
    return [torch.fx.symbolic_trace(model), program.module(), *more]


def seen(model: Any, path: str = "layer") -> tuple[str | None, bool]:
    """The kind of a module's weight, and whether it is reached by its value."""
    entry = next(e for e in survey(model).entries if e.path == path)
    return None if entry.kind is None else entry.kind.name, entry.own_forward


def dense(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.weight, m.bias)


WITH_BIAS: list[tuple[tuple[int, ...], Run, str]] = [
    ((OUT, IN), dense, "linear"),
    ((OUT, IN), lambda m, x: torch.addmm(m.bias, x, m.weight.t()), "linear"),
    ((IN, OUT), lambda m, x: torch.addmm(m.bias, x, m.weight), "transposed_linear"),
    (
        (IN, OUT),
        lambda m, x: torch.addmm(input=m.bias, mat1=x, mat2=m.weight),
        "transposed_linear",
    ),
]


@pytest.mark.parametrize(("shape", "run", "kind"), WITH_BIAS)
def test_a_layer_with_its_bias(shape: tuple[int, int], run: Run, kind: str) -> None:
    for model in graphs(Model(shape, run).eval(), torch.randn(LENGTH, IN), decomposed=True):
        assert seen(model) == (kind, False)


class Product(Model):
    """The owner has no bias."""

    def __init__(self, shape: tuple[int, ...], run: Run) -> None:
        super().__init__(shape, run)
        self.layer.bias = cast(Any, None)


WITHOUT_BIAS: list[tuple[tuple[int, ...], Run, str]] = [
    ((OUT, IN), lambda m, x: x @ m.weight.t(), "linear"),
    ((OUT, IN), lambda m, x: x @ m.weight.T, "linear"),
    ((OUT, IN), lambda m, x: torch.matmul(x, m.weight.transpose(0, 1)), "linear"),
    ((OUT, IN), lambda m, x: torch.mm(x, m.weight.permute(1, 0)), "linear"),
    ((IN, OUT), lambda m, x: cast(Any, operator).matmul(x, m.weight), "transposed_linear"),
    ((IN, OUT), lambda m, x: torch.mm(x, m.weight), "transposed_linear"),
    ((IN, OUT), lambda m, x: F.linear(x, torch.t(m.weight)), "transposed_linear"),
    ((IN, OUT), lambda m, x: F.embedding(x.argmax(-1), m.weight), "embedding"),
    ((OUT, IN, 2), lambda m, x: F.conv1d(x.mT, m.weight), "conv1d"),
]


@pytest.mark.parametrize(("shape", "run", "kind"), WITHOUT_BIAS)
def test_a_layer_without_bias(shape: tuple[int, ...], run: Run, kind: str) -> None:
    for model in graphs(Product(shape, run).eval(), torch.randn(LENGTH, IN)):
        assert seen(model) == (kind, False)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_of_all_ranks_with_their_constants(rank: int) -> None:
    functions: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
    kernel = (3, 2, 1)[:rank]

    def run(m: Any, x: Tensor) -> Tensor:
        x = x.reshape(1, 4, *(6,) * rank)
        stride = (2, *(1,) * (rank - 1))
        return functions[rank](x, m.weight, None, stride, padding=1, dilation=2, groups=2)

    model = Product((6, 2, *kernel), run)
    for graph in graphs(model.eval(), torch.randn(4 * 6**rank), decomposed=rank == 2):
        (site,) = surgery.plan("match layer apply lora(r=2)", graph).sites
        assert site.form.kind.name == f"conv{rank}d"
        assert (site.form.sizes.groups, site.form.sizes.channels) == (2, 2)
        geometry = site.form.geometry
        assert geometry is not None
        assert geometry.kernel == kernel
        assert geometry.stride == (2, *(1,) * (rank - 1))
        assert (geometry.padding, geometry.dilation) == ((1,) * rank, (2,) * rank)


OTHERWISE: dict[str, Run] = {
    "read besides": lambda m, x: dense(m, x) * m.weight.norm(),
    "without its bias": lambda m, x: F.linear(x, m.weight),
    "its bias twice": lambda m, x: dense(m, x) + m.bias,
    "once without it": lambda m, x: dense(m, x).sum(-1, keepdim=True) * x @ m.weight.T,
    "times two": lambda m, x: torch.addmm(m.bias, x, m.weight.t(), alpha=2),
    "cast": lambda m, x: F.linear(x, m.weight.to(torch.float32), m.bias),
    "changed": lambda m, x: F.linear(x, 2 * m.weight, m.bias),
}


@pytest.mark.parametrize("use", OTHERWISE)
def test_what_is_not_one_layer_alone_is_reached_by_its_value(use: str) -> None:
    untyped.manual_seed(0)
    plain = Model((OUT, IN), OTHERWISE[use]).eval()
    x = torch.randn(LENGTH, IN)
    for graph in graphs(plain, x):
        (site,) = surgery.plan("match layer apply lora(r=2)", graph).sites
        whole = "bias" in dict(graph.layer.named_parameters())  # a trace lacks what is not used
        assert site.form.mode == ("value" if whole else "call")
        compiled = surgery.compile("match layer apply lora(r=2)", graph)
        with torch.no_grad():
            a, b = (graph.get_parameter(f"layer.surgery.default.{n}") for n in "AB")
            b.normal_()
            changed = plain.layer.weight + b @ a
            wanted = torch.func.functional_call(plain, {"layer.weight": changed}, (x,))
        torch.testing.assert_close(graph(x), wanted)
        compiled.inverse.merge()
        torch.testing.assert_close(graph(x), wanted)
        compiled.inverse.unload()


def test_a_weight_that_the_graph_writes_into_is_refused() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return F.embedding(x.argmax(-1), m.weight, max_norm=1.0)

    model = torch.export.export(Product((IN, OUT), run).eval(), (torch.randn(LENGTH, IN),))
    with pytest.raises(SelectionError, match="writes into it"):
        surgery.plan("match layer apply lora(r=2)", model)


class Repeated(nn.Module):
    """A list in which some have no parameters, one layer that is called twice, and one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(IN, IN), nn.Tanh(), nn.Dropout(0.1), nn.Linear(IN, IN)
        )
        self.twice = nn.Linear(IN, IN)
        self.attention = nn.MultiheadAttention(IN, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.twice(self.layers(x))))
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("form", ["traced", "program"])
def test_layers_that_are_called_twice_or_inside_of_others(form: str) -> None:
    untyped.manual_seed(0)
    plain, x = Repeated().eval(), torch.randn(2, LENGTH, IN)
    spec = "match * except layers.* apply lora(r=2) match * in layers[3] apply lora(r=1)"
    if form == "traced":
        graph: Any = torch.fx.symbolic_trace(Repeated().eval())
        graph.load_state_dict(plain.state_dict())
    else:
        graph = torch.export.export(plain, (x,))
    modules = surgery.compile(spec, plain)
    whole = surgery.compile(spec, graph)
    names = ("twice", "attention.in_proj_weight", "attention.out_proj", "layers.3")
    assert {s.path for s in whole.plan.sites} == {*names}
    for model in (plain, whole.model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".B"):
                    parameter.fill_(0.25)
    torch.testing.assert_close(whole.model(x), plain(x))
    modules.inverse.merge()
    torch.testing.assert_close(whole.model(x), plain(x))


@pytest.mark.parametrize("index", [1, 2])
def test_what_left_no_parameters_still_counts_in_a_list(index: int) -> None:
    model = torch.export.export(Repeated().eval(), (torch.randn(2, LENGTH, IN),)).module()
    with pytest.raises(SelectionError, match="E201"):
        surgery.plan(f"match * in layers[{index}] apply lora(r=1)", model)


def test_classes_are_known_by_their_names() -> None:
    model = torch.export.export(Repeated().eval(), (torch.randn(2, LENGTH, IN),)).module()
    plan = surgery.plan("match * where type == Linear apply lora(r=1)", model)
    assert {s.path for s in plan.sites} == {"layers.0", "layers.3", "twice"}
