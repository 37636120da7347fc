"""What a folder holds is told from headers and texts: nothing is loaded, nothing is believed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_files import sharded
from torch import nn

import surgery
from surgery.artifact import CONFIG, MAPPING, TENSORS
from surgery.checkpoint import Checkpoint
from surgery.errors import ArtifactError
from surgery.inspection import AdapterSite, Inspection, inspect

# A library whose types are not complete.
files: Any = safetensors.torch


def inspected(path: Path) -> Inspection:
    def never(*_: object) -> None:
        raise AssertionError("a tensor was read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "read_bytes", never)
        found = inspect(path)
    assert json.loads(json.dumps(found.as_json()))["kind"] == found.kind
    return found


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).bfloat16()


def test_a_checkpoint_is_told_by_its_headers(tmp_path: Path) -> None:
    tensors = sharded(tmp_path, 3)
    config = {"model_type": "llama", "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspected(tmp_path)
    assert found.kind == "checkpoint"
    assert found.model == ("llama", True)
    assert found.contents.dtypes == {"BF16": (3, 3 * 91, 6 * 91), "F32": (3, 39, 156)}
    assert found.contents.bytes == 6 * 91 + 156
    assert [count for count, _ in found.contents.shards.values()] == [2, 2, 2]
    assert {one.name for one in found.contents.tensors} == tensors.keys()
    lines = str(found).splitlines()
    assert lines[0].endswith("a checkpoint (llama, embeddings tied)")
    assert lines[-1].split() == ["layers.*.weight", "BF16", "[13,", "7]", "3"]
    one = inspected(next(tmp_path.glob("model-00001*")))
    assert one.model == ("llama", True)
    assert len(one.contents.tensors) == 2


def test_a_saved_adapter_is_told_with_its_sites(model: nn.Module, tmp_path: Path) -> None:
    spec = "match /0|2/ apply lora(r=2, dropout=0.5)"
    surgery.compile(spec, model).save(tmp_path / "a")
    adapter = inspected(tmp_path / "a").adapter
    assert adapter is not None
    digests = [site.digest for site in adapter.sites]
    assert [len(digest) for digest in digests] == [len("bfloat16:") + 64] * 2
    assert tuple(replace(site, digest="") for site in adapter.sites) == (
        AdapterSite("0", "lora(r=2, dropout=0.5)", 2, "linear", (7, 5)),
        AdapterSite("2", "lora(r=2, dropout=0.5)", 2, "linear", (3, 7)),
    )
    assert (adapter.name, adapter.form, adapter.peft, adapter.spec) == ("default", "peft", "", "")
    text = str(inspect(tmp_path / "a"))
    assert "peft reads this folder" in text
    assert "digests of 2 of 2 weights, in bfloat16" in text


def test_an_adapter_that_peft_does_not_read_says_why(model: nn.Module, tmp_path: Path) -> None:
    spec = "match 0 apply lora(r=2) then ia3()\nmatch 2 apply hra(r=2)"
    surgery.compile(spec, model).save(tmp_path / "a")
    adapter = inspected(tmp_path / "a").adapter
    assert adapter is not None
    assert [site.method for site in adapter.sites] == ["lora(r=2) then ia3()", "hra(r=2)"]
    assert "peft does not read it: " in str(inspect(tmp_path / "a"))
    assert adapter.form == "native"


def test_a_folder_of_pefts_alone_is_told_by_its_config(model: nn.Module, tmp_path: Path) -> None:
    surgery.compile("match /0|2/ apply lora(r=2, alpha=8)", model).save(tmp_path / "a")
    for name in ("mapping.json", "adapter.peft", "inverse.json"):
        (tmp_path / "a" / name).unlink()
    path = tmp_path / "a" / CONFIG
    config = {**json.loads(path.read_text()), "base_model_name_or_path": "owner/base"}
    path.write_text(json.dumps(config))
    adapter = inspected(tmp_path / "a").adapter
    assert adapter is not None
    assert {(s.path, s.method, s.rank) for s in adapter.sites} == {
        ("0", "lora(r=2, alpha=8.0)", 2),
        ("2", "lora(r=2, alpha=8.0)", 2),
    }
    assert "apply lora(r=2, alpha=8.0)" in adapter.spec
    assert adapter.base == "owner/base"
    path.write_text(json.dumps({**config, "peft_type": "LOAR"}))
    adapter = inspected(tmp_path / "a").adapter
    assert adapter is not None
    assert "is not known" in adapter.spec
    assert adapter.sites == ()


def test_a_merged_checkpoint_says_what_is_in_it(tmp_path: Path) -> None:
    files.save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    changed = [{"tensor": "w", "kept": 7}]
    record: dict[str, object] = {
        "adapters": {"a": 1.0, "b": 0.5},
        "machine": {"cpu": "AVX2"},
        "shards": {"model.safetensors": {"changed": changed}},
    }
    (tmp_path / "inverse.json").write_text(json.dumps(record))
    found = inspected(tmp_path)
    assert found.kind == "merged"
    assert found.merged is not None
    assert (found.merged.tensors, found.merged.kept) == (1, 7)
    assert "merged: 1 × a + 0.5 × b; 1 tensors changed" in str(found)
    for bad in ("[]", '{"x": 3}', '{"x": {"changed": [1]}}'):
        (tmp_path / "inverse.json").write_text(json.dumps({**record, "shards": json.loads(bad)}))
        with pytest.raises(ArtifactError, match="E538"):
            inspect(tmp_path)


def test_what_does_not_hold_together_is_refused(model: nn.Module, tmp_path: Path) -> None:
    surgery.compile("match 0 apply lora(r=2)", model).save(tmp_path / "a")
    path = tmp_path / "a" / MAPPING
    data = json.loads(path.read_text())
    for bad in ({**data, "sites": [3]}, {**data, "version": 9}, {**data, "adapter": ""}):
        path.write_text(json.dumps(bad))
        with pytest.raises(ArtifactError, match="E514"):
            inspect(tmp_path / "a")
    whole = (tmp_path / "a" / TENSORS).read_bytes()
    (tmp_path / "a" / TENSORS).write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match="E531"):
        inspect(tmp_path / "a")
    with pytest.raises(ArtifactError, match="E530"):
        inspect(tmp_path / "no")
