"""Where a model keeps several roles in one matrix: which rows of it are whose.

A row of `FUSED` is a layer of a class of owners whose forward splits the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, cast

from torch import nn

from surgery.model.layers import base_class, qualified_name
from surgery.model.parts import Part

_MODELS = "transformers.models"

_PROJECTIONS = ("query", "key", "value")

Lengths = Callable[[Any], Mapping[str, int]]
"""The number of rows of each role, in order, from what the owner knows of itself."""


@dataclass(frozen=True, slots=True)
class Fused:
    """A child of some classes of owners that is several roles at once.

    by_turns: whether `lengths` are those of a group of heads, after which the next has its own.
    """

    child: str
    lengths: Lengths
    owners: tuple[str, ...]
    by_turns: bool = False


def _by_heads(owner: Any) -> Mapping[str, int]:
    """Query, key, value, the latter two with heads of their own number."""
    config = owner.config
    queries = int(config.num_attention_heads * owner.head_dim)
    keys = int(config.num_key_value_heads * owner.head_dim)
    return {"query": queries, "key": keys, "value": keys}


def _by_embedding(owner: Any) -> Mapping[str, int]:
    """Query, key and value of one size; in cross attention the query has a layer of its own."""
    names = _PROJECTIONS[1:] if owner.is_cross_attention else _PROJECTIONS
    return dict.fromkeys(names, int(owner.split_size))


def _by_head(owner: Any) -> Mapping[str, int]:
    """Query, key and value of a head stand together."""
    size = int(getattr(owner, "head_dim", 0) or owner.head_size)
    return dict.fromkeys(_PROJECTIONS, size)


def _by_group(owner: Any) -> Mapping[str, int]:
    """The queries that share a key and a value stand before them; by heads in older models."""
    size = int(owner.head_dim)
    queries = 1
    if owner.new_decoder_architecture:
        queries = int(owner.num_heads // owner.num_kv_heads)
    elif owner.multi_query:
        queries = int(owner.num_heads)
    return {"query": queries * size, "key": size, "value": size}


def _of_fused(child: str, names: tuple[str, ...]) -> Lengths:
    """Equal shares of the child's own rows."""

    def lengths(owner: Any) -> Mapping[str, int]:
        return dict.fromkeys(names, int(getattr(owner, child).out_features) // len(names))

    return lengths


def _owners(*names: str) -> tuple[str, ...]:
    """`phi3.Phi3MLP` is the class of that name in the model's own module."""
    split = (name.split(".") for name in names)
    return tuple(f"{_MODELS}.{model}.modeling_{model}.{cls}" for model, cls in split)


FUSED: tuple[Fused, ...] = (
    Fused(
        "c_attn",
        _by_embedding,
        _owners(
            "gpt2.GPT2Attention",
            "imagegpt.ImageGPTAttention",
            "decision_transformer.DecisionTransformerGPT2Attention",
        ),
    ),
    Fused(
        "qkv_proj",
        _by_heads,
        _owners("phi3.Phi3Attention", "phi4_multimodal.Phi4MultimodalAttention"),
    ),
    Fused(
        "qkv",
        _of_fused("qkv", _PROJECTIONS),
        _owners(
            "blip.BlipAttention",
            "blip_2.Blip2Attention",
            "cohere_compass.CohereCompassVisionAttention",
            "deepseek_ocr2.DeepseekOcr2SamVisionAttention",
            "dots3_note.Dots3NoteVisionAttention",
            "ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention",
            "florence2.Florence2VisionChannelAttention",
            "florence2.Florence2VisionWindowAttention",
            "glm4v.Glm4vVisionAttention",
            "glm4v_moe.Glm4vMoeVisionAttention",
            "glm5_next.Glm5NextVisionAttention",
            "glm_image.GlmImageVisionAttention",
            "glm_ocr.GlmOcrVisionAttention",
            "got_ocr2.GotOcr2VisionAttention",
            "hiera.HieraMaskUnitAttention",
            "instructblip.InstructBlipAttention",
            "instructblipvideo.InstructBlipVideoAttention",
            "mgp_str.MgpstrAttention",
            "pp_formulanet.PPFormulaNetVisionAttention",
            "pp_ocrv5_mobile_rec.PPOCRV5MobileRecAttention",
            "pp_ocrv5_server_rec.PPOCRV5ServerRecAttention",
            "pp_ocrv6_small_rec.PPOCRV6SmallRecAttention",
            "qwen2_5_vl.Qwen2_5_VLVisionAttention",
            "qwen2_vl.VisionAttention",
            "qwen3_5.Qwen3_5VisionAttention",
            "qwen3_5_moe.Qwen3_5MoeVisionAttention",
            "qwen3_omni_moe.Qwen3OmniMoeVisionAttention",
            "qwen3_vl.Qwen3VLVisionAttention",
            "qwen3_vl_moe.Qwen3VLMoeVisionAttention",
            "qwen4_exp.Qwen4ExpVisionAttention",
            "sam.SamVisionAttention",
            "sam2.Sam2MultiScaleAttention",
            "sam_hq.SamHQVisionAttention",
            "seggpt.SegGptAttention",
            "slanext.SLANeXtVisionAttention",
            "timesformer.TimesformerSelfAttention",
            "unlimited_ocr.UnlimitedOcrSamVisionAttention",
            "vitdet.VitDetAttention",
        ),
    ),
    Fused(
        "Wqkv",
        _of_fused("Wqkv", _PROJECTIONS),
        _owners("modernbert.ModernBertAttention", "mpt.MptAttention"),
    ),
    Fused(
        "gate_up_proj",
        _of_fused("gate_up_proj", ("gate", "up")),
        _owners(
            "dia.DiaMLP",
            "dots3_note.Dots3NoteAudioMLP",
            "esmfold2.EsmFold2SwiGLU",
            "glm.GlmMLP",
            "glm4.Glm4MLP",
            "glm4v.Glm4vTextMLP",
            "glm_image.GlmImageTextMLP",
            "glm_ocr.GlmOcrTextMLP",
            "minimax_m3_vl.MiniMaxM3VLDenseMLP",
            "phi3.Phi3MLP",
            "phi4_multimodal.Phi4MultimodalMLP",
        ),
    ),
    Fused(
        "query_key_value",
        _by_head,
        _owners(
            "bloom.BloomAttention",
            "gpt_neox.GPTNeoXAttention",
            "gpt_neox_japanese.GPTNeoXJapaneseAttention",
            "persimmon.PersimmonAttention",
        ),
        by_turns=True,
    ),
    Fused("query_key_value", _by_group, _owners("falcon.FalconAttention"), by_turns=True),
)

_BY_OWNER = {(owner, row.child): row for row in FUSED for owner in row.owners}


def split(owner: nn.Module, child: str, rows: int) -> Mapping[str, Part]:
    """The parts of a child's matrix of some rows, by their roles; empty where it is one thing.

    What a mounted owner was is looked through.
    """
    classes = map(qualified_name, base_class(owner).__mro__)
    row = next((r for c in classes if (r := _BY_OWNER.get((c, child)))), None)
    if row is None:
        return {}
    lengths = row.lengths(cast(Any, owner))
    period = sum(lengths.values()) if row.by_turns else rows
    cuts = pairwise(accumulate(lengths.values(), initial=0))
    parts = {n: Part(n, a, b, rows, period) for n, (a, b) in zip(lengths, cuts, strict=True)}
    # An owner that was changed since its class was written is not split where it does not fit.
    whole = sum(lengths.values()) == period and all(part.fits for part in parts.values())
    return parts if whole else {}
