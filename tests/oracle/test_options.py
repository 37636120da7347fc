"""Against peft itself: what touches the bias, what is drawn in training, options of rotations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from beside_peft import Case, attaches, begins, close, every, fed, loads, output, saved_by_peft
from small_models import bert, gpt2, llama
from torch import Tensor, nn

import surgery

pytestmark = [
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape:UserWarning"),
]

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch


# ------------------------------------------------------------------------------------- models


def dense() -> nn.Module:
    untyped.manual_seed(0)
    layers = nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 14, bias=False)
    return fed(nn.Sequential(*layers), 2, 3, 24)


class Pictures(nn.Module):
    """Convolutions and a head, that end in [n, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0))
        self.point = nn.Conv2d(8, 6, 1, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 4, height, width] to [n, 5]."""
        return self.head(torch.relu(self.point(torch.relu(self.stem(x)))).mean((2, 3)))


def pictures() -> nn.Module:
    untyped.manual_seed(3)
    return fed(Pictures(), 2, 4, 11, 9)


# -------------------------------------------------------------------------------------- cases


PAIR = ["q_proj", "v_proj"]
DENSE = ["0", "2"]
BERT = ["query", "intermediate.dense"]
CASES = (
    Case(
        "oft",
        llama,
        lambda: peft.OFTConfig(oft_block_size=3, target_modules=[*PAIR, "down_proj"]),
        "match /q_proj|down_proj/ apply oft(block_size=6)",
    ),
    Case(
        "oft of two terms",
        bert,
        lambda: peft.OFTConfig(
            oft_block_size=0, r=2, num_cayley_neumann_terms=2, target_modules=BERT
        ),
        "match /query|intermediate\\.dense/ apply oft(block_size=0, r=4, "
        "num_cayley_neumann_terms=2)",
    ),
    Case(
        "oft of three terms",
        dense,
        lambda: peft.OFTConfig(oft_block_size=2, num_cayley_neumann_terms=3, target_modules=DENSE),
        "match /0|2/ apply oft(block_size=4, num_cayley_neumann_terms=4)",
    ),
    Case(
        "oft of seven terms, one block for all",
        dense,
        lambda: peft.OFTConfig(
            oft_block_size=4, num_cayley_neumann_terms=7, block_share=True, target_modules=DENSE
        ),
        "match /0|2/ apply oft(block_size=2, block_share=true, use_cayley_neumann=false)",
    ),
    Case(
        "oft, shortened",
        llama,
        lambda: peft.OFTConfig(
            oft_block_size=6,
            coft=True,
            eps=0.2,
            use_cayley_neumann=False,
            target_modules=[*PAIR, "down_proj"],
        ),
        "match /q_proj|down_proj/ apply oft(block_size=6, coft=true, eps=0.3)",
    ),
    Case(
        "oft, shortened, one block for all",
        dense,
        lambda: peft.OFTConfig(
            oft_block_size=4, coft=True, eps=0.5, block_share=True, target_modules=DENSE
        ),
        "match /0|2/ apply oft(block_size=2, block_share=true, coft=true, eps=0.7)",
    ),
    Case(
        "oft of an embedding",
        llama,
        lambda: peft.OFTConfig(oft_block_size=4, target_modules=["embed_tokens", "q_proj"]),
        "match /embed_tokens|q_proj/ apply oft(block_size=6, coft=true, eps=0.4)",
    ),
    Case(
        "oft of a point",
        pictures,
        lambda: peft.OFTConfig(oft_block_size=2, block_share=True, target_modules=["point"]),
        "match /point|head/ apply oft(block_size=2)",
    ),
    Case(
        "lora with a bias",
        bert,
        lambda: peft.LoraConfig(r=3, lora_alpha=5, lora_bias=True, target_modules=BERT),
        "match /query|intermediate\\.dense/ apply lora(r=2 + layer, alpha=7, bias=true)",
    ),
    Case(
        "lora with a bias where there is none",
        llama,
        lambda: peft.LoraConfig(r=3, use_rslora=True, lora_bias=True, target_modules=PAIR),
        "match /q_proj|v_proj/ apply lora(r=2, rslora=true, bias=true)",
    ),
    Case(
        "lora with a bias, on Conv1D",
        gpt2,
        lambda: peft.LoraConfig(
            r=3, lora_alpha=5, lora_bias=True, fan_in_fan_out=True, target_modules=["c_attn"]
        ),
        "match c_attn apply lora(r=4, alpha=3, bias=true)",
    ),
    Case(
        "lora with a bias, on convolutions",
        pictures,
        lambda: peft.LoraConfig(
            r=3, lora_alpha=5, lora_bias=True, target_modules=["stem", "point"]
        ),
        "match /stem|head/ apply lora(r=2, alpha=3, bias=true)",
    ),
    Case(
        "glora",
        bert,
        lambda: peft.GloraConfig(r=3, target_modules=BERT),
        "match /query|intermediate\\.dense/ apply glora(r=2)",
    ),
    Case(
        "glora of vectors",
        dense,
        lambda: peft.GloraConfig(
            config_A_B="vector", config_C="vector", config_D_E="vector", target_modules=DENSE
        ),
        """match /0|2/ apply glora(config_A_B="vector", config_C="vector", config_D_E="vector")""",
    ),
    Case(
        "glora of numbers",
        dense,
        lambda: peft.GloraConfig(r=2, config_A_B="constant", target_modules=DENSE),
        """match /0|2/ apply glora(r=3, config_A_B="constant", config_D_E="vector")""",
    ),
    Case(
        "glora of the bias alone",
        bert,
        lambda: peft.GloraConfig(
            config_A_B="none", config_C="none", config_D_E="vector", target_modules=BERT
        ),
        """match /query|intermediate\\.dense/ apply glora(config_A_B="none", config_C="vector",
        config_D_E="none")""",
    ),
    Case(
        "glora without biases",
        llama,
        lambda: peft.GloraConfig(r=2, target_modules=[*PAIR, "down_proj"]),
        "match /q_proj|down_proj/ apply glora(r=3)",
    ),
    Case(
        "pvera",
        llama,
        lambda: peft.PveraConfig(r=5, d_initial=0.3, target_modules=[*PAIR, "up_proj"]),
        "match /q_proj|up_proj|down_proj/ apply pvera(r=3, dropout=0.2)",
    ),
    Case(
        "pvera on Conv1D",
        gpt2,
        lambda: peft.PveraConfig(
            r=5, pvera_dropout=0.3, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"]
        ),
        "match /c_attn|c_fc/ apply pvera(r=4)",
    ),
    Case(
        "pvera of one layer",
        dense,
        lambda: peft.PveraConfig(r=3, projection_prng_key=7, target_modules=["0"]),
        "match /0|2/ apply pvera(r=3, projection_prng_key=5)",
    ),
)


@every(CASES)
def test_what_peft_saves_attaches(case: Case, tmp_path: Path) -> None:
    attaches(case, tmp_path)


@every(CASES)
def test_what_we_save_peft_loads(case: Case, tmp_path: Path) -> None:
    loads(case, tmp_path)


@every(CASES)
def test_the_beginning_is_the_base(case: Case) -> None:
    assert begins(case) == (True, True)


@pytest.mark.parametrize("name", ["pvera", "pvera on Conv1D", "pvera of one layer"])
def test_what_is_drawn_in_training_is_what_peft_draws(name: str, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == name)
    theirs = saved_by_peft(case.model, case.config(), tmp_path)
    ours = surgery.attach(tmp_path, case.model()).model
    quiet = output(ours.eval())
    assert torch.equal(output(ours), quiet)
    drawn: list[Tensor] = []
    for model in (theirs.train(), ours.train()):
        untyped.manual_seed(6)
        drawn.append(output(model))
    assert (quiet - drawn[1]).abs().max() > 1e-3
    close(drawn[1], drawn[0])


DROPPING: dict[str, Callable[[], peft.PeftConfig]] = {
    "loha, rows": lambda: peft.LoHaConfig(r=2, rank_dropout=0.4, target_modules=["0"]),
    "loha, whole": lambda: peft.LoHaConfig(r=2, module_dropout=0.4, target_modules=["0"]),
    "lokr, rows": lambda: peft.LoKrConfig(r=2, rank_dropout=0.4, target_modules=["0"]),
    "lokr, scaled rows": lambda: peft.LoKrConfig(
        r=2, rank_dropout=0.4, rank_dropout_scale=True, target_modules=["0"]
    ),
    "lokr, whole": lambda: peft.LoKrConfig(r=2, module_dropout=0.4, target_modules=["0"]),
}


@pytest.mark.parametrize("name", DROPPING)
def test_what_is_dropped_in_training_is_what_peft_drops(name: str, tmp_path: Path) -> None:
    theirs = saved_by_peft(dense, DROPPING[name](), tmp_path)
    ours = surgery.attach(tmp_path, dense()).model
    close(output(ours.eval()), output(theirs))
    quiet, differs = output(ours), 0
    for seed in range(20):
        drawn: list[Tensor] = []
        for model in (theirs.train(), ours.train()):
            untyped.manual_seed(seed)
            if "rows" in name and model is ours:  # peft draws whether the whole is dropped as well
                torch.rand(1)
            drawn.append(output(model))
        differs += not torch.allclose(drawn[1], quiet, atol=1e-3)
        close(drawn[1], drawn[0])
    assert differs > 2


@pytest.mark.parametrize(
    ("config", "pattern", "spec"),
    [
        (
            peft.FourierFTConfig(
                n_frequency=5,
                n_frequency_pattern={"q_proj": 7, r"1\.self_attn\.v_proj": 3},
                target_modules=PAIR,
            ),
            "n_frequency_pattern",
            "match /q_proj|v_proj/ in layers[*] apply fourierft(n_frequency = 4 + layer)",
        ),
        (
            peft.C3AConfig(block_size=3, block_size_pattern={"q_proj": 6}, target_modules=PAIR),
            "block_size_pattern",
            "match /q_proj|v_proj/ in layers[*] apply c3a(block_size = 3 if layer == 0 else 2)",
        ),
    ],
)
def test_sites_of_which_a_pattern_says_otherwise(
    config: peft.PeftConfig, pattern: str, spec: str, tmp_path: Path
) -> None:
    case = Case("", llama, lambda: config, spec)
    attaches(case, tmp_path / "theirs")
    loads(case, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert len(written[pattern]) == 2


def test_a_series_of_before_it_was_changed_is_refused(tmp_path: Path) -> None:
    config = peft.OFTConfig(oft_block_size=2, target_modules=DENSE)
    saved_by_peft(dense, config, tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    del values["peft_version"]
    path.write_text(json.dumps(values))
    with pytest.raises(surgery.SurgeryError, match=r"before 0\.18 the series was another"):
        surgery.attach(tmp_path, dense())
    path.write_text(json.dumps({**values, "use_cayley_neumann": False}))
    surgery.attach(tmp_path, dense())


def test_what_is_drawn_at_inference_is_refused(tmp_path: Path) -> None:
    config = peft.PveraConfig(r=2, sample_at_inference=True, target_modules=["0"])
    saved_by_peft(dense, config, tmp_path)
    with pytest.raises(surgery.SurgeryError, match=r"`sample_at_inference` is true: every output"):
        surgery.attach(tmp_path, dense())
