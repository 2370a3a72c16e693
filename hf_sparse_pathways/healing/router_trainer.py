"""The ``Trainer`` of routers of groups of neurons, which logs how the groups are used."""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.healing.batches import TrainingText
from hf_sparse_pathways.healing.routed_student import RoutedStudent
from hf_sparse_pathways.healing.router_settings import RouterSettings
from hf_sparse_pathways.healing.trainer_runs import collate
from hf_sparse_pathways.healing.utilisation import mean_utilisation

_ROUTERS = ("_weight", "_bias")
"""Ends of the names of a router's parameters; the others are refitted columns."""


class RouterTrainer(Trainer):
    """Logs what the routers do beside the loss."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._told: list[dict[str, Any]] = []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Return the student's loss."""
        told = model(**inputs)
        if model.training:
            self._told.append({name: value for name, value in told.items() if name != "loss"})
        return (told["loss"], told) if kwargs.get("return_outputs") else told["loss"]

    @torch.no_grad()
    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Return the loss alone."""
        return model(**self._prepare_inputs(inputs))["loss"], None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means since the last time."""
        if self._told and "loss" in logs:
            used = mean_utilisation([each["shares"] for each in self._told])
            for name in ("balance", "z_loss"):
                values = [float(each[name].detach()) for each in self._told]
                logs[name] = sum(values) / len(values)
            logs |= used.described()
            self._told = []
        super().log(logs, *args, **kwargs)


def make_trainer(
    student: RoutedStudent, text: TrainingText, settings: RouterSettings, folder: Path
) -> RouterTrainer:
    """Return what trains a student.

    Args:
        student: Its parameters are trained.
        text: On what.
        settings: How.
        folder: Where the run is stored.
    """
    windows = [window for step in text.steps for window in step]
    steps = max(1, len(text.steps))
    often = max(1, steps // settings.validations)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.05 * steps),
        eval_strategy="steps",
        eval_steps=often,
        save_strategy="steps",
        save_steps=often,
        save_total_limit=2,
        logging_steps=often,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=not sys.stderr.isatty(),
        report_to="none",
        seed=settings.seed,
    )
    rates = {True: settings.learning_rate, False: settings.refit_rate}
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in student.named_parameters():
        groups[name.endswith(_ROUTERS)].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": own, "lr": rates[which]} for which, own in groups.items() if own],
        weight_decay=0.0,
    )
    trainer = RouterTrainer(
        model=student,
        args=arguments,
        train_dataset=windows,
        eval_dataset=list(text.validation),
        data_collator=collate,
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)  # a report says it
    return trainer


def measure_distance(trainer: Trainer) -> float:
    """Return the mean distance from the dense model on validation text.

    Raises:
        PathwaysError: It is no number.
    """
    found = float(trainer.evaluate()["eval_loss"])
    if not math.isfinite(found):
        raise PathwaysError(f"The validation loss is {found}. Lower the learning rate.")
    return found
