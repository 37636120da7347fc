"""How long a plan takes, and how that grows: `python benchmarks/planning.py`.

A mixture of experts on the meta device, plain modules: LAYERS × 64 experts × 3 matrices. Processor
time, the best of five runs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch
from torch import nn

import surgery

EXPERTS, LAYERS = 64, (15, 30, 60)
SPECS = {
    "one class": "match gate | up | down in layers[*] apply lora(r=4)",
    "a class a layer": "match * in layers[*] apply lora(r = 2 + layer)",
}
GOAL = 2.0  # seconds for the largest


def expert() -> nn.Module:
    parts = {"gate": (64, 48), "up": (64, 48), "down": (48, 64)}
    return nn.ModuleDict({name: nn.Linear(*sizes, bias=False) for name, sizes in parts.items()})


def mixture(layers: int) -> nn.Module:
    model = nn.Module()
    with torch.device("meta"):
        stack = (nn.ModuleList(expert() for _ in range(EXPERTS)) for _ in range(layers))
        model.add_module("layers", nn.ModuleList(stack))
    return model


def best(run: Callable[[], object]) -> float:
    times: list[float] = []
    gc.disable()  # when garbage is collected is chance
    for _ in range(5):
        begun = time.process_time()
        run()
        times.append(time.process_time() - begun)
    gc.enable()
    return min(times)


def main() -> None:
    models = {layers: mixture(layers) for layers in LAYERS}
    for name, spec in SPECS.items():
        first: float | None = None
        for model in models.values():
            sites = len(surgery.plan(spec, model).sites)
            taken = best(lambda model=model, spec=spec: surgery.plan(spec, model))
            first = first or taken
            goal = f"{taken / GOAL:.2f} of the goal"
            print(f"{name:16} {sites:6,} sites {taken:6.3f} s  ×{taken / first:.1f}  {goal}")


if __name__ == "__main__":
    main()
