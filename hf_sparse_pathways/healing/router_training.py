"""Routers of groups of neurons, trained by distillation through Transformers' ``Trainer``.

Per domain: draw fresh windows, make a student whose routers and refitted columns are parameters
(``routed_student.py``), train it towards the dense model's predictions with the load-balancing loss
and the z-loss, and put the best state on validation text back into the pathway. The state before
training is among those: a pathway does not get worse on that text. Checkpoints are ``Trainer``'s,
from which an interrupted run goes on.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_sparse_pathways.discovery.repair import STORED_DTYPE
from hf_sparse_pathways.discovery.resumption import digest_plan
from hf_sparse_pathways.discovery.text import TextSource, read_documents
from hf_sparse_pathways.discovery.trials import mean_loss
from hf_sparse_pathways.discovery.windows import Window, make_batches, resolve_length
from hf_sparse_pathways.errors import PathwaysError, TextError, UnknownNameError
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.healing.batches import TrainingText, draw_text
from hf_sparse_pathways.healing.routed_student import RoutedStudent
from hf_sparse_pathways.healing.router_settings import RouterSettings
from hf_sparse_pathways.healing.students import frozen_copy
from hf_sparse_pathways.healing.training import describe_plan, restore
from hf_sparse_pathways.healing.utilisation import (
    Utilisation,
    mean_utilisation,
    measure_utilisation,
)
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways
from hf_sparse_pathways.tables import ShownAsTables, Table

_ROUTERS = ("_weight", "_bias")

LOGGED = {"loss", "eval_loss", "balance", "z_loss", "entropy", "dead", "largest"}
"""What a report keeps of ``Trainer``'s log."""


@dataclass(frozen=True, kw_only=True)
class RouterReport(ShownAsTables):
    """One domain's training. Losses are in nats per token of the same validation windows.

    Attributes:
        domain: Which.
        settings: All of them.
        tokens: Tokens trained on.
        dense: The dense model's next-token loss.
        losses: The pathway's, before and after, in its stored precision.
        distances: What is minimised, without the terms on routers, before and after.
        utilisation: Of the groups, before and after.
        history: What was logged on the way: losses, and how the groups were used.
    """

    domain: str
    settings: RouterSettings
    tokens: int
    dense: float
    losses: tuple[float, float]
    distances: tuple[float, float]
    utilisation: tuple[Utilisation, Utilisation]
    history: tuple[Mapping[str, float], ...]

    def sections(self) -> list[Table]:
        """Return a table of before and after."""
        rows = [
            [
                name,
                f"{math.exp(loss - self.dense):.3f}",
                f"{distance:.4f}",
                f"{used.entropy:.3f}",
                f"{used.dead}",
                f"{used.largest:.1f}",
            ]
            for name, loss, distance, used in zip(
                ("before", "after"), self.losses, self.distances, self.utilisation, strict=True
            )
        ]
        header = ["routers", "perplexity of dense", self.settings.loss, "entropy", "dead groups"]
        return [
            Table(
                title=f"{self.domain}: routers trained on {self.tokens} tokens",
                note="Entropy: of even use. Largest: the most used group's share over an even one.",
                header=[*header, "largest"],
                rows=rows,
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        used = [each.described() for each in self.utilisation]
        return {**asdict(self), "settings": self.settings.described(), "utilisation": used}


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedRouters(ShownAsTables):
    """What ``train_routers`` made.

    Attributes:
        pathways: The model's pathways, the trained ones in place of theirs.
        reports: Domain -> what it brought.
    """

    pathways: Pathways
    reports: Mapping[str, RouterReport]

    def sections(self) -> list[Table]:
        """Return the tables of all reports."""
        return [table for report in self.reports.values() for table in report.sections()]


def train_routers(
    model: SparsePathwaysForCausalLM,
    tokenizer: Any,
    texts: Mapping[str, TextSource],
    *,
    settings: RouterSettings | None = None,
    work_folder: "str | os.PathLike[str] | None" = None,
) -> TrainedRouters:
    """Train the routers of some domains' groups of neurons. The model is left as it was.

    Use the result with ``model.set_pathways(trained.pathways)``. The dense model teaches; it is
    held in float32.

    Args:
        model: A model with pathways.
        tokenizer: Its tokenizer.
        texts: Domain -> text source. All of it is training text: hold out what you evaluate on.
            Documents that the pathway was validated on are left for validation.
        settings: How; see ``RouterSettings``.
        work_folder: Where unfinished training is stored. An interrupted run goes on from there
            when it is called again with the same arguments.

    Raises:
        UnknownNameError: A domain that the model does not have.
        TextError: A source cannot be read, or has too little text.
        PathwaysError: A domain's pathway has no groups of neurons.
    """
    settings = settings or RouterSettings()
    if not texts:
        raise TextError("No domains were given. Pass a dictionary {domain: text source}.")
    for domain in texts:
        _check(model.pathways, domain)
    length = resolve_length(model, settings.max_length)
    frozen = frozen_copy(model.to_dense(), Accelerator().device)
    pathways, reports = model.pathways, {}
    for domain, source in texts.items():
        documents = read_documents(source, seed=settings.seed)
        seen = pathways[domain].provenance.get("text", {})
        text = draw_text(domain, documents, seen, tokenizer, settings.text, length)
        job = _Job(frozen, pathways, domain, text, settings)
        trained, reports[domain] = job.carry_out(work_folder)
        pathways = replace(pathways, by_domain={**pathways.by_domain, domain: trained})
    return TrainedRouters(pathways=pathways, reports=reports)


def _check(pathways: Pathways, domain: str) -> None:
    if domain not in pathways.by_domain:
        raise UnknownNameError("domain", domain, pathways.by_domain)
    blocks = pathways[domain].blocks
    if not any(isinstance(block, BlockPathway) and block.groups for block in blocks):
        raise PathwaysError(
            f"The pathway {domain!r} has no groups of neurons, so that there is no router to be "
            "trained. Build it with --mixture (mixture=), or use heal."
        )
    if all(getattr(block, "groups", None) is None or block.groups.top_k == 1 for block in blocks):  # type: ignore[union-attr]
        raise PathwaysError(
            f"A token of the pathway {domain!r} has one group, whose weight is always 1: nothing "
            "tells its router. Build it with --top-k 2 (top_k=2) or more."
        )


@dataclass(frozen=True)
class _Job:
    """One domain's training."""

    frozen: Any
    pathways: Pathways
    domain: str
    text: TrainingText
    settings: RouterSettings

    def carry_out(
        self, work_folder: "str | os.PathLike[str] | None"
    ) -> tuple[Pathway, RouterReport]:
        """Train, keep the best state, and measure."""
        pathway, settings = self.pathways[self.domain], self.settings
        before: Any = pathway.blocks
        student = RoutedStudent(self.frozen, self.pathways, self.domain, settings)
        start = {name: value.detach().clone() for name, value in student.named_parameters()}
        used = [self._measure(student)]
        with TemporaryDirectory() as temporary:
            folder = Path(work_folder or temporary, self._name(student))
            trainer = _trainer(student, self.text, settings, folder)
            distances = [_distance(trainer)]
            trainer.train(resume_from_checkpoint=_last(folder))
            distances.append(_distance(trainer))
        history = [entry for entry in trainer.state.log_history if entry.keys() & LOGGED]
        if not distances[1] < distances[0]:
            restore(student, start)
            distances[1] = distances[0]
        used.append(self._measure(student))
        blocks = student.blocks(before, self._shares(before, used[1]), STORED_DTYPE)
        report = RouterReport(
            domain=self.domain,
            settings=settings,
            tokens=self.text.tokens,
            dense=self._loss(None),
            losses=(self._loss(before), self._loss(blocks)),
            distances=(distances[0], distances[1]),
            utilisation=(used[0], used[1]),
            history=tuple({k: v for k, v in e.items() if k in (*LOGGED, "step")} for e in history),
        )
        return replace(pathway, blocks=blocks, provenance=self._provenance(pathway, report)), report

    def _name(self, student: RoutedStudent) -> str:
        """Return the name of a folder that no other run has."""
        plan: Any = describe_plan(student, self.text, self.settings, f"route {self.domain}")  # type: ignore[arg-type]
        return f"routers-{digest_plan(plan)}"

    def _measure(self, student: RoutedStudent) -> Utilisation:
        return measure_utilisation(student, self.text.validation, self.settings.batch_size)

    @staticmethod
    def _shares(blocks: Sequence[BlockPathway], used: Utilisation) -> dict[int, torch.Tensor]:
        """Return the share of tokens that have each group, by block."""
        own = [number for number, block in enumerate(blocks) if block.groups is not None]
        return {
            number: torch.tensor(shares) * blocks[number].groups.top_k  # type: ignore[union-attr]
            for number, shares in zip(own, used.shares, strict=True)
        }

    def _loss(self, blocks: Sequence[BlockPathway] | None) -> float:
        found = find_blocks(self.frozen)
        size = self.settings.batch_size
        return mean_loss(self.frozen, self.text.validation, blocks, found, batch_size=size)

    def _provenance(self, pathway: Pathway, report: RouterReport) -> dict[str, Any]:
        seen = pathway.provenance.get("text", {})
        earlier = pathway.provenance.get("routers", [])
        return {
            **pathway.provenance,
            "text": self.text.added_to(seen),
            "routers": [*earlier, report.to_dict()],
        }


class _RouterTrainer(Trainer):
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


def _trainer(
    student: RoutedStudent, text: TrainingText, settings: RouterSettings, folder: Path
) -> _RouterTrainer:
    """Return what trains a student, and stores it in a folder."""
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
    trainer = _RouterTrainer(
        model=student,
        args=arguments,
        train_dataset=windows,
        eval_dataset=list(text.validation),
        data_collator=_collate,
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)  # a report says it
    return trainer


def _collate(windows: Sequence[Window]) -> dict[str, torch.Tensor]:
    batch = next(make_batches(windows, len(windows)))
    return {"ids": batch.ids, "mask": batch.mask}


def _distance(trainer: Trainer) -> float:
    """Return the mean distance from the dense model on validation text."""
    found = float(trainer.evaluate()["eval_loss"])
    if not math.isfinite(found):
        raise PathwaysError(f"The validation loss is {found}. Lower the learning rate.")
    return found


def _last(folder: Path) -> str | None:
    """Return the checkpoint that an interrupted run goes on from, if there is one."""
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None
