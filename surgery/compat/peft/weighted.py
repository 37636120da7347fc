"""An adapter made of others: peft's `add_weighted_adapter`, which is a composition here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from surgery.compat.peft.config import PeftConfig
from surgery.compat.peft.configs import IA3Config
from surgery.compat.peft.putting import configs_of, known, refuse_option, set_trained
from surgery.composing import compose_on
from surgery.mapping import Reason, peft_config
from surgery.state import require_state


def add_weighted(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination_type: str,
    rank: int | None,
    density: float | None,
    sign: str,
) -> None:
    """Put the weighted sum of adapters beside them, in peft's sense of a sum.

    Raises as `surgery.composing.compose_on`, and ArtifactError (E561) for other numbers of weights
    than of adapters.
    """
    if len(weights) != len(known(model, adapters)):
        refuse_option("weights", list(weights), f"give one for each of {len(adapters)} adapters")
    every = configs_of(model)
    # Of such adapters peft has one sum, that of the parameters.
    alone = all(isinstance(every.get(one), IA3Config) for one in adapters)
    how = "linear" if alone else combination_type
    elected = "frequency" if sign == "frequency" else "total"
    if sign not in ("total", "frequency"):
        refuse_option("majority_sign_method", sign, "it is `total` or `frequency`")
    compose_on(
        model,
        expression(adapters, weights),
        name,
        how=how,
        rank=rank if how.endswith("svd") else None,
        density=density,
        sign=elected,
    )
    set_trained(model, (name,), False)
    every[name] = _config_of(model, name, every.get(adapters[0]))


def expression(adapters: Sequence[str], weights: Sequence[float]) -> str:
    """A weighted sum as the language has it."""
    pairs = list(zip(adapters, map(float, weights), strict=True))
    signs = ["-" if weight < 0 else "+" for _, weight in pairs]
    terms = [f"{abs(weight):.17g}*{name}" for name, weight in pairs]
    text = " ".join(f"{sign} {term}" for sign, term in zip(signs, terms, strict=True))
    return text.removeprefix("+ ")


def _config_of(model: nn.Module, name: str, first: PeftConfig | None) -> PeftConfig:
    """The config of what was made, as a folder of it would have it."""
    made = peft_config(require_state(model).adapters[name].plan, name, model)
    if isinstance(made, Reason):  # then its folder is none of peft's either
        return PeftConfig()
    config = PeftConfig.from_peft_type(**dict(made.values))
    if first is not None:
        for field in ("task_type", "base_model_name_or_path", "revision"):
            setattr(config, field, getattr(first, field))
    return config
