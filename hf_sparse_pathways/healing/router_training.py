"""Routers of groups of neurons, trained by distillation through Transformers' ``Trainer``.

Per domain: draw fresh windows, make a student whose routers and refitted columns are parameters
(``routed_student.py``), train it towards the dense model's predictions with the load-balancing loss
and the z-loss, and put the best state on validation text back into the pathway. The state before
training is among those: a pathway does not get worse on that text. Checkpoints are ``Trainer``'s,
from which an interrupted run goes on.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator

from hf_sparse_pathways.discovery.repair import STORED_DTYPE
from hf_sparse_pathways.discovery.resumption import digest_plan
from hf_sparse_pathways.discovery.text import TextSource, read_documents
from hf_sparse_pathways.discovery.trials import mean_loss
from hf_sparse_pathways.discovery.windows import resolve_length
from hf_sparse_pathways.errors import PathwaysError, TextError, UnknownNameError
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.healing.batches import TrainingText, draw_text
from hf_sparse_pathways.healing.routed_student import RoutedStudent
from hf_sparse_pathways.healing.router_report import RouterReport, TrainedRouters
from hf_sparse_pathways.healing.router_settings import RouterSettings
from hf_sparse_pathways.healing.router_trainer import make_trainer, measure_distance
from hf_sparse_pathways.healing.students import frozen_copy
from hf_sparse_pathways.healing.trainer_runs import last_checkpoint
from hf_sparse_pathways.healing.training import describe_plan, restore
from hf_sparse_pathways.healing.utilisation import Utilisation, measure_utilisation
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways

LOGGED = {"loss", "eval_loss", "balance", "z_loss", "entropy", "dead", "largest"}
"""What a report keeps of ``Trainer``'s log."""


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
    groups = [one.groups for one in blocks if isinstance(one, BlockPathway) and one.groups]
    if not groups:
        raise PathwaysError(
            f"The pathway {domain!r} has no groups of neurons, so that there is no router to be "
            "trained. Build it with --mixture (mixture=), or use heal."
        )
    if all(own.top_k == 1 for own in groups):
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
            trainer = make_trainer(student, self.text, settings, folder)
            distances = [measure_distance(trainer)]
            trainer.train(resume_from_checkpoint=last_checkpoint(folder))
            distances.append(measure_distance(trainer))
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
