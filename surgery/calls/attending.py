"""The heads of one attention module, changed between its attention and its output projection.

In transformers an attention module looks up, at each call, the function that attends
(`AttentionInterface.get_interface`), and calls it with itself, q, k and v. That look-up is where
an adapter comes in: while a module's own call runs, in the thread that runs it, what is looked up
is followed by the adapter's equation. Masks, caches and kernels are the model's own, whatever its
implementation is; any other module finds what it always found.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, wraps
from threading import Lock, local
from types import CodeType
from typing import Any, NoReturn, cast

from torch import Tensor, nn

from surgery.errors import refuse
from surgery.model.fused import split
from surgery.model.layers import base_class, kind_of
from surgery.model.parts import ENTRIES, Part
from surgery.model.roles import plays

Branch = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of q [batch, heads, tokens, head_dim], k and v [batch, kv_heads, keys, head_dim], all with their
positions, and what the heads made of them, o [batch, heads, tokens, head_dim]: the o' in its place.
The keys are all that is attended to, those in a cache included."""

Output = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of q, k, v, o' and the module's output y [batch, tokens, hidden]: the y' in its place."""


def objection(module: nn.Module) -> str:
    """Why the heads of a module cannot be reached, from its class alone; empty where they can."""
    cls = base_class(module)
    if _asks(cls):
        return ""
    return f"`{cls.__name__}` does not attend through the attention interface of transformers"


def attended(
    module: nn.Module,
    forward: Callable[..., Any],
    branch: Branch | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Output | None = None,
) -> Any:
    """What a module's own forward gives, where its heads' result is what `branch` makes of it.

    forward: called with the module before the other arguments. output: what is made of the
    module's output in the end, if anything.

    Raises StateError (E480) where the call did not attend once, through the interface, in the
    shapes that `Branch` says.
    """
    if not _ready:
        intercept()
    call = _Call(module, branch)
    before = _HERE.call
    _HERE.call = call
    try:
        result = forward(module, *args, **kwargs)
    finally:
        _HERE.call = before
    if len(call.seen) != 1:
        _refuse_call(module, f"attended {len(call.seen)} times through the interface, not once")
    if output is None:
        return result
    if isinstance(result, tuple):
        parts = cast("tuple[Any, ...]", result)
        return output(*call.seen[0], parts[0]), *parts[1:]
    return output(*call.seen[0], result)


# --------------------------------------------------------------------------- one call at a time


class _Call:
    """A call of a module that is under way, and what it attended with so far."""

    __slots__ = ("branch", "module", "seen")

    def __init__(self, module: nn.Module, branch: Branch | None) -> None:
        """Nothing yet."""
        self.module, self.branch = module, branch
        self.seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []


class _Here(local):
    """The innermost call of this thread; what a graph can read, as `surgery.switch` does."""

    call: _Call | None = None


_HERE = _Here()


def _followed(interface: Callable[..., Any], call: _Call) -> Callable[..., Any]:
    """A function that attends, and where it does so for the call's own module, the adapter."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if module is not call.module:
            return interface(module, query, key, value, *args, **kwargs)
        if kwargs.get("cache") is not None:  # the keys of other calls are in it, by pages
            _refuse_call(module, "keeps its keys in pages")
        attention, *weights = interface(module, query, key, value, *args, **kwargs)
        if attention.shape[:3] != (query.shape[0], query.shape[2], query.shape[1]):
            _refuse_call(module, f"attended in the shape {list(attention.shape)}")
        o = attention.transpose(1, 2)
        if call.branch is not None:
            o = call.branch(query, key, value, o).to(attention.dtype)
            attention = o.transpose(1, 2).contiguous()
        call.seen.append((query, key, value, o))
        return attention, *weights

    return attend


def _refuse_call(module: nn.Module, what: str) -> NoReturn:
    refuse(
        "E480",
        f"the heads of a `{type(module).__name__}` cannot be changed in this call, which {what}",
        hint="leave such modules out, or let the model attend in another way: "
        'model.set_attn_implementation("sdpa")',
    )


# ------------------------------------------------------------------------------ the look-up

_ready = False
_MAKING_READY = Lock()


def intercept() -> None:
    """Let the interface's look-up ask what call is under way; once, and for the whole process.

    Where none is, it gives what it always gave. To be done before a model is compiled.
    """
    global _ready
    from transformers.modeling_utils import AttentionInterface

    with _MAKING_READY:
        if _ready:
            return
        interface = cast(Any, AttentionInterface)
        own: Callable[..., Any] = interface.get_interface

        @wraps(own)
        def get_interface(self: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
            found, call = own(self, *args, **kwargs), _HERE.call
            return found if call is None else _followed(found, call)

        interface.get_interface = get_interface
        _ready = True


@lru_cache(maxsize=1024)
def _asks(cls: type[nn.Module]) -> bool:
    """Whether a class's forward, or one that it inherits and may call, looks an interface up."""
    forwards = (vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base))
    codes = (getattr(inspect.unwrap(f), "__code__", None) for f in forwards)
    return any("get_interface" in c.co_names for code in codes if code for c in _within(code))


def _within(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _within(constant)


# ---------------------------------------------------------------------------- the projections


@dataclass(frozen=True, slots=True)
class Projection:
    """A child of an attention module that makes queries, keys or values; or a part of its output.

    features: of each token, that the child takes.
    """

    child: str
    features: int
    part: Part | None

    def __call__(self, module: nn.Module, x: Tensor, size: int) -> Tensor:
        """Of x [..., tokens, hidden], per head: [..., heads, tokens, size]."""
        y = cast(Tensor, getattr(module, self.child)(x))
        if self.part is not None:
            y = self.part.of(y, ENTRIES)
        return cast(Tensor, y.unflatten(-1, (-1, size))).transpose(-3, -2)


@dataclass(frozen=True, slots=True)
class Projections:
    """How an attention module makes its queries, keys and values, and its output of what they give.

    All run the module's own layers, with the adapters that these have. Positions, and norms of
    queries and keys, are no part of them. hidden: the features of a token that asks; those of one
    that is attended to are `keys.features`. value_dim: the entries of a head of values.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    queries: Projection
    keys: Projection
    values: Projection
    output: str

    def query(self, module: nn.Module, x: Tensor) -> Tensor:
        """Of x [..., tokens, hidden]: [..., heads, tokens, head_dim]."""
        return self.queries(module, x, self.head_dim)

    def key(self, module: nn.Module, x: Tensor) -> Tensor:
        """Of x [..., tokens, hidden]: [..., heads, tokens, head_dim], one for each query's head."""
        return self._repeated(self.keys(module, x, self.head_dim))

    def value(self, module: nn.Module, x: Tensor) -> Tensor:
        """Of x [..., tokens, hidden]: [..., heads, tokens, value_dim], one for each query's."""
        return self._repeated(self.values(module, x, self.value_dim))

    def out(self, module: nn.Module, o: Tensor, bias: bool = True) -> Tensor:
        """Of o [..., heads, tokens, value_dim]: [..., tokens, hidden]; without its bias if not.

        Raises StateError (E481) where the output is projected by another module.
        """
        if not self.output:
            _refuse_projection(module, "output")
        layer = getattr(module, self.output)
        y = cast(Tensor, layer(merged(o)))
        own = None if bias else cast("Tensor | None", layer.bias)
        return y if own is None else y - own

    def _repeated(self, x: Tensor) -> Tensor:
        """The same for each head: those that share a key stand side by side, in every model."""
        return x.repeat_interleave(self.heads // self.kv_heads, dim=-3)


def merged(o: Tensor) -> Tensor:
    """Heads [..., heads, tokens, head_dim] as tokens [..., tokens, heads·head_dim]."""
    return o.transpose(-3, -2).flatten(-2)


def projections(module: nn.Module) -> Projections:
    """What makes a module's queries, keys, values and output, by the roles that its children play.

    Raises StateError (E481) where a role is not one matrix of the hidden states, as where keys are
    expanded from a latent.
    """
    found = _found(module)
    for role in ("query", "key", "value"):
        if role not in found:
            _refuse_projection(module, role)
    own = vars(module)
    size = next((own[name] for name in _HEAD_SIZES if isinstance(own.get(name), int)), 0)
    rows = {role: _rows(module, projection) for role, projection in found.items()}
    heads, kv_heads = (rows[role] // size if size else 0 for role in ("query", "key"))
    counts = kv_heads and heads * size == rows["query"] and kv_heads * size == rows["key"]
    if not (counts and heads % kv_heads == 0 and rows["value"] % kv_heads == 0):
        _refuse_projection(module, "key")
    if own.get("num_key_value_groups", heads // kv_heads) != heads // kv_heads:
        _refuse_projection(module, "query")  # which makes gates too, or has heads of its own
    queries, keys, values = (found[role] for role in ("query", "key", "value"))
    output = found["output"].child if "output" in found else ""
    value_dim = rows["value"] // kv_heads
    return Projections(
        queries.features, heads, kv_heads, size, value_dim, queries, keys, values, output
    )


_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head")
"""What attention modules call the entries of a head."""

_PARENTS = ("self_attn", "SelfAttention", "attention.attn")
"""Names that attention modules have, one of each kind that `ROLES` tells apart by."""


def _found(module: nn.Module) -> Mapping[str, Projection]:
    """What plays which role, of those that stand below an attention module by themselves."""
    found: dict[str, Projection] = {}
    for name, child in module.named_children():
        kind = kind_of(child)
        if kind is None or kind.input != "features":
            continue
        sizes = kind.sizes(child)
        for role in ("query", "key", "value", "output"):
            if any(plays(role, f"{parent}.{name}") for parent in _PARENTS):
                found.setdefault(role, Projection(name, sizes.fan_in, None))
        for role, part in split(module, name, sizes.fan_out).items():
            found.setdefault(role, Projection(name, sizes.fan_in, part))
    return found


def _rows(module: nn.Module, projection: Projection) -> int:
    """The features that a projection makes of a token."""
    if projection.part is not None:
        return projection.part.length
    child = getattr(module, projection.child)
    kind = kind_of(child)
    assert kind is not None
    return kind.sizes(child).fan_out


def _refuse_projection(module: nn.Module, role: str) -> NoReturn:
    known = ", ".join(f"`{name}`" for name, _ in module.named_children())
    refuse(
        "E481",
        f"a `{type(module).__name__}` has no {role} projection of its own",
        hint=f"below it there are {known}; leave such modules out",
    )
