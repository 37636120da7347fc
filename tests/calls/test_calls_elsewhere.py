"""Adapters on calls and the rest of the program: what it does with them, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from small_models import bert, language_model, logits
from support import moved
from torch import Tensor, nn

import surgery
from surgery.errors import SurgeryError

untyped: Any = torch
files: Any = import_module("safetensors.torch")

SPEC = """
adapter between { match mlp in layers[*] apply bottleneck(r=3) }
adapter behind { match layers.* apply loreft(r=2) }
adapter weights { match q_proj apply lora(r=2) }
adapter both {
  match mlp in layers[*] apply compacter(r=8)
  match v_proj apply lora(r=3)
}
adapter straight { match layers.* apply steering() }
"""
NAMES = ("between", "behind", "weights", "both", "straight")


def several() -> surgery.Compiled:
    compiled = surgery.compile(SPEC, language_model())
    for name in NAMES:
        moved(compiled, name)
    return compiled


def run(compiled: surgery.Compiled, name: str | None) -> Tensor:
    with compiled.using(name):
        return logits(compiled.model)


def refused(code: str, call: Callable[[], object]) -> str:
    with pytest.raises(SurgeryError) as caught:
        call()
    assert code in {d.code for d in caught.value.diagnostics}
    return str(caught.value)


def test_a_bank_leaves_them_to_their_texts() -> None:
    compiled = several()
    alone = {name: run(compiled, name) for name in (None, *NAMES)}
    bank = compiled.reserve(4, adapters=6)
    said = str(bank)
    for name in ("between", "behind", "both", "straight"):
        assert f"`{name}` runs by its text" in said
    assert "is around a call" in said
    assert "`weights` runs by its text" not in said
    assert all(torch.allclose(run(compiled, name), alone[name], atol=1e-5) for name in alone)
    tokens = torch.tensor([[3, 5, 1, 7, 2]]).repeat(6, 1)
    with compiled.route([None, *NAMES]):
        routed = logits(compiled.model, tokens)
    for row, name in enumerate(alone):
        assert torch.allclose(routed[row], alone[name][0], atol=1e-5)


def test_status_and_parameters_count_them() -> None:
    compiled = several()
    rows = {row.name: row for row in compiled.status().adapters}
    for name in NAMES:
        numbers = sum(p.numel() for p in compiled.parameters(name).values())
        assert rows[name].trained == rows[name].total == numbers
    assert rows["both"].methods == ("compacter", "lora")
    assert rows["straight"].sites == 2
    compiled.train_only("behind")
    named = compiled.model.named_parameters()
    assert {n for n, p in named if p.requires_grad} == {*compiled.parameters("behind")}


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_what_is_in_no_weight_is_composed_of_parameters_alone(how: str) -> None:
    compiled = several()
    before = {n: t.clone() for n, t in compiled.model.state_dict().items()}
    rank = None if how == "cat" else 2
    for expression in ("0.5*between", "between + behind", "weights + both"):
        made = partial(
            surgery.compose_on, compiled.model, expression, name="new", how=how, rank=rank
        )
        assert "no weight says that" in refused("E580", made)
    refused(
        "E523",
        partial(
            surgery.compose_on,
            compiled.model,
            "weights",
            name="new",
            how="svd",
            rank=2,
            to="loreft",
        ),
    )
    after = compiled.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in after.items())


def test_composed_of_parameters() -> None:
    """What is linear in its parameters is the mix itself; all else is made of the same parts."""
    compiled = several()
    surgery.compose_on(compiled.model, "0.5*straight", name="less", how="linear")
    assert torch.allclose(run(compiled, "less"), run(compiled, "0.5*straight"), atol=1e-6)
    surgery.compose_on(
        compiled.model, "0.5*between + 2*weights", name="new", how="ties", density=1.0
    )
    found, source = compiled.parameters("new"), compiled.parameters("between")
    for name, value in source.items():
        own = found[name.replace(".between.", ".new.")]
        assert torch.allclose(own, 0.5 * value, atol=1e-6)
    surgery.compose_on(compiled.model, "1*behind", name="twin")
    assert torch.equal(run(compiled, "twin"), run(compiled, "behind"))


@pytest.mark.parametrize("name", ["between", "behind", "both"])
def test_a_folder_says_why_peft_cannot_read_it(name: str, tmp_path: Path) -> None:
    compiled = several()
    saved = compiled.save(tmp_path / "own", name)
    assert "peft" in saved.peft
    assert not (tmp_path / "own" / "adapter_config.json").exists()
    model, convert = language_model(), surgery.convert
    refused("E523", partial(convert, tmp_path / "own", tmp_path / "peft", model))
    lora = partial(convert, tmp_path / "own", tmp_path / "lora", model, to="lora", rank=2)
    assert "no weight says that" in refused("E523", lora)
    convert(tmp_path / "own", tmp_path / "native", model, to="native")
    attached = surgery.attach(tmp_path / "native", language_model())
    assert torch.equal(logits(attached.model), run(compiled, name))
    assert not (tmp_path / "lora").exists()
    assert not (tmp_path / "peft").exists()


def test_a_model_of_another_width_is_refused_before_anything(tmp_path: Path) -> None:
    several().save(tmp_path / "a", "behind")
    other = language_model(hidden_size=16)
    assert "[16, 2]" in refused("E518", partial(surgery.attach, tmp_path / "a", other))
    assert not any("surgery" in name for name in other.state_dict())


def test_frozen_exported_and_on_meta() -> None:
    compiled = several()
    compiled.activate("between + 0.5*behind - both")
    before = logits(compiled.model)
    with compiled.frozen():
        assert torch.allclose(logits(compiled.model), before, atol=1e-6)
    tokens = torch.tensor([[3, 5, 1, 7, 2], [2, 0, 11, 4, 6]])
    program = compiled.export((), {"input_ids": tokens, "use_cache": False})
    made = cast(Any, program.module())(input_ids=tokens, use_cache=False).logits
    assert torch.allclose(made, before, atol=1e-5)
    with torch.device("meta"):
        empty = type(compiled.model)(cast(Any, compiled.model).config)
    plan = surgery.plan(SPEC, empty)
    assert [site.path for site in plan.sites] == [site.path for site in compiled.plan.sites]


# ---------------------------------------------------------------------------- offloaded weights

PUT = (
    ("mlp in layers[*]", "bottleneck(r=3)"),
    ("mlp in layers[*]", 'bottleneck(r=3, side="in")'),
    ("mlp in layers[*]", "compacter(r=8)"),
    ("layers.*", "loreft(r=2) then steering()"),
    ("q_proj | self_attn | input_layernorm", "noreft(r=2)"),
)


def on_cpu(model: nn.Module, folder: Path) -> None:
    """Weights in a dictionary, loaded for each call."""
    del folder
    pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")


def on_disk(model: nn.Module, folder: Path) -> None:
    """One layer on disk, one in memory."""
    where = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    where |= {name: "cpu" for name, _ in model.named_children() if name == "surgery"}
    where |= {"model.layers.0": "disk", "model.layers.1": "cpu", "lm_head": "disk"}
    pytest.importorskip("accelerate").dispatch_model(
        model, where, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


def whole(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradient of each trained parameter."""
    found = model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).logits
    found.square().sum().backward()
    named = model.named_parameters()
    return found.detach(), {n: p.grad for n, p in named if p.grad is not None}


@pytest.mark.parametrize(("where", "call"), PUT)
@pytest.mark.parametrize("offload", [on_cpu, on_disk])
@pytest.mark.parametrize("first", ["adapted", "offloaded"])
def test_an_offloaded_model_computes_the_same(
    first: str, offload: Callable[[nn.Module, Path], None], where: str, call: str, tmp_path: Path
) -> None:
    def adapt(model: nn.Module) -> surgery.Compiled:
        compiled = surgery.compile(f"match {where} apply {call}", model)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in compiled.parameters():
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))
        return compiled

    plain, other = language_model(), language_model()
    base = logits(plain)
    adapt(plain)
    expected = whole(plain)
    if first == "offloaded":
        offload(other, tmp_path)
        compiled = adapt(other)
    else:
        compiled = adapt(other)
        offload(other, tmp_path)
    found = whole(other)
    assert torch.allclose(found[0], expected[0], atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    assert expected[1]
    assert all(torch.allclose(v, expected[1][n], atol=1e-4) for n, v in found[1].items())
    compiled.inverse.unload()
    assert torch.equal(logits(other), base)


# ------------------------------------------------------------- what other programs have saved


class Bottleneck(nn.Module):
    """With the names, and the computation, that AdapterHub's have in their files."""

    def __init__(self, hidden: int, r: int) -> None:
        super().__init__()
        self.adapter_down = nn.Sequential(nn.Linear(hidden, r), nn.SiLU())
        self.adapter_up = nn.Linear(r, hidden)

    def forward(self, y: Tensor) -> Tensor:
        return self.adapter_up(self.adapter_down(y)) + y


NAMED = {
    "adapter_down.0.weight": "D",
    "adapter_down.0.bias": "d",
    "adapter_up.weight": "U",
    "adapter_up.bias": "u",
}


def test_bottlenecks_of_a_file_are_put_in_by_their_names() -> None:
    """AdapterHub's double_seq_bn on BERT, whose adapters stand in the outputs of both halves."""
    model = bert()
    hidden = cast(Any, model).config.hidden_size
    compiled = surgery.compile('match output.dense apply bottleneck(r=3, act_fn="silu")', model)
    untyped.manual_seed(3)
    theirs = {
        str(site.path).removesuffix(".dense.call"): Bottleneck(hidden, 3)
        for site in compiled.plan.sites
    }
    file = {
        f"bert.{path}.adapters.pad.{name}": value.detach()
        for path, adapter in theirs.items()
        for name, value in adapter.named_parameters()
    }

    def renamed(key: str) -> str:
        path, name = key.removeprefix("bert.").split(".adapters.pad.")
        return f"{path}.dense.surgery.default.call.{NAMED[name]}"

    compiled.hotswap("default", {renamed(key): value for key, value in file.items()})
    tokens = torch.tensor([[3, 5, 1, 7, 2], [2, 0, 11, 4, 6]])
    with torch.no_grad():
        found = cast(Any, model)(tokens).last_hidden_state
        for path, adapter in theirs.items():
            hook = partial(_behind, adapter)
            cast(Any, model.get_submodule(f"{path}.dense")).register_forward_hook(hook)
        with compiled.using(None):
            expected = cast(Any, model)(tokens).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_folder_of_another_program_is_not_taken_for_pefts(tmp_path: Path) -> None:
    config = {"config": {"reduction_factor": 4, "non_linearity": "swish"}, "model_type": "bert"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    key = "bert.encoder.layer.0.output.adapters.pad.adapter_up.bias"
    files.save_file({key: torch.zeros(12)}, str(tmp_path / "adapter_model.safetensors"))
    assert "peft_type" in refused("E516", partial(surgery.attach, tmp_path, bert()))
    assert "peft does not read it" in str(surgery.inspect(tmp_path))


def _behind(adapter: nn.Module, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    del module, args
    return adapter(output)
