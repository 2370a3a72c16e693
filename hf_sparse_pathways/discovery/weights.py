"""A digest of a model's weights, by which results that belong to other weights are known."""

import hashlib
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from hf_sparse_pathways.errors import UnsupportedModelError

_SAMPLES = 61


@torch.no_grad()
def weight_digest(model: nn.Module) -> str:
    """Return sixteen hexadecimal digits that change with nearly any change of the weights.

    Of every parameter, names, dtype, and some tens of evenly taken entries count; a write to single
    other entries is not seen.
    """
    digest = hashlib.sha256()
    for prefix, module in model.named_modules():
        with align_module_device(module):  # an offloaded one has its weights in here alone
            for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
                _update(digest, name, parameter)
    return digest.hexdigest()[:16]


def _update(digest: Any, name: str, parameter: Tensor) -> None:
    values = parameter.detach().flatten()
    sample = values[:: max(1, len(values) // _SAMPLES)].double().cpu()
    digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
    digest.update(sample.numpy().tobytes())


def check_in_memory(model: nn.Module) -> None:
    """Check that a model's weights can be read at any time.

    Raises:
        UnsupportedModelError: Some are offloaded.
    """
    offloaded = [name for name, weight in model.named_parameters() if weight.is_meta]
    if offloaded:
        raise UnsupportedModelError(
            f"{len(offloaded)} of the model's weights are offloaded ({offloaded[0]} ...), and "
            "selection has to read them. Load the model into memory, in bfloat16 if need be: "
            "from_pretrained(name, dtype='bfloat16') without device_map. A profile, which can be "
            "taken of an offloaded model, fits both."
        )
