"""Which number formats the processor multiplies itself, and which PyTorch only emulates there."""

from collections.abc import Mapping
from typing import Any

import torch


def has_fast_bfloat16(device: str) -> bool:
    """Whether a kind of device multiplies bfloat16 numbers in hardware."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return device == "cpu" and bool(capabilities().get("amx_bf16"))


def capabilities() -> Mapping[str, Any]:
    """Return what PyTorch tells of the processor: its name and units; nothing in old versions."""
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return known


UNITS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16"),
}
"""Dtype -> what a processor has that multiplies it, as PyTorch calls it."""


def slow_dtypes() -> frozenset[torch.dtype]:
    """Return the dtypes that this processor only emulates, as far as PyTorch tells.

    A product in them takes several times as long as in float32.
    """
    known = capabilities()
    if known.get("architecture") != "x86_64":
        return frozenset()
    return frozenset(dtype for dtype, units in UNITS.items() if not any(map(known.get, units)))
