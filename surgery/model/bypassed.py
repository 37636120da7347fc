"""Layers whose weight their owner reads itself, and may never call: a new forward would be dead."""

from __future__ import annotations

# Layers in transformers whose weight goes to a cache or a kernel: model, owner, child. What only a
# fused kernel reads is called by the plain code, so nothing is seen on that path alone.
_READ_IN_TRANSFORMERS = (
    ("bailing_hybrid", "BailingHybridDeltaAttention", "conv1d"),
    ("bamba", "BambaMixer", "conv1d"),
    ("bamba", "BambaMixer", "out_proj"),
    ("falcon_h1", "FalconH1Mixer", "conv1d"),
    ("falcon_h1", "FalconH1Mixer", "out_proj"),
    ("falcon_mamba", "FalconMambaMixer", "conv1d"),
    ("falcon_mamba", "FalconMambaMixer", "dt_proj"),
    ("falcon_mamba", "FalconMambaMixer", "out_proj"),
    ("falcon_mamba", "FalconMambaMixer", "x_proj"),
    ("glm5_next", "Glm5NextTextLinearAttention", "conv1d"),
    ("granitemoehybrid", "GraniteMoeHybridMambaLayer", "conv1d"),
    ("granitemoehybrid", "GraniteMoeHybridMambaLayer", "out_proj"),
    ("inkling", "InklingShortConvolution", "conv1d"),
    ("inkling2", "Inkling2ShortConvolution", "conv1d"),
    ("jamba", "JambaMambaMixer", "conv1d"),
    ("jamba", "JambaMambaMixer", "dt_proj"),
    ("kimi_linear", "KimiLinearDeltaAttention", "conv1d"),
    ("lfm2", "Lfm2ShortConv", "conv"),
    ("lfm2_moe", "Lfm2MoeShortConv", "conv"),
    ("lfm3", "Lfm3ShortConv", "conv"),
    ("mamba", "MambaMixer", "conv1d"),
    ("mamba", "MambaMixer", "dt_proj"),
    ("mamba", "MambaMixer", "out_proj"),
    ("mamba", "MambaMixer", "x_proj"),
    ("mamba2", "Mamba2Mixer", "conv1d"),
    ("mamba2", "Mamba2Mixer", "out_proj"),
    ("nemotron_h", "NemotronHMamba2Mixer", "conv1d"),
    ("nemotron_h", "NemotronHMamba2Mixer", "out_proj"),
    ("olmo_hybrid", "OlmoHybridGatedDeltaNet", "conv1d"),
    ("qwen3_5", "Qwen3_5GatedDeltaNet", "conv1d"),
    ("qwen3_5_moe", "Qwen3_5MoeGatedDeltaNet", "conv1d"),
    ("qwen3_next", "Qwen3NextGatedDeltaNet", "conv1d"),
    ("qwen4_exp", "Qwen4ExpTextGatedDeltaNet", "conv1d"),
    ("recurrent_gemma", "RecurrentGemmaRecurrentBlock", "conv_1d"),
    ("zamba", "ZambaMambaMixer", "conv1d"),
    ("zamba2", "Zamba2MambaMixer", "conv1d"),
    ("zamba2", "Zamba2MambaMixer", "out_proj"),
)

READ_BY_OWNER: frozenset[tuple[str, str]] = frozenset(
    {
        ("torch.nn.modules.activation.MultiheadAttention", "out_proj"),
        # its fast path
        ("torch.nn.modules.transformer.TransformerEncoderLayer", "linear1"),
        ("torch.nn.modules.transformer.TransformerEncoderLayer", "linear2"),
        *(
            (f"transformers.models.{model}.modeling_{model}.{owner}", child)
            for model, owner, child in _READ_IN_TRANSFORMERS
        ),
    }
)
"""The qualified name of the owner's class, and the name of the child."""
