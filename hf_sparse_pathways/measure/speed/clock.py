"""The clock of all timings."""

import time

import torch


def now(device: torch.device | None = None) -> float:
    """Return seconds, after everything that was queued on an accelerator is done."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
