"""Against peft and scikit-learn: rows in clusters, and tensors that a file has in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import surgery
from surgery.algebra.axes import size
from surgery.algebra.expr import Expr, parameter
from surgery.algebra.interpret import Domain, Evaluator
from surgery.algebra.rules import make

clustering = pytest.importorskip("sklearn.cluster")

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch
files: Any = safetensors.torch

SPEC = "match * apply adamss(r=6, num_subspaces=3, subspace_rank=2)"


def dense(seed: int = 0) -> nn.Module:
    untyped.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 14, bias=False)).eval()


def output(model: nn.Module) -> Tensor:
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(4))
    return cast(Tensor, model(x))


def moved(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def saved_by_peft(at: Path, **given: object) -> nn.Module:
    """A model with peft's adapter, moved, and its folder."""
    fields = {"r": 6, "num_subspaces": 3, "subspace_rank": 2, **given}
    model = hf.get_peft_model(dense(), hf.AdamssConfig(target_modules=["0", "2"], **fields))
    moved(model)
    model.save_pretrained(str(at))
    return cast(nn.Module, model.eval())


# ------------------------------------------------------------------------------------- k-means


@pytest.mark.parametrize("seed", [0, 123456789, 2**32 - 1])
@pytest.mark.parametrize(("rows", "k"), [(211, 5), (31, 31), (53, 17), (1009, 3)])
def test_clusters_are_scikit_learns(rows: int, k: int, seed: int) -> None:
    a = torch.randn(rows, 7, generator=torch.Generator().manual_seed(rows))
    expr = make(
        "clusters",
        parameter("a", (size(rows), size(7))),
        k=size(k),
        steps=size(10),
        seed=size(seed),
    )
    found = value(expr, a.double())
    means = clustering.KMeans(n_clusters=k, init="random", n_init=1, max_iter=10, random_state=seed)
    expected = means.fit_predict(np.asarray(a))
    assert found.sum(1).eq(1).all()
    np.testing.assert_array_equal(np.asarray(found.argmax(1)), expected)


def value(expr: Expr, a: Tensor) -> Tensor:
    domain = Domain({}, lambda leaf: a, lambda: torch.zeros((), dtype=torch.float64))
    return Evaluator(domain).value(expr)


# ------------------------------------------------------------------------------------- folders


def test_a_cluster_of_one_row_has_one_direction(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    expected = output(saved_by_peft(theirs, num_subspaces=9))
    shapes = {
        tuple(t.shape) for t in files.load_file(theirs / "adapter_model.safetensors").values()
    }
    assert (1, 1) in shapes
    ours = surgery.attach(theirs, dense())
    torch.testing.assert_close(output(ours.model), expected, atol=1e-5, rtol=1e-4)
    assert ours.save(tmp_path / "ours").peft == ""
    again = hf.PeftModel.from_pretrained(dense(), str(tmp_path / "ours")).eval()
    for model in (again, surgery.attach(tmp_path / "ours", dense()).model):
        torch.testing.assert_close(output(model), expected, atol=1e-5, rtol=1e-4)


def test_what_pefts_form_has_no_place_for_keeps_the_native_form(tmp_path: Path) -> None:
    compiled = surgery.compile(SPEC.replace("3", "9"), dense())
    moved(compiled.model)  # what is beyond the one row as well
    assert "more directions than it has rows" in compiled.save(tmp_path).peft
    expected = output(compiled.model)
    torch.testing.assert_close(output(surgery.attach(tmp_path, dense()).model), expected)
    with pytest.raises(surgery.SurgeryError, match="E518"):
        compiled.mapping.rename(compiled.parameters(), to="peft")


@pytest.mark.parametrize("of", ["peft", "ours"])
def test_another_base_or_none_is_refused(of: str, tmp_path: Path) -> None:
    saved_by_peft(tmp_path / "peft")
    surgery.attach(tmp_path / "peft", dense()).save(tmp_path / "ours")
    with pytest.raises(surgery.SurgeryError, match=r"adamss_B.0` … are of [\d, ]+ rows"):
        surgery.attach(tmp_path / of, dense(seed=1))
    with pytest.raises(surgery.SurgeryError, match="is seen in its weights"):
        surgery.attach(tmp_path / of, dense().to("meta"))


def test_clusters_of_as_many_rows_are_not_believed_alone(tmp_path: Path) -> None:
    """Other directions in the file than the base has are of another base."""
    saved_by_peft(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = files.load_file(path)
    tensors["base_model.model.0.adamss_newB"] += 0.1
    files.save_file(tensors, path)
    with pytest.raises(surgery.SurgeryError, match="ask for others"):
        surgery.attach(tmp_path, dense())


def test_a_piece_that_is_missing_or_too_narrow_is_refused(tmp_path: Path) -> None:
    saved_by_peft(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = files.load_file(path)
    kept = tensors.pop("base_model.model.0.adamss_B.1")
    files.save_file(tensors, path)
    with pytest.raises(surgery.SurgeryError, match=r"lacks the tensor `.*0\.adamss_B"):
        surgery.attach(tmp_path, dense())
    files.save_file({**tensors, "base_model.model.0.adamss_B.1": kept[:, :1].contiguous()}, path)
    with pytest.raises(surgery.SurgeryError, match=r"lacks the tensor `.*0\.adamss_B"):
        surgery.attach(tmp_path, dense())


@pytest.mark.parametrize(
    ("given", "reason"),
    [({"use_dynamic_rank": True}, "a rank of its own"), ({"r": 100}, "another equation")],
)
def test_what_cannot_be_found_again_is_refused(
    given: dict[str, object], reason: str, tmp_path: Path
) -> None:
    """Rows of a square orthogonal matrix are all as far apart: rounding alone clusters them."""
    saved_by_peft(tmp_path, **given)
    with pytest.raises(surgery.SurgeryError, match=reason):
        surgery.attach(tmp_path, dense())
    wide = surgery.compile("match 2 apply adamss(r=100)", dense())
    assert wide.save(tmp_path / "ours").peft
    assert torch.equal(output(surgery.attach(tmp_path / "ours", dense()).model), output(dense()))


def test_the_beginning_is_pefts(tmp_path: Path) -> None:
    compiled = surgery.compile(SPEC, dense())
    assert torch.equal(output(compiled.model), output(dense()))
    theirs = hf.get_peft_model(
        dense(), hf.AdamssConfig(r=6, num_subspaces=3, subspace_rank=2, target_modules=["0", "2"])
    )
    written = compiled.mapping.rename(compiled.parameters(), to="peft")
    wanted = cast("dict[str, Tensor]", hf.get_peft_model_state_dict(theirs))
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in wanted.items()}
    for key, tensor in written.items():  # what peft's A begins as, no seed says
        mine, own = (t @ t.T if "_A." in key else t for t in (tensor, wanted[key]))
        torch.testing.assert_close(mine, own, atol=1e-5, rtol=0)


def test_all_names_round_trip() -> None:
    compiled = surgery.compile(SPEC, dense())
    moved(compiled.model)
    mapping, tensors = compiled.mapping, compiled.parameters()
    there = mapping.rename(tensors, to="peft")
    back = mapping.rename(there, source="peft", to="adapted")
    assert back.keys() == {name for name in tensors if not name.endswith(".C")}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in back.items())
    with pytest.raises(surgery.SurgeryError, match="is cut by C, which is not there"):
        mapping.rename(back, to="peft")


# -------------------------------------------------------------------------------- the largest


def chosen_by_peft(at: Path, topk: int) -> nn.Module:
    """A model with an adapter of mixed vectors, of which the folder has the largest parts alone."""
    config = hf.VBLoRAConfig(
        r=2,
        num_vectors=9,
        vector_length=2,
        topk=topk,
        target_modules=["0", "2"],
        save_only_topk_weights=True,
    )
    model = hf.get_peft_model(dense(), config)
    moved(model)
    model.save_pretrained(str(at))
    return cast(nn.Module, model.eval())


@pytest.mark.parametrize("topk", [1, 2, 9])
def test_the_largest_alone_are_the_same_model_both_ways(topk: int, tmp_path: Path) -> None:
    theirs, mine, whole = (tmp_path / name for name in ("theirs", "mine", "whole"))
    expected = output(chosen_by_peft(theirs, topk))
    ours = surgery.attach(theirs, dense())
    torch.testing.assert_close(output(ours.model), expected, atol=1e-5, rtol=1e-4)
    untyped.autograd.backward(output(ours.model).square().sum())
    grads = [p.grad for p in ours.model.parameters() if p.requires_grad]
    assert all(g is not None and bool(g.isfinite().all()) for g in grads)
    assert ours.save(mine, config={"save_only_topk_weights": True}).peft == ""
    assert ours.save(whole).peft == ""
    for at in (mine, whole):
        again = hf.PeftModel.from_pretrained(dense(), str(at)).eval()
        for model in (again, surgery.attach(at, dense()).model):
            torch.testing.assert_close(output(model), expected, atol=1e-5, rtol=1e-4)
    one, other = (files.load_file(at / "adapter_model.safetensors") for at in (theirs, mine))
    assert {k: (t.shape, t.dtype) for k, t in one.items()} == {
        k: (t.shape, t.dtype) for k, t in other.items()
    }


def test_places_of_vectors_that_there_are_not_are_refused(tmp_path: Path) -> None:
    chosen_by_peft(tmp_path, 2)
    path = tmp_path / "adapter_model.safetensors"
    tensors = files.load_file(path)
    tensors["base_model.model.0.vblora_logits_A_topk_indices"][0, 0, 0] = 9
    files.save_file(tensors, path)
    with pytest.raises(surgery.SurgeryError, match="has places outside of 9"):
        surgery.attach(tmp_path, dense())
