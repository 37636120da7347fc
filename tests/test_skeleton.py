"""A module tree of a checkpoint's names: what layers are, and how an adapter's paths fit."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from surgery.errors import SurgeryError
from surgery.model.holder import modules_of
from surgery.model.inventory import survey
from surgery.model.layers import kind_of
from surgery.skeleton import Need, Prefix, Shapes, Skeleton, built, prefix_of, table_like

HALF = torch.bfloat16


def shapes(**of: tuple[int, ...]) -> Shapes:
    return {name.replace("__", "."): (HALF, shape) for name, shape in of.items()}


def kinds(made: Skeleton) -> Mapping[str, str | None]:
    named = modules_of(made.model)
    return {n: None if (k := kind_of(m)) is None else k.name for n, m in named if n}


def test_layers_are_what_their_tensors_make_them() -> None:
    made = built(
        shapes(
            layers__10__q__weight=(5, 3),
            layers__9__q__weight=(5, 3),
            layers__9__q__bias=(5,),
            embed_tokens__weight=(7, 3),
            conv__weight=(5, 3, 2, 2),
            norm__weight=(3,),
            turned__weight=(3, 5),
            turned__bias=(5,),
            experts__gate_up_proj=(2, 3, 5),
            scale=(1,),
        ),
        {},
        {},
    )
    found = kinds(made)
    assert found["layers.9.q"] == found["layers.10.q"] == "linear"
    assert found["embed_tokens"] == "embedding"
    assert found["conv"] == "conv2d"
    assert found["turned"] == "transposed_linear"
    assert found["norm"] is None
    paths = [entry.path for entry in survey(made.model).entries]
    assert paths.index("layers.9.q") < paths.index("layers.10.q")
    assert all(p.is_meta and p.dtype == HALF for p in made.model.parameters())
    q = made.model.get_submodule("layers.9.q")
    assert made.tensor(q, "bias") == "layers.9.q.bias"
    assert made.tensor(q, "scale") is None
    assert made.tensor(made.model, "scale") == "scale"


def test_an_adapter_says_what_a_layer_is() -> None:
    tensors = shapes(square__weight=(3, 3), square__bias=(3,), table__weight=(7, 3))
    said = {"square": frozenset({"transposed_linear"}), "table": frozenset({"embedding"})}
    assert kinds(built(tensors, said, {})) == {"square": "transposed_linear", "table": "embedding"}
    assert kinds(built(tensors, {}, {}))["square"] == "linear"


def test_a_type_of_model_says_how_square_weights_lie() -> None:
    tensors = shapes(h__c_proj__weight=(3, 3), h__c_proj__bias=(3,))
    assert kinds(built(tensors, {}, {"model_type": "gpt2"}))["h.c_proj"] == "transposed_linear"
    assert kinds(built(tensors, {}, {"model_type": "llama"}))["h.c_proj"] == "linear"


def test_a_tensor_below_a_tensor_is_left_out() -> None:
    made = built(shapes(q__weight=(5, 3), q__weight__absmax=(5,)), {}, {})
    assert [n for n, _ in made.model.named_parameters()] == ["q.weight"]


def test_layers_share_a_tensor() -> None:
    tensors = shapes(model__embed_tokens__weight=(7, 3))
    made = built(tensors, {}, {}, {"lm_head": "model.embed_tokens.weight"})
    head = made.model.get_submodule("lm_head")
    assert made.tensor(head, "weight") == "model.embed_tokens.weight"
    assert survey(made.model).ties["lm_head.weight"] == ("model.embed_tokens.weight",)
    assert table_like(tensors, (7, 3)) == ("model.embed_tokens.weight",)
    assert table_like(tensors, (3, 7)) == ()


NAMES = ("bert.layer.0.q.weight", "bert.layer.1.q.weight", "cls.weight")


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        (("bert.layer.0.q", "cls"), Prefix()),
        (("layer.0.q", "layer.1.q"), Prefix(less="bert")),
        (("model.bert.layer.0.q",), Prefix(more="model")),
    ],
)
def test_paths_may_differ_by_a_prefix(paths: tuple[str, ...], found: Prefix) -> None:
    assert prefix_of([Need(path) for path in paths], NAMES, "the adapter") == found


def test_a_view_has_the_same_layers() -> None:
    made = built({name: (HALF, (5, 3)) for name in NAMES}, {}, {"model_type": "bert"})
    layer = made.model.get_submodule("bert.layer.0.q")
    assert made.seen_by(Prefix(less="bert")).get_submodule("layer.0.q") is layer
    seen = made.seen_by(Prefix(more="model"))
    assert seen.get_submodule("model.bert.layer.0.q") is layer
    assert isinstance(seen, nn.Module)
    assert vars(seen)["config"].model_type == "bert"


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (("bert.layer.0.query",), "did you mean `bert.layer.0.q.weight`"),
        (("layer.0.q", "layer.1.q", "cls"), "no tensor `cls.weight`"),
    ],
)
def test_what_has_no_place_is_said(paths: tuple[str, ...], said: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        prefix_of([Need(path) for path in paths], NAMES, "the adapter")
    assert {d.code for d in caught.value.diagnostics} == {"E545"}
    assert said in str(caught.value)


def test_two_prefixes_are_one_too_many() -> None:
    names = ("a.q.weight", "b.q.weight")
    with pytest.raises(SurgeryError, match="`a`, `b`"):
        prefix_of([Need("q")], names, "the adapter")
