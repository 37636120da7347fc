"""What a forward takes beyond the base, against what torch is seen to compute on the meta device.

The oracle runs the very same equations over tensors without data, at two batch sizes, and counts
every operator that comes through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import surgery
from surgery.language.library import Library
from surgery.planned import SiteClass
from surgery.work import Work

IN, OUT, CHANNELS = 35, 30, 10
LAYERS: Mapping[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "embedding": lambda: nn.Embedding(IN, OUT),
    "conv": lambda: nn.Conv2d(CHANNELS, OUT, 3, padding=1, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(CHANNELS, OUT, (3, 5), groups=5, stride=2),
}
OWN = {
    "gated": "method gated() on matrix {"
    " train A[5, in] = 0  train B[out, 5] = 0  y' = y + gelu(x @ transpose(A)) @ transpose(B) }",
    "turned": "method turned() on matrix { train u[in] = 1  W' = W @ householder(u) }",
    "tensored": "method tensored() on matrix {"
    " train a[out / 5, 7] = 1  train b[5, in / 7] = 1  W' = W + kron(a, b) }",
}


# ------------------------------------------------------------------------------- the oracle


def _product(args: Sequence[Any], out: Tensor) -> int:
    return 2 * out.numel() * args[0].shape[-1]


def _product_and_sum(args: Sequence[Any], out: Tensor) -> int:
    return 2 * out.numel() * args[1].shape[-1]


def _convolution(args: Sequence[Any], out: Tensor) -> int:
    return 2 * out.numel() * prod(args[1].shape[1:])


def _solution(args: Sequence[Any], out: Sequence[Tensor]) -> int:
    return 4 * args[0].numel() * args[0].shape[-1]


def _elements(args: Sequence[Any], out: Tensor) -> int:
    return out.numel() if out.is_floating_point() else 0


def _transform(args: Sequence[Any], out: Tensor) -> int:
    """Of the axes in its second argument, for each of which a number meets log n others."""
    larger = max(args[0], out, key=Tensor.numel)
    return larger.numel() * prod(larger.shape[a] for a in args[1]).bit_length()


COUNTS: Mapping[str, Callable[[Sequence[Any], Any], int]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), _product),
    **dict.fromkeys(("addmm", "baddbmm"), _product_and_sum),
    **dict.fromkeys(("_linalg_solve_ex", "linalg_inv_ex"), _solution),
    **dict.fromkeys(("clone", "copy_", "_to_copy", "fill_"), lambda args, out: 0),
    **dict.fromkeys(("sum", "linalg_vector_norm"), lambda args, out: args[0].numel()),
    "convolution": _convolution,
    **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), _transform),
}


class Seen(TorchDispatchMode):
    """Adds up what is computed."""

    def __init__(self) -> None:
        cast(Any, super()).__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        pointwise = cast(Any, torch).Tag.pointwise in func.tags
        count = COUNTS.get(func.overloadpacket.__name__, _elements if pointwise else None)
        self.count += 0 if count is None else count(args, out)
        return out


class Model(nn.Module):
    """One layer."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x)


def computed(run: nn.Module, layer: str, batch: int) -> tuple[int, int]:
    """The number of positions of an output, and what it took."""
    match layer:
        case "linear":
            x = torch.empty(batch, IN, device="meta")
        case "embedding":
            x = torch.empty(batch, dtype=torch.long, device="meta")
        case _:
            x = torch.empty(batch, CHANNELS, 11, 13, device="meta")
    with torch.no_grad(), Seen() as seen:
        y = run(x)
    return y.numel() // OUT, seen.count


def wanted(spec: str, layer: str) -> Work:
    base, model = (Model(LAYERS[layer]().to("meta")) for _ in range(2))
    surgery.compile(spec, model).model.eval()
    found: list[int] = []
    positions = 1
    for batch in (1, 2):
        positions, adapted = computed(model, layer, batch)
        found.append(adapted - computed(base, layer, batch)[1])
    once, twice = found
    return Work(round((twice - once) / (positions // 2)), 2 * once - twice)


def spec_of(method: str) -> str:
    known = Library.standard().method(method)
    names = [] if known is None else [a.name for a in known.arguments]
    chosen = next((f"{n}=5" for n in ("block_size", "r") if n in names), "")
    return f"{OWN.get(method, '')} match site apply {method}({chosen})"


def form_of(spec: str, layer: str) -> SiteClass:
    return surgery.plan(spec, Model(LAYERS[layer]())).sites[0].form


METHODS = (*Library.standard().names(), *OWN)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_counted_is_what_is_computed(method: str, layer: str) -> None:
    spec = spec_of(method)
    try:
        form = form_of(spec, layer)
    except surgery.SurgeryError:
        pytest.skip("the method does not go on such a layer")
    work = form.work
    assert work is not None
    seen = wanted(spec, layer)
    # Biases, and scaling an input that overlaps itself, are a few operations an element.
    assert abs(work.token - seen.token) <= 4 * (IN + OUT)
    assert abs(work.call - seen.call) <= 0.2 * abs(seen.call) + 4 * form.sizes.fan_in * OUT


def test_a_product_of_two_factors() -> None:
    work = form_of("match site apply lora(r=5)", "linear").work
    assert work == Work(2 * 5 * (IN + OUT) + OUT, 0)
    assert form_of("match site apply ia3()", "linear").work == Work(OUT, 0)


def test_a_layer_that_is_reached_by_its_weight_has_it_built_for_each_call() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    (site,) = surgery.plan("match linear1 apply lora(r=2)", encoder).sites
    assert site.form.work == Work(0, 2 * 16 * 2 * 8 + 16 * 8)


def test_a_plan_has_the_sum_of_its_sites() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    plan = surgery.plan("match * apply lora(r=2) adapter b { match 0 apply ia3() }", model)
    assert plan.work("default") == Work(2 * 2 * (5 + 7 + 7 + 3) + 7 + 3, 0)
    assert plan.work("b") == Work(7, 0)
    data = plan.as_json()
    assert data["flops"] == {"default": {"token": 98, "call": 0}, "b": {"token": 7, "call": 0}}
    assert "a forward with `b` takes 7 FLOPs more for each token" in str(plan)
