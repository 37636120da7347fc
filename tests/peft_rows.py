"""What peft's methods are here: a row for each, with three configs of peft's.

The settings take every argument of a method once; `oracle.test_architectures` runs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
from peft.tuners.lora.config import BdLoraConfig, KasaConfig


@dataclass(frozen=True)
class Row:
    """A method of ours, the config of peft's that it is, and three settings of it.

    In the settings the texts "query", "value" and "down" stand for an architecture's layers, and a
    kind beside its own settings for a config within the config.
    """

    method: str
    config: Any
    on: tuple[str, str]
    settings: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
    convolutions: bool = False  # whether it goes to an architecture's convolution too


SHARDS: dict[str, Any] = {
    "target_modules_bd_a": ["query"],
    "target_modules_bd_b": ["down"],
    "match_strict": False,
}
KASA = (KasaConfig, dict[str, Any]())

ROWS = (
    Row(
        "lora",
        peft.LoraConfig,
        ("llama", "whisper"),
        (
            {"r": 3, "lora_alpha": 5},
            {"r": 4, "use_rslora": True, "init_lora_weights": "gaussian"},
            {"r": 5, "rank_pattern": {"value": 2}, "alpha_pattern": {"down": 7}},
        ),
        convolutions=True,
    ),
    Row(
        "dora",
        peft.LoraConfig,
        ("gpt2", "vit"),
        (
            {"use_dora": True, "r": 3, "lora_alpha": 5},
            {"use_dora": True, "r": 4, "use_rslora": True},
            {"use_dora": True, "r": 5, "rank_pattern": {"value": 2}},
        ),
        convolutions=True,
    ),
    Row(
        "ia3",
        peft.IA3Config,
        ("opt", "convnext"),
        (
            {"feedforward_modules": ["down"]},
            {"feedforward_modules": []},
            {"feedforward_modules": ["query", "value", "down"], "init_ia3_weights": False},
        ),
        convolutions=True,
    ),
    Row(
        "vera",
        peft.VeraConfig,
        ("qwen", "t5"),
        (
            {"r": 5},
            {"r": 7, "d_initial": 0.5, "projection_prng_key": 3},
            {"r": 26, "init_weights": False, "save_projection": False},
        ),
    ),
    Row(
        "oft",
        peft.OFTConfig,
        ("bert", "mixtral"),
        (
            {"oft_block_size": 4},
            {"oft_block_size": 0, "r": 3, "use_cayley_neumann": False, "coft": True, "eps": 0.1},
            {"oft_block_size": 12, "block_share": True, "num_cayley_neumann_terms": 3},
        ),
    ),
    Row(
        "miss",
        peft.MissConfig,
        ("whisper", "convnext"),
        (
            {"r": 5},
            {"r": 6, "mini_r": 3, "init_weights": "mini"},
            {"r": 4, "init_weights": "bat"},
        ),
    ),
    Row(
        "hira",
        peft.HiraConfig,
        ("gpt2", "vit"),
        ({"r": 3}, {"r": 5, "hira_dropout": 0.2}, {"r": 2, "init_weights": False}),
        convolutions=True,
    ),
    Row(
        "delora",
        peft.DeloraConfig,
        ("llama", "opt"),
        (
            {"r": 3},
            {"r": 4, "delora_lambda": 5, "module_dropout": 0.2},
            {"r": 5, "rank_pattern": {"value": 2}, "lambda_pattern": {"down": 3}},
        ),
    ),
    Row(
        "road",
        peft.RoadConfig,
        ("qwen", "t5"),
        (
            {"group_size": 6},
            {"variant": "road_2", "group_size": 4},
            {"variant": "road_4", "group_size": 12},
        ),
    ),
    Row(
        "beft",
        peft.BeftConfig,
        ("bert", "vit"),
        ({}, {"init_weights": False}, {"target_modules": ["down"]}),
    ),
    Row(
        "adalora",
        peft.AdaLoraConfig,
        ("gpt2", "mixtral"),
        (
            {"init_r": 3, "target_r": 2, "total_step": 7},
            {"init_r": 5, "target_r": 2, "total_step": 7, "lora_alpha": 3},
            {"init_r": 2, "target_r": 1, "total_step": 7, "lora_dropout": 0.3},
        ),
    ),
    Row(
        "loha",
        peft.LoHaConfig,
        ("whisper", "convnext"),
        (
            {"r": 3, "alpha": 5},
            {"r": 2, "use_effective_conv2d": True, "rank_dropout": 0.2},
            {"r": 4, "rank_pattern": {"value": 2}, "alpha_pattern": {"down": 3}},
        ),
        convolutions=True,
    ),
    Row(
        "lokr",
        peft.LoKrConfig,
        ("opt", "vit"),
        (
            {"r": 1, "alpha": 3},
            {"r": 8, "decompose_factor": 4, "rank_dropout": 0.2, "module_dropout": 0.1},
            {"r": 1, "decompose_both": True, "decompose_factor": 6, "use_effective_conv2d": True},
        ),
        convolutions=True,
    ),
    Row(
        "hra",
        peft.HRAConfig,
        ("t5", "convnext"),
        (
            {"r": 4},
            {"r": 3, "init_weights": False},
            {"r": 2, "apply_GS": True, "init_weights": False},
        ),
        convolutions=True,
    ),
    Row(
        "boft",
        peft.BOFTConfig,
        ("llama", "vit"),
        (
            {"boft_block_size": 4},
            {"boft_block_size": 0, "boft_block_num": 3},
            {"boft_block_size": 6, "init_weights": False},
        ),
        convolutions=True,
    ),
    Row(
        "gralora",
        peft.GraloraConfig,
        ("opt", "t5"),
        (
            {"r": 4, "alpha": 5},
            {"r": 6, "gralora_k": 3, "gralora_dropout": 0.2},
            {"r": 4, "hybrid_r": 3, "alpha": 7},
        ),
    ),
    Row(
        "mica",
        peft.LoraConfig,
        ("qwen", "bert"),
        (
            {"init_lora_weights": "mica", "r": 3, "lora_alpha": 5},
            {"init_lora_weights": "mica", "r": 4, "use_rslora": True},
            {"init_lora_weights": "mica", "r": 5, "lora_dropout": 0.1},
        ),
    ),
    Row(
        "pissa",
        peft.LoraConfig,
        ("t5", "qwen"),
        (
            {"init_lora_weights": "pissa", "r": 3, "lora_alpha": 5},
            {"init_lora_weights": "pissa", "r": 4, "use_rslora": True},
            {"init_lora_weights": "pissa", "r": 5, "rank_pattern": {"value": 2}},
        ),
    ),
    Row(
        "olora",
        peft.LoraConfig,
        ("whisper", "vit"),
        (
            {"init_lora_weights": "olora", "r": 3, "lora_alpha": 5},
            {"init_lora_weights": "olora", "r": 4, "use_rslora": True},
            {"init_lora_weights": "olora", "r": 5, "rank_pattern": {"value": 2}},
        ),
    ),
    Row(
        "fourierft",
        peft.FourierFTConfig,
        ("gpt2", "mixtral"),
        (
            {"n_frequency": 17},
            {"n_frequency": 23, "scaling": 40.0, "random_loc_seed": 3},
            {"n_frequency": 11, "init_weights": True},
        ),
    ),
    Row(
        "waveft",
        peft.WaveFTConfig,
        ("opt", "t5"),
        (
            {"n_frequency": 17},
            {"n_frequency": 23, "scaling": 7.0, "use_idwt": False},
            {"n_frequency": 11, "random_loc_seed": 3, "n_frequency_pattern": {"down": 7}},
        ),
    ),
    Row(
        "c3a",
        peft.C3AConfig,
        ("whisper", "mixtral"),
        (
            {"block_size": 4},
            {"block_size": 6, "init_weights": True},
            {"block_size": 12, "init_weights": "gaussian"},
        ),
    ),
    Row(
        "shira",
        peft.ShiraConfig,
        ("bert", "convnext"),
        ({"r": 2}, {"r": 3, "random_seed": 5}, {"r": 1, "init_weights": False}),
    ),
    Row(
        "randlora",
        peft.RandLoraConfig,
        ("gpt2", "qwen"),
        (
            {"r": 3, "randlora_alpha": 5},
            {"r": 5, "randlora_alpha": 4, "very_sparse": True},
            {"r": 7, "randlora_alpha": 3, "sparse": True, "projection_prng_key": 3},
        ),
    ),
    Row(
        "vblora",
        peft.VBLoRAConfig,
        ("llama", "mixtral"),
        (
            {"r": 3, "num_vectors": 11, "vector_length": 4},
            {"r": 2, "num_vectors": 7, "vector_length": 12, "topk": 3},
            {"r": 4, "num_vectors": 5, "vector_length": 6, "vblora_dropout": 0.1},
        ),
    ),
    Row(
        "bdlora",
        peft.LoraConfig,
        ("bert", "whisper"),
        (
            {"r": 4, "use_bdlora": (BdLoraConfig, {"nblocks": 2, **SHARDS})},
            {"r": 6, "lora_alpha": 5, "use_bdlora": (BdLoraConfig, {"nblocks": 3, **SHARDS})},
            {"r": 2, "use_rslora": True, "use_bdlora": (BdLoraConfig, {"nblocks": 2, **SHARDS})},
        ),
    ),
    Row(
        "kasa",
        peft.LoraConfig,
        ("llama", "mixtral"),
        (
            {"r": 3, "kasa_config": KASA},
            {"r": 4, "lora_alpha": 5, "lora_dropout": 0.2, "kasa_config": KASA},
            {"r": 2, "use_rslora": True, "kasa_config": KASA},
        ),
    ),
    Row(
        "psoft",
        peft.PsoftConfig,
        ("qwen", "convnext"),  # elsewhere singular values are near, and peft's rounding is seen
        (
            {"r": 4, "use_cayley_neumann": True, "cayley_neumann_eps": 0.1},
            {"r": 5, "psoft_alpha": 3, "ab_svd_init": "pissa_init", "psoft_mag_a": False},
            {"r": 3, "psoft_orth": False, "psoft_mag_b": False, "psoft_dropout": 0.2},
        ),
    ),
    Row(
        "frod",
        peft.FrodConfig,
        ("opt", "vit"),
        (
            {},
            {"sparse_rate": 0.2, "regularization_alpha": 0.1, "frod_dropout": 0.2},
            {"sparse_rate": 0.0, "projection_prng_key": 3},
        ),
    ),
    Row(
        "osf",
        peft.OSFConfig,
        ("opt", "bert"),
        ({}, {"effective_rank": 5}, {"effective_rank": 0.7}),
    ),
    Row(
        "deft",
        peft.DeftConfig,
        ("t5", "vit"),
        (
            {"r": 3},
            {"r": 4, "alpha": 7, "decomposition_method": "qr"},
            {"r": 5, "para": True},
        ),
    ),
    Row(
        "peanut",
        peft.PeanutConfig,
        ("llama", "opt"),
        (
            {"r": 3},
            {"r": 5, "depth": 2, "act_fn": "gelu", "scaling": 0.5},
            {"r": 4, "depth": 1, "act_fn": "tanh"},
        ),
    ),
    Row(
        "unilora",
        peft.UniLoraConfig,
        ("llama", "gpt2"),
        (
            {"theta_d_length": 13, "init_theta_d_bound": 0.4},
            {"r": 3, "theta_d_length": 101, "proj_seed": 7, "unilora_dropout": 0.1},
            {"r": 2, "theta_d_length": 5000, "init_weights": False},
        ),
    ),
    Row(
        "adamss",
        peft.AdamssConfig,
        ("llama", "bert"),
        (
            {"r": 7, "num_subspaces": 3},
            {"r": 6, "num_subspaces": 2, "random_seed": 3},
            {"r": 5, "num_subspaces": 2, "subspace_rank": 2, "init_weights": None},
        ),
    ),
    Row(
        "supertuning",
        peft.SupertuningConfig,
        ("qwen", "bert"),
        (
            {"sparsity": 0.9},
            {"sparsity": 0.95, "r": 3, "lora_dropout": 0.1, "select_top": False},
            {"sparsity": 0.8, "r": 2, "lora_alpha": 7.0, "save_precomputed_indices": False},
        ),
    ),
    Row(
        "pvera",
        peft.PveraConfig,
        ("gpt2", "mixtral"),
        (
            {"r": 5},
            {"r": 7, "d_initial": 0.5, "projection_prng_key": 3},
            {"r": 3, "init_weights": False, "pvera_dropout": 0.1},
        ),
    ),
    Row(
        "tinylora",
        peft.TinyLoraConfig,
        ("gpt2", "whisper"),
        (
            {"u": 7},
            {"r": 4, "u": 5, "weight_tying": 1.0, "tinylora_dropout": 0.1},
            {"r": 3, "u": 11, "projection_seed": 3, "init_v_bound": 0.3},
        ),
    ),
    Row(
        "glora",
        peft.GloraConfig,
        ("qwen", "t5"),
        (
            {"r": 3},
            {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
            {"r": 4, "config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
        ),
    ),
)

BEGUN = ("corda", "eva", "loftq", "lora_ga", "ortholora")

ELSEWHERE = {
    "bone": "peft has it no more; golden vectors of peft 0.15.2 stand in tests/golden",
    "bat": "as bone",
    **dict.fromkeys(BEGUN, "a beginning, and as lora in a folder"),
    "qalora": "peft has it on GPTQ's layers alone, and does not merge it",
}
"""Methods that have no row, and why."""
