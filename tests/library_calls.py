"""Calls of the library's methods at one site, what follows from them, and values to try them on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from support import called
from torch import Tensor

from surgery.algebra.beginnings import draw
from surgery.algebra.cost import numbers
from surgery.algebra.derive import Derived, derive
from surgery.algebra.elaborate import instantiate
from surgery.algebra.expr import Expr

SITE = {"in": 12, "out": 20, "channels": 12}
FACTS = (("has_bias", True), ("kind", "linear"))
# Calls that fit the site, and how a merge with them can be taken back.
CASES = (
    ("lora(r=5, alpha=3)", "algebraic"),
    ('lora(r=5, alpha=3, init_weights="gaussian")', "algebraic"),
    ("pissa(r=5, alpha=3, dropout=0.1)", "algebraic"),
    ("olora(r=5, alpha=3, rslora=true)", "algebraic"),
    ("lora(r=5, alpha=3, dropout=0.1, rslora=true, bias=true)", "algebraic"),
    (
        'lora(r=5, alpha=3, dropout=0.1, init_weights="gaussian", bias=true)',
        "algebraic",
    ),
    ("pvera(r=5, dropout=0.1)", "algebraic"),
    ('glora(r=3, config_C="vector", config_D_E="vector")', "algebraic"),
    ('glora(r=3, config_A_B="vector", config_C="vector", config_D_E="vector")', "algebraic"),
    ('glora(r=3, config_A_B="constant", config_C="vector", config_D_E="vector")', "algebraic"),
    ("mica(r=5, alpha=3, dropout=0.1)", "algebraic"),
    ("dora(r=5, alpha=3)", "witness"),
    ('dora(r=5, alpha=3, dropout=0.1, init_weights="gaussian")', "witness"),
    ('dora(r=5, alpha=3, dropout=0.1, init_weights="eva")', "witness"),
    ("ia3()", "algebraic"),
    ('ia3(side="in")', "algebraic"),
    ("vera(r=7, dropout=0.1)", "algebraic"),
    (
        "oft(block_size=4, use_cayley_neumann=false)",
        "algebraic",
    ),
    (
        "oft(block_size=0, r=3, use_cayley_neumann=false, coft=true, block_share=true)",
        "algebraic",
    ),
    ("oft(block_size=4, block_share=true)", "algebraic"),
    ("oft(block_size=0, r=3, num_cayley_neumann_terms=2, coft=true)", "algebraic"),
    ("bone(r=5)", "algebraic"),
    ("loha(r=5, alpha=3, rank_dropout=0.1, module_dropout=0.2)", "algebraic"),
    (
        "loha(r=5, alpha=3, use_effective_conv2d=true, rank_dropout=0.1)",
        "algebraic",
    ),
    (
        "lokr(r=1, alpha=3, decompose_both=true, module_dropout=0.2)",
        "algebraic",
    ),
    (
        "lokr(r=1, alpha=3, use_effective_conv2d=true, rank_dropout=0.1)",
        "algebraic",
    ),
    ("lokr(r=3, use_effective_conv2d=true, rank_dropout=0.1)", "algebraic"),
    ("hra(r=3, apply_GS=true)", "algebraic"),
    ("hra(r=4)", "algebraic"),
    ("boft(block_size=2, n_butterfly_factor=2)", "algebraic"),
    ("boft(block_size=0, block_num=4)", "algebraic"),
    ("gralora(r=6, alpha=3, dropout=0.1)", "algebraic"),
    ("gralora(r=6, hybrid_r=3, alpha=3, dropout=0.1)", "algebraic"),
    ("adalora(init_r=5, r=4, alpha=3, dropout=0.1)", "algebraic"),
    ("beft()", "exact"),
    ('c3a(block_size=4, init_weights="zeros")', "algebraic"),
    ("delora(r=5, module_dropout=0.1)", "algebraic"),
    ("fourierft(n_frequency=9, scaling=2, random_loc_seed=3)", "algebraic"),
    ("hira(r=5, dropout=0.1)", "snapshot"),
    ("randlora(r=4, alpha=3, dropout=0.1)", "algebraic"),
    ("road(group_size=10)", "snapshot"),
    ('road(variant="road_2", group_size=10)', "snapshot"),
    ('road(variant="road_4", group_size=10)', "snapshot"),
    ("shira(r=2, random_seed=3)", "algebraic"),
    ("vblora(r=2, num_vectors=6, vector_length=4, dropout=0.1)", "algebraic"),
    ("waveft(n_frequency=9, scaling=2, random_loc_seed=3)", "algebraic"),
    ("unilora(theta_d_length=7, dropout=0.1)", "algebraic"),
    ("supertuning(sparsity=0.9)", "algebraic"),
    ("supertuning(sparsity=0.9, r=4, dropout=0.1)", "algebraic"),
    ("waveft(n_frequency=9, scaling=2, random_loc_seed=3, use_idwt=false)", "algebraic"),
    ("bat(r=4)", "algebraic"),
    ("miss(r=4)", "algebraic"),
    ('miss(r=4, init_weights="mini")', "algebraic"),
    ('miss(r=4, init_weights="bat")', "algebraic"),
    ("eva(r=4, alpha=3, dropout=0.1, rslora=true, whiten=true)", "algebraic"),
    ("eva(r=4, alpha=3, dropout=0.1, rslora=true, adjust_scaling_factors=false)", "algebraic"),
    ("corda(r=4, alpha=3, dropout=0.1)", "algebraic"),
    ('corda(r=4, alpha=3, dropout=0.1, corda_method="kpm")', "algebraic"),
    ("lora_ga(r=4, alpha=3, dropout=0.1)", "algebraic"),
    ('lora_ga(r=4, alpha=3, dropout=0.1, direction="A2rBr", scale="gd_scale")', "algebraic"),
    ('lora_ga(r=4, alpha=3, dropout=0.1, direction="ArBr", scale="unit")', "algebraic"),
    ("loftq(r=4, alpha=3, dropout=0.1)", "algebraic"),
    ('loftq(r=4, alpha=3, dropout=0.1, rounding="int8")', "algebraic"),
    ("ortholora(r=4, alpha=3, dropout=0.1)", "algebraic"),
    ("kasa(r=4, alpha=3, dropout=0.1)", "algebraic"),
    ("qalora(r=5, alpha=3, group_size=4, dropout=0.1)", "algebraic"),
    ("tinylora(r=3, u=5, dropout=0.1)", "algebraic"),
    ('bdlora(r=4, nblocks=2, blocks="A", dropout=0.1)', "algebraic"),
    ('bdlora(r=4, nblocks=2, blocks="B", rslora=true)', "algebraic"),
    ("psoft(r=5, dropout=0.1)", "algebraic"),
    ('psoft(r=5, ab_svd_init="pissa_init", use_cayley_neumann=true)', "algebraic"),
    ("deft(r=3, alpha=2, dropout=0.1)", "snapshot"),
    ('deft(r=3, decomposition_method="qr")', "snapshot"),
    ("deft(r=3, para=true)", "snapshot"),
    ("osf()", "algebraic"),
    ("frod(sparse_rate=0.2, dropout=0.1)", "snapshot"),
    ("frod(sparse_rate=0)", "snapshot"),
    ('peanut(r=3, depth=2, act_fn="gelu")', "snapshot"),
    ("peanut(r=3)", "snapshot"),
    ("adamss(r=5, num_subspaces=3, subspace_rank=2)", "algebraic"),
)


def derived(call: str, has_bias: bool = True, site: Mapping[str, int | float] = SITE) -> Derived:
    """What follows from a call at the site, or at one of other sizes."""
    found, arguments = called(call)
    equations = instantiate(found, arguments, tuple(site.items()), FACTS)
    return derive(equations, has_bias)


def leaf(expr: Expr) -> Tensor:
    """The value of a leaf: random, but of places."""
    name = expr.text("name") if expr.op == "parameter" else expr.op
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    if name == "entries":  # places in the matrix, each once
        sizes = {"rows": SITE["out"], "columns": SITE["in"]}
        return draw("places", sizes, numbers(expr, SITE), generator)
    if name == "places":  # row by row
        return torch.arange(numbers(expr, SITE)[0])
    if name.startswith("dealt"):  # places in a vector of 7
        deck = {"numbers": 7, "cards": 91, "first": 0}
        return draw("dealt", deck, numbers(expr, SITE), generator)
    return torch.randn(numbers(expr, SITE), generator=generator, dtype=torch.float64)
