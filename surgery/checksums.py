"""Checksums of what tensors hold, taken where the bytes lie; and which machine computed."""

from __future__ import annotations

import ctypes
import hashlib
import platform
from typing import Any

import torch
from torch import Tensor

_PIECE = 2**24
"""Elements that are brought from another device at a time."""


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU where they lie, which is kept for as long.

    `Tensor.numpy` would ask for a package that is not needed otherwise.
    """
    assert tensor.is_cpu
    assert tensor.is_contiguous()
    count = tensor.numel() * tensor.element_size()
    if not count:
        return memoryview(b"")
    found: Any = (ctypes.c_char * count).from_address(tensor.data_ptr())
    found.tensor = tensor
    return memoryview(found).cast("B")


class Checksum:
    """SHA-256 over the bytes of tensors, block after block.

    Rows that are added block by block give what the whole gives at once; where they lie (device,
    strides) makes no difference, but the byte order is this machine's.
    """

    __slots__ = ("_found",)

    def __init__(self, about: str = "") -> None:
        """about: what comes first, of what else shall agree, as dtype and shape."""
        self._found = hashlib.sha256(about.encode())

    def add(self, block: Tensor) -> Checksum:
        """Add the elements of a block, of any shape and dtype, in order."""
        block = block.detach().resolve_conj().resolve_neg()
        if block.is_cpu and block.is_contiguous():
            self._found.update(bytes_of(block))
            return self
        for part in torch.split(block, _rows(block)) if block.dim() else (block,):
            here = part.cpu().contiguous()
            self._found.update(bytes_of(here))
        return self

    def hexdigest(self) -> str:
        """What was found so far, in hexadecimals; more may be added."""
        return self._found.hexdigest()


def _rows(block: Tensor) -> int:
    """How many rows of a tensor are `_PIECE` elements, and at least one."""
    row = block[:1].numel()
    return max(1, _PIECE // row) if row else max(1, len(block))


def checksum(tensor: Tensor) -> str:
    """The checksum of one tensor's dtype, shape and bytes, in hexadecimals."""
    name = str(tensor.dtype).removeprefix("torch.")
    return Checksum(f"{name} {list(tensor.shape)} ").add(tensor).hexdigest()


def machine() -> dict[str, str]:
    """What of this machine could make arithmetic come out otherwise, for a message to tell."""
    return {
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
    }
