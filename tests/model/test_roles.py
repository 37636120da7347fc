"""Roles: one spec for many architectures, and what each role finds in each of them.

`SURGERY_GOLDEN=write pytest tests/model/test_roles.py` writes the list of what is found anew.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import nn

import surgery
from surgery.errors import Report, SelectionError, Source, Span
from surgery.language.syntax import Role
from surgery.model.inventory import Entry, Inventory, survey
from surgery.model.roles import ROLES, compiled

t = cast(Any, transformers)  # every class is loaded when it is asked for

FINDINGS = Path(__file__).parents[1] / "golden" / "roles.txt"
SELECTORS = [name for name, row in ROLES.items() if not row.container]


def on_meta(cls: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        return cast(nn.Module, cls(config))


# -------------------------------------------------------------- one spec, sites counted by hand

SPEC = """
method scaled() on matrix { train l[out] = 1; y' = l * y }
optional match @query | @key | @value | @output in @layers[*] apply scaled()
optional match @gate | @up | @down in @layers[*] apply lora(r=2)
"""

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 97}
DECODER = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
BART = {
    "d_model": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 97,
    "pad_token_id": 0,
}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 97}


def t5(**more: Any) -> nn.Module:
    config = t.T5Config(**T5, num_decoder_layers=3, **more)
    return on_meta(t.T5ForConditionalGeneration, config)


def counts(each: int, gate: int, up: int, down: int, **more: int) -> dict[str, int]:
    """`each` of query, key, value and output."""
    parts = dict.fromkeys(("query", "key", "value", "output"), each)
    return {**parts, "gate": gate, "up": up, "down": down, **more}


# The number of sites of each role; what is not listed plays none.
BY_HAND: Mapping[str, tuple[Callable[[], nn.Module], Mapping[str, int]]] = {
    # 3 layers with four projections each, and a gated feed-forward of three.
    "llama": (
        lambda: on_meta(t.LlamaForCausalLM, t.LlamaConfig(**DECODER)),
        counts(3, 3, 3, 3, attention=12, mlp=9, embedding=1, head=1),
    ),
    # As Llama; the norms of queries and keys are no matrices.
    "qwen3": (
        lambda: on_meta(t.Qwen3ForCausalLM, t.Qwen3Config(**DECODER, head_dim=16)),
        counts(3, 3, 3, 3, attention=12, mlp=9, embedding=1, head=1),
    ),
    # `c_attn` is query, key and value: one matrix a layer, which is also three parts.
    "gpt2": (
        lambda: on_meta(
            t.GPT2LMHeadModel, t.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=97)
        ),
        counts(3, 0, 3, 3, qkv=3, attention=6, mlp=6, embedding=1, head=1),
    ),
    # `qkv_proj` is three parts and `gate_up_proj` two: 2 matrices of attention a layer, 2 of mlp.
    "phi3": (
        lambda: on_meta(t.Phi3ForCausalLM, t.Phi3Config(**DECODER)),
        counts(3, 3, 3, 3, qkv=3, attention=6, mlp=6, embedding=1, head=1),
    ),
    # The feed-forward is `intermediate.dense` and `output.dense`, no gate; the pooler has no role.
    "bert": (
        lambda: on_meta(t.BertModel, t.BertConfig(**SIZES, intermediate_size=48)),
        counts(3, 0, 3, 3, attention=12, mlp=6, embedding=1),
    ),
    # 2 self attentions in the encoder; 3 self and 3 cross in the decoder; 5 feed-forwards. The
    # encoder and the decoder each have an embedding that is tied to the shared one.
    "t5": (t5, counts(8, 0, 5, 5, attention=32, mlp=10, embedding=3, head=1)),
    # The same with a gate in each feed-forward.
    "t5 gated": (
        lambda: t5(feed_forward_proj="gated-gelu"),
        counts(8, 5, 5, 5, attention=32, mlp=15, embedding=3, head=1),
    ),
    "bart": (
        lambda: on_meta(t.BartForConditionalGeneration, t.BartConfig(**BART)),
        counts(8, 0, 5, 5, attention=32, mlp=10, embedding=3, head=1),
    ),
    # One convolution embeds the patches; there is no head.
    "vit": (
        lambda: on_meta(t.ViTModel, t.ViTConfig(**SIZES, intermediate_size=48)),
        counts(3, 0, 3, 3, attention=12, mlp=6, embedding=1),
    ),
    # As Bart, but the encoder hears convolutions, and the model names the decoder's embedding.
    "whisper": (
        lambda: on_meta(t.WhisperForConditionalGeneration, t.WhisperConfig(**BART)),
        counts(8, 0, 5, 5, attention=32, mlp=10, embedding=1, head=1),
    ),
    # The experts of a layer are two batches of matrices, one of which is gate and up; one router.
    "mixtral": (
        lambda: on_meta(t.MixtralForCausalLM, t.MixtralConfig(**DECODER, num_local_experts=5)),
        counts(3, 3, 3, 3, attention=12, mlp=6, embedding=1, head=1, router=3),
    ),
    "qwen3_moe": (
        lambda: on_meta(
            t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig(**DECODER, num_experts=5, head_dim=16)
        ),
        counts(3, 3, 3, 3, attention=12, mlp=6, embedding=1, head=1, router=3),
    ),
    # No attention and no feed-forward: only an embedding and a head.
    "mamba": (
        lambda: on_meta(
            t.MambaForCausalLM,
            t.MambaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=97, state_size=4),
        ),
        counts(0, 0, 0, 0, embedding=1, head=1),
    ),
}


def played(model: nn.Module) -> dict[str, set[str]]:
    """The paths of what plays each role, parts of matrices included; no two by one path."""
    every: dict[str, set[str]] = {}
    for role in SELECTORS:
        try:
            plan = surgery.plan(f"optional match @{role} apply lora(r=1)", model)
            every[role] = {site.path for site in plan.sites}
        except SelectionError:  # tied, or of a kind that no row knows
            every[role] = matched(role, model)
    return every


def matched(role: str, model: nn.Module) -> set[str]:
    """The paths of candidates that have a role's name."""
    inventory = survey(model)
    return taken(role, inventory, [inventory.entries[i] for i in inventory.pool])


def taken(role: str, inventory: Inventory, entries: Iterable[Entry]) -> set[str]:
    """The paths of those entries that a role's pattern takes."""
    source = Source("role", f"@{role}")
    node = Role(role, span=Span(source, 0, len(source.text)))
    pattern = compiled(node, inventory, Report(), container=ROLES[role].container)
    assert pattern is not None
    return {entry.path for entry in entries if pattern.matches_tail(entry.path)}


@pytest.mark.parametrize("name", BY_HAND)
def test_every_role_takes_what_one_counts_by_hand(name: str) -> None:
    build, wanted = BY_HAND[name]
    found = {role: len(paths) for role, paths in played(build()).items()}
    assert found == {**dict.fromkeys(SELECTORS, 0), **wanted}


@pytest.mark.parametrize("name", BY_HAND)
def test_one_spec_of_roles_serves_all(name: str) -> None:
    build, wanted = BY_HAND[name]
    model = build()
    plan = surgery.plan(SPEC, model)
    by_method = Counter(site.form.method.name for site in plan.sites)
    attention = sum(wanted[role] for role in ("query", "key", "value", "output"))
    assert by_method["scaled"] == attention
    assert by_method["lora"] == wanted["gate"] + wanted["up"] + wanted["down"]
    assert all(site.site.layer is not None for site in plan.sites)
    if plan.sites:
        assert surgery.compile(SPEC, model).plan.sites == plan.sites


# ----------------------------------------------------------------- what each role finds elsewhere

_PARTS = ("text_config", "vision_config")
_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)


def small(model_type: str) -> nn.Module:
    """A model of a type by its own defaults, with one layer of each kind, on meta."""
    config = t.CONFIG_MAPPING[model_type]()
    given = (config, *(getattr(config, name, None) for name in _PARTS))
    for part in filter(None, given):
        for name in _LAYERS:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, 1)
        if "layer_types" in vars(part) and part.layer_types:
            part.layer_types = part.layer_types[:1]
    mappings = (
        t.MODEL_FOR_CAUSAL_LM_MAPPING,
        t.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        t.MODEL_FOR_MASKED_LM_MAPPING,
        t.MODEL_MAPPING,
    )
    return on_meta(next(m[type(config)] for m in mappings if type(config) in m), config)


def findings(model: nn.Module) -> Iterator[str]:
    """A line for each role that something plays: the last two names of paths; norms by class."""
    inventory = survey(model)
    pool = [inventory.entries[i] for i in inventory.pool]
    for role, row in ROLES.items():
        everything = row.container or role == "norm"
        paths = taken(role, inventory, inventory.entries if everything else pool)
        if role == "norm":
            names = {type(model.get_submodule(path)).__name__ for path in paths}
        else:
            names = {".".join(re.sub(r"\.\d+(?=\.|$)", "", p).split(".")[-2:]) for p in paths}
        if names:
            yield f"  {role:<10} {' '.join(sorted(names))}"


def test_what_each_role_finds_is_as_written() -> None:
    wanted = FINDINGS.read_text(encoding="utf-8").splitlines()
    shown: list[str] = []
    for model_type in (line for line in wanted if not line.startswith(" ")):
        shown += [model_type, *findings(small(model_type))]
    if os.environ.get("SURGERY_GOLDEN") == "write":
        FINDINGS.write_text("\n".join(shown) + "\n", encoding="utf-8")
    else:
        assert shown == wanted


# -------------------------------------------------------------------- what a model says of itself


class Told(nn.Module):
    """A model that answers as it is told to; an exception is raised."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.first = nn.Embedding(5, 3)
        self.wte = nn.Embedding(5, 3)
        self.copy = nn.Embedding(5, 3)
        self.copy.weight = self.first.weight
        self.inner = nn.Sequential(nn.Linear(3, 2))
        self.lm_head = nn.Linear(3, 5)
        self.answer = answer

    def get_input_embeddings(self) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return getattr(self, self.answer) if isinstance(self.answer, str) else self.answer

    def get_output_embeddings(self) -> object:
        return self.get_input_embeddings()


@pytest.mark.parametrize(
    ("answer", "embedding", "head"),
    [
        ("first", {"first", "copy"}, {"first"}),
        ("wte", {"wte"}, {"wte"}),
        ("inner", {"inner.0"}, {"inner.0"}),
        (None, {"wte"}, {"lm_head"}),
        (7, {"wte"}, {"lm_head"}),
        (NotImplementedError(), {"wte"}, {"lm_head"}),
        (TypeError("an argument"), {"wte"}, {"lm_head"}),
    ],
)
def test_a_model_is_asked_before_names_are(
    answer: object, embedding: set[str], head: set[str]
) -> None:
    model = Told(answer)
    assert (matched("embedding", model), matched("head", model)) == (embedding, head)
    inside = nn.ModuleList([Told(answer), nn.Linear(2, 3)])
    assert matched("embedding", inside) == {f"0.{path}" for path in embedding}


def test_a_model_that_is_adapted_is_asked_as_before() -> None:
    model = on_meta(t.LlamaForCausalLM, t.LlamaConfig(**DECODER))
    before = {role: matched(role, model) for role in SELECTORS}
    surgery.compile("match @mlp | @embedding | @head apply ia3()", model)
    assert {role: matched(role, model) for role in SELECTORS} == before


def test_a_name_of_any_depth_would_need_more_than_the_last_names() -> None:
    assert not [glob for row in ROLES.values() for glob in (*row.globs, *row.but) if "**" in glob]
