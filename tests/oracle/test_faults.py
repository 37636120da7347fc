"""Where peft's forward, merge, reload or beginning is not its equation's: ours agree there.

Each test has peft fail first, so that it says what the fault is, and then has the same adapter
here: its forward is its merge, and what is unloaded is the base to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from peft.tuners.lora.config import KasaConfig
from small_models import ARCHITECTURES, fresh
from support import bits, moved
from torch import Tensor, nn

import surgery
from surgery.store import read_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
    pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT:UserWarning"),
]

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch

Make = Callable[[], nn.Module]


# ------------------------------------------------------------------------------------- models


def dense() -> nn.Module:
    untyped.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 30)).eval()


def seen(model: nn.Module) -> Tensor:
    """The output of any model here on a fixed input."""
    return seen_with_gradients(model).detach()


def seen_with_gradients(model: nn.Module) -> Tensor:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    first: Any = next(m for m in inner.modules() if isinstance(m, kinds))
    width = first.in_features if isinstance(first, nn.Linear) else first.in_channels
    shape = (2, width, *(9, 8, 5)[: first.weight.dim() - 2])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(first.weight.dtype)
    return cast(Tensor, model(x))


def tried(model: nn.Module) -> Tensor | None:
    """The output, or None where sizes do not fit each other."""
    try:
        return seen(model)
    except RuntimeError:
        return None


def close(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def far(found: Tensor | None, expected: Tensor) -> None:
    """None at all, of another size, or another by more than a hundredth of the largest."""
    if found is not None and found.shape == expected.shape:
        assert (found - expected).abs().max() > 1e-2 * expected.abs().max()


def whole(ours: surgery.Compiled, base: nn.Module, expected: Tensor | None = None) -> None:
    """The forward is what the merged weights compute, and what is unloaded is the base."""
    live = seen(ours.model)
    if expected is not None:
        close(live, expected)
    ours.inverse.merge()
    close(seen(ours.model), live)
    ours.inverse.unmerge()
    close(seen(ours.model), live)
    assert bits(ours.inverse.unload()) == bits(base)


# ------------------------------------------------------------------------ two adapters of one model


def two(call: str, other: str, live: str, make: Make = dense) -> surgery.Compiled:
    """Adapters `one` and `two` on both layers, moved, with `live` what the forward runs."""
    spec = "\n".join(
        f"adapter {name} {{ match * apply {of} }}" for name, of in (("one", call), ("two", other))
    )
    ours = surgery.compile(spec, make())
    trained = {key for key, p in ours.model.named_parameters() if p.requires_grad}
    for seed, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, tensor in ours.parameters(name).items():
                if key in trained:
                    tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    ours.activate(live)
    return ours


def both_in_peft(ours: surgery.Compiled, directory: Path, make: Make = dense) -> Any:
    """peft with the same two adapters, both of them active."""
    for name in ("one", "two"):
        assert ours.save(directory / name, name).peft == ""
    theirs = hf.PeftModel.from_pretrained(make(), str(directory / "one"), adapter_name="one")
    theirs.load_adapter(str(directory / "two"), adapter_name="two")
    theirs.base_model.set_adapter(["one", "two"])
    return theirs.eval()


def test_the_second_circulant_sees_the_input_and_not_the_firsts_output(tmp_path: Path) -> None:
    def square() -> nn.Module:
        untyped.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 12)).eval()

    call = 'c3a(block_size=6, init_weights="zeros")'
    ours = two(call, call, "one + two", square)
    theirs = both_in_peft(ours, tmp_path, square)
    forward = seen(theirs)
    merged = seen(theirs.merge_and_unload())
    far(forward, merged)
    whole(ours, square(), merged)


def test_rotations_one_after_the_other_keep_their_order(tmp_path: Path) -> None:
    call = "oft(block_size=6)"
    ours = two(call, call, "one then two")
    theirs = both_in_peft(ours, tmp_path)
    forward = seen(theirs)
    merged = seen(theirs.merge_and_unload())
    far(forward, merged)
    # peft merges one after the other, and runs them the other way round.
    close(seen(ours.model), merged)
    ours.activate("two then one")
    close(seen(ours.model), forward)
    ours.activate("one then two")
    whole(ours, dense(), merged)


def test_all_that_are_live_are_run_and_not_the_first_alone(tmp_path: Path) -> None:
    ours = two("osf()", "osf(effective_rank=9)", "one")
    alone = seen(ours.model)
    ours.activate("one + two")
    theirs = both_in_peft(ours, tmp_path)
    close(seen(theirs), alone)
    merged = seen(theirs.merge_and_unload())
    far(alone, merged)
    whole(ours, dense(), merged)


def test_rows_of_several_adapters_are_not_asked_for_in_vain(tmp_path: Path) -> None:
    ours = surgery.compile("match * apply loha(r=3)", dense())
    moved(ours)
    ours.save(tmp_path)
    theirs = hf.PeftModel.from_pretrained(dense(), str(tmp_path)).eval()
    x = torch.randn(2, 12)
    # peft takes the names, and gives every row its adapter nevertheless.
    close(theirs(x, adapter_names=["__base__", "default"]), theirs(x))
    with pytest.raises(TypeError, match="adapter_names"):
        ours.model(x, adapter_names=["__base__", "default"])


@pytest.mark.parametrize(
    ("first", "second"),
    [('init_weights="mini", mini_r=3', ""), ("", 'init_weights="mini", mini_r=3')],
)
def test_each_adapter_of_a_layer_has_its_own_equation(
    first: str, second: str, tmp_path: Path
) -> None:
    calls = [f"miss({', '.join(filter(None, ('r=6', more)))})" for more in (first, second)]
    ours = two(calls[0], calls[1], "one + two")
    theirs = both_in_peft(ours, tmp_path)
    for name in ("one", "two"):
        ours.activate(name)
        close(seen(ours.model), seen(surgery.attach(tmp_path / name, dense()).model))
    ours.activate("one + two")
    far(tried(theirs), seen(ours.model))
    whole(ours, dense())


def test_adapters_of_unequal_rank_share_no_projection(tmp_path: Path) -> None:
    ours = two("vera(r=7)", "vera(r=5)", "one + two")
    with pytest.raises(RuntimeError, match="size mismatch"):
        both_in_peft(ours, tmp_path)
    whole(ours, dense())


# ------------------------------------------------------------------------------- merge and unmerge


def test_a_factor_of_nought_is_undone(tmp_path: Path) -> None:
    ours = surgery.compile('match 0 apply ia3() match 2 apply ia3(side="in")', dense())
    with torch.no_grad():
        for factor in ours.parameters().values():
            factor[1] = 0
    ours.save(tmp_path)
    theirs = hf.PeftModel.from_pretrained(dense(), str(tmp_path)).eval()
    before = seen(theirs)
    theirs.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerge result can be inaccurate"):
        theirs.unmerge_adapter()
    with theirs.disable_adapter():
        far(seen(theirs), seen(dense()))
    whole(ours, dense(), before)


def test_a_merge_in_few_bits_leaves_the_parameters(tmp_path: Path) -> None:
    def coarse() -> nn.Module:
        return dense().to(torch.bfloat16)

    ours = surgery.compile(
        'match * apply miss(r=6, mini_r=3, init_weights="mini")', coarse(), dtype=torch.bfloat16
    )
    moved(ours)
    ours.save(tmp_path)
    theirs = hf.PeftModel.from_pretrained(coarse(), str(tmp_path), autocast_adapter_dtype=False)
    block = theirs.base_model.model[0].miss_block
    assert block["default"].shape == (6, 3)
    theirs.merge_adapter()
    assert block["default"].shape == (6, 12)
    before = {name: t.clone() for name, t in ours.parameters().items()}
    ours.inverse.merge()
    assert all(torch.equal(t, before[name]) for name, t in ours.parameters().items())
    ours.inverse.unmerge()
    assert bits(ours.inverse.unload()) == bits(coarse())


def test_a_bias_is_made_where_there_is_none(tmp_path: Path) -> None:
    def bare() -> nn.Module:
        untyped.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 7, bias=False)).eval()

    config = peft.BeftConfig(target_modules=["0"], init_weights=False)
    with pytest.warns(UserWarning, match="has no bias term"):
        theirs = hf.get_peft_model(bare(), config).eval()
    theirs.save_pretrained(str(tmp_path))
    expected = seen(theirs)
    with pytest.raises(ValueError, match="has no bias"):
        theirs.merge_adapter()
    whole(surgery.attach(tmp_path, bare()), bare(), expected)


def test_a_gain_is_not_lost_when_it_becomes_factors(tmp_path: Path) -> None:
    ours = surgery.compile("match * apply dora(r=3)", dense())
    moved(ours)
    ours.save(tmp_path / "gain")
    expected = seen(ours.model)
    theirs = hf.PeftModel.from_pretrained(dense(), str(tmp_path / "gain")).eval()
    close(seen(theirs), expected)
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        config, tensors = hf.convert_to_lora(theirs, rank=12)
    again = hf.get_peft_model(dense(), config).eval()
    hf.set_peft_model_state_dict(again, tensors)
    far(seen(again), expected)
    surgery.convert(tmp_path / "gain", tmp_path / "plain", dense(), to="lora", rank=12)
    close(seen(surgery.attach(tmp_path / "plain", dense()).model), expected)


def test_a_budget_that_is_whole_takes_nothing_away(tmp_path: Path) -> None:
    schedule: dict[str, Any] = {"target_r": 3, "total_step": 3}
    config = hf.AdaLoraConfig(init_r=3, target_modules=["0", "2"], **schedule)
    theirs = hf.get_peft_model(dense(), config)
    theirs.save_pretrained(str(tmp_path))
    cast(Any, seen_with_gradients(theirs).sum()).backward()
    with pytest.raises(RuntimeError, match="kthvalue"):
        theirs.base_model.update_and_allocate(1)
    ours = surgery.attach(tmp_path, dense())
    moved(ours)
    before = seen(ours.model)
    allocation = surgery.allocate(ours, **schedule)
    for step in (1, 2, 3):
        cast(Any, seen_with_gradients(ours.model).sum()).backward()
        allocation.step(step)
    assert torch.equal(seen(ours.model), before)
    whole(ours, dense())


def test_the_series_of_a_rotation_turns_the_other_way(tmp_path: Path) -> None:
    exact = surgery.compile("match * apply oft(block_size=6, use_cayley_neumann=false)", dense())
    series = surgery.compile("match * apply oft(block_size=6)", dense())
    with torch.no_grad():
        for (_, one), (_, two) in zip(
            exact.parameters().items(), series.parameters().items(), strict=True
        ):
            one.copy_(0.01 * torch.randn(one.shape, generator=torch.Generator().manual_seed(3)))
            two.copy_(-one)
    assert (seen(exact.model) - seen(dense())).abs().max() > 1e-3
    close(seen(series.model), seen(exact.model))
    for name, ours in (("exact", exact), ("series", series)):
        ours.save(tmp_path / name)
        theirs = hf.PeftModel.from_pretrained(dense(), str(tmp_path / name)).eval()
        whole(ours, dense(), seen(theirs))


# --------------------------------------------------------------------- what is saved and beginnings


def test_the_name_of_one_adapter_hides_nothing_of_another(tmp_path: Path) -> None:
    """peft looks for the others' names anywhere in a key: one called `0` takes the first layer."""
    it = ARCHITECTURES["llama"]
    config = peft.LoraConfig(r=2, target_modules=[it.query], init_lora_weights=False)
    theirs = hf.get_peft_model(fresh("llama"), config, adapter_name="one").eval()
    expected = it.output(theirs)
    theirs.add_adapter("0", config)
    theirs.save_pretrained(str(tmp_path / "theirs"), selected_adapters=["one"])
    kept = read_tensors(tmp_path / "theirs" / "one" / "adapter_model.safetensors").shapes
    assert not [key for key in kept if ".layers.0." in key]

    names = ("one", "layers", it.query, "default", "A", "shared")
    spec = "\n".join(f"adapter {n} {{ match {it.query} apply lora(r=2, alpha=8) }}" for n in names)
    ours = surgery.compile(f"{spec}\nactivate one", fresh("llama"))
    held = dict(theirs.base_model.model.named_parameters())
    with torch.no_grad():
        for name, tensor in ours.parameters("one").items():
            tensor.copy_(held[f"{name.partition('.surgery')[0]}.lora_{name[-1]}.one.weight"])
    close(it.output(ours.model), expected)
    for name in names:
        assert ours.save(tmp_path / name, name).peft == ""
        file = read_tensors(tmp_path / name / "adapter_model.safetensors")
        assert len(file.shapes) == len(ours.parameters(name))
    again = hf.PeftModel.from_pretrained(fresh("llama"), str(tmp_path / "one")).eval()
    close(it.output(again), expected)
    with pytest.raises(surgery.SurgeryError, match="E0"):
        surgery.parse("adapter 0 { match q_proj apply lora() }")


def test_bases_that_all_sites_share_are_saved_once(tmp_path: Path) -> None:
    config = peft.RandLoraConfig(r=3, target_modules=["0", "2"])
    theirs = hf.get_peft_model(dense(), config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = surgery.attach(tmp_path / "theirs", dense())
    assert ours.save(tmp_path / "ours").peft == ""
    keys = {
        who: {
            key
            for key in read_tensors(tmp_path / who / "adapter_model.safetensors").shapes
            if key.endswith((".randlora_A", ".randlora_B"))
        }
        for who in ("theirs", "ours")
    }
    assert len(keys["theirs"]) == 6
    assert keys["ours"] == {"base_model.randlora_A", "base_model.randlora_B"}
    moved(ours)
    whole(ours, dense())


def test_what_is_nothing_is_saved_dense_and_is_nothing(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"config_A_B": "none", "config_C": "none", "config_D_E": "none"}
    config = peft.GloraConfig(r=3, target_modules=["0", "2"], **nothing)
    hf.get_peft_model(dense(), config).save_pretrained(str(tmp_path))
    zeros = [s for s in read_tensors(tmp_path / "adapter_model.safetensors").shapes.values()]
    assert (30, 12) in zeros
    whole(surgery.attach(tmp_path, dense()), dense(), seen(dense()))


def test_a_beginning_that_no_folder_tells_is_refused_where_peft_reads_another(
    tmp_path: Path,
) -> None:
    init = cast(Any, "pissa_niter_2")
    config = peft.LoraConfig(r=3, init_lora_weights=init, target_modules=["0", "2"])
    theirs = hf.get_peft_model(dense(), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2)
    theirs.save_pretrained(str(tmp_path))
    base = dense()
    untyped.manual_seed(6)
    again = hf.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert (seen(again) - seen(theirs)).abs().max() > 1e-4
    with pytest.raises(surgery.SurgeryError, match="changes the base by what no file has"):
        surgery.attach(tmp_path, dense())


@torch.no_grad()
def test_a_beginning_by_qr_is_one_on_transposed_matrices_too() -> None:
    it = ARCHITECTURES["gpt2"]
    config = peft.LoraConfig(
        r=3, init_lora_weights="olora", target_modules=[it.value], fan_in_fan_out=True
    )
    with pytest.raises(RuntimeError, match=r"size of tensor|shape"):
        it.output(hf.get_peft_model(fresh("gpt2"), config).eval())
    ours = surgery.compile(f"match {it.value} apply olora(r=3, alpha=5)", fresh("gpt2"))
    close(it.output(ours.model), it.output(fresh("gpt2")))
    moved(ours)
    live = it.output(ours.model)
    ours.inverse.merge()
    close(it.output(ours.model), live)
    assert bits(ours.inverse.unload()) == bits(fresh("gpt2"))


BEGINNINGS: dict[str, tuple[Any, str]] = {
    "an odd number of reflections": (peft.HRAConfig(r=3), "hra(r=3)"),
    "reflections made orthogonal": (peft.HRAConfig(r=4, apply_GS=True), "hra(r=4, apply_GS=true)"),
    "a drawn spectrum": (peft.FourierFTConfig(n_frequency=17), "fourierft(n_frequency=17)"),
    "a drawn circulant": (peft.C3AConfig(block_size=6), "c3a(block_size=6)"),
    "a drawn bank": (
        peft.VBLoRAConfig(r=3, num_vectors=7, vector_length=6),
        "vblora(r=3, num_vectors=7, vector_length=6, init_vector_bank_bound=0.4)",
    ),
    "a dealt vector": (
        peft.UniLoraConfig(r=3, theta_d_length=11, init_theta_d_bound=0.5),
        "unilora(r=3, theta_d_length=11, init_theta_d_bound=0.5)",
    ),
    "a base without its least parts": (peft.LoraConfig(r=3, kasa_config=KasaConfig()), "kasa(r=3)"),
    "a projection": (peft.DeftConfig(r=3, para=True), "deft(r=3, para=true)"),
}


@pytest.mark.parametrize("what", BEGINNINGS)
def test_a_beginning_that_is_not_the_base_is_one_model(what: str, tmp_path: Path) -> None:
    config, call = BEGINNINGS[what]
    config.target_modules = {"0", "2"}
    untyped.manual_seed(6)
    theirs = hf.get_peft_model(dense(), config).eval()
    expected, base = seen(theirs), seen(dense())
    assert (expected - base).abs().max() > 1e-5
    theirs.save_pretrained(str(tmp_path))
    # Of two equal columns peft takes what rounding leaves of the second for a direction.
    whole(surgery.attach(tmp_path, dense()), dense(), None if "apply_GS" in call else expected)
    ours = surgery.compile(f"match * apply {call}", dense())
    assert (seen(ours.model) - base).abs().max() > 1e-5
    whole(ours, dense())
