"""A method beside peft's own: what either of the two saves, the other reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from small_models import TOKENS
from torch import Tensor, nn

import surgery

hf: Any = peft  # whose types are not complete
untyped: Any = torch


@dataclass(frozen=True)
class Case:
    """A config of peft's, and a spec of ours that peft has a config for as well."""

    name: str
    model: Callable[[], nn.Module]
    config: Callable[[], peft.PeftConfig]
    spec: str


def every(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """A test for each case, under its name."""
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def fed(model: nn.Module, *shape: int) -> nn.Module:
    """A model with the input that it is looked at by."""
    model.example = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    return model.eval()


def output(model: nn.Module) -> Tensor:
    """What a model makes of its input, or one of transformers of tokens."""
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if hasattr(inner, "example"):
        return cast(Tensor, model(inner.example))
    return cast(Tensor, model(TOKENS).last_hidden_state)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The data of all that is trained, by name."""
    return {n: p.data for n, p in model.named_parameters() if p.requires_grad}


def moved(model: nn.Module, far: float = 0.3) -> None:
    """Parameters away from where they begin, so that the adapter does something."""
    generator = torch.Generator().manual_seed(5)
    for _, tensor in sorted(trained(model).items()):
        tensor.add_(far * torch.randn(tensor.shape, generator=generator))


def close(found: Tensor, expected: Tensor) -> None:
    """The same but for the rounding of float32."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def saved_by_peft(
    make: Callable[[], nn.Module], config: peft.PeftConfig, at: Path, far: float = 0.3
) -> nn.Module:
    """peft's model, whose adapter was moved and saved."""
    model = cast(peft.PeftModel, hf.get_peft_model(make(), config))
    moved(model, far)
    model.save_pretrained(str(at))
    return model.eval()


def saved(case: Case, at: Path, far: float = 0.3) -> surgery.Compiled:
    """The adapter of a case, moved and saved here, as peft has it too."""
    compiled = surgery.compile(case.spec, case.model())
    moved(compiled.model, far)
    assert compiled.save(at).peft == ""
    compiled.model.eval()
    return compiled


def attaches(case: Case, at: Path, far: float = 0.3) -> None:
    """What peft saves gives the same forward and merge here, and comes off to the bit."""
    theirs = saved_by_peft(case.model, case.config(), at, far)
    expected, base = output(theirs), case.model()
    weights = {n: t.clone() for n, t in base.state_dict().items()}
    assert (expected - output(base)).abs().max() > 1e-3
    ours = surgery.attach(at, base)
    close(output(ours.model), expected)
    ours.inverse.merge()
    torch.testing.assert_close(output(ours.model), expected, atol=1e-4, rtol=1e-3)
    ours.inverse.unmerge()
    close(output(ours.model), expected)
    ours.inverse.unload()
    assert all(torch.equal(t, weights[n]) for n, t in base.state_dict().items())


def loads(case: Case, at: Path, far: float = 0.3) -> None:
    """What is saved here loads in peft with the same forward, under the keys that peft has."""
    compiled = saved(case, at, far)
    expected = output(compiled.model)
    assert (expected - output(case.model())).abs().max() > 1e-3
    theirs = hf.PeftModel.from_pretrained(case.model(), str(at)).eval()
    close(output(theirs), expected)
    wanted = cast("dict[str, Tensor]", hf.get_peft_model_state_dict(theirs))
    # Of an embedding that it adapts, peft's own file may have the base besides.
    own = {k: v.shape for k, v in wanted.items() if "base_layer" not in k}
    written = compiled.mapping.rename(compiled.parameters(), to="peft")
    assert {k: v.shape for k, v in written.items()} == own
    assert torch.equal(output(surgery.attach(at, case.model()).model), expected)


def begins(case: Case) -> tuple[bool, bool]:
    """Whether the beginning is the base: here, and in peft."""
    base = output(case.model())
    ours = output(surgery.compile(case.spec, case.model()).model.eval())
    theirs = output(cast(nn.Module, hf.get_peft_model(case.model(), case.config()).eval()))
    return torch.allclose(ours, base, atol=1e-5), torch.allclose(theirs, base, atol=1e-5)


def drops(case: Case, at: Path) -> None:
    """In training the same is dropped as in peft, of the same seed."""
    theirs = saved_by_peft(case.model, case.config(), at).train()
    untyped.manual_seed(6)
    expected = output(theirs)
    ours = surgery.attach(at, case.model()).model.train()
    untyped.manual_seed(6)
    found = output(ours)
    assert (output(ours.eval()) - found).abs().max() > 1e-3
    close(found, expected)
