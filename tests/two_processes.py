"""What two processes check of an adapted model: run as a program, once in each of them.

`python two_processes.py RANK FOLDER` runs every function of `CHECKS` in order and writes what went
wrong to `FOLDER/RANK.json`, by the names of the functions. Each function must make the same
collectives in both processes.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from blocks import IN, OUT, Block, Model
from torch import Tensor, nn

import surgery
from surgery.errors import SurgeryError
from surgery.model.holder import modules_of, under_adapters
from surgery.trainable import set_trainable, trainable

WORLD, BATCH = 2, 6

Check = Callable[[int, Path], None]
CHECKS: list[Check] = []

untyped: Any = torch  # whose types are not complete
processes: Any = torch.distributed


def check(function: Check) -> Check:
    """One more check."""
    CHECKS.append(function)
    return function


SPECS = {
    "low rank": "match * apply lora(r=2)",
    "a norm and a witness": "match * apply dora(r=2)",
    "a rotation, and a copy": "match up apply oft(block_size=7) train head",
    "shared by all": "match up apply vblora(num_vectors=12, vector_length=1, r=2)",
}

TWO = """
adapter a { match up apply lora(r=2) }
adapter b { match up|down|head apply dora(r=3) }
activate a
"""


def made() -> Model:
    untyped.manual_seed(0)
    return Model()


def adapted(spec: str = TWO) -> surgery.Compiled:
    """The same in both processes: with adapters that do something."""
    compiled = surgery.compile(spec, made(), seed=1)
    for adapter in compiled.adapters:
        for name, tensor in sorted(compiled.parameters(adapter).items()):
            if tensor.is_floating_point():
                generator = torch.Generator().manual_seed(len(name))
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return compiled


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(BATCH, size, generator=generator) for size in (IN, OUT))
    return x, y


def part(rank: int) -> tuple[Tensor, Tensor]:
    """A process's half of the batch."""
    x, y = batch()
    return x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=0.05, eps=1e-3)


def steps(model: nn.Module, x: Tensor, y: Tensor) -> None:
    stepping = optimizer(model)
    for _ in range(2):
        backward(loss(model, x, y))
        stepping.step()
        stepping.zero_grad()


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def backward(loss: Any) -> None:
    loss.backward()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same_parameters(one: nn.Module, other: nn.Module) -> None:
    """Those of adapters to rounding, and the base's to the bit."""
    wanted = dict(other.named_parameters())
    found = {name.removeprefix("module."): p for name, p in one.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        now, then = whole(parameter), wanted[name].detach()
        if under_adapters(name):
            torch.testing.assert_close(now, then)
        else:
            assert torch.equal(now, then), name


@contextmanager
def refused(code: str) -> Generator[None]:
    with pytest.raises(SurgeryError) as caught:
        yield
    found = caught.value.diagnostics
    assert {one.code for one in found} == {code}, caught.value
    assert all(one.hint for one in found)


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# ------------------------------------------------------------------- DistributedDataParallel


def replicated(compiled: surgery.Compiled, **options: Any) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(compiled.model, **options)


def count_sent(model: nn.Module) -> list[int]:
    """A list to which the elements of each bucket that is sent are added."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    sent: list[int] = []

    def hook(state: Any, bucket: Any) -> Any:
        sent.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)

    hook.__annotations__.clear()  # which torch would have as types, and here are texts
    cast(Any, model).register_comm_hook(None, hook)
    return sent


@check
def a_replicated_step_is_the_step_of_one(rank: int, folder: Path) -> None:
    for number, spec in enumerate(SPECS.values()):
        one, two = adapted(spec), adapted(spec)
        model = replicated(two)
        sent = count_sent(model)
        steps(one.model, *batch())
        steps(model, *part(rank))
        assert_same_parameters(model, one.model)
        assert sum(sent) == 2 * sum(p.numel() for p in trained(two.model)), spec
        assert surgery.of(model).model is two.model
        # In both processes, so to two folders.
        surgery.of(model).save(folder / f"replicated{number}.{rank}")
    processes.barrier()
    for number in range(len(SPECS)):
        assert_same_files(folder / f"replicated{number}.0", folder / f"replicated{number}.1")


@check
def gradients_are_accumulated_without_sending_them(rank: int, folder: Path) -> None:
    one, two = adapted(), adapted()
    one.activate("b")
    two.activate("b")
    model = replicated(two, find_unused_parameters=True)
    sent = count_sent(model)
    x, y = batch()
    mine = part(rank)
    stepping, others = optimizer(one.model), optimizer(model)
    backward(loss(one.model, x, y) + loss(one.model, 2 * x, y))
    with cast(Any, model).no_sync():
        backward(loss(model, *mine))
    assert not sent
    backward(loss(model, 2 * mine[0], mine[1]))
    assert sent
    stepping.step()
    others.step()
    assert_same_parameters(model, one.model)


@check
def another_adapter_is_live_at_each_step(rank: int, folder: Path) -> None:
    one, two = adapted(), adapted()
    model = replicated(two, find_unused_parameters=True)
    first, second = optimizer(one.model), optimizer(model)
    for live in ("a", "b", "a + b", "b"):
        for compiled in (one, surgery.of(model)):
            compiled.activate(live)
        backward(loss(one.model, *batch()))
        backward(loss(model, *part(rank)))
        for stepping in (first, second):
            stepping.step()
            stepping.zero_grad()
        assert_same_parameters(model, one.model)


@check
def an_adapter_that_is_not_trained_needs_no_search(rank: int, folder: Path) -> None:
    one, two = adapted(), adapted()
    for compiled in (one, two):
        for name, parameter in compiled.model.named_parameters():
            parameter.requires_grad_(".a." in name)
    model = replicated(two)
    steps(one.model, *batch())
    steps(model, *part(rank))
    assert_same_parameters(model, one.model)


@check
def samples_of_a_process_are_routed_by_it(rank: int, folder: Path) -> None:
    names = ["a", None, "b", "b", "a", None]
    compiled, (x, _) = adapted(), batch()
    with compiled.route(names):
        wanted = compiled.model(x).detach()
    model = replicated(compiled)
    with surgery.of(model).route(names[rank * 3 :][:3]), torch.no_grad():
        found = model(x.chunk(WORLD)[rank])
    torch.testing.assert_close(found, wanted.chunk(WORLD)[rank])


@check
def nothing_is_added_to_what_is_wrapped(rank: int, folder: Path) -> None:
    compiled = adapted()
    compiled.save(folder / f"kept{rank}", "a")
    model, bare = replicated(compiled), replicated(surgery.compile(TWO, made()))
    plain = nn.parallel.DistributedDataParallel(made())
    for wrapped in (model, bare, plain):
        with refused("E460"):
            surgery.compile("match up apply lora(r=2)", wrapped)
        with refused("E460"):
            surgery.attach(folder / f"kept{rank}", wrapped)
    with refused("E460"):
        surgery.compile("match up apply lora(r=2)", nn.Sequential(plain))
    assert surgery.of(model).adapters == ("a", "b")
    assert not [name for name, _ in plain.named_parameters() if "surgery" in name]
    with refused("E401"):
        surgery.of(plain)


# ---------------------------------------------------------------------------- fully_shard


def sharded(compiled: surgery.Compiled, *, sites: bool = False) -> nn.Module:
    """The same model, whose blocks, and perhaps the layers in them, are groups of their own."""
    from torch.distributed.fsdp import fully_shard

    model = cast(Model, compiled.model)
    for block in cast("Iterable[Block]", model.layers):
        if sites:
            fully_shard(block.up)
            fully_shard(block.down)
        fully_shard(block)
    if sites:
        fully_shard(model.head)
    return cast(nn.Module, fully_shard(model))


@check
def a_sharded_step_is_the_step_of_one(rank: int, folder: Path) -> None:
    from torch.distributed.tensor import DTensor

    for spec in SPECS.values():
        for sites in (False, True):
            one, two = adapted(spec), adapted(spec)
            model = sharded(two, sites=sites)
            assert surgery.of(model).model is model
            backward(loss(model, *part(rank)))
            for parameter in trained(model):
                assert isinstance(parameter, DTensor)
                assert isinstance(parameter.grad, DTensor)
            assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
            model.zero_grad()
            steps(one.model, *batch())
            steps(model, *part(rank))
            assert_same_parameters(model, one.model)


@check
def a_sharded_adapter_is_saved_by_one_process_as_by_one(rank: int, folder: Path) -> None:
    for number, spec in enumerate(SPECS.values()):
        one, two = adapted(spec), adapted(spec)
        model = sharded(two)
        if rank == 0:
            one.save(folder / f"one{number}")
        before = two.save(folder / f"before{number}")
        with torch.no_grad():
            model(batch()[0])  # leaves what the root manages whole
        after = two.save(folder / f"after{number}")
        assert [path.name for path in before.files] == [path.name for path in after.files]
        processes.barrier()
        for name in ("before", "after"):
            assert_same_files(folder / f"one{number}", folder / f"{name}{number}")
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@check
def a_model_is_sharded_and_replicated_at_once(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    one = adapted()
    if rank == 0:
        one.save(folder / "at once")
    for shape in ((1, WORLD), (WORLD, 1)):
        two = adapted()
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicated", "sharded"))
        fully_shard(two.model, mesh=mesh)
        two.save(folder / f"at once {shape[0]}")
        processes.barrier()
        assert_same_files(folder / f"at once {shape[0]}", folder / "at once")
        steps(two.model, *part(rank))
    steps(one.model, *batch())
    assert_same_parameters(two.model, one.model)


class Tied(nn.Module):
    """A table of words, and a head that reads it."""

    def __init__(self) -> None:
        super().__init__()
        untyped.manual_seed(3)
        self.words = nn.Embedding(13, IN)
        self.block = Block()
        self.head = nn.Linear(IN, 13, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        """[...] to [..., 13]."""
        return self.head(self.block(self.words(x)))


@check
def layers_that_share_a_weight_share_its_adapter(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    spec = "match words apply lora(r=2) share match up apply lora(r=2)"
    one, two = (surgery.compile(spec, Tied(), seed=4) for _ in range(2))
    fully_shard(cast(Tied, two.model).block)
    fully_shard(two.model)
    words = torch.tensor([[1, 5, 2], [7, 12, 0]])
    stepped = [(one.model, words), (two.model, words[rank : rank + 1])]
    for model, x in stepped:
        stepping = optimizer(model)
        for _ in range(2):
            backward(model(x).square().mean())
            stepping.step()
            stepping.zero_grad()
    assert_same_parameters(two.model, one.model)
    with torch.no_grad():
        torch.testing.assert_close(two.model(words), one.model(words))


class Doubled(nn.Linear):
    """A layer with a forward of its own, which reads its weight W'."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Twice what a linear layer gives."""
        del kwargs
        return 2 * nn.functional.linear(args[0], self.weight, self.bias)


class Computed(nn.Module):
    """Layers whose adapted weight is computed where it is read, by them or by what owns them."""

    def __init__(self) -> None:
        super().__init__()
        untyped.manual_seed(6)
        self.doubled = Doubled(IN, IN + 1)
        self.attention = nn.MultiheadAttention(IN + 1, 2, batch_first=True)
        self.head = nn.Linear(IN + 1, OUT)

    def forward(self, x: Tensor) -> Tensor:
        """[..., IN] to [..., OUT]."""
        y = self.doubled(x)[:, None]
        return self.head(self.attention(y, y, y)[0][:, 0])


@check
def weights_are_computed_of_sharded_ones(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    spec = "match doubled|out_proj apply dora(r=2) train head"
    for inner in (False, True):
        one, two = (surgery.compile(spec, Computed(), seed=4) for _ in range(2))
        model = cast(Computed, two.model)
        if inner:
            fully_shard(model.doubled)
            fully_shard(model.head)
        fully_shard(model)
        steps(one.model, *batch())
        steps(model, *part(rank))
        assert_same_parameters(model, one.model)
        with torch.no_grad():
            torch.testing.assert_close(model(batch()[0]), one.model(batch()[0]))
        two.save(folder / f"computed{inner}")


@check
def what_cannot_be_saved_is_refused_in_all_processes(rank: int, folder: Path) -> None:
    compiled = adapted()
    sharded(compiled)
    in_the_way = folder / "a file"
    if rank == 0:
        in_the_way.write_text("")
    processes.barrier()
    with refused("E513"):
        compiled.save(in_the_way / "below it")
    with refused("E411"):
        compiled.save(folder / "none", "nobody")
    processes.barrier()
    assert not (folder / "none").exists()


@check
def a_folder_is_attached_before_it_is_sharded(rank: int, folder: Path) -> None:
    one = adapted()
    one.save(folder / f"attached{rank}", "b")
    two = surgery.attach(folder / f"attached{rank}", made())
    model = sharded(two)
    one.activate("b")
    with torch.no_grad():
        torch.testing.assert_close(model(batch()[0]), one.model(batch()[0]))


@check
def a_checkpoint_is_loaded_into_a_sharded_model(rank: int, folder: Path) -> None:
    """As libraries do it: sharded on meta, then filled from the tensors of the first process."""
    from torch.distributed.checkpoint import state_dict

    one, two = adapted(), surgery.compile(TWO, made(), seed=5)
    model = sharded(surgery.of(two.model.to("meta")))
    options = state_dict.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    cast(Any, model).to_empty(device="cpu")
    given = dict(one.model.state_dict()) if rank == 0 else {}
    state_dict.set_model_state_dict(model, given, options=options)
    assert_same_parameters(model, one.model)
    for live in ("a", "b"):
        one.activate(live)
        two.activate(live)
        with torch.no_grad():
            torch.testing.assert_close(model(batch()[0]), one.model(batch()[0]))
    whole_options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = state_dict.get_model_state_dict(model, options=whole_options)
    assert rank or found.keys() == one.model.state_dict().keys()


@check
def whole_values_are_written_to_parameters_that_are_sharded(rank: int, folder: Path) -> None:
    for number, spec in enumerate(SPECS.values()):
        one, two = adapted(spec), surgery.compile(spec, made(), seed=5)
        model = sharded(two)
        before = {name: id(p) for name, p in model.named_parameters()}
        with torch.no_grad():
            model(batch()[0])  # leaves what the root manages whole
        one.save(folder / f"swapped{number}.{rank}")
        two.hotswap("default", folder / f"swapped{number}.{rank}")
        assert before == {name: id(p) for name, p in model.named_parameters()}
        assert_same_parameters(model, one.model)
        with torch.no_grad():
            torch.testing.assert_close(model(batch()[0]), one.model(batch()[0]))


@check
def adapters_of_a_sharded_model_are_renamed_and_deleted(rank: int, folder: Path) -> None:
    one, two = adapted(), adapted()
    model = sharded(two)
    with torch.no_grad():
        model(batch()[0])
    for compiled in (one, two):
        compiled.rename("a", "c")
        compiled.delete("b")
    steps(one.model, *batch())
    steps(model, *part(rank))
    assert_same_parameters(model, one.model)
    with torch.no_grad():
        torch.testing.assert_close(model(batch()[0]), one.model(batch()[0]))


@check
def another_adapter_of_a_sharded_model_is_trained(rank: int, folder: Path) -> None:
    one, two = adapted(), adapted()
    model = sharded(two)
    for live in ("a", "b"):
        for compiled in (one, two):
            compiled.activate(live)
            set_trainable(compiled.model, [live])
            assert trainable(compiled.model) == (live,)
        steps(one.model, *batch())
        steps(model, *part(rank))
        assert_same_parameters(model, one.model)
        with torch.no_grad():
            model(batch()[0])  # leaves what the root manages whole


@check
def sharded_gradients_are_accumulated_without_sending_them(rank: int, folder: Path) -> None:
    one, two = adapted(), adapted()
    model: Any = sharded(two)
    (x, y), (mine, its) = batch(), part(rank)
    stepping, others = optimizer(one.model), optimizer(model)
    backward(loss(one.model, x, y) + loss(one.model, 2 * x, y))
    model.set_requires_gradient_sync(False)
    backward(loss(model, mine, its))
    model.set_requires_gradient_sync(True)
    backward(loss(model, 2 * mine, its))
    stepping.step()
    others.step()
    assert_same_parameters(model, one.model)


@check
def each_process_has_an_adapter_of_its_own_live(rank: int, folder: Path) -> None:
    lives = ("a", "b")
    one, two = adapted(), adapted()
    model: Any = sharded(two)
    if not hasattr(model, "set_reduce_scatter_unused_params"):  # torch before 2.13
        return
    model.set_reduce_scatter_unused_params(True)
    stepping, others = optimizer(one.model), optimizer(model)
    for process, live in enumerate(lives):
        one.activate(live)
        backward(loss(one.model, *part(process)) / WORLD)
    with two.using(lives[rank]):
        backward(loss(model, *part(rank)))
    stepping.step()
    others.step()
    assert_same_parameters(model, one.model)


@check
def a_class_is_swapped_below_what_shards_it(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import FSDPModule

    one, two = adapted(), adapted()
    model = sharded(two, sites=True)  # of which `a` runs nothing in most
    classes: dict[str, type] = {}
    for live in ("b", "a + b", None, "a", "b"):
        one.activate(live)
        two.activate(live)
        with torch.no_grad():
            torch.testing.assert_close(model(batch()[0]), one.model(batch()[0]))
        for name, module in modules_of(model):
            if isinstance(module, nn.Linear | Block | Model):
                assert isinstance(module, FSDPModule), name
                assert type(module).__name__.startswith("FSDP")
    classes = {n: type(m) for n, m in modules_of(model) if isinstance(m, nn.Linear)}
    assert len(set(classes.values())) == 1
    stepped = optimizer(one.model), optimizer(model)
    backward(loss(one.model, *batch()))
    backward(loss(model, *part(rank)))
    for stepping in stepped:
        stepping.step()
    assert_same_parameters(model, one.model)


@check
def what_a_sharded_model_cannot_do_is_refused(rank: int, folder: Path) -> None:
    adapted("adapter c { match up apply lora(r=2) }").save(folder / f"more{rank}")
    compiled, (x, _) = adapted(), batch()
    model = sharded(compiled)
    for _ in range(2):  # with all parameters sharded, and with some of them whole
        with refused("E460"):
            surgery.compile("adapter c { match up apply lora(r=2) }", model)
        with refused("E460"):
            surgery.attach(folder / f"more{rank}", model)
        with refused("E461"):
            compiled.inverse.merge()
        with refused("E461"):
            compiled.inverse.unmerge()
        with refused("E461"):
            compiled.inverse.unload()
        with refused("E461"):
            compiled.reserve(max_rank=3)
        with refused("E461"):
            model.eval()
            compiled.freeze()
        model.train()
        with torch.no_grad():
            torch.testing.assert_close(model(x), adapted().model(x))
    assert compiled.adapters == ("a", "b")
    with refused("E415"):
        surgery.compile("adapter c { match up apply lora(r=2) }", model, inplace=False)
    assert str(surgery.plan(TWO, model)) == str(surgery.plan(TWO, made()))
    compiled.materialize()  # nothing waits


@check
def what_waits_for_its_base_is_not_sharded(rank: int, folder: Path) -> None:
    with torch.device("meta"):
        base = Model()
    compiled = surgery.compile("match * apply dora(r=2)", base)
    cast(Any, sharded(compiled)).to_empty(device="cpu")
    with refused("E461"):
        compiled.materialize()


@check
def what_an_outer_module_has_whole_is_refused(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    compiled = adapted()
    outer: Any = fully_shard(nn.Sequential(compiled.model))
    compiled.save(folder / "inner")
    processes.barrier()
    with torch.no_grad():
        outer(batch()[0])
    with refused("E462"):
        compiled.save(folder / f"inner{rank}")
    with refused("E462"):
        compiled.hotswap("a", folder / "inner")
    assert isinstance(outer, FSDPModule)
    outer.reshard()
    compiled.save(folder / "again")
    compiled.hotswap("a", folder / "inner")


@check
def a_merged_model_is_sharded(rank: int, folder: Path) -> None:
    compiled, (x, _) = adapted(), batch()
    wanted = compiled.model(x).detach()
    compiled.save(folder / f"unmerged{rank}")
    compiled.inverse.merge()
    model = sharded(compiled)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted)
    with refused("E461"):
        compiled.inverse.unmerge()
    compiled.save(folder / "merged")
    processes.barrier()
    assert_same_files(folder / "merged", folder / f"unmerged{rank}")


@check
def a_base_of_16_bits_has_adapters_of_32(rank: int, folder: Path) -> None:
    base = made().bfloat16()
    one = surgery.compile("match * apply lora(r=2)", deepcopy(base))
    two = surgery.compile("match * apply lora(r=2)", base)
    model = sharded(two)
    (x, y), (mine, its) = batch(), part(rank)
    for each, inputs, wanted in ((one.model, x, y), (model, mine, its)):
        backward(loss(each, inputs.bfloat16(), wanted.bfloat16()))
    for name, parameter in one.model.named_parameters():
        assert parameter.dtype == (torch.float32 if "surgery" in name else torch.bfloat16)
    found = dict(model.named_parameters())
    for name, parameter in one.model.named_parameters():
        assert (parameter.grad is None) == (found[name].grad is None)
        if parameter.grad is not None:
            gradient = whole(cast(Tensor, found[name].grad))
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, parameter.grad, rtol=0.05, atol=0.01)


# ----------------------------------------------------------------------------- accelerate


@check
def accelerate_prepares_a_model_and_its_optimizer(rank: int, folder: Path) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    accelerator: Any = pytest.importorskip("accelerate").Accelerator(cpu=True)
    assert accelerator.num_processes == WORLD
    one, two = adapted("match * apply dora(r=2)"), adapted("match * apply dora(r=2)")
    loader: Any = DataLoader(TensorDataset(*batch()), batch_size=BATCH // WORLD)
    model, stepping, loader = accelerator.prepare(two.model, optimizer(two.model), loader)
    assert accelerator.unwrap_model(model) is two.model
    assert surgery.of(model).model is two.model
    for _ in range(2):
        for x, y in loader:
            accelerator.backward(loss(model, x, y))
            stepping.step()
            stepping.zero_grad()
    steps(one.model, *batch())
    assert_same_parameters(model, one.model)
    if accelerator.is_main_process:
        surgery.of(model).save(folder / "prepared")
        again = surgery.attach(folder / "prepared", made())
        torch.testing.assert_close(again.model(batch()[0]), two.model(batch()[0]))


def main(rank: int, folder: Path) -> None:
    """Run all checks; what went wrong is written, and the next goes on."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ.update(LOCAL_WORLD_SIZE=str(WORLD))
    processes.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=120),
    )
    wrong: dict[str, str] = {}
    for function in CHECKS:
        try:
            function(rank, folder)
        except Exception:
            wrong[function.__name__] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(wrong))
    processes.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
