"""Low-rank changes of a student's leaves, and the PEFT adapter that does the same to the base.

The student's leaves hold kept neurons only. Spread over all rows (or columns) of the base's leaves,
with zeros at removed neurons, its changes are a LoRA of the model with pathways: the same function
while the healed domain is on.

Source: Hu et al. 2021, "LoRA", arXiv:2106.09685.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_sparse_pathways.errors import PathwaysError, named
from hf_sparse_pathways.ffn.block_pathway import LowRank
from hf_sparse_pathways.healing.settings import HealingSettings
from hf_sparse_pathways.healing.students import Student, StudentLeaf

_NAME = "default"
FACTORS = (f"lora_B.{_NAME}.weight", f"lora_A.{_NAME}.weight")
"""Names of a low-rank change's parameters within their leaf: the outer, and the inner factor."""

_PREFIX = "base_model.model"


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A LoRA of a model with pathways.

    Attributes:
        config: A ``peft.LoraConfig``.
        tensors: By the names that PEFT's files have.
    """

    config: Any
    tensors: dict[str, Tensor]

    def save_pretrained(self, folder: "str | os.PathLike[str]") -> None:
        """Write a PEFT adapter folder; ``PeftModel.from_pretrained(model, folder)`` reads it."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(str(folder))
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, Path(folder, "adapter_model.safetensors"), metadata={"format": "pt"})


def import_peft() -> Any:
    """Return the module.

    Raises:
        PathwaysError: It is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise PathwaysError(
            "Low-rank healing needs PEFT. Install it with `pip install hf-sparse-pathways[peft]`, "
            f"or choose {named('train', 'weights')}."
        ) from error
    return peft


def add_lora(student: Student, settings: HealingSettings) -> None:
    """Give a student trainable low-rank changes, in place; they are zero as yet.

    Raises:
        PathwaysError: PEFT is missing, or the attention is wanted and was not found.
    """
    peft = import_peft()
    places = [leaf.place for leaf in student.trained_leaves()]
    if settings.attention:
        places += attention_leaves(student.model)
    holder = nn.ModuleDict({"student": student.model})  # PEFT renames targets by a model's config
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        target_modules=[f"student.{place}" for place in places],
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        torch.manual_seed(settings.seed)
        peft.inject_adapter_in_model(config, holder)


def lora_change(student: Student, place: str) -> LowRank:
    """Return what a leaf's low-rank change adds to its weight, in ``nn.Linear``'s order."""
    layer: Any = student.model.get_submodule(place)
    outer = layer.lora_B[_NAME].weight.detach() * layer.scaling[_NAME]
    return LowRank(outer.cpu().clone(), layer.lora_A[_NAME].weight.detach().cpu().clone())


def make_adapter(student: Student, base: nn.Module, settings: HealingSettings) -> Adapter:
    """Return the adapter of the base that does what a student's changes do."""
    peft = import_peft()
    changes = {
        leaf.name: _spread(lora_change(student, leaf.place), leaf)
        for leaf in student.trained_leaves()
    }
    if settings.attention:
        changes |= {place: lora_change(student, place) for place in attention_leaves(base)}
    tensors = {}
    for name, change in changes.items():
        tensors[f"{_PREFIX}.{name}.lora_A.weight"] = change.inner
        tensors[f"{_PREFIX}.{name}.lora_B.weight"] = change.outer
    config: Any = getattr(base, "config", None)
    return Adapter(
        config=peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.rank,
            target_modules=list(changes),
            fan_in_fan_out=all(isinstance(base.get_submodule(n), Conv1D) for n in changes),
            base_model_name_or_path=str(getattr(config, "_name_or_path", "") or ""),
            inference_mode=True,
        ),
        tensors=tensors,
    )


def _spread(change: LowRank, leaf: StudentLeaf) -> LowRank:
    """Put zeros where a leaf of the base has removed neurons."""
    if leaf.incoming:
        outer = change.outer.new_zeros(leaf.width, change.rank)
        return LowRank(outer.index_copy(0, leaf.index, change.outer), change.inner)
    inner = change.inner.new_zeros(change.rank, leaf.width)
    return LowRank(change.outer, inner.index_copy(1, leaf.index, change.inner))


def attention_leaves(model: nn.Module) -> list[str]:
    """Return the names of the attention's linear leaves.

    Raises:
        PathwaysError: There are none.
    """
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and any(mark in part for part in name.split(".") for mark in ("attn", "attention"))
    ]
    if not found:
        raise PathwaysError(
            "No linear leaves were found in modules named attn or attention: leave attention out."
        )
    return found
