"""What plays which part in a model, whatever its architecture calls it: `@query`, `@mlp`, ….

A row of `ROLES` says by which names a role goes; it holds for every architecture that uses them.
Rows are read off the models of transformers 5; the comments say whose names are not self-evident.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

from surgery.errors import Report, Source, Span
from surgery.language import syntax as ast
from surgery.language.patterns import Pattern, compile_selector
from surgery.model import told
from surgery.model.inventory import Inventory


@dataclass(frozen=True, slots=True)
class RoleRow:
    """One role: the globs of the paths that play it, and of those that only look like it.

    told: what the model itself says; where it says nothing, the globs hold.
    """

    name: str
    globs: tuple[str, ...]
    but: tuple[str, ...] = ()
    container: bool = False
    told: Callable[[Inventory], AbstractSet[str]] | None = None


_ATTENTION = (
    "{self_attn,encoder_attn,cross_attn,attn,attention,self_attention,crossattention,linear_attn,"
    "multi_head_attention}"
)
_T5 = "{SelfAttention,EncDecAttention,LocalSelfAttention,TransientGlobalSelfAttention}"
_MPNET = "attention.attn"

# Latent attention takes two steps to its queries, `q_a_proj` and `q_b_proj`.
_QUERY = (
    "{q_proj,query,q_lin,to_q,query_proj,query_global,q_attn,q_head,Wq,q_a_proj,q_b_proj}",
    f"{_T5}.q",
    f"{_MPNET}.q",
)
_KEY = ("{k_proj,key,k_lin,to_k,key_proj,key_global,k_head,Wk}", f"{_T5}.k", f"{_MPNET}.k")
_VALUE = ("{v_proj,value,v_lin,to_v,value_proj,value_global,v_head,Wv}", f"{_T5}.v", f"{_MPNET}.v")
_QKV = (
    "{c_attn,qkv_proj,query_key_value,Wqkv,qkv,in_proj_qkvz,in_proj_weight}",
    "attention.self.in_proj",
)
_KV = ("{kv_proj,kv_a_proj_with_mqa,kv_b_proj}",)
_OUTPUT = (
    f"{_ATTENTION}.{{o_proj,out_proj,c_proj,proj,projection,dense,Wo,post_proj,output}}",
    "{attention,crossattention}.output.dense",
    "{out_lin,to_out.0,post_attention.conv1d}",
    f"{_T5}.o",
    f"{_MPNET}.o",
)
# A key and a value of RWKV's feed-forward; a pooling head's attention; MobileBERT's bottleneck.
_NOT_ATTENTION = ("feed_forward.{key,value}", "head.attention.out_proj", "bottleneck.attention.*")

_GATE = ("{gate_proj,wi_0}", "{feed_forward,mlp}.w1")
_UP = (
    "{up_proj,wi,wi_1,fc1,c_fc,fc_in,dense_h_to_4h,lin1,intermediate_dense,linear_fc1}",
    "intermediate.{dense,conv1d}",
    "{ffn.linear_1,ff.layer_1,ffn.0,albert_layers.*.ffn}",
    "{feed_forward,mlp}.w3",
    "feed_forward.key",
)
_DOWN = (
    "{down_proj,wo,fc2,fc_out,dense_4h_to_h,lin2,output_dense,linear_fc2}",
    "output.{dense,conv1d}",
    "mlp.{c_proj,Wo}",
    "{ffn.linear_2,ff.layer_2,ffn.2,ffn_output}",
    "{feed_forward,mlp}.w2",
    "feed_forward.value",
)
_GATE_UP = ("{gate_up_proj,mlp.Wi}",)
_NOT_MLP = ("{attention,crossattention}.output.dense",)

ROLES = {
    row.name: row
    for row in (
        RoleRow("query", _QUERY, _NOT_ATTENTION),
        RoleRow("key", _KEY, _NOT_ATTENTION),
        RoleRow("value", _VALUE, _NOT_ATTENTION),
        RoleRow("qkv", _QKV),
        RoleRow("output", _OUTPUT, _NOT_ATTENTION),
        RoleRow("attention", (*_QUERY, *_KEY, *_VALUE, *_QKV, *_KV, *_OUTPUT), _NOT_ATTENTION),
        RoleRow("gate", _GATE),
        RoleRow("up", _UP),
        RoleRow("down", _DOWN, _NOT_MLP),
        RoleRow("mlp", (*_GATE, *_UP, *_DOWN, *_GATE_UP), _NOT_MLP),
        RoleRow(
            "embedding",
            ("{embed_tokens,wte,word_embeddings,tok_embeddings,token_embedding,embed_in}",),
            told=told.embeddings,
        ),
        RoleRow("head", ("{lm_head,embed_out,classifier,score,qa_outputs}",), told=told.heads),
        RoleRow("norm", (), told=told.norms),
        RoleRow("router", ("{mlp,block_sparse_moe,feed_forward}.{gate,router}", "router.layer")),
        RoleRow("experts", ("experts",), container=True),
        RoleRow("layers", ("{layers,layer,h,block,blocks,albert_layer_groups}",), container=True),
    )
}


class RolePattern:
    """The paths that play a role; it answers as the pattern of a regex or a glob does."""

    literal: str | None = None

    def __init__(self, row: RoleRow, span: Span, inventory: Inventory) -> None:
        """A role as it stands at `span`, in a model."""
        self._told = frozenset[str]() if row.told is None else row.told(inventory)
        self._name = row.name
        self._reach = max((glob.count(".") + 1 for glob in (*row.globs, *row.but)), default=1)
        self.alternatives = ((self, span),)

    def matches_tail(self, path: str) -> bool:
        """Whether what has this path plays the role."""
        if self._told:
            return path in self._told
        names = path.rsplit(".", self._reach)[-self._reach :]
        return plays(self._name, ".".join(names))


Tails = Pattern | RolePattern
"""What says of a path whether a selector takes it."""


def compiled(
    node: ast.Pattern, inventory: Inventory, report: Report, *, container: bool = False
) -> Tails | None:
    """The pattern of one part of a selector, or None if E007 or E213 was reported for it."""
    if isinstance(node, ast.Role):
        return _role_pattern(node, inventory, report, container)
    return compile_selector(node, report)


def _role_pattern(
    node: ast.Role, inventory: Inventory, report: Report, container: bool
) -> RolePattern | None:
    known = [name for name, row in ROLES.items() if row.container is container]
    if node.name in known:
        return RolePattern(ROLES[node.name], node.span, inventory)
    near = get_close_matches(node.name, known, 1)
    label = f"did you mean `@{near[0]}`?" if near else ""
    message = f"no role `@{node.name}`"
    if node.name in ROLES:
        what = "a container" if ROLES[node.name].container else "a selector"
        message = f"`@{node.name}` is {what}"
        label = "here stands what it is in" if container else f"as in `in @{node.name}[*]`"
    listed = ", ".join(f"`@{name}`" for name in known)
    report.error("E213", message, node.span, label=label, hint=f"there are {listed}")
    return None


def roles_of(inventory: Inventory, paths: list[str]) -> tuple[str, ...]:
    """The roles that some paths of a model play, in the order of the table."""
    patterns = {name: RolePattern(row, _NOWHERE, inventory) for name, row in ROLES.items()}
    return tuple(n for n, pattern in patterns.items() if any(map(pattern.matches_tail, paths)))


@lru_cache(maxsize=4096)
def plays(role: str, tail: str) -> bool:
    """Whether a path that ends in some names plays a role, by the globs of its row.

    The layers of a model end in the same names, so this is asked once for most of them.
    """
    takes, but = _patterns(ROLES[role].globs), _patterns(ROLES[role].but)
    return any(p.matches_tail(tail) for p in takes) and not any(p.matches_tail(tail) for p in but)


@lru_cache(maxsize=256)
def _patterns(globs: tuple[str, ...]) -> tuple[Pattern, ...]:
    report = Report()
    found = [
        compile_selector(ast.Glob(text, span=Span(Source("roles", text), 0, len(text))), report)
        for text in globs
    ]
    report.stop()
    return tuple(p for p in found if p is not None)


_NOWHERE = Span(Source("roles", ""), 0, 0)
