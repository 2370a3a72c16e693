"""Whether an exported checkpoint, loaded by Transformers alone, computes the pathway.

Logits on random tokens are compared, without their mean, which ``softmax`` does not see. The error
is the norm of the difference over that of the logits: rounding stays well below the tolerance of
the weights' dtype, and of unrelated logits it is above 1.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from hf_sparse_pathways.errors import MismatchError

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}
_ROWS, _LENGTH = 2, 24


def check_checkpoint(folder: Path, reference: Any, domain: str) -> float:
    """Load a checkpoint as everybody does, and compare it with the model that it was made from.

    Args:
        folder: The checkpoint.
        reference: The model with pathways.
        domain: The domain that the checkpoint computes.

    Returns:
        The error, as a fraction.

    Raises:
        MismatchError: They differ by more than rounding, or tensors are missing or left over.
    """
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=reference.dtype, output_loading_info=True
    )
    problems = {name: found for name, found in report.items() if found}
    own: Any = type(reference).__bases__[1]
    if type(loaded) is not own or problems:
        raise MismatchError(
            f"The exported checkpoint loads as {type(loaded).__name__} instead of {own.__name__}, "
            f"or not all of it does ({problems}). Nothing was written."
        )
    tokens = _random_tokens(reference)
    expected = _logits(reference, tokens, domain=domain)
    error = _relative_error(_logits(loaded.eval().to(reference.device), tokens), expected)
    tolerance = TOLERANCES.get(reference.dtype, max(TOLERANCES.values()))
    if not error <= tolerance:
        raise MismatchError(
            f"The exported checkpoint does not compute the pathway: its logits differ by "
            f"{error:.2g} of their size, of which rounding to {reference.dtype} explains at most "
            f"{tolerance:.2g}. Nothing was written. Serve the model with this package."
        )
    return error


def describe_change(model: Any, changed: Any, domain: str) -> str:
    """Say in words how far one model with pathways is from another one in a domain."""
    tokens = _random_tokens(model)
    before, after = (_logits(each, tokens, domain=domain) for each in (model, changed))
    agreeing = (before.argmax(dim=-1) == after.argmax(dim=-1)).double().mean()
    return (
        f"on random tokens the logits differ by {_relative_error(after, before):.2g} of their "
        f"size, and the likeliest token is the same for {float(agreeing):.0%}"
    )


def _random_tokens(model: Any) -> Tensor:
    """Return the same token ids ``(rows, length)`` for the same model."""
    count = model.get_input_embeddings().weight.shape[0]
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(0, count, (_ROWS, _LENGTH), generator=drawn).to(model.device)


@torch.no_grad()
def _logits(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Return float64 logits ``(rows, length, vocabulary)`` without their mean."""
    logits = model(input_ids=tokens, **options).logits.double()
    return logits - logits.mean(dim=-1, keepdim=True)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
