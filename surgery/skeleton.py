"""A model of names alone: modules on meta, made of a checkpoint's header for adapters to fit on.

No code of a model is needed for it. What a layer is says the adapter's own folder, or which keys it
has; where both leave it open, the shapes, the config and a table of names do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import cast

import torch
from torch import Tensor, nn

from surgery.errors import Report
from surgery.model.holder import children_of, modules_of, parameters_of
from surgery.model.layers import KINDS
from surgery.model.nearest import closest, tails
from surgery.model.roles import plays

Kinds = frozenset[str]
"""The names of layer kinds."""

ANY: Kinds = frozenset()

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Of each tensor of a checkpoint, in elements."""

Config = Mapping[str, object]
"""A model's config.json as plain data."""


@dataclass(frozen=True, slots=True)
class Need:
    """A parameter that an adapter has a site on.

    path: of its module. parameter: "" where it is the weight of a layer, or the only one of two or
    more axes. kinds: what the layer can be; `ANY` where the adapter leaves it open. width: of the
    hidden states, where the site is a module's call and no parameter; 0 where it is one.
    """

    path: str
    parameter: str = ""
    kinds: Kinds = ANY
    width: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The names that its tensor can have; of a module, its path and a dot."""
        below = f"{self.path}." if self.path else ""
        if self.width:
            return (below,)
        return (f"{below}{self.parameter}",) if self.parameter else (f"{below}weight", self.path)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A module tree on meta.

    tensors: the name in the checkpoint of each parameter, by its module's identity and its name.
    """

    model: nn.Module
    tensors: Mapping[tuple[int, str], str] = field(repr=False)

    def tensor(self, module: nn.Module, parameter: str) -> str | None:
        """The checkpoint's name of a parameter; None for one that it does not have."""
        return self.tensors.get((id(module), parameter))

    def renamed(self, names: Mapping[str, str]) -> Skeleton:
        """The same of a checkpoint that has some of these tensors under other names."""
        return Skeleton(self.model, {at: names.get(n, n) for at, n in self.tensors.items()})

    def seen_by(self, prefix: Prefix) -> nn.Module:
        """The tree as an adapter sees it whose paths begin otherwise; its layers are the same."""
        root = self.model
        for name in filter(None, prefix.less.split(".")):
            below = children_of(root).get(name)
            assert below is not None  # a prefix is one that names have
            root = below
        for name in reversed([*filter(None, prefix.more.split("."))]):
            above = nn.Module()
            above.add_module(name, root)
            root = above
        vars(root)["config"] = vars(self.model)["config"]
        return root


# ------------------------------------------------------------------------------------ prefixes


@dataclass(frozen=True, slots=True)
class Prefix:
    """How an adapter's paths differ from a checkpoint's names.

    less: what the checkpoint's begin with and the adapter's do not; more: the other way round.
    """

    less: str = ""
    more: str = ""

    def __call__(self, path: str) -> str:
        """An adapter's path as the checkpoint has it; "" as well for what lies outside of it."""
        if self.more:
            path = path.removeprefix(self.more).removeprefix(".")
        return ".".join(filter(None, (self.less, path)))

    def holds(self, path: str) -> bool:
        """Whether an adapter's path can be one of the checkpoint."""
        return not self.more or f"{path}.".startswith(f"{self.more}.")


_DEEPEST = 4  # names of a prefix: `model.language_model.model.layers` is the longest that is known


def prefix_of(needs: Iterable[Need], names: Iterable[str], where: str) -> Prefix:
    """The prefix by which all that an adapter has sites on is a tensor of a checkpoint.

    Raises ArtifactError (E545) where there is none, or several that differ in what they mean.
    """
    needs, known = tuple(needs), frozenset(names)
    if any(need.width for need in needs):
        known |= frozenset(_modules(known))
    if _all_there(needs, Prefix(), known):
        return Prefix()
    candidates = {*_candidates(known, "less"), *_candidates((n.path for n in needs), "more")}
    found = [prefix for prefix in candidates if _all_there(needs, prefix, known)]
    report = Report()
    if len(found) > 1:
        told = ", ".join(f"`{p.less or p.more}`" for p in sorted(found, key=str))
        message = f"the sites of {where} are tensors of the checkpoint with any of {told} before"
        report.error("E545", message, hint="name a checkpoint of the adapter's own model")
    if not found:
        _report_absent(needs, candidates, known, where, report)
    report.stop()
    return found[0]


def _modules(names: Iterable[str]) -> Iterator[str]:
    """The modules that have some tensors in them: their paths, each with a dot."""
    for name in names:
        at = name.rfind(".")
        while at > 0:
            yield name[: at + 1]
            at = name.rfind(".", 0, at)


def _all_there(needs: Iterable[Need], prefix: Prefix, known: frozenset[str]) -> bool:
    return all(_there(need, prefix, known) for need in needs)


def _there(need: Need, prefix: Prefix, known: frozenset[str]) -> bool:
    names = need.names
    return any(prefix.holds(name) and prefix(name) in known for name in names)


def _candidates(paths: Iterable[str], side: str) -> Iterator[Prefix]:
    begun = {tuple(path.split(".")[:-1][:_DEEPEST]) for path in paths}
    for names in begun:
        for count in range(1, len(names) + 1):
            yield Prefix(**{side: ".".join(names[:count])})


def _report_absent(
    needs: tuple[Need, ...],
    candidates: Iterable[Prefix],
    known: frozenset[str],
    where: str,
    report: Report,
) -> None:
    """E545 for each site that the checkpoint lacks, seen by the prefix that fits most of them."""
    every = sorted({Prefix(), *candidates}, key=lambda p: (len(p.less) + len(p.more), str(p)))
    best = max(every, key=lambda p: sum(_there(need, p, known) for need in needs))
    absent = [need for need in needs if not _there(need, best, known)]
    for need in absent[:_MOST]:
        name = need.names[0]
        meant = closest(best(name), tails(sorted(known), best(name))).question()
        more = f" (and {len(absent) - 1} more)" if need is absent[0] and len(absent) > 1 else ""
        hint = meant or "name the checkpoint of the model that the adapter was made for"
        what = f"module `{need.path}`" if need.width else f"tensor `{name}`"
        message = f"the checkpoint has no {what}{more}, on which {where} has a site"
        report.error("E545", message, hint=hint)


_MOST = 3


# -------------------------------------------------------------------------------------- the tree


_TRANSPOSED: Mapping[str, frozenset[str]] = {
    model: frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
    for model in ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
}
"""By a model's type the layers whose weights lie as [in, out]."""


def built(
    tensors: Shapes,
    kinds: Mapping[str, Kinds],
    config: Config,
    tied: Mapping[str, str] = MappingProxyType({}),
    widths: Mapping[str, int] = MappingProxyType({}),
) -> Skeleton:
    """The tree of a checkpoint's tensors.

    kinds: by paths of modules, what an adapter says that these are; what is said of none can be
    anything that its tensors allow. tied: paths of layers that the checkpoint has no weight of, and
    the tensor that they share. widths: of the hidden states of modules, by their paths.
    """
    owners: dict[str, dict[str, Tensor]] = {}
    for name, (dtype, shape) in tensors.items():
        path, _, own = name.rpartition(".")
        owners.setdefault(path, {})[own] = torch.empty(shape, dtype=dtype, device="meta")
    root = nn.Module()
    vars(root)["config"] = SimpleNamespace(**{"tie_word_embeddings": False, **config})
    known: dict[tuple[int, str], str] = {}
    for path in sorted(owners, key=_natural):
        own = owners[path]
        module = root if not path else _leaf(path, own, kinds.get(path, ANY), config)
        if path and not _hang(root, path, module):
            continue  # below a tensor stands what describes how that is stored
        for name, tensor in own.items():
            if name in parameters_of(module) or not hasattr(module, name):
                module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
                known[id(module), name] = f"{path}.{name}" if path else name
    made = Skeleton(root, known)
    for path, name in tied.items():
        _tie(made, path, name)
    every = dict(modules_of(root)) if widths else {}
    for path in widths.keys() & every.keys():
        vars(every[path])["config"] = SimpleNamespace(hidden_size=widths[path])
    return made


def _tie(made: Skeleton, path: str, name: str) -> None:
    """Add a layer that has another's weight, which stands in the checkpoint once."""
    owner, _, own = name.rpartition(".")
    weight = parameters_of(made.model.get_submodule(owner))[own]
    assert weight is not None
    module = _linear(weight)
    module.register_parameter("weight", weight)
    if _hang(made.model, path, module):
        cast("dict[tuple[int, str], str]", made.tensors)[id(module), "weight"] = name


def table_like(tensors: Shapes, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The tensors of a shape that are a table of embeddings, or the head that may share it."""
    return tuple(
        name
        for name, (_, own) in tensors.items()
        if own == shape and name.endswith(".weight") and _table_or_head(name)
    )


def _table_or_head(name: str) -> bool:
    path = name.removesuffix(".weight")
    tail = ".".join(path.split(".")[-3:])
    return _is_table(path, path.rpartition(".")[2]) or plays("head", tail)


def _natural(path: str) -> list[tuple[int, str]]:
    """An order in which `layers.10` comes after `layers.9`, and a module before what is in it."""
    return [(int(n) if n.isdecimal() else -1, n) for n in path.split(".")] if path else []


def _hang(root: nn.Module, path: str, module: nn.Module) -> bool:
    """Put a module at its path; whether there is room for it."""
    *above, name = path.split(".")
    at = root
    for step in above:
        if step in parameters_of(at) or not step:
            return False
        below = children_of(at).get(step)
        if below is None:
            below = nn.Module()
            at.add_module(step, below)
        at = below
    if not name or name in parameters_of(at) or (name not in children_of(at) and hasattr(at, name)):
        return False
    children_of(at)[name] = module
    return True


def _leaf(path: str, own: Mapping[str, Tensor], kinds: Kinds, config: Config) -> nn.Module:
    """A module of the class that its tensors and the adapter's word make it."""
    weight = own.get("weight")
    if weight is None or weight.dim() not in _BY_AXES:
        return _attention(own) or _experts(kinds)
    possible = [name for name in _BY_AXES[weight.dim()] if not kinds or name in kinds]
    if not possible:
        return nn.Module()  # whose weight is a matrix by itself, or a parameter as it lies
    return _MAKE[_chosen(path, own, possible, config)](weight)


_BY_AXES: Mapping[int, tuple[str, ...]] = {
    2: ("linear", "transposed_linear", "embedding"),
    3: ("conv1d",),
    4: ("conv2d",),
    5: ("conv3d",),
}
"""By the number of axes of a weight, the kinds of layers that have such."""


def _chosen(path: str, own: Mapping[str, Tensor], possible: list[str], config: Config) -> str:
    """Of kinds that an adapter leaves open, the one that shapes and names speak for."""
    if len(possible) == 1:
        return possible[0]
    leaf = path.rpartition(".")[2]
    if "embedding" in possible and "bias" not in own and _is_table(path, leaf):
        return "embedding"
    weight, bias = own["weight"], own.get("bias")
    turned = leaf in _TRANSPOSED.get(str(config.get("model_type")), ANY)
    if bias is not None and weight.shape[0] != weight.shape[1]:
        turned = tuple(bias.shape) == (weight.shape[1],)
    first, second = ("transposed_linear", "linear") if turned else ("linear", "transposed_linear")
    return next(kind for kind in (first, second, *possible) if kind in possible)


def _is_table(path: str, leaf: str) -> bool:
    tail = ".".join(path.split(".")[-3:])
    return plays("embedding", tail) or "embedding" in leaf or leaf in ("wpe", "shared")


class Conv1D(nn.Module):
    """What stands for the layer of this name of transformers: a weight [in, out]."""


# Rows of layer kinds know classes by their names, so none of transformers' has to be imported.
_QUALIFIED = {kind.name: kind.qualified for kind in KINDS}
Conv1D.__module__, _, Conv1D.__qualname__ = _QUALIFIED["transposed_linear"].rpartition(".")


def _bare(cls: type[nn.Module], **facts: object) -> nn.Module:
    """A module of a class that never began: no parameter is made, and none drawn."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    vars(module).update(facts)
    if cls is not nn.Embedding:
        module.register_parameter("bias", None)  # its forward would add one
    return module


def _linear(weight: Tensor) -> nn.Module:
    fan_out, fan_in = weight.shape
    return _bare(nn.Linear, in_features=fan_in, out_features=fan_out)


def _turned(weight: Tensor) -> nn.Module:
    del weight
    return _bare(Conv1D)


def _table(weight: Tensor) -> nn.Module:
    count, size = weight.shape
    return _bare(nn.Embedding, num_embeddings=count, embedding_dim=size, max_norm=None)


def _convolution(cls: type[nn.Module]) -> _Make:
    """The maker of convolutions; of stride, padding, dilation and groups a checkpoint is silent."""

    def make(weight: Tensor) -> nn.Module:
        fan_out, channels, *kernel = weight.shape
        ones = (1,) * len(kernel)
        return _bare(
            cls,
            in_channels=channels,
            out_channels=fan_out,
            kernel_size=tuple(kernel),
            stride=ones,
            padding=(0,) * len(kernel),
            dilation=ones,
            groups=1,
            padding_mode="zeros",
        )

    return make


_Make = Callable[[Tensor], nn.Module]

_MAKE: Mapping[str, _Make] = {
    "linear": _linear,
    "transposed_linear": _turned,
    "embedding": _table,
    "conv1d": _convolution(nn.Conv1d),
    "conv2d": _convolution(nn.Conv2d),
    "conv3d": _convolution(nn.Conv3d),
}


def _attention(own: Mapping[str, Tensor]) -> nn.Module | None:
    """An attention of torch's, which keeps its projections in one parameter."""
    stacked = own.get("in_proj_weight")
    if stacked is None or stacked.dim() != 2 or stacked.shape[0] != 3 * stacked.shape[1]:
        return None
    module = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
    nn.Module.__init__(module)
    return module


def _experts(kinds: Kinds) -> nn.Module:
    """A module with parameters of its own, which may be batches of matrices."""
    module = nn.Module()
    if "transposed_matrix" in kinds and "matrix" not in kinds:
        vars(module)["is_transposed"] = True
    return module
