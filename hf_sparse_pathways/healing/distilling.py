"""A dense model with some FFN blocks replaced, trained end to end to predict what it predicts.

The student shares all weights with the dense model but those of the new layers, which alone are
trained: by Transformers' ``Trainer``, on the KL divergence of the student's predictions from the
dense model's. ``Trainer`` stores the run, which goes on from there when it is started again.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_sparse_pathways.discovery.windows import Batch, Window
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.healing.losses import Objective, count_scored
from hf_sparse_pathways.healing.trainer_runs import collate, last_checkpoint
from hf_sparse_pathways.modeling.configuration import SparsePathwaysConfig
from hf_sparse_pathways.modeling.replacement import find_layers
from hf_sparse_pathways.sgatlin.linear_experts import SgatlinFFN


@dataclass(frozen=True, kw_only=True)
class EndToEnd:
    """How the layers are trained together.

    Attributes:
        steps: Of AdamW; 0 for none.
        batch_size: Windows of a step.
        learning_rate: The highest; it rises over a tenth of the steps, and falls along a cosine.
        save_steps: Steps after which the run is stored.
        seed: Of the order of the windows.

    Raises:
        PathwaysError: A number is out of range.
    """

    steps: int = 200
    batch_size: int = 4
    learning_rate: float = 3e-4
    save_steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size - 1, self.save_steps - 1) < 0 or self.learning_rate <= 0:
            raise PathwaysError(
                "Layers are trained together in 0 steps or more, of 1 window or more, stored after "
                f"1 step or more, with a learning rate above 0; got {self}."
            )


def assemble(dense: Any, layers: Mapping[int, SgatlinFFN]) -> Any:
    """Return a model that shares a dense model's weights, with layers in place of some FFN blocks.

    Args:
        dense: A causal LM.
        layers: Number of a FFN block -> layer, all of one configuration; they are copied.
    """
    numbers = sorted(layers)
    ffn = layers[numbers[0]].config
    config = SparsePathwaysConfig.from_base(dense.config, ffn=ffn, ffn_blocks=numbers)
    config._name_or_path = ""  # its weights are not those of the base
    student = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    student.load_state_dict(dense.state_dict(), strict=False, assign=True)
    student.tie_weights()
    for number, own in zip(numbers, find_layers(student), strict=True):
        own.load_state_dict(layers[number].state_dict())
    student.generation_config = dense.generation_config
    return student.to(dense.device).eval()


def train_together(
    student: Any, dense: Any, windows: Sequence[Window], settings: EndToEnd, folder: Path
) -> None:
    """Train a student's layers to predict what the dense model predicts, in place.

    Args:
        student: Of ``assemble``.
        dense: The dense model.
        windows: Text.
        settings: How.
        folder: Where ``Trainer`` stores the run; one that is there is gone on with.
    """
    if not settings.steps:
        return
    with _only_layers(student):
        trainer = _Distiller(
            model=student,
            args=_arguments(settings, folder, student.device.type),
            train_dataset=list(windows),
            data_collator=collate,
        )
        trainer.objective = Objective(terms={"kl": 1.0}, teacher=dense)
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    student.eval()


class _Distiller(Trainer):
    """Minimises the mean KL divergence from a teacher."""

    objective: Objective

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: ARG002
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the loss of a batch, per token."""
        batch = Batch(inputs["ids"], inputs["mask"], ())
        return self.objective(model, batch) / max(count_scored(batch), 1)


def _arguments(settings: EndToEnd, folder: Path, device: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.steps // 10),
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=1,
        seed=settings.seed,
        use_cpu=device == "cpu",
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


@contextmanager
def _only_layers(model: nn.Module) -> Iterator[None]:
    """Within the block, only the weights of the FFN layers need gradients, and are float32."""
    layers = find_layers(model)
    dtypes = [next(layer.parameters()).dtype for layer in layers]
    own = {id(p) for layer in layers for p in layer.parameters()}
    others = [p for p in model.parameters() if id(p) not in own and p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    hooks = [
        hook
        for layer, dtype in zip(layers, dtypes, strict=True)
        for hook in (
            layer.float().register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:])),
            layer.register_forward_hook(partial(_cast, dtype)),
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, dtype in zip(layers, dtypes, strict=True):
            layer.to(dtype)
        for parameter in others:
            parameter.requires_grad_(True)


def _cast(dtype: torch.dtype, _: nn.Module, __: Any, output: Tensor) -> Tensor:
    """Return what a layer computes in the dtype of the model around it."""
    return output.to(dtype)
