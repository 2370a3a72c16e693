"""A digest of a model's weights, by which results that belong to other weights are known."""

import hashlib

import torch
from torch import nn

_SAMPLES = 61


@torch.no_grad()
def weight_digest(model: nn.Module) -> str:
    """Return sixteen hexadecimal digits that change with nearly any change of the weights.

    Of every parameter, names, dtype, and some tens of evenly taken entries count; a write to single
    other entries is not seen.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // _SAMPLES)].double().cpu()
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
