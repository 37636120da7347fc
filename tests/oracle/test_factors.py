"""Against peft itself: methods that are made of parts of the weight, or read it in the equation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from beside_peft import (
    Case,
    attaches,
    begins,
    close,
    every,
    fed,
    loads,
    moved,
    output,
    saved_by_peft,
)
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import QALoraLinearVariant
from small_models import bert, gpt2, llama
from torch import nn

import surgery
from surgery.store import read_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning"),
]

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch

FAR = 0.2  # of what is moved


def dense() -> nn.Module:
    untyped.manual_seed(0)
    layers = nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 8, bias=False)
    return fed(nn.Sequential(*layers), 5, 12)


BOTH = ["0", "2"]
PAIR = ["q_proj", "v_proj"]
BERT = ["query", "output.dense"]


def kasa(**given: Any) -> Callable[[], peft.PeftConfig]:
    return lambda: peft.LoraConfig(kasa_config=KasaConfig(), **given)


def bdlora(
    blocks: int, a: list[str], b: list[str], strict: bool = True, **given: Any
) -> Callable[[], peft.PeftConfig]:
    shards = BdLoraConfig(a, b, nblocks=blocks, match_strict=strict)
    return lambda: peft.LoraConfig(use_bdlora=shards, **given)


CASES = (
    Case("kasa", dense, kasa(r=3, target_modules=BOTH), "match /0|2/ apply kasa(r=2, alpha=5)"),
    Case(
        "kasa on llama",
        llama,
        kasa(r=2, lora_alpha=7, use_rslora=True, lora_dropout=0.2, target_modules=PAIR),
        "match /q_proj|v_proj/ apply kasa(r=3, alpha=5, rslora=true, dropout=0.1)",
    ),
    Case(
        "kasa on bert, of several ranks",
        bert,
        kasa(r=3, rank_pattern={"layer.1.attention.self.query": 2}, target_modules=BERT),
        "match query | output.dense in layer[*] apply kasa(r = 2 + layer)",
    ),
    Case(
        "bdlora",
        dense,
        bdlora(2, ["0"], ["2"], r=4, target_modules=BOTH),
        'match 0 apply bdlora(r=4, nblocks=2, blocks="B")\n'
        'match 2 apply bdlora(r=4, nblocks=2, blocks="A")',
    ),
    Case(
        "bdlora on llama",
        llama,
        bdlora(3, ["down_proj"], PAIR, r=3, lora_alpha=5, target_modules=[*PAIR, "down_proj"]),
        'match /q_proj|v_proj/ apply bdlora(r=6, alpha=5, nblocks=3, blocks="B", dropout=0.1)\n'
        'match down_proj apply bdlora(r=6, alpha=5, nblocks=3, blocks="A", dropout=0.1)',
    ),
    Case(
        "bdlora beside plain factors on bert",
        bert,
        bdlora(2, ["query"], [], False, r=2, use_rslora=True, target_modules=BERT),
        'match query apply bdlora(r=4, nblocks=2, blocks="A", rslora=true)\n'
        "match output.dense apply bdlora(r=4, nblocks=2, rslora=true)",
    ),
    Case(
        "psoft",
        dense,
        lambda: peft.PsoftConfig(r=4, target_modules=BOTH),
        "match /0|2/ apply psoft(r=5)",
    ),
    Case(
        "psoft on llama",
        llama,
        lambda: peft.PsoftConfig(
            r=5, psoft_alpha=3, ab_svd_init="pissa_init", target_modules=[*PAIR, "down_proj"]
        ),
        'match /q_proj|down_proj/ apply psoft(r=3, ab_svd_init="pissa_init", dropout=0.1)',
    ),
    Case(
        "psoft on bert",
        bert,
        lambda: peft.PsoftConfig(
            r=3, psoft_dropout=0.2, psoft_orth=False, psoft_mag_b=False, target_modules=BERT
        ),
        "match query | output.dense apply psoft(r=4, mag_a=false)",
    ),
    *(
        Case(
            f"psoft by {terms} terms",
            dense,
            lambda terms=terms: peft.PsoftConfig(
                r=4,
                use_cayley_neumann=True,
                num_cayley_neumann_terms=terms,
                psoft_mag_a=False,
                target_modules=BOTH,
            ),
            f"match /0|2/ apply psoft(r=5, use_cayley_neumann=true, "
            f"num_cayley_neumann_terms={terms + 1}, mag_b=false)",
        )
        for terms in (1, 2, 4)
    ),
    Case(
        "deft",
        dense,
        lambda: peft.DeftConfig(r=3, target_modules=BOTH),
        "match /0|2/ apply deft(r=2, alpha=5)",
    ),
    Case(
        "deft on llama, orthogonal",
        llama,
        lambda: peft.DeftConfig(
            r=8, alpha=3, decomposition_method="qr", deft_dropout=0.2, target_modules=PAIR
        ),
        'match /q_proj|v_proj/ apply deft(r=7, decomposition_method="qr", dropout=0.1)',
    ),
    Case(
        "deft on Conv1D, with nothing put in",
        gpt2,
        lambda: peft.DeftConfig(
            r=3, para=True, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"]
        ),
        'match /c_attn|c_fc/ apply deft(r=4, para=true, decomposition_method="qr")',
    ),
    Case(
        "osf",
        dense,
        lambda: peft.OSFConfig(target_modules=BOTH),
        "match /0|2/ apply osf()",
    ),
    Case(
        "osf on llama, of a rank",
        llama,
        lambda: peft.OSFConfig(effective_rank=4, target_modules=[*PAIR, "down_proj"]),
        "match /q_proj|down_proj/ apply osf(effective_rank=5)",
    ),
    Case(
        "osf on bert, of a part",
        bert,
        lambda: peft.OSFConfig(effective_rank=0.3, target_modules=BERT),
        "match query | output.dense apply osf(effective_rank=0.75)",
    ),
    Case(
        "tinylora",
        dense,
        lambda: peft.TinyLoraConfig(r=3, u=5, target_modules=BOTH),
        "match 2 apply tinylora(r=2, u=7, group=1)\nmatch 0 apply tinylora(r=2, u=7)",
    ),
    Case(
        "tinylora on llama, with one vector for some",
        llama,
        lambda: peft.TinyLoraConfig(
            r=2, u=5, weight_tying=0.6, tinylora_dropout=0.2, target_modules=[*PAIR, "down_proj"]
        ),
        "match /q_proj|v_proj|down_proj/ in layers[*] apply tinylora(r=3, u=7, group=layer)",
    ),
    Case(
        "tinylora on Conv1D and an embedding, with one vector for all",
        gpt2,
        lambda: peft.TinyLoraConfig(
            r=40, u=5, weight_tying=1.0, fan_in_fan_out=True, target_modules=["c_attn", "wte"]
        ),
        "match /c_attn|wte/ apply tinylora(r=3, u=7)",
    ),
    Case(
        "peanut",
        dense,
        lambda: peft.PeanutConfig(r=3, target_modules=BOTH),
        "match /0|2/ apply peanut(r=4, scaling=0.5)",
    ),
    Case(
        "peanut on llama",
        llama,
        lambda: peft.PeanutConfig(
            r=5, depth=1, act_fn="gelu", scaling=2.5, target_modules=[*PAIR, "down_proj"]
        ),
        'match /q_proj|down_proj/ apply peanut(r=3, depth=1, act_fn="silu")',
    ),
    Case(
        "peanut on bert",
        bert,
        lambda: peft.PeanutConfig(r=4, depth=2, act_fn="tanh", target_modules=BERT),
        'match query | output.dense apply peanut(r=3, depth=2, act_fn="sigmoid")',
    ),
)
"""Three configurations of each method."""


def pooled(config: peft.LoraConfig) -> peft.PeftModel:
    """peft's model in the form that it has on quantised layers alone."""
    model = cast(peft.PeftModel, hf.get_peft_model(dense(), config))
    for layer in model.modules():
        if isinstance(layer, Linear):
            variant = QALoraLinearVariant()
            variant.init(layer, "default", config)
            layer.lora_variant["default"] = variant
    return model


@pytest.mark.parametrize("size", [2, 4])
def test_pooled_inputs_are_as_on_quantised_layers(size: int, tmp_path: Path) -> None:
    """Those layers are none that are here; ours merges, and peft's does not."""
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_qalora=True, qalora_group_size=size, target_modules=BOTH
    )
    theirs = pooled(config)
    moved(theirs, FAR)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    expected = output(theirs.eval())
    assert (expected - output(dense())).abs().max() > 1e-3
    ours = surgery.attach(tmp_path / "theirs", dense())
    close(output(ours.model), expected)
    assert ours.save(tmp_path / "ours").peft == ""
    written, wanted = (
        dict(read_tensors(tmp_path / n / "adapter_model.safetensors")) for n in ("ours", "theirs")
    )
    assert written.keys() == wanted.keys()
    assert all(torch.equal(t, wanted[k]) for k, t in written.items())
    ours.inverse.merge()
    close(output(ours.model), expected)


@pytest.mark.parametrize(
    "config",
    [
        peft.PsoftConfig(r=3, target_modules=BOTH),
        peft.OSFConfig(effective_rank=3, target_modules=BOTH),
        peft.LoraConfig(r=3, kasa_config=KasaConfig(), target_modules=BOTH),
    ],
    ids=["psoft", "osf", "kasa"],
)
def test_parts_of_equal_size_are_those_that_peft_takes(
    config: peft.PeftConfig, tmp_path: Path
) -> None:
    """Of an orthogonal weight any parts are the largest, and peft takes the same each time."""

    def orthogonal() -> nn.Module:
        model = dense()
        for weight in (p for p in model.parameters() if p.dim() == 2):
            untyped.nn.init.orthogonal_(weight)
        return model

    expected = output(saved_by_peft(orthogonal, config, tmp_path, FAR))
    ours = surgery.attach(tmp_path, orthogonal())
    close(output(ours.model), expected)


def test_groups_in_another_order_than_the_models_are_in_no_folder(tmp_path: Path) -> None:
    spec = "match 0 apply tinylora(r=2, u=7, group=1)\nmatch 2 apply tinylora(r=2, u=7)"
    compiled = surgery.compile(spec, dense())
    moved(compiled.model, FAR)
    assert "peft cannot say group = 1 at `0`" in compiled.save(tmp_path).peft
    ours = surgery.attach(tmp_path, dense())
    assert torch.equal(output(ours.model), output(compiled.model))


REFUSED: tuple[tuple[peft.PeftConfig, str], ...] = (
    (
        peft.PsoftConfig(r=3, psoft_svd="lowrank", target_modules=BOTH),
        '`psoft_svd` is "lowrank": its random decomposition of W is in no file',
    ),
    (peft.PeanutConfig(r=3, depth=3, target_modules=BOTH), "3 is above 2"),
    (peft.PeanutConfig(r=3, act_fn="mish", target_modules=BOTH), '"mish" is no activation'),
)


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_would_compute_something_else_is_refused(
    config: peft.PeftConfig, message: str, tmp_path: Path
) -> None:
    saved_by_peft(dense, config, tmp_path)
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.attach(tmp_path, dense())
    assert message in str(caught.value)


def test_projections_that_the_config_says_no_file_has_are_refused(tmp_path: Path) -> None:
    saved_by_peft(dense, peft.TinyLoraConfig(u=3, target_modules=BOTH), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "save_projection": False}))
    with pytest.raises(surgery.SurgeryError, match="tinylora_P`, which is no tensor of it"):
        surgery.attach(tmp_path, dense())


def test_gradients_are_at_right_angles_to_what_is_kept() -> None:
    """As peft's hooks make them, where both have the same parts."""
    config = peft.OSFConfig(effective_rank=3, target_modules=BOTH)
    theirs = cast(nn.Module, hf.get_peft_model(dense(), config))
    ours = surgery.compile("match /0|2/ apply osf(effective_rank=3)", dense())
    generator = torch.Generator().manual_seed(3)
    given = dict(theirs.named_parameters())
    for site in ours.plan.sites:
        for name in ("U", "S", "V"):
            key = f"base_model.model.{site.path}.osf_svd_params.default.{name}_low"
            value = 0.3 * torch.randn(given[key].shape, generator=generator)
            given[key].data.copy_(value)
            ours.parameters()[site.adapted(name)].data.copy_(value)
    for model in (theirs, ours.model):
        untyped.autograd.backward(output(model).square().sum())
    for site in ours.plan.sites:
        for name in ("U", "S", "V"):
            key = f"base_model.model.{site.path}.osf_svd_params.default.{name}_low"
            found = dict(ours.model.named_parameters())[site.adapted(name)].grad
            torch.testing.assert_close(found, given[key].grad, atol=1e-4, rtol=1e-3)


@every(CASES)
def test_what_peft_saves_attaches(case: Case, tmp_path: Path) -> None:
    attaches(case, tmp_path, FAR)


@every(CASES)
def test_what_we_save_peft_loads_and_we_attach_again(case: Case, tmp_path: Path) -> None:
    loads(case, tmp_path, FAR)


@every(CASES)
def test_the_beginning_is_pefts_kind(case: Case) -> None:
    """Both begin as the base, or both as something else."""
    elsewhere = case.name.startswith("kasa") or "nothing" in case.name
    assert begins(case) == (not elsewhere, not elsewhere)
