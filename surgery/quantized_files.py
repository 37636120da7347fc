"""Quantised weights in checkpoints: which entries belong to one, and who can read them.

Of 4 bits there are, after the weight's own name, `.absmax`, `.quant_map` and
`.quant_state.bitsandbytes__nf4` (or `__fp4`), and where the scales are quantised too
`.nested_absmax` and `.nested_quant_map`. Of 8 bits there is `SCB` beside the weight, and often
`weight_format`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol, cast

from torch import Tensor

from surgery.errors import refuse
from surgery.model.hooked import imported

STATE = "quant_state.bitsandbytes__"
"""How the entry begins, after the weight's name, that says how 4 bits were made."""

_FOUR = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{STATE}nf4", f"{STATE}fp4")
_EIGHT = ("SCB", "weight_format")


def entries_of(name: str, names: Collection[str]) -> tuple[str, ...]:
    """The entries that a quantised weight has besides its own; () where it is not quantised.

    name: of the weight. names: of all that the checkpoint has.
    """
    owner = name.removesuffix("weight")
    if owner == name:
        return ()
    if any(f"{name}.{STATE}{kind}" in names for kind in ("nf4", "fp4")):
        return tuple(f"{name}.{part}" for part in _FOUR if f"{name}.{part}" in names)
    if f"{owner}SCB" in names:
        return tuple(f"{owner}{part}" for part in _EIGHT if f"{owner}{part}" in names)
    return ()


class Quantiser(Protocol):
    """What reads and makes the entries of a quantised weight."""

    def dequantised(self, name: str, entries: Mapping[str, Tensor]) -> Tensor:
        """What a weight stands for [out, in], in float32. Raises ValueError for wrong entries.

        entries: its own, and those of `entries_of`, by their full names.
        """
        ...

    def requantised(
        self, name: str, entries: Mapping[str, Tensor], matrix: Tensor
    ) -> dict[str, Tensor]:
        """The entries of another weight [out, in]: with names, dtypes and shapes as before.

        entries: the old ones, which say how it is quantised.
        """
        ...


def quantiser() -> Quantiser:
    """The library that quantised weights. Raises ArtifactError (E525) where it is not installed."""
    try:
        return cast(Quantiser, imported("surgery.integrations.bitsandbytes_files"))
    except ModuleNotFoundError as error:
        refuse(
            "E525",
            f"quantised weights are read by {error.name}, which is not installed",
            hint="pip install 'model-surgery[quantized]'",
        )
