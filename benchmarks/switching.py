"""Ten adapters of five methods on a Llama of 32 layers: adding, switching, routing, compiling.

    python -m benchmarks.switching

Times are medians in one run, of one thread. `base` is the model before it was adapted.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig, LlamaForCausalLM

import surgery

untyped: Any = torch

METHODS = ("lora(r=8)", "dora(r=8)", "ia3()", "oft(block_size=8)", "bone(r=8)")
SITES = "q_proj | k_proj | v_proj | o_proj | gate_proj | up_proj | down_proj"


def model_of(layers: int, hidden: int) -> nn.Module:
    untyped.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def median(run: Callable[[], object], times: int) -> float:
    """Seconds."""
    found: list[float] = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def shown(name: str, value: str) -> None:
    print(f"{name:<44} {value}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--compiled-layers", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    added(asked.layers, asked.hidden)
    compiled(asked.compiled_layers, asked.hidden)


def put_on(model: nn.Module, count: int) -> list[float]:
    """Adapters; the seconds that each took, without the collection of garbage, as timeit does."""
    took: list[float] = []
    for number in range(count):
        spec = f"adapter a{number} {{ match {SITES} apply {METHODS[number % len(METHODS)]} }}"
        gc.collect()
        gc.disable()
        start = time.perf_counter()
        surgery.compile(spec, model)
        took.append(time.perf_counter() - start)
        gc.enable()
    return took


def added(layers: int, hidden: int) -> None:
    model = model_of(layers, hidden)
    base = copy.deepcopy(model)
    put_on(copy.deepcopy(model), 1)  # what Python and the library load and build once
    runs = [put_on(copy.deepcopy(base), 2 * len(METHODS)) for _ in range(6)]
    runs.append(put_on(model, 2 * len(METHODS)))
    took = [statistics.median(times) for times in zip(*runs, strict=True)]
    handle = surgery.of(model)
    for name in handle.adapters:
        handle.activate(name)
    sites = len(handle.plan.sites) // len(handle.adapters)
    shown("sites", f"{sites}")
    for first, method in enumerate(METHODS):
        one, other = took[first], took[first + len(METHODS)]
        ratio = f"{one * 1e3:.0f} ms, and as number {first + 6}: {other * 1e3:.0f} ms"
        shown(f"adding {method} as number {first + 1}", f"{ratio}, × {other / one:.2f}")
    names = [*handle.adapters, None]
    turns = iter(names * 1000)
    shown("a switch", f"{median(lambda: handle.activate(next(turns)), 1000) * 1e6:.1f} us")
    tokens = torch.arange(32).view(8, 4)

    def run(which: nn.Module) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            with torch.no_grad():
                return cast(Any, which)(tokens).logits

        return forward

    plain = median(run(base), 9)
    shown("forward of the base, 8 × 4 tokens", f"{plain * 1e3:.1f} ms")
    for name in (None, "a0", "a1", "a3"):
        handle.activate(name)
        now = median(run(model), 9)
        shown(f"with {name or 'nothing live'}", f"{now * 1e3:.1f} ms, × {now / plain:.2f}")
    with handle.frozen():
        now = median(run(model), 9)
        shown("with a3, frozen", f"{now * 1e3:.1f} ms, × {now / plain:.2f}")
    with handle.route([f"a{number}" for number in range(8)]):
        now = median(run(model), 9)
    shown("8 samples with 8 adapters", f"{now * 1e3:.1f} ms, × {now / plain:.2f}")


def compiled(layers: int, hidden: int) -> None:
    counter = CompileCounter()
    model = model_of(layers, hidden)
    put_on(model, 2 * len(METHODS))
    handle = surgery.of(model)
    handle.reserve(8, batch=8)
    handle.activate(None)
    run: Any = untyped.compile(model, backend=counter, fullgraph=True)
    tokens = torch.arange(32).view(8, 4)
    with torch.no_grad():
        start = time.perf_counter()
        run(tokens)
        shown(f"tracing {layers} layers with a bank", f"{time.perf_counter() - start:.1f} s")
        for number in range(100):
            handle.activate(handle.adapters[number % len(handle.adapters)])
            run(tokens)
    shown("graphs after a hundred switches", f"{counter.frame_count}")


if __name__ == "__main__":
    main()
