"""A base saved beside its adapters, adapters with their base's name, and both on the hub."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast
from unittest import mock

import pytest
import torch
import transformers
from small_models import llama_config, logits, untyped
from support import bits, moved
from torch import nn
from transformers import BertConfig, LlamaForCausalLM, T5Config
from transformers.utils import logging

import surgery
from surgery.errors import ArtifactError, StateError
from surgery.integrations import models
from surgery.model.holder import under_adapters

hub: Any = pytest.importorskip("huggingface_hub")
library: Any = transformers  # whose types are not complete
log: Any = logging
SPEC = "match q_proj apply lora(r=2)"
TWO = f"adapter a {{ {SPEC} }} adapter b {{ match v_proj apply dora(r=2) }}"
FILES = {"adapter.peft", "adapter_config.json", "adapter_model.safetensors"} | {
    "base.json",
    "inverse.json",
    "mapping.json",
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    log.set_verbosity_error()
    log.disable_progress_bar()


def llama(**given: Any) -> Any:
    untyped.manual_seed(0)
    return LlamaForCausalLM(llama_config(**given)).eval()


def read(folder: Path, **options: Any) -> Any:
    """A Llama from a folder."""
    return library.LlamaForCausalLM.from_pretrained(folder, **options)


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def t5() -> Any:
    untyped.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 12, "d_kv": 5, "d_ff": 20, "num_layers": 1, "num_heads": 3}
    return library.T5ForConditionalGeneration(T5Config(vocab_size=31, **sizes)).eval()


def adapted(model: nn.Module, spec: str = SPEC) -> surgery.Compiled:
    compiled = surgery.compile(spec, model)
    for name in compiled.adapters:
        moved(compiled, name)
    return compiled


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --------------------------------------------------------------------------------- the base

BASES: tuple[tuple[Callable[[], Any], str, dict[str, Any]], ...] = (
    (llama, "train @norm match q_proj apply vera(r=3)", {}),
    (
        llama,
        f"adapter a {{ {SPEC} }} adapter b {{ match v_proj apply dora(r=2) }} activate a + b",
        {},
    ),
    (tied, "match embed_tokens apply lora(r=2) share", {}),
    (tied, SPEC, {"max_shard_size": 4_000}),
    (t5, "match /[qv]/ apply bone(r=2)", {"max_shard_size": "5KB"}),
)


@pytest.mark.parametrize(("build", "spec", "options"), BASES)
def test_the_base_is_saved_as_if_it_had_no_adapter(
    build: Callable[[], Any], spec: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = build()
    build().save_pretrained(tmp_path / "plain", **options)
    compiled = adapted(model, spec)
    before, live = bits(model), compiled.live
    saved = models.save_base(compiled, tmp_path / "saved", **options)
    assert contents(tmp_path / "saved") == contents(tmp_path / "plain")
    assert {p.name for p in saved.files} == contents(tmp_path / "plain").keys()
    assert (str(saved), saved.merged) == ("the base", "")
    assert compiled.live == live
    assert bits(model) == before
    assert any(map(under_adapters, model.state_dict()))
    again = cast(Any, type(model)).from_pretrained(tmp_path / "saved")
    compiled.activate(None)
    assert bits(again) == {n: b for n, b in before.items() if not under_adapters(n)}


def test_a_merged_model_is_saved_as_what_it_is(tmp_path: Path) -> None:
    model = tied()
    compiled = adapted(model, "match lm_head apply lora(r=2) untie match v_proj apply dora(r=2)")
    compiled.inverse.merge()
    saved = models.save_base(model, tmp_path)
    assert saved.merged == "default"
    assert str(saved) == "the base with `default` merged into it"
    again = read(tmp_path)
    assert torch.equal(logits(again), logits(model))
    compiled.inverse.unmerge()
    models.save_base(model, tmp_path)
    assert bits(read(tmp_path)) == bits(tied())


def test_weights_from_before_do_not_stay_beside_new_ones(tmp_path: Path) -> None:
    model = llama()
    compiled = adapted(model)
    (tmp_path / "notes.txt").write_text("mine")
    models.save_base(compiled, tmp_path, max_shard_size=4_000)
    assert len([*tmp_path.glob("model-*")]) > 1
    models.save_base(compiled, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*model*")) == ["model.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_quantised_base_and_an_adapter_for_it_and_for_the_dense_one(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "vocab_size": 13}
    library.LlamaForCausalLM(library.LlamaConfig(**sizes, **heads)).save_pretrained(
        tmp_path / "base"
    )
    how: Any = library.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = read(tmp_path / "base", quantization_config=how)
    model.save_pretrained(tmp_path / "plain")
    compiled = adapted(model, "match q_proj apply dora(r=2)")
    models.save_base(compiled, tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(tmp_path / "plain")
    models.save_pretrained(compiled, tmp_path / "adapter")
    again = models.from_pretrained(tmp_path / "adapter", quantization_config=how)
    assert torch.equal(logits(again.model), logits(model))
    dense = models.from_pretrained(tmp_path / "adapter").model
    assert dense.get_parameter("model.layers.0.self_attn.q_proj.weight").dtype == torch.float32


def test_a_base_that_is_spread_over_processes(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    spread: Any = distributed  # whose types are not complete
    compiled = adapted(llama())
    models.save_pretrained(compiled, tmp_path / "whole", base="owner/llama")
    spread.init_process_group("gloo", store=spread.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(compiled.model)
        with pytest.raises(ArtifactError, match="spread over processes"):
            models.save_base(compiled, tmp_path / "base")
        models.save_pretrained(compiled, tmp_path / "spread", base="owner/llama")
    finally:
        spread.destroy_process_group()
    assert contents(tmp_path / "spread") == contents(tmp_path / "whole")


def test_a_base_whose_weights_are_on_disk(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    llama().save_pretrained(tmp_path / "plain")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "disk", "lm_head": "cpu"}
    folder = tmp_path / "offload"
    compiled = adapted(read(tmp_path / "plain", device_map=places, offload_folder=folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers says that there must be memory for a shard
        models.save_base(compiled, tmp_path / "saved")
    expected = contents(tmp_path / "plain")
    assert contents(tmp_path / "saved") == expected


def test_what_cannot_be_saved_leaves_nothing(tmp_path: Path) -> None:
    compiled = surgery.compile("match * apply lora(r=2)", nn.Sequential(nn.Linear(5, 7)))
    with pytest.raises(ArtifactError, match="no `save_pretrained`"):
        models.save_base(compiled, tmp_path / "out")
    model = llama()
    compiled = adapted(model)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="cannot write"):
        models.save_base(compiled, tmp_path / "file")
    with (
        mock.patch.object(LlamaForCausalLM, "save_pretrained", _half_way),
        pytest.raises(ArtifactError, match="No space left"),
    ):
        models.save_base(compiled, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert not vars(model)["_state_dict_hooks"]


def _half_way(model: object, folder: Path, **options: object) -> None:
    (folder / "config.json").write_text("{}")
    raise OSError(28, "No space left on device")


# ------------------------------------------------------------------------ an adapter, and both


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a Llama in it."""
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("spec", [SPEC, f"{SPEC} match v_proj apply dora(r=2)"])
def test_a_folder_builds_its_base_and_attaches(spec: str, base: Path, tmp_path: Path) -> None:
    model = read(base)
    compiled = adapted(model, spec)
    report = models.save_pretrained(compiled, tmp_path / "adapter")
    assert (report.peft == "") == (spec == SPEC)
    assert {p.name for p in report.files} == FILES - (
        {"adapter_config.json"} if report.peft else set()
    )
    stated = json.loads((tmp_path / "adapter" / "base.json").read_text())
    wanted = {"base_model_name_or_path": str(base), "revision": None, "class": "LlamaForCausalLM"}
    assert stated == wanted
    assert f"base: {base}" in str(surgery.inspect(tmp_path / "adapter"))
    for given in (
        {},
        {"name": "mine"},
        {"dtype": torch.float32},
        {"model_class": LlamaForCausalLM},
    ):
        again = models.from_pretrained(tmp_path / "adapter", **cast(Any, given))
        assert type(again.model) is LlamaForCausalLM
        assert again.adapters == (given.get("name", "default"),)
        assert not again.model.training
        assert torch.equal(logits(again.model), logits(model))


def test_a_folder_that_peft_wrote_builds_its_base(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = read(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it reads what transformers will not have for long
        wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "theirs")
    again = models.from_pretrained(tmp_path / "theirs")
    assert type(again.model) is LlamaForCausalLM
    torch.testing.assert_close(logits(again.model), logits(wrapped), rtol=1e-5, atol=1e-6)
    adapted(again.model, f"adapter more {{ {SPEC} }}")


def test_the_class_is_that_of_the_task(tmp_path: Path) -> None:
    untyped.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=13, num_attention_heads=2, **sizes)
    library.BertModel(config).save_pretrained(tmp_path / "base")
    cls: Any = library.BertForSequenceClassification
    model = cls.from_pretrained(tmp_path / "base", num_labels=3)
    compiled = adapted(model, "save classifier match query apply lora(r=2)")
    models.save_pretrained(compiled, tmp_path / "adapter")
    tokens = torch.tensor([[3, 5, 1]])
    expected = logits(model.eval(), tokens)
    for _ in range(2):  # then as peft would have written it
        again = models.from_pretrained(tmp_path / "adapter", num_labels=3)
        assert type(again.model) is cls
        assert torch.equal(logits(again.model, tokens), expected)
        (tmp_path / "adapter" / "base.json").unlink(missing_ok=True)


def test_a_base_may_be_another_than_the_folder_says(base: Path, tmp_path: Path) -> None:
    compiled = adapted(llama())  # which was loaded from nowhere
    models.save_pretrained(compiled, tmp_path / "adapter")
    with pytest.raises(ArtifactError) as raised:
        models.from_pretrained(tmp_path / "adapter")
    assert raised.value.diagnostics[0].code == "E575"
    assert "base=" in raised.value.diagnostics[0].hint
    again = models.from_pretrained(tmp_path / "adapter", base=base)
    assert torch.equal(logits(again.model), logits(compiled.model))
    models.save_pretrained(compiled, tmp_path / "adapter", base=str(tmp_path / "gone"))
    for name in ("base.json", "adapter_config.json"):
        stated = json.loads((tmp_path / "adapter" / name).read_text())
        assert stated["base_model_name_or_path"] == str(tmp_path / "gone")
    with pytest.raises(ArtifactError, match="cannot be built") as raised:
        models.from_pretrained(tmp_path / "adapter")
    assert "gone" in raised.value.diagnostics[0].message


def test_an_adapter_beside_its_base_is_not_put_on_twice(base: Path) -> None:
    compiled = adapted(read(base))
    models.save_pretrained(compiled, base)  # so transformers reads both, if there is peft
    pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ArtifactError, match="an adapter lies beside it"):
            models.from_pretrained(base)


class Asked:
    """A class of models that only says what it was asked for."""

    calls: ClassVar[list[tuple[str, dict[str, object]]]] = []

    @classmethod
    def from_pretrained(cls, name: str, **options: object) -> Any:
        cls.calls.append((name, options))
        return llama()


def test_the_revision_of_the_base_is_that_of_the_folder(tmp_path: Path) -> None:
    model = llama()
    model.config.name_or_path, model.config._commit_hash = "owner/llama", "c0ffee"
    compiled = adapted(model)
    Asked.calls.clear()
    models.save_pretrained(compiled, tmp_path)
    models.from_pretrained(tmp_path, Asked)
    models.from_pretrained(tmp_path, Asked, revision="main", dtype="auto")
    models.save_pretrained(compiled, tmp_path, base="owner/other")
    models.from_pretrained(tmp_path, Asked)
    (tmp_path / "base.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "revision": "v2"}))
    models.from_pretrained(tmp_path, Asked)
    assert Asked.calls == [
        ("owner/llama", {"revision": "c0ffee"}),
        ("owner/llama", {"revision": "main", "dtype": "auto"}),
        ("owner/other", {}),
        ("owner/other", {"revision": "v2"}),
    ]


def test_an_adapter_on_the_hub_is_fetched(base: Path, tmp_path: Path) -> None:
    compiled = adapted(read(base))
    models.save_pretrained(compiled, tmp_path / "adapter")
    folder = str(tmp_path / "adapter")
    with mock.patch.object(hub, "snapshot_download", return_value=folder) as fetched:
        again = models.from_pretrained("owner/adapter")
        verbs: Any = models.enable(read(base))
        verbs.load_adapter("owner/adapter", "other")
    for one in (again.model, verbs):
        assert torch.equal(logits(one), logits(compiled.model))
    assert [call.args for call in fetched.call_args_list] == [("owner/adapter",)] * 2
    assert {*fetched.call_args.kwargs["allow_patterns"]} > FILES
    with (
        mock.patch.object(hub, "snapshot_download", side_effect=OSError("no route")),
        pytest.raises(ArtifactError, match="no route") as raised,
    ):
        models.from_pretrained("owner/adapter")
    assert raised.value.diagnostics[0].code == "E504"


def test_which_adapter_is_saved_is_clear(tmp_path: Path) -> None:
    compiled = adapted(llama(), f"adapter a {{ {SPEC} }} adapter b {{ {SPEC} }} activate a + b")
    with pytest.raises(StateError, match="are live"):
        models.save_pretrained(compiled, tmp_path / "out")
    with pytest.raises(StateError, match="there is no adapter `c`"):
        models.save_pretrained(compiled, tmp_path / "out", "c")
    assert not [*tmp_path.iterdir()]
    models.save_pretrained(compiled, tmp_path / "out", "b")
    assert surgery.attach(tmp_path / "out", llama()).adapters == ("b",)


# ------------------------------------------------------------------------------------ the hub


class Api:
    """A hub that keeps what it is sent."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.folder = Path()
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self._called("create_repo", {"repo_id": repo_id, **options})
        return mock.Mock(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, **options: Any) -> Any:
        self.folder = Path(options["folder_path"])
        self.files = contents(self.folder)
        self._called("upload_folder", options)
        return mock.Mock(pr_url=None, commit_url=f"https://hub/{options['repo_id']}/commit/1")

    def _called(self, name: str, options: dict[str, Any]) -> None:
        self.calls.append((name, options))
        if name == self.fails:
            raise OSError("401 Client Error: you may not\nwrite there")


def test_an_adapter_is_sent_with_its_card(base: Path, tmp_path: Path) -> None:
    compiled = adapted(read(base))
    api = Api()
    pushed = models.push_to_hub(
        compiled, "small", base="owner/llama", private=True, api=api, tags=["tiny"], license="mit"
    )
    assert pushed.url == "https://hub/me/small/commit/1"
    assert pushed.report.peft == ""
    assert {str(path) for path in pushed.report.files} == FILES
    assert api.files.keys() == FILES | {"README.md"}
    (_, made), (_, sent) = api.calls
    assert (made["repo_id"], made["private"], made["exist_ok"]) == ("small", True, True)
    assert sent["repo_id"] == "me/small"
    assert not api.folder.exists()
    found = hub.ModelCard(api.files["README.md"].decode())
    assert found.data.base_model == "owner/llama"
    assert found.data.library_name == "peft"
    assert found.data.license == "mit"
    assert found.data.tags == ["model-surgery", "adapter", "lora", "tiny"]
    assert str(tmp_path) not in api.files["README.md"].decode()
    for name in ("base.json", "adapter_config.json"):
        assert json.loads(api.files[name])["base_model_name_or_path"] == "owner/llama"
    for name, content in api.files.items():
        (tmp_path / "down").mkdir(exist_ok=True)
        (tmp_path / "down" / name).write_bytes(content)
    again = models.from_pretrained(tmp_path / "down", base=base)
    assert torch.equal(logits(again.model), logits(compiled.model))


@pytest.mark.parametrize("fails", ["create_repo", "upload_folder"])
def test_what_the_hub_refuses_is_said_and_leaves_nothing(fails: str, tmp_path: Path) -> None:
    compiled = adapted(llama())
    before, api = bits(compiled.model), Api(fails)
    with (
        mock.patch("tempfile.tempdir", str(tmp_path)),
        pytest.raises(ArtifactError, match="you may not") as raised,
    ):
        models.push_to_hub(compiled, "me/small", api=api)
    assert raised.value.diagnostics[0].code == "E576"
    assert raised.value.diagnostics[0].hint
    assert not [*tmp_path.iterdir()]
    assert bits(compiled.model) == before


def test_nothing_is_asked_of_the_hub_before_all_is_written() -> None:
    compiled, api = adapted(llama()), Api()
    with pytest.raises(StateError, match="no adapter `other`"):
        models.push_to_hub(compiled, "me/small", "other", api=api)
    with (
        mock.patch("surgery.integrations.pretrained.moved_in", side_effect=_refused),
        pytest.raises(ArtifactError),
    ):
        models.push_to_hub(compiled, "me/small", api=api)
    with (
        mock.patch.dict(sys.modules, {"huggingface_hub": None}),
        pytest.raises(ArtifactError, match="huggingface_hub") as raised,
    ):
        models.push_to_hub(compiled, "me/small", api=api)
    assert raised.value.diagnostics[0].code == "E525"
    assert not api.calls


def _refused(*given: object) -> None:
    del given
    raise OSError(28, "No space left on device")


def test_a_card_shows_the_spec_the_equations_the_sites_and_the_counts(base: Path) -> None:
    model = read(base)
    compiled = adapted(model, f"{SPEC} match v_proj apply dora(r=2)")
    text = models.card(compiled, repo_id="me/both")
    data = hub.ModelCard(text).data
    assert data.library_name == "model-surgery"
    assert data.base_model is None  # which is a folder of this machine
    assert str(base) not in text
    assert data.tags == ["model-surgery", "adapter", "lora", "dora"]
    assert "match v_proj apply dora(r=2)" in text
    assert "method dora(" in text
    assert "format peft" not in text
    for site in compiled.plan.sites:
        assert f"{site.form.named}: {site.form.equation}" in text
    assert "| `model.layers.*.self_attn.q_proj` | 2 | linear | 12 × 12 |" in text
    assert "| `model.layers.*.self_attn.v_proj` | 2 | linear | 6 × 12 |" in text
    assert f"{compiled.plan.trainable:,} trained numbers at 4 sites" in text
    assert 'from_pretrained("me/both", base=…)' in text
    assert "peft import" not in text


def test_a_card_is_of_one_adapter(base: Path) -> None:
    model = read(base)
    spec = f"adapter a {{ {SPEC} }} adapter b {{ match v_proj apply vera(r=2) }} activate a + b"
    compiled = adapted(model, spec)
    with pytest.raises(StateError, match="are live"):
        models.card(compiled)
    text = models.card(compiled, "b", base="owner/llama")
    assert "q_proj" not in text
    assert "https://huggingface.co/owner/llama" in text
    assert 'from_pretrained("owner/name")' in text
    assert "from peft import PeftModel" in text
    assert hub.ModelCard(text).data.base_model == "owner/llama"
