"""Against peft itself: products of small matrices, reflections, butterflies and blocks."""

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
    drops,
    every,
    fed,
    loads,
    output,
    saved_by_peft,
)
from peft.tuners.boft import layer as butterflies
from peft.tuners.lokr.layer import factorization
from small_models import bert, gpt2, llama
from torch import Tensor, nn

import surgery
from surgery.algebra.axes import divisor

pytestmark = [
    pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT:UserWarning"),
]

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch


class Blocks:
    """In the place of peft's CUDA extension, without which it has butterflies of one factor."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        """[m, n, b, b] to [m, n * b, n * b]."""
        return [torch.stack([untyped.block_diag(*level) for level in blocks])]


@pytest.fixture(autouse=True)
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(butterflies, "get_fbd_cuda", Blocks)


# ------------------------------------------------------------------------------------- models


def dense() -> nn.Module:
    untyped.manual_seed(0)
    layers = nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 14, bias=False)
    return fed(nn.Sequential(*layers), 2, 3, 24)


def loud(model: nn.Module) -> nn.Module:
    """With weights that keep the size of what passes them, so that a change of one is seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)
    return model


class Pictures(nn.Module):
    """Convolutions of two axes, that end in [n, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.square = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 6, 1)
        self.split = nn.Conv2d(6, 4, 2, groups=2, bias=False)
        self.uneven = nn.Conv2d(4, 4, 3, stride=(1, 2), padding=(1, 2))
        self.round = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 4, height, width] to [n, 5]."""
        x = torch.relu(self.point(torch.relu(self.square(torch.relu(self.stem(x))))))
        return self.head(self.round(self.uneven(torch.relu(self.split(x)))).mean((2, 3)))


def pictures() -> nn.Module:
    untyped.manual_seed(3)
    return loud(fed(Pictures(), 2, 4, 11, 9))


class Waves(nn.Module):
    """Convolutions of one axis, that end in [n, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, 8, 4, stride=2, padding=3)
        self.split = nn.Conv1d(8, 6, 3, groups=2, dilation=2)
        self.point = nn.Conv1d(6, 9, 1, bias=False)
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 4, length] to [n, 5]."""
        x = torch.relu(self.split(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.point(x)).mean(2))


def waves() -> nn.Module:
    untyped.manual_seed(4)
    return loud(fed(Waves(), 2, 4, 17))


# -------------------------------------------------------------------------------------- cases


PAIR = ["q_proj", "v_proj"]
CASES = (
    Case(
        "loha",
        llama,
        lambda: peft.LoHaConfig(
            r=3,
            alpha=5,
            target_modules=[*PAIR, "down_proj"],
            rank_pattern={"layers.1.self_attn.v_proj": 2},
            alpha_pattern={"down_proj": 7},
        ),
        "match /q_proj|v_proj|down_proj/ in layers[*] apply loha(r = 2 + layer, alpha = 5 - layer)",
    ),
    Case(
        "loha on convolutions of two axes",
        pictures,
        lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["stem", "point", "split", "head"]),
        "match /stem|point|split|head/ apply loha(r=3, alpha=5)",
    ),
    Case(
        "loha with cores",
        pictures,
        lambda: peft.LoHaConfig(
            r=3,
            alpha=5,
            use_effective_conv2d=True,
            target_modules=["stem", "point", "split"],
        ),
        "match /stem|point|split/ apply loha(r=2, use_effective_conv2d=true)",
    ),
    Case(
        "loha on convolutions of one axis",
        waves,
        lambda: peft.LoHaConfig(r=3, target_modules=["stem", "split", "point"]),
        "match /stem|split|point/ apply loha(r=3, alpha=5)",
    ),
    Case(
        "loha with cores of one axis",
        waves,
        lambda: peft.LoHaConfig(
            r=3, use_effective_conv2d=True, target_modules=["stem", "split", "point"]
        ),
        "match /stem|split|point/ apply loha(r=2, use_effective_conv2d=true)",
    ),
    Case(
        "lokr, whole",
        bert,
        lambda: peft.LoKrConfig(r=8, alpha=5, target_modules=["query", "intermediate.dense"]),
        "match /query|intermediate\\.dense/ apply lokr(alpha=5)",
    ),
    Case(
        "lokr",
        llama,
        lambda: peft.LoKrConfig(
            r=1,
            alpha=3,
            target_modules=[*PAIR, "up_proj", "down_proj"],
            rank_pattern={"up_proj": 2},
        ),
        "match /q_proj|v_proj|up_proj/ apply lokr(r=1, alpha=3)",
    ),
    Case(
        "lokr, both factors of low rank",
        llama,
        lambda: peft.LoKrConfig(
            r=1, decompose_both=True, decompose_factor=4, target_modules=[*PAIR, "down_proj"]
        ),
        "match /q_proj|up_proj/ apply lokr(r=1, decompose_both=true, decompose_factor=5)",
    ),
    Case(
        "lokr on convolutions of two axes",
        pictures,
        lambda: peft.LoKrConfig(
            r=1, alpha=3, target_modules=["stem", "square", "point", "split", "head"]
        ),
        "match /stem|square|point|split|head/ apply lokr(r=1, alpha=3)",
    ),
    Case(
        "lokr on convolutions of two axes, whole",
        pictures,
        lambda: peft.LoKrConfig(r=4, target_modules=["stem", "square", "point", "split"]),
        "match /stem|square|point|split/ apply lokr(r=4, decompose_factor=2)",
    ),
    Case(
        "lokr with cores",
        pictures,
        lambda: peft.LoKrConfig(
            r=1,
            decompose_both=True,
            decompose_factor=2,
            use_effective_conv2d=True,
            target_modules=["stem", "square", "point", "split"],
        ),
        "match /stem|square|point|split/ apply lokr(r=1, alpha=2, use_effective_conv2d=true)",
    ),
    Case(
        "lokr on convolutions of one axis",
        waves,
        lambda: peft.LoKrConfig(r=1, decompose_factor=2, target_modules=["stem", "split", "point"]),
        "match /stem|split|point/ apply lokr(r=1, decompose_factor=2)",
    ),
    Case(
        "hra",
        llama,
        lambda: peft.HRAConfig(r=4, target_modules=[*PAIR, "down_proj"]),
        "match /q_proj|down_proj/ apply hra(r=3)",
    ),
    Case(
        "hra, orthonormal",
        dense,
        lambda: peft.HRAConfig(r=4, apply_GS=True, init_weights=False, target_modules=["0", "2"]),
        "match /0|2/ apply hra(r=5, apply_GS=true)",
    ),
    Case(
        "hra on convolutions",
        pictures,
        lambda: peft.HRAConfig(r=4, target_modules=["square", "point", "head"]),
        "match /square|point|head/ apply hra(r=2)",
    ),
    Case(
        "boft",
        llama,
        lambda: peft.BOFTConfig(boft_block_size=3, target_modules=[*PAIR, "down_proj"]),
        "match /q_proj|down_proj/ apply boft(block_size=6)",
    ),
    Case(
        "boft by the number of blocks",
        dense,
        lambda: peft.BOFTConfig(boft_block_size=0, boft_block_num=4, target_modules=["0", "2"]),
        "match /0|2/ apply boft(block_size=0, block_num=2)",
    ),
    Case(
        "boft of two factors",
        dense,
        lambda: peft.BOFTConfig(
            boft_block_size=2, boft_n_butterfly_factor=2, target_modules=["0", "2"]
        ),
        "match /0|2/ apply boft(block_size=2, n_butterfly_factor=2)",
    ),
    Case(
        "boft of three factors",
        dense,
        lambda: peft.BOFTConfig(boft_block_size=6, boft_n_butterfly_factor=3, target_modules=["0"]),
        "match 0 apply boft(block_size=2, n_butterfly_factor=3)",
    ),
    Case(
        "boft on convolutions",
        pictures,
        lambda: peft.BOFTConfig(boft_block_size=3, target_modules=["square", "point"]),
        "match /square|point/ apply boft(block_size=6)",
    ),
    Case(
        "gralora",
        llama,
        lambda: peft.GraloraConfig(r=6, gralora_k=3, alpha=5, target_modules=[*PAIR, "up_proj"]),
        "match /q_proj|down_proj/ apply gralora(r=4, alpha=5, dropout=0.3)",
    ),
    Case(
        "gralora with dropout",
        llama,
        lambda: peft.GraloraConfig(
            r=4, alpha=5, gralora_dropout=0.3, target_modules=[*PAIR, "up_proj"]
        ),
        "match /v_proj|down_proj/ apply gralora(r=6, alpha=5, k=6)",
    ),
    Case(
        "gralora beside a whole update, on Conv1D",
        gpt2,
        lambda: peft.GraloraConfig(
            r=4, hybrid_r=3, alpha=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
        ),
        "match /c_attn|c_fc/ apply gralora(r=6, hybrid_r=2, k=3, alpha=3)",
    ),
)


@every(CASES)
def test_what_peft_saves_attaches(case: Case, tmp_path: Path) -> None:
    attaches(case, tmp_path)


@every(CASES)
def test_what_we_save_peft_loads(case: Case, tmp_path: Path) -> None:
    loads(case, tmp_path)


@every(CASES)
def test_the_beginning_is_pefts_kind(case: Case) -> None:
    """Both begin as the base, or both as something else."""
    odd = case.spec.endswith(("hra(r=3)", "apply_GS=true)"))
    assert begins(case) == (not odd, "orthonormal" not in case.name)


def test_dropout_in_training_is_pefts(tmp_path: Path) -> None:
    drops(next(c for c in CASES if c.name == "gralora with dropout"), tmp_path)


# -------------------------------------------------------------------- where peft is another thing


@pytest.mark.parametrize(
    "config",
    [
        peft.HRAConfig(r=4, target_modules=["uneven"]),
        peft.BOFTConfig(boft_block_size=3, target_modules=["uneven"]),
    ],
    ids=["hra", "boft"],
)
def test_an_uneven_stride_is_that_of_what_peft_merges(
    config: peft.PeftConfig, tmp_path: Path
) -> None:
    """peft's forward takes the first stride and padding for all; its merge does not."""
    theirs = cast(Any, saved_by_peft(pictures, config, tmp_path))
    forward = output(theirs)
    merged = output(theirs.merge_and_unload())
    ours = surgery.attach(tmp_path, pictures())
    assert not torch.allclose(forward, merged, atol=1e-3)
    close(output(ours.model), merged)
    ours.inverse.merge()
    torch.testing.assert_close(output(ours.model), merged, atol=1e-4, rtol=1e-3)


def test_pefts_whole_factor_on_one_axis_is_no_kronecker_product(tmp_path: Path) -> None:
    config = peft.LoKrConfig(r=8, target_modules=["stem"])
    theirs = cast(Any, saved_by_peft(waves, config, tmp_path / "theirs"))
    with pytest.raises(surgery.SurgeryError, match=r"lokr on `stem`"):
        surgery.attach(tmp_path / "theirs", waves())
    compiled = surgery.compile("match stem apply lokr(r=8)", waves())
    assert "no tensor for C2 of lokr on `stem` (conv1d" in compiled.save(tmp_path / "ours").peft
    # With peft's own factors the Kronecker product is another matrix than peft's change.
    layer = theirs.base_model.model.stem
    left, right = layer.lokr_w1["default"], layer.lokr_w2["default"]
    change = cast(Tensor, layer.get_delta_weight("default")).flatten(1)
    assert not torch.allclose(torch.kron(left, right.flatten(1)), change, atol=1e-3)


REFUSED: tuple[tuple[Callable[[], nn.Module], peft.PeftConfig, str], ...] = (
    (
        dense,
        peft.BOFTConfig(boft_block_size=2, boft_dropout=0.1, target_modules=["0"]),
        "`boft_dropout` is 0.1: blocks are then replaced",
    ),
    (pictures, peft.LoHaConfig(r=2, target_modules=["round"]), "loha on `round`"),
    (pictures, peft.LoKrConfig(r=1, target_modules=["round"]), "lokr on `round`"),
    (pictures, peft.HRAConfig(r=2, target_modules=["round"]), "hra on `round`"),
    (pictures, peft.BOFTConfig(boft_block_size=3, target_modules=["round"]), "boft on `round`"),
)


@pytest.mark.parametrize(("make", "config", "message"), REFUSED)
def test_what_would_compute_something_else_is_refused(
    make: Callable[[], nn.Module], config: peft.PeftConfig, message: str, tmp_path: Path
) -> None:
    saved_by_peft(make, config, tmp_path)
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.attach(tmp_path, make())
    assert message in str(caught.value)


def test_a_butterfly_of_fewer_factors_than_its_config_says_is_refused(tmp_path: Path) -> None:
    """peft without its CUDA extension saves one factor, and the config as it was asked for."""
    saved_by_peft(dense, peft.BOFTConfig(boft_block_size=2, target_modules=["0"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "boft_n_butterfly_factor": 2}))
    with pytest.raises(surgery.SurgeryError, match=r"boft_R"):
        surgery.attach(tmp_path, dense())


def test_sizes_are_divided_as_peft_divides_them() -> None:
    for size in (1, 7, 12, 36, 128, 254, 768):
        for bound in range(-1, 41):
            found = divisor(size, bound)
            assert (found, size // found) == factorization(size, bound), (size, bound)
