"""The verbs for adapters on a model of transformers: what they do there with peft, without it."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from small_models import llama_config, logits, untyped
from support import bits
from torch import nn
from transformers import LlamaForCausalLM
from transformers.utils import logging

import surgery
from surgery.errors import ArtifactError, PlanError, StateError
from surgery.integrations.models import enable
from surgery.model.holder import under_adapters

peft: Any = pytest.importorskip("peft")
log: Any = logging
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(autouse=True)
def quiet() -> None:
    log.set_verbosity_error()
    log.disable_progress_bar()


def plain() -> Any:
    untyped.manual_seed(0)
    return LlamaForCausalLM(llama_config()).eval()


def enabled() -> Any:
    return enable(plain())


def nudged(model: nn.Module, seed: int = 1) -> None:
    """Move what is trained, so that an adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


def lora(**given: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "target_modules": TARGETS, **given})


def trained(model: Any) -> set[str]:
    """The adapters of which something is trained."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return {
        n.split(".surgery.")[1].split(".")[0] if ".surgery." in n else n.split(".")[-2]
        for n in names
    }


# --------------------------------------------------------------------------- beside peft


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Two adapters, as peft saves them from a model of transformers."""
    log.disable_progress_bar()
    made: dict[str, Path] = {}
    for seed, name in enumerate("ab"):
        model = plain()
        model.add_adapter(lora(target_modules=TARGETS[: 2 - seed], init_lora_weights=False))
        nudged(model, seed)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


STEPS: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...] = (
    ("load_adapter", ("a", "a"), {}),
    ("load_adapter", ("b", "b"), {"is_trainable": True}),
    ("set_adapter", ("a",), {}),
    ("set_adapter", (["a", "b"],), {}),
    ("disable_adapters", (), {}),
    ("enable_adapters", (), {}),
    ("disable_adapters", (), {}),
    ("set_adapter", ("b",), {}),
    ("load_adapter", ("a", "c"), {}),
    ("enable_adapters", (), {}),
    ("set_adapter", ("b",), {}),
    ("delete_adapter", ("c",), {}),
    ("load_adapter", ("b", "d"), {}),
    ("set_adapter", (["d", "a"],), {}),
    ("delete_adapter", ("d",), {}),
    ("delete_adapter", ("a",), {}),
)


def test_a_script_does_the_same_as_with_peft(folders: Mapping[str, Path]) -> None:
    theirs, ours = plain(), enabled()
    for verb, arguments, options in STEPS:
        given = [
            folders[a] if verb == "load_adapter" and not i else a for i, a in enumerate(arguments)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one that was active is deleted
            getattr(theirs, verb)(*given, **options)
            getattr(ours, verb)(*given, **options)
        at = f"{verb}{arguments}"
        assert ours.active_adapters() == theirs.active_adapters(), at
        assert ours.training == theirs.training, at
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5, msg=at)
        assert trained(ours) == trained(theirs), at
    assert bits_of_base(ours) == bits_of_base(plain())


def bits_of_base(model: nn.Module) -> dict[str, bytes]:
    return {n: b for n, b in bits(model).items() if not under_adapters(n)}


CONFIGS: Mapping[str, Any] = {
    "lora": lambda: lora(lora_alpha=4),
    "dora": lambda: lora(use_dora=True, rank_pattern={"down_proj": 3}),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "miss": lambda: peft.MissConfig(r=2, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_of_pefts_makes_the_adapter_that_peft_makes(kind: str) -> None:
    theirs, ours = plain(), enabled()
    theirs.add_adapter(CONFIGS[kind]())
    ours.add_adapter(CONFIGS[kind]())
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    nudged(theirs)
    wanted = theirs.get_adapter_state_dict()
    own = ours.get_adapter_state_dict()
    assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in wanted.items()}
    adapted = surgery.of(ours).mapping.rename(
        {f"base_model.model.{n}": t for n, t in wanted.items()}, "peft", "adapted"
    )
    surgery.of(ours).hotswap("default", adapted)
    assert all(torch.equal(t, wanted[n]) for n, t in ours.get_adapter_state_dict().items())
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(ours), logits(plain()), atol=1e-3)


def test_a_config_may_be_an_object_fields_a_file_or_a_folder(folders: Mapping[str, Path]) -> None:
    texts: set[str] = set()
    config = lora()
    for given in (config, config.to_dict(), folders["a"], folders["a"] / "adapter_config.json"):
        model = enabled()
        compiled = model.add_adapter(given, "named")
        assert compiled.adapters == ("named",)
        texts.add(str(compiled.plan))
    assert len(texts) == 1


# ------------------------------------------------------------------------------ our specs


def test_specs_and_configs_stand_side_by_side() -> None:
    model = enabled()
    base = logits(model)
    model.add_adapter("match q_proj apply bone(r=2)")
    nudged(model)
    first = logits(model)
    model.add_adapter(lora(), "second")
    assert model.active_adapters() == ["second"]
    assert trained(model) == {"second"}
    assert torch.equal(logits(model), base)
    model.add_adapter(surgery.parse("match v_proj apply dora(r=2)"), adapter_name="third")
    model.set_adapter(["default", "third"])
    torch.testing.assert_close(logits(model), first)
    assert surgery.of(model).live == "default + third"
    assert surgery.of(model).adapters == ("default", "second", "third")


def test_a_spec_of_several_adapters_keeps_their_names_and_what_it_makes_live() -> None:
    text = "adapter a { match q_proj apply lora(r=2) } adapter b { match v_proj apply lora(r=2) }"
    model = enabled()
    model.add_adapter(text)
    assert model.active_adapters() == ["a"]
    other = enabled()
    other.add_adapter(f"{text} activate 0.5*a + b")
    assert other.active_adapters() == ["a", "b"]
    assert surgery.of(other).live == "0.5*a + b"
    again = enabled()
    with pytest.raises(StateError, match="cannot be the name of `a`, `b`"):
        again.add_adapter(text, "c")
    with pytest.raises(StateError, match="no adapter"):
        again.active_adapters()


def test_a_handle_and_the_verbs_see_the_same() -> None:
    model = enabled()
    compiled = model.add_adapter("match q_proj apply lora(r=2)")
    model.add_adapter("match q_proj apply lora(r=3)", "b")
    model.disable_adapters()
    assert compiled.live is None
    assert model.active_adapters() == ["b"]
    compiled.activate("0.3*default")
    assert model.active_adapters() == ["default"]
    model.enable_adapters()  # nothing is set aside any more
    assert compiled.live == "0.3*default"
    model.disable_adapters()
    model.enable_adapters()
    assert compiled.live == "0.3*default"


def test_the_last_adapter_that_goes_leaves_the_base() -> None:
    model = enabled()
    model.add_adapter("match q_proj apply lora(r=2)")
    model.add_adapter("match embed_tokens apply lora(r=2)", "b")
    with pytest.warns(UserWarning, match="b was active; now default is"):
        model.delete_adapter("b")
    assert model.active_adapters() == ["default"]
    model.delete_adapter("default")
    assert bits(model) == bits(plain())
    assert {type(m) for m in model.modules()} == {type(m) for m in plain().modules()}
    model.add_adapter("match q_proj apply lora(r=2)")
    assert model.active_adapters() == ["default"]


def test_saved_and_loaded_by_the_verbs(tmp_path: Path) -> None:
    model = enabled()
    model.save_pretrained(tmp_path / "own")
    plain().save_pretrained(tmp_path / "plain")
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "own" / path.name).read_bytes() == path.read_bytes()
    model.add_adapter("match q_proj apply lora(r=2) match v_proj apply dora(r=2)")
    nudged(model)
    adapted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*"))
    model.load_adapter(tmp_path / "adapter", "again")
    assert model.active_adapters() == ["again"]
    assert trained(model) == set()
    assert torch.equal(logits(model), adapted)
    nudged_other = enabled()
    nudged_other.add_adapter("match q_proj apply lora(r=2) match v_proj apply dora(r=2)")
    nudged_other.load_adapter(tmp_path / "adapter", "default", hotswap=True)
    assert torch.equal(logits(nudged_other), adapted)
    model.set_adapter(["default", "again"])
    with pytest.raises(StateError, match="are active"):
        model.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both").exists()


# --------------------------------------------------------------------- copies, and its class


def test_copies_and_pickles_have_verbs_of_their_own() -> None:
    model = enabled()
    model.add_adapter("match q_proj apply lora(r=2)")
    nudged(model)
    model.add_adapter("match v_proj apply lora(r=2)", "b")
    nudged(model)
    adapted = logits(model)
    twin = surgery.compile("adapter c { match o_proj apply lora(r=2) }", model, inplace=False).model
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), cast(Any, twin)):
        assert torch.equal(logits(other), adapted)
        other.set_adapter("default")
        assert other.active_adapters() == ["default"]
        assert not torch.equal(logits(other), adapted)
        assert model.active_adapters() == ["b"]
        other.disable_adapters()
        again = copy.deepcopy(other)
        again.enable_adapters()
        assert again.active_adapters() == other.active_adapters() == ["default"]
        assert surgery.of(other).live is None
    assert torch.equal(logits(model), adapted)


def test_the_verbs_change_no_class_and_keep_no_model() -> None:
    before = dict(vars(LlamaForCausalLM))
    model = enabled()
    verb_before = model.add_adapter
    assert enable(model).add_adapter == verb_before
    model.add_adapter("match q_proj apply lora(r=2)")
    logits(model)
    assert type(model) is LlamaForCausalLM
    assert dict(vars(LlamaForCausalLM)) == before
    gone, verb = weakref.ref(model), model.set_adapter
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="gone"):
        verb("default")


# ------------------------------------------------------------------------------ bad input


def snapshot(model: Any) -> tuple[Any, ...]:
    compiled = surgery.of(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    return compiled.adapters, compiled.live, model.active_adapters(), flags, bits(model)


def test_what_is_wrong_is_said_and_changes_nothing(tmp_path: Path) -> None:
    model = enabled()
    model.add_adapter("match q_proj apply lora(r=2)")
    model.add_adapter("match v_proj apply lora(r=2)", "style")
    before = snapshot(model)
    cases: tuple[tuple[type[Exception], str, str, tuple[Any, ...]], ...] = (
        (StateError, "E412", "add_adapter", ("match v_proj apply lora(r=2)", "style")),
        (StateError, "E412", "add_adapter", (lora(),)),
        (StateError, "E443", "add_adapter", (lora(), "my.own")),
        (ArtifactError, "E516", "add_adapter", (lora(target_modules=["nothing"]), "x")),
        (ArtifactError, "E516", "add_adapter", ({"peft_type": "LARA"}, "x")),
        (ArtifactError, "E515", "add_adapter", ({**lora().to_dict(), "lora_alphas": 3}, "x")),
        (ArtifactError, "E517", "load_adapter", (tmp_path, "x")),
        (StateError, "E411", "set_adapter", ("stile",)),
        (StateError, "E411", "set_adapter", (["style", "a", "b"],)),
        (StateError, "E411", "set_adapter", ([],)),
        (StateError, "E411", "delete_adapter", (["style", "other"],)),
        (StateError, "E411", "get_adapter_state_dict", ("other",)),
    )
    for error, code, verb, given in cases:
        with pytest.raises(error) as raised:
            getattr(model, verb)(*given)
        found = cast(Any, raised.value).diagnostics
        assert found[0].code == code, verb
        assert found[0].hint or found[0].label, verb
        assert snapshot(model) == before, verb
    with pytest.raises(StateError) as raised:
        model.set_adapter(["a", "b", "style"])
    assert len(raised.value.diagnostics) == 2


def test_a_merged_adapter_stands_in_the_way() -> None:
    model = enabled()
    compiled = model.add_adapter("match q_proj apply lora(r=2)")
    nudged(model)
    compiled.inverse.merge()
    before = snapshot(model)
    for call in (
        lambda: model.add_adapter(lora(), "b"),
        lambda: model.set_adapter("default"),
        lambda: model.disable_adapters(),
        lambda: model.delete_adapter("default"),
    ):
        with pytest.raises(StateError) as raised:
            call()
        assert raised.value.diagnostics[0].code == "E402"
        assert snapshot(model) == before
    compiled.inverse.unmerge()
    model.delete_adapter("default")
    assert bits(model) == bits(plain())


def test_a_model_with_pefts_adapters_is_left_to_peft() -> None:
    model = plain()
    model.add_adapter(lora())
    with pytest.raises(StateError, match="adapters of peft's"):
        enable(model)
    assert "add_adapter" not in vars(model)


def test_verbs_without_adapters_say_so() -> None:
    model = enabled()
    for call in (model.active_adapters, model.disable_adapters, model.enable_adapters):
        with pytest.raises(StateError, match="no adapter"):
            call()
    with pytest.raises((PlanError, StateError, surgery.SurgeryError)):
        model.add_adapter("match nothing_at_all apply lora(r=2)")
    assert bits(model) == bits(plain())
    assert not [t for t in model.parameters() if not t.requires_grad]
