"""The clock of all timings."""

import time

import torch


def now(device: torch.device) -> float:
    """Return seconds, after everything that was queued on an accelerator is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
