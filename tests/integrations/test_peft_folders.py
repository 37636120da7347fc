"""Folders of peft's that are damaged, or are for another model: all that is wrong is said."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from support import Held
from torch import Tensor, nn

import surgery
from surgery.errors import SurgeryError
from surgery.model.holder import modules_of
from surgery.store import read_tensors

untyped = cast(Any, torch)
files = cast(Any, safetensors.torch)

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.layers.{}.{}.lora_{}.weight"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(11, 7)
        self.v_proj = nn.Linear(7, 11, bias=False)
        self.norm = nn.LayerNorm(11)

    def forward(self, x: Tensor) -> Tensor:
        """[..., 11] to the same."""
        return self.norm(x + self.v_proj(torch.tanh(self.q_proj(x))))


class Model(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[..., 11] to [..., 5]."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Other(nn.Module):
    """The same layers under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([Block() for _ in range(2)])


def seen(model: nn.Module) -> dict[str, Any]:
    """All that a failed call may not change."""
    tensors = model.state_dict(keep_vars=True)
    return {
        "tensors": {n: (Held(t), t.requires_grad, t.dtype, t.tolist()) for n, t in tensors.items()},
        "modules": [(n, type(m), sorted(vars(m))) for n, m in modules_of(model)],
    }


def made() -> Model:
    """The same model every time."""
    untyped.manual_seed(1)
    return Model()


@pytest.fixture
def model() -> Iterator[Model]:
    """A model, which must come out as it went in."""
    one = made()
    before = seen(one)
    yield one
    assert seen(one) == before


SPEC = "match /q_proj|v_proj/ apply lora(r=3, alpha=5)"


def written(directory: Path, spec: str = SPEC) -> Path:
    """A folder that has nothing but what peft writes."""
    compiled = surgery.compile(spec, made())
    assert compiled.save(directory).peft == ""
    for path in directory.iterdir():
        if path.name not in (TENSORS, CONFIG):
            path.unlink()
    return directory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "adapter")


def refused(folder: Path, model: nn.Module) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        surgery.attach(folder, model)
    return caught.value


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = read_tensors(folder / TENSORS)
    tensors = {name: file[name] for name in file}
    change(tensors)
    files.save_file(tensors, folder / TENSORS)


def configured(folder: Path, **fields: object) -> None:
    """Some fields of the config set, or with `...` taken out."""
    values = {**json.loads((folder / CONFIG).read_text()), **fields}
    kept = {name: value for name, value in values.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(kept))


def test_the_folder_itself_attaches(folder: Path) -> None:
    assert len(surgery.attach(folder, Model()).plan.sites) == 4


def test_every_tensor_that_is_wrong_is_listed_with_the_nearest_right(
    folder: Path, model: Model
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[KEY.format(0, "q_proj", "A")]
        tensors[KEY.format(0, "v_proj", "b")] = tensors.pop(KEY.format(0, "v_proj", "B"))
        tensors[KEY.format(1, "q_proj", "A")] = torch.ones(3, 12)
        tensors["base_model.model.extra"] = torch.ones(2)

    changed(folder, change)
    error = refused(folder, model)
    assert {d.code for d in error.diagnostics} == {"E518"}
    text = str(error)
    assert f"lacks the tensor `{KEY.format(0, 'q_proj', 'A')}`" in text
    assert f"lacks the tensor `{KEY.format(0, 'v_proj', 'B')}`" in text
    assert f"`{KEY.format(0, 'v_proj', 'b')}` stands there instead" in text
    assert f"nearest that belongs there is `{KEY.format(0, 'v_proj', 'B')}`" in text
    assert f"`{KEY.format(1, 'q_proj', 'A')}` has shape [3, 12]" in text
    assert "needs [3, 11]" in text
    assert "has `base_model.model.extra`, which is no tensor of it" in text


def test_every_tensor_that_is_no_number_is_listed(folder: Path, model: Model) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[KEY.format(0, "q_proj", "A")][1, 2] = torch.nan
        tensors[KEY.format(1, "v_proj", "B")][:] = torch.inf

    changed(folder, change)
    text = str(refused(folder, model))
    assert f"`{KEY.format(0, 'q_proj', 'A')}` has 1 of 33 values that are no numbers" in text
    assert f"`{KEY.format(1, 'v_proj', 'B')}` has 33 of 33 values" in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": ...}, "peft_type null is not known"),
        ({"peft_type": "LORAX"}, "did you mean LORA?"),
        ({"r": ...}, "has shape [3, 11], and the equation needs [8, 11]"),
        ({"r": "3"}, '`r` is an int, and "3" is a text'),
        ({"r": 0}, "r"),
        ({"lora_dropout": "much"}, "lora_dropout"),
        ({"layer_replication": [[0, 2]]}, "`layer_replication` is [[0, 2]], which `lora` knows"),
        ({"use_dora": True}, "lacks the tensor"),
        ({"bias": "mine"}, '`bias` is "mine": lora has none, all, or a name that ends in _only'),
        ({"bias": "all"}, "lack a copy of `head.bias`"),
        ({"bias": "lora_only"}, "lack a copy of `layers.0.q_proj.bias`"),
        ({"target_parameters": 3}, "`target_parameters` is 3: lora has a list of paths there"),
        ({"modules_to_save": ["haed"]}, "did you mean `head`?"),
        ({"rank_pattern": {"(a+)+b": 2}}, "(a+)+b"),
    ],
)
def test_configs_that_say_what_is_not_so(
    fields: dict[str, object], message: str, folder: Path, model: Model
) -> None:
    configured(folder, **fields)
    assert message in str(refused(folder, model))


def test_what_the_mathematics_needs_must_stand_in_the_config(tmp_path: Path, model: Model) -> None:
    folder = written(tmp_path / "adapter", "match q_proj apply vera(r=3)")
    configured(folder, r=...)
    assert "the equation needs [256" in str(refused(folder, model))


def test_an_adapter_for_another_model_names_every_module(folder: Path) -> None:
    model = Other()
    before = seen(model)
    error = refused(folder, model)
    assert len(error.diagnostics) == 4
    assert {d.code for d in error.diagnostics} == {"E516"}
    assert "the model has no module `layers.0.q_proj`" in str(error)
    assert "the nearest is `h.0.q_proj`" in str(error)
    assert seen(model) == before


def test_a_layer_of_another_size(folder: Path) -> None:
    model = Model()
    model.layers[1].v_proj = nn.Linear(7, 13, bias=False)
    error = refused(folder, model)
    assert f"`{KEY.format(1, 'v_proj', 'B')}` has shape [11, 3]" in str(error)


def header(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A safetensors file with another header."""
    (length,) = struct.unpack("<Q", data[:8])
    said = json.loads(data[8 : 8 + length])
    change(said)
    text = json.dumps(said).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _longer(said: dict[str, Any]) -> None:
    said[KEY.format(0, "q_proj", "A")]["data_offsets"][1] += 4000


def _shaped(said: dict[str, Any]) -> None:
    said[KEY.format(0, "q_proj", "A")]["shape"] = [3, 1100]


Damage = Callable[[bytes], bytes]

DAMAGES: tuple[Damage, ...] = (
    lambda data: data[: len(data) // 2],
    lambda data: data[:9],
    lambda data: b"",
    lambda data: struct.pack("<Q", 2**60) + data[8:],
    lambda data: header(data, _longer),
    lambda data: header(data, _shaped),
    lambda data: b"\x80\x02}q\x00." + data,
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_cut_off_or_lie(damage: Damage, folder: Path, model: Model) -> None:
    path = folder / TENSORS
    path.write_bytes(damage(path.read_bytes()))
    error = refused(folder, model)
    assert [d.code for d in error.diagnostics] == ["E512"]
    assert str(path) in str(error)


def test_a_pickle_is_not_opened(folder: Path, model: Model) -> None:
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    error = refused(folder, model)
    assert "is a pickle, which can run code when read" in str(error)
    assert "safe_serialization=True" in str(error)


def test_a_config_that_is_no_json(folder: Path, model: Model) -> None:
    (folder / CONFIG).write_text('{"peft_type": "LORA"')
    assert refused(folder, model).diagnostics[0].code == "E512"


# ------------------------------------------------------------------------- what can be asked for


def test_a_method_with_two_formats_is_written_as_asked(tmp_path: Path) -> None:
    x = torch.randn(2, 11)
    for kind, key in (("MISS", "miss_block"), ("BONE", "bone_block")):
        compiled = surgery.compile("match q_proj apply bone(r=3)", made())
        with torch.no_grad():
            for tensor in compiled.parameters().values():
                tensor.add_(0.1)
        folder = tmp_path / kind
        assert compiled.save(folder, config={"peft_type": kind}).peft == ""
        assert json.loads((folder / CONFIG).read_text())["peft_type"] == kind
        assert all(name.endswith(key) for name in read_tensors(folder / TENSORS))
        again, wanted = made(), compiled.model(x)
        assert torch.equal(surgery.attach(folder, again).model(x), wanted)
        surgery.of(again).inverse.unload()
        (folder / "mapping.json").unlink()
        attached = surgery.attach(folder, again)
        assert {s.form.method.name for s in attached.plan.sites} <= {"bone", "miss"}
        torch.testing.assert_close(attached.model(x), wanted)


def test_a_format_that_there_is_not_is_refused(tmp_path: Path) -> None:
    compiled = surgery.compile("match q_proj apply bone(r=3)", Model())
    with pytest.raises(SurgeryError, match=r"E524(.|\n)*there are: \"MISS\", \"BONE\""):
        compiled.save(tmp_path / "out", config={"peft_type": "LORA"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (
            "match q_proj apply lora(r=2) train v_proj.weight in layers[0]\ntrain q_proj.bias in "
            "layers[0]",
            "names no single parameters to be trained, such as `layers.0.q_proj.bias`",
        ),
        ("match q_proj apply lora(r=2) train norm.weight", "no single parameters"),
        ("match q_proj apply ia3() train q_proj.bias", "no single parameters"),
        ("train norm.weight", "no single parameters"),
        ("match q_proj apply lora(r=2) then ia3()", "one method a layer"),
    ],
)
def test_what_peft_cannot_say_has_a_reason(spec: str, reason: str, tmp_path: Path) -> None:
    compiled = surgery.compile(spec, made())
    assert reason in compiled.save(tmp_path).peft
    attached = surgery.attach(tmp_path, made())
    assert len(attached.plan.sites) == len(compiled.plan.sites)


def test_a_name_that_ends_others_too_is_no_module_to_save(tmp_path: Path) -> None:
    class Ends(Model):
        def __init__(self) -> None:
            super().__init__()
            self.ahead = nn.Linear(3, 3)

    compiled = surgery.compile("match q_proj apply lora(r=2)\nsave head", Ends())
    assert "`head` is the end of `ahead` too" in compiled.save(tmp_path).peft
