"""Whatever is wrong, the answer is a diagnostic, and the model is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest
import torch
from support import Held, soon
from torch import Tensor, nn

import surgery
from surgery import lower, materialize, mount
from surgery.errors import SurgeryError
from surgery.merged import Undo
from surgery.model import storage
from surgery.model.holder import modules_of

untyped = cast(Any, torch)  # for calls whose stubs are not fully typed


class Odd(nn.Module):
    """A layer with a weight of three axes, and a forward that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(13, 13, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[..., 13] to the same."""
        return 2 * x @ self.weight[..., 0]


class Block(nn.Module):
    """Two projections of sizes that nothing divides."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(13, 7)
        self.v_proj = nn.Linear(7, 13, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., 13] to the same."""
        return self.v_proj(torch.tanh(self.q_proj(x)))


class Model(nn.Module):
    """Three blocks, a tied head, and a layer that no row knows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 13)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.gate = nn.Linear(13, 13)
        self.odd = Odd()
        self.head = nn.Linear(13, 17, bias=False)
        self.head.weight = self.table.weight
        self.odd.weight.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [...] to logits [..., 17]."""
        x = self.table(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.odd(self.gate(x)))


def seen(model: nn.Module) -> dict[str, Any]:
    """All that a failed call may not change."""
    tensors = model.state_dict(keep_vars=True)
    return {
        "tensors": {n: (Held(t), t.requires_grad, t.dtype, t.tolist()) for n, t in tensors.items()},
        "modules": [(n, type(m), sorted(vars(m))) for n, m in modules_of(model)],
    }


@pytest.fixture
def model() -> Iterator[Model]:
    """A model, which must come out as it went in."""
    untyped.manual_seed(1)
    made = Model()
    before = seen(made)
    yield made
    assert seen(made) == before


def refused(spec: str | Path, model: nn.Module, **given: Any) -> SurgeryError:
    """What `compile` raises; every finding has a code and says what to do or where it is."""
    with soon(), pytest.raises(SurgeryError) as caught:
        surgery.compile(spec, model, **given)
    for found in caught.value.diagnostics:
        assert found.code
        assert found.message
        assert str(found).startswith(("error[", "warning["))
    return caught.value


SITE = "match /q_proj/ in layers[*] "
BAD: dict[str, tuple[str, set[str], str]] = {
    "only a name": ("param p: int = 3", {"E116"}, ""),
    "half a statement": ("match", {"E003"}, ""),
    "an unknown method": (SITE + "apply lorra()", {"E121"}, "lorra"),
    "an unknown argument": (SITE + "apply lora(rr=3)", {"E122"}, "rr"),
    "a text for a number": (SITE + 'apply lora(r="8")', {"E119"}, 'r="8"'),
    "half a rank": (SITE + "apply lora(r=2.5)", {"E119"}, "r=2.5"),
    "rank zero": (SITE + "apply lora(r=0)", {"E111"}, ""),
    "a negative rank": (SITE + "apply bone(r=-2)", {"E111"}, ""),
    "blocks that do not divide": (SITE + "apply bat(r=4)", {"E301"}, "bat(r=4)"),
    "rotations that do not divide": (SITE + "apply oft(block_size=6)", {"E301"}, ""),
    "division by zero": (SITE + "apply lora(alpha=1/0)", {"E105"}, "1/0"),
    "an index past the end": ("match /q_proj/ in layers[3] apply lora()", {"E204"}, "3"),
    "a selector of nothing": ("match /q_porj/ apply lora()", {"E201"}, "q_porj"),
    "an alternative of nothing": ("match /q_proj|k_proj/ apply lora()", {"E201"}, "k_proj"),
    "no such container": ("match /q_proj/ in layrs[0] apply lora()", {"E203"}, "layrs"),
    "an except of nothing": ("match * in layers[*] except up apply lora()", {"E202"}, "up"),
    "two statements on a site": (f"{SITE}apply lora()\n{SITE}apply ia3()", {"E302"}, "/q_proj/"),
    "a failing expect": (SITE + "apply lora() expect 4", {"E206"}, "4"),
    "a tied site": ("match head apply lora()", {"E207"}, "head"),
    "a layer that no row knows": ("match odd apply lora()", {"E208"}, "odd"),
    "everything": ("match * apply lora()", {"E207", "E208"}, "*"),
    "a regex that does not compile": ("match /q_(proj/ apply lora()", {"E007"}, ""),
    "a look-ahead": ("match /(?=q)q_proj/ apply lora()", {"E007"}, ""),
    "a repeat of a repeat": ("match /(_*)*q_proj/ apply lora()", {"E007"}, ""),
    "terabytes": (SITE + "apply lora(r=10**12)", {"E304"}, ""),
    "more than there are numbers": (SITE + "apply lora(r=10**10**10)", {"E105"}, ""),
    "a circle": ("let a = b\nlet b = a\n" + SITE + "apply lora(r=a)", {"E115"}, ""),
    "a circle in a method": (
        "method m() on matrix { let a = c let c = a train t[out] = 0 W' = t * rows(W) }\n"
        + SITE
        + "apply m()",
        {"E101"},
        "c",
    ),
    "a shape that does not fit": (
        "method m(r: int = 2) on matrix { train A[r, in] = 0 W' = W + A }\n" + SITE + "apply m()",
        {"E108"},
        "W + A",
    ),
    "an undefined name": (
        "method m() on matrix { train A[out, in] = 0 W' = W + B }\n" + SITE + "apply m()",
        {"E101"},
        "B",
    ),
    "no equation": (
        "method m() on matrix { train A[out, in] = 0 }\n" + SITE + "apply m()",
        {"E120"},
        "",
    ),
    "a layer of no list": ("match gate apply lora(r = layer + 1)", {"E303"}, "layer"),
    "a name that is not one": ("param W: int = 3\n" + SITE + "apply lora(r=Q)", {"E101"}, "Q"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_specs_are_diagnosed(case: str, model: Model) -> None:
    text, codes, place = BAD[case]
    error = refused(text, model)
    assert {d.code for d in error.diagnostics if d.severity == "error"} & codes, error
    assert all(d.span is not None for d in error.diagnostics), error
    assert any(d.hint or d.label for d in error.diagnostics), error
    if place:
        assert any(d.span and place in d.span.text for d in error.diagnostics), error
    assert isinstance(surgery.check(text), tuple)
    with pytest.raises(SurgeryError):
        surgery.plan(text, model)
    with torch.device("meta"):
        on_meta = Model()
    with pytest.raises(SurgeryError):
        surgery.plan(text, on_meta)


@pytest.mark.parametrize("text", ["", " \n", "# nothing\n"])
def test_an_empty_spec(text: str, model: Model) -> None:
    error = refused(text, model)
    assert [d.code for d in error.diagnostics] == ["E005"]
    assert all(d.hint for d in error.diagnostics)


def test_many_mistakes_are_found_in_one_run(model: Model) -> None:
    text = """
    match /q_porj/ in layers[*] apply lora()
    match /v_proj/ in layers[7] apply lora()
    match odd apply lora()
    match head apply lora()
    match /q_proj/ in layers[*] apply bat(r=5)
    match /v_proj/ in layers[0] apply lora(r=3) expect 2
    """
    error = refused(text, model)
    codes = [d.code for d in error.diagnostics]
    assert set(codes) == {"E201", "E204", "E208", "E207", "E301", "E206"}
    lines = {d.span.source.position(d.span.start)[0] for d in error.diagnostics if d.span}
    assert lines == {2, 3, 4, 5, 6, 7}


def test_many_wrong_definitions_are_found_in_one_run(model: Model) -> None:
    text = """
    match /q_proj/ apply lorra()
    match /q_proj/ apply lora(rr=3, alpha="x")
    method m() on matrix { train A[out, in] = 0 W' = W + B }
    method n() on tensor { train A[out, in] = 0 W' = A }
    param p: int = 2.5
    """
    error = refused(text, model)
    codes = {d.code for d in error.diagnostics}
    assert {"E121", "E122", "E101", "E112", "E119"} <= codes


def test_wrong_values_are_diagnosed(model: Model) -> None:
    text = f"param rank: int = 4\n{SITE}apply lora(r=rank)"
    assert "did you mean `rank`?" in str(refused(text, model, values={"rnk": 3}))
    assert "E119" in str(refused(text, model, values={"rank": "many"}))
    assert "E119" in str(refused(text, model, values={"rank": 2.5}))


def test_files_that_are_no_text(model: Model, tmp_path: Path) -> None:
    bad = tmp_path / "bad.peft"
    bad.write_bytes(b"match \xff\xfe apply lora()")
    refused(bad, model)
    refused(tmp_path / "missing.peft", model)
    refused(tmp_path, model)
    bad.write_text("match /q_proj/ apply lora() # " + "x" * 300_000)
    refused(bad, model)
    bad.write_text(SITE + "apply lora(r=" + "(" * 5000 + "1" + ")" * 5000 + ")")
    refused(bad, model)


def test_an_exponential_regex_answers_at_once(model: Model) -> None:
    refused("match /(a|a?)+b/ in layers[*] apply lora()", model)
    refused("match /" + "(x?){20}" * 8 + "x{40}/ apply lora()", model)


# ------------------------------------------------------------------------------------ folders


def written(tmp_path: Path) -> tuple[Path, Model]:
    untyped.manual_seed(1)
    base = Model()
    surgery.compile(SITE + "apply lora(r=3)", base).save(tmp_path / "out")
    return tmp_path / "out", base


def unreadable(directory: Path, model: nn.Module) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        surgery.attach(directory, model)
    assert all(d.code.startswith(("E0", "E1", "E3", "E5")) for d in caught.value.diagnostics)
    return caught.value


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_tensor_file(keep: int, model: Model, tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "E512" in str(unreadable(folder, model))


@pytest.mark.parametrize("name", ["mapping.json", "adapter.peft"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"[]", b"null", b"{}"])
def test_a_damaged_folder(name: str, content: bytes, model: Model, tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    (folder / name).write_bytes(content)
    unreadable(folder, model)


def test_a_folder_for_another_model(model: Model, tmp_path: Path) -> None:
    folder, _ = written(tmp_path)
    other = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 5)])})
    before = seen(other)
    assert "E306" in str(unreadable(folder, other))
    assert seen(other) == before
    unreadable(tmp_path / "nowhere", model)
    unreadable(tmp_path, model)


# -------------------------------------------------------------------------- failing in the middle


class Broken(Exception):
    """What an injected failure raises."""


def failing_at(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which fails at its count-th call."""
    calls = iter(range(count))

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise Broken
        return function(*args, **kwargs)

    return fail


def broken(*args: Any, **kwargs: Any) -> NoReturn:
    raise Broken


SPEC = SITE + "apply vera(r=3)\nmatch /v_proj/ in layers[*] apply dora(r=2)"


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (mount, "mount"),
        (mount, "add_parameters"),
        (mount, "link_shared"),
        (mount, "set_requires_grad"),
        (mount, "mounted_class"),
        (materialize, "site_tensors"),
        (materialize, "shared_tensor"),
        (lower, "lower"),
    ],
)
def test_a_failure_while_mounting(
    owner: Any, name: str, count: int, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        original = getattr(owner, name)
        patch.setattr(owner, name, failing_at(count, original))
        try:
            surgery.compile(SPEC, model)
        except Broken:
            pass
        else:
            surgery.of(model).inverse.unload()  # it was called less often than that
    compiled = surgery.compile(SPEC, model)
    compiled.inverse.unload()


MERGED = SITE + "apply ia3()\nmatch /v_proj/ in layers[*] apply dora(r=2)"


@pytest.mark.parametrize("undo", ["exact", "algebraic"])
@pytest.mark.parametrize("count", range(3))
@pytest.mark.parametrize("name", ["write", "write_bias", "detach_parameter", "read"])
def test_a_failure_while_merging(
    name: str, count: int, undo: Undo, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = surgery.compile(MERGED, model)
    tokens = torch.arange(11)
    with torch.no_grad():
        for parameter in compiled.parameters().values():
            parameter.add_(0.3)
    output, before = model(tokens), seen(model)
    with monkeypatch.context() as patch:
        patch.setattr(storage, name, failing_at(count, getattr(storage, name)))
        with pytest.raises(Broken):
            compiled.inverse.merge(undo=undo)
    assert not compiled.merged
    assert seen(model) == before
    assert torch.equal(model(tokens), output)
    compiled.inverse.unload()


@pytest.mark.parametrize("count", range(3))
def test_a_failure_while_undoing_by_arithmetic(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    compiled = surgery.compile(MERGED, model)
    compiled.inverse.merge(undo="algebraic")
    merged = seen(model)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", failing_at(count, storage.write))
        with pytest.raises(Broken):
            compiled.inverse.unmerge()
    assert compiled.merged
    assert seen(model) == merged
    compiled.inverse.unload()
    after = model.state_dict()
    assert all(torch.allclose(after[n], before[n], atol=1e-6) for n in before)


@pytest.mark.parametrize("count", range(4))
def test_a_failure_while_unmerging(
    count: int, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = surgery.compile(SPEC, model)
    compiled.inverse.merge()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_back", failing_at(count, storage.put_back))
        with pytest.raises(Broken):
            compiled.inverse.unmerge()
    assert compiled.merged
    compiled.inverse.unload()


def test_a_second_adapter_that_fails_leaves_the_first(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = surgery.compile(SITE + "apply lora(r=3)", model)
    tokens = torch.arange(11)
    output, before = model(tokens), seen(model)
    with monkeypatch.context() as patch:
        patch.setattr(mount, "link_shared", broken)
        with pytest.raises(Broken):
            surgery.compile("adapter other { match /q_proj/ apply vera(r=3) }", model)
    assert seen(model) == before
    assert compiled.adapters == ("default",)
    assert torch.equal(model(tokens), output)
    compiled.inverse.unload()
