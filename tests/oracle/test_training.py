"""Training against peft: the same tensors, data and order give the same losses, step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from small_models import ARCHITECTURES, fresh
from torch import Tensor, nn

import surgery

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch

STEPS = 30

# Of each: the kind of config, the architecture, how fast it learns, and peft's options. A llama has
# no dropout of its own: peft's LoHa asks the global generator whether to drop its change even where
# it never does, and the base would then draw other masks.
RUNS: dict[str, tuple[Any, str, float, dict[str, Any]]] = {
    "lora": (peft.LoraConfig, "llama", 1e-2, {"r": 3, "lora_alpha": 5}),
    "dora": (peft.LoraConfig, "bert", 1e-2, {"r": 3, "use_dora": True}),
    "ia3": (peft.IA3Config, "llama", 3e-2, {"feedforward_modules": ["down_proj"]}),
    "oft": (peft.OFTConfig, "bert", 1e-2, {"oft_block_size": 4, "use_cayley_neumann": False}),
    "miss": (peft.MissConfig, "llama", 1e-2, {"r": 5}),
    "vera": (peft.VeraConfig, "bert", 3e-2, {"r": 7}),
    "adalora": (
        peft.AdaLoraConfig,
        "llama",
        1e-2,
        {"init_r": 4, "target_r": 2, "total_step": STEPS},
    ),
    "hra": (peft.HRAConfig, "bert", 1e-2, {"r": 4}),
    "loha": (peft.LoHaConfig, "llama", 1e-2, {"r": 3}),
    "randlora": (peft.RandLoraConfig, "llama", 1e-2, {"r": 5, "randlora_alpha": 10}),
}


def batches() -> list[Tensor]:
    """One epoch of sequences [4, 6], each a walk of equal steps around the vocabulary."""
    generator = torch.Generator().manual_seed(8)
    draws = torch.randint(1, 13, (STEPS, 2, 4, 1), generator=generator)
    return [*((draws[:, 0] + draws[:, 1] * torch.arange(6)) % 13)]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """How surprising each next token is, told from the last states by the embedding itself."""
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    embedding = cast(Tensor, cast(Any, inner).get_input_embeddings().weight)
    states = cast(Tensor, cast(Any, model)(input_ids=tokens).last_hidden_state)
    logits = states[:, :-1] @ embedding.T
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def nothing(step: int) -> None:
    """What there is to do between most steps."""


def trained(
    model: nn.Module,
    rate: float,
    between: Callable[[int], object] = nothing,
    beside: Callable[[], Tensor | float] = float,
) -> list[float]:
    """The losses of one epoch of AdamW, with the base's own dropout drawn from one seed.

    between: is called at every step, counted from 1, while its gradients are there. beside: is
    added to each loss.
    """
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    untyped.manual_seed(9)
    model.train()
    losses: list[float] = []
    for step, tokens in enumerate(batches(), 1):
        loss = loss_of(model, tokens) + beside()
        optimizer.zero_grad()
        cast(Any, loss).backward()
        optimizer.step()
        between(step)
        losses.append(float(loss.detach()))
    return losses


def started_by_peft(name: str, directory: Path) -> nn.Module:
    kind, on, _, options = RUNS[name]
    it = ARCHITECTURES[on]
    config = kind(target_modules=[it.query, it.value, it.down], **options)
    untyped.manual_seed(7)
    theirs = hf.get_peft_model(fresh(on), config)
    theirs.save_pretrained(str(directory))
    return theirs


@pytest.mark.parametrize("name", RUNS)
def test_one_epoch_has_pefts_losses(name: str, tmp_path: Path) -> None:
    _, on, rate, _ = RUNS[name]
    theirs = started_by_peft(name, tmp_path)
    ours = surgery.attach(tmp_path, fresh(on))
    assert {s.form.method.name for s in ours.plan.sites} == {name}
    wanted, found = trained(theirs, rate), trained(ours.model, rate)
    same_curve(found, wanted)
    # What was learned is the same model, live and merged.
    theirs.eval()
    ours.model.eval()
    output = ARCHITECTURES[on].output
    with torch.no_grad():
        expected = output(theirs)
        torch.testing.assert_close(output(ours.model), expected, atol=1e-3, rtol=1e-3)
        ours.inverse.merge()
        torch.testing.assert_close(output(ours.model), expected, atol=1e-3, rtol=1e-3)


def same_curve(found: list[float], wanted: list[float]) -> None:
    """Losses that fall, and that are the same to 1e-4 at every step."""
    assert min(wanted) < wanted[0] - 0.1
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), atol=1e-4, rtol=0)


def test_one_epoch_with_a_budget_that_shrinks_has_pefts_losses(tmp_path: Path) -> None:
    schedule: dict[str, Any] = {
        "target_r": 2,
        "tinit": 4,
        "tfinal": 8,
        "deltaT": 3,
        "total_step": STEPS,
    }
    it = ARCHITECTURES["llama"]
    config = hf.AdaLoraConfig(init_r=5, target_modules=[it.query, it.value, it.down], **schedule)
    untyped.manual_seed(7)
    theirs = hf.get_peft_model(fresh("llama"), config)
    theirs.save_pretrained(str(tmp_path))
    ours = surgery.attach(tmp_path, fresh("llama"))
    allocation = surgery.allocate(ours, orth_reg_weight=0.3, **schedule)
    wanted = trained(theirs, 1e-2, theirs.base_model.update_and_allocate, lambda: apart(theirs))
    found = trained(ours.model, 1e-2, allocation.step, allocation.loss)
    same_curve(found, wanted)
    kept = theirs.peft_config["default"].rank_pattern
    masks = {f"{path}.lora_E.default": mask for path, mask in allocation.masks.items()}
    wanted_masks = {key.removeprefix("model."): torch.tensor(mask) for key, mask in kept.items()}
    assert masks.keys() == wanted_masks.keys()
    assert all(torch.equal(mask, wanted_masks[key]) for key, mask in masks.items())
    assert sum(int(mask.sum()) for mask in masks.values()) == 2 * len(masks)


def apart(theirs: nn.Module) -> Tensor:
    """0.3 of the mean of |P Pᵀ - I| over the factors, whose rows or columns are to be orthonormal.

    peft adds it itself to a loss that the model gives.
    """
    terms: list[Tensor] = []
    for name, parameter in theirs.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            terms.append(untyped.linalg.matrix_norm(gram - torch.eye(len(gram))))
    return 0.3 * torch.stack(terms).mean()
