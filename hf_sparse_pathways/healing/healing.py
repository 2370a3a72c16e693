"""Healing: train what a fixed pathway keeps, so that it misses less of what was removed.

Per domain: draw fresh windows (``batches.py``), make the compact student of the pathway
(``students.py``), train low-rank changes or the kept weights themselves (``training.py``) on the
text and a teacher (``losses.py``), and fold what was learnt into the pathway (``folding.py``) or
keep it as a LoRA (``adapters.py``). On request the dense model takes the first of the steps, and
what it learnt is cut to the pathway (``cutting.py``), which takes the others. Much of what
such training brings is adaptation to the text, which the dense model gains too: a dense partner is
trained equally on request, and the report's ``honest_ratio`` is the one that counts.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_sparse_pathways.discovery.precision import PRECISIONS, calibration_precision
from hf_sparse_pathways.discovery.repair import STORED_DTYPE
from hf_sparse_pathways.discovery.text import TextSource, read_documents
from hf_sparse_pathways.discovery.trials import mean_loss
from hf_sparse_pathways.discovery.windows import make_batches, resolve_length
from hf_sparse_pathways.errors import (
    PathwaysError,
    TextError,
    UnknownNameError,
    UnsupportedModelError,
    named,
    option,
)
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.healing.adapters import Adapter, add_lora, import_peft, make_adapter
from hf_sparse_pathways.healing.batches import TrainingText, draw_text
from hf_sparse_pathways.healing.checkpoints import Checkpoints
from hf_sparse_pathways.healing.cutting import cut
from hf_sparse_pathways.healing.folding import fold
from hf_sparse_pathways.healing.losses import LANGUAGE_MODELLING, Objective
from hf_sparse_pathways.healing.report import HealingReport
from hf_sparse_pathways.healing.settings import HealingSettings
from hf_sparse_pathways.healing.students import (
    Student,
    check_student,
    everything,
    frozen_copy,
    make_student,
    reduce_frozen,
)
from hf_sparse_pathways.healing.training import (
    CurvePoint,
    Stage,
    Trained,
    describe_plan,
    restore,
    train,
)
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.pathways.names import TUNED
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways
from hf_sparse_pathways.tables import ShownAsTables, Table


@dataclass(frozen=True, kw_only=True, eq=False)
class Healed(ShownAsTables):
    """What ``heal`` made.

    Attributes:
        pathways: The model's pathways, the healed ones in place of theirs; with ``keep="lora"``
            they only know which documents were trained on. A dense partner is among the controls,
            as ``"tuned: <domain>"``, unless ``keep="lora"``.
        adapters: Domain -> LoRA, with ``keep="lora"``.
        reports: Domain -> losses before and after.
    """

    pathways: Pathways
    adapters: Mapping[str, Adapter]
    reports: Mapping[str, HealingReport]

    def sections(self) -> list[Table]:
        """Return the tables of all reports."""
        return [table for report in self.reports.values() for table in report.sections()]


def heal(
    model: SparsePathwaysForCausalLM,
    tokenizer: Any,
    texts: Mapping[str, TextSource],
    *,
    settings: HealingSettings | None = None,
    work_folder: "str | os.PathLike[str] | None" = None,
) -> Healed:
    """Heal the pathways of some domains. The model is left as it was.

    Use the result with ``model.set_pathways(healed.pathways)``. Training takes place in float32
    copies: about 4 bytes per parameter, and as many again for the FFN's in every model that a run
    holds (student, dense partner, teacher); while a model trains 16 more per trained one, and with
    ``dense_first`` 4 for the state at the cut.

    Args:
        model: A model with pathways.
        tokenizer: Its tokenizer.
        texts: Domain -> text source. All of it is training text: hold out what you evaluate on.
            Documents that the pathway was validated on are left for validation.
        settings: How; see ``HealingSettings``.
        work_folder: Where unfinished training is stored. An interrupted run goes on from there
            when it is called again with the same arguments.

    Raises:
        UnknownNameError: A domain that the model does not have, or an unknown precision.
        TextError: A source cannot be read, or has too little text.
        PathwaysError: It is no model with pathways, PEFT is missing, or the loss is NaN.
        UnsupportedModelError: The model's FFN blocks cannot be trained in compact form.
    """
    settings = settings or HealingSettings()
    _check(model, texts, settings)
    length = resolve_length(model, settings.max_length)
    drawn = {}
    for domain, source in texts.items():
        documents = read_documents(source, seed=settings.seed)
        seen = model.pathways[domain].provenance.get("text", {})
        drawn[domain] = draw_text(domain, documents, seen, tokenizer, settings, length)
    frozen = frozen_copy(model.to_dense(), Accelerator().device)
    pathways, adapters, reports = model.pathways, {}, {}
    for domain, text in drawn.items():
        job = _Job(model, frozen, domain, text, settings, work_folder)
        healed, partner, adapter, reports[domain] = job.carry_out()
        if adapter is not None:
            adapters[domain] = adapter
        by_domain = {**pathways.by_domain, domain: healed}
        tuned = f"{TUNED}{domain}"  # of an earlier healing, it is no partner of this one
        controls = {name: own for name, own in pathways.controls.items() if name != tuned}
        if partner is not None:
            controls[tuned] = partner
        pathways = replace(pathways, by_domain=by_domain, controls=controls)
    return Healed(pathways=pathways, adapters=adapters, reports=reports)


def _check(model: Any, texts: Mapping[str, TextSource], settings: HealingSettings) -> None:
    if not isinstance(model, SparsePathwaysForCausalLM):
        raise PathwaysError(
            f"heal needs a model with pathways, not {type(model).__name__}. Make one with "
            "SparsePathwaysForCausalLM.from_dense(model, pathways)."
        )
    _check_settings(model, settings)
    if not texts:
        raise TextError("No domains were given. Pass a dictionary {domain: text source}.")
    for domain in texts:
        if domain not in model.domains:
            raise UnknownNameError("domain", domain, model.domains)
        if model.pathways[domain].experts:
            raise UnsupportedModelError(
                f"Pathway {domain!r} keeps some of the routed experts, among which healing cannot "
                "train yet. Heal pathways that were selected without experts= (--experts) and "
                "expert_neurons= (--expert-neurons)."
            )


def _check_settings(model: SparsePathwaysForCausalLM, settings: HealingSettings) -> None:
    if Accelerator().num_processes > 1:
        raise PathwaysError("Healing runs in one process: start it without `accelerate launch`.")
    if settings.precision not in PRECISIONS:
        raise UnknownNameError("precision", settings.precision, PRECISIONS)
    if settings.train == "lora":
        import_peft()
    if settings.keep == "lora" and model.pathways.base.routed:
        raise PathwaysError(
            "PEFT renames the targets of adapters for models with routed experts, so that an "
            f"adapter of this one would not load: choose {named('keep', 'folded')}."
        )


@dataclass(frozen=True)
class _Arm:
    """A student after training."""

    student: Student
    run: Trained

    @property
    def lowest(self) -> float:
        return min(point.validation for point in self.run.curve)

    def without_fork(self) -> "_Arm":
        return replace(self, run=replace(self.run, fork={}))


@dataclass(frozen=True)
class _Job:
    """One domain's healing."""

    model: Any
    frozen: nn.Module
    domain: str
    text: TrainingText
    settings: HealingSettings
    work_folder: "str | os.PathLike[str] | None"

    def carry_out(self) -> tuple[Pathway, Pathway | None, Adapter | None, HealingReport]:
        """Train the dense model if it takes part, then the pathway; fold, and measure."""
        settings, pathway = self.settings, self.model.pathways[self.domain]
        self._check(pathway)
        dense = self._train_dense() if settings.dense_partner or self._dense_steps else None
        student = self._prepare(self._blocks(pathway))
        stage = Stage(label=f"heal {self.domain}")
        if dense is not None and self._dense_steps:
            cut(student, dense.student, dense.run.fork, self.frozen)
            stage = replace(stage, start=dense.run.forked)
        curve = dense.run.curve if dense else ()
        fork = dense.run.fork if dense and settings.teacher == "cut" else {}
        partner = dense.without_fork() if dense and settings.dense_partner else None
        del dense
        objective = Objective(terms=settings.terms, teacher=self._teacher(partner, fork))
        del fork
        trained = self._train(student, objective, stage)
        adapter, blocks = None, self._blocks(pathway)
        if settings.keep == "lora":
            adapter, loss = make_adapter(trained.student, self.model, settings), trained.lowest
        else:
            blocks = self._fold(trained)
            loss = self._loss(blocks)
        report = self._report(trained, loss, partner, curve)
        provenance = self._provenance(pathway, report)
        healed = replace(pathway, blocks=blocks, provenance=provenance)
        tuned = None
        if partner is not None and adapter is None:
            provenance = {**healed.provenance, "method": "dense, tuned equally"}
            tuned = Pathway(blocks=self._fold(partner), provenance=provenance)
        return healed, tuned, adapter, report

    def _check(self, pathway: Pathway) -> None:
        """Refuse, before anything is trained, what cannot be healed or compared."""
        if "healing" in pathway.provenance and (self.settings.dense_partner or self._dense_steps):
            raise PathwaysError(
                f"The pathway {self.domain!r} was healed before, and the dense model was not: "
                "beside it the pathway would look better than it is. Heal the pathway as it was "
                f"built, or leave out {option('dense_partner')} and {option('dense_first')}."
            )
        probe = next(make_batches(self.text.validation[:1], 1))
        student = make_student(self.frozen, self._blocks(pathway))
        check_student(student, self.model, probe, self.domain)

    def _blocks(self, pathway: Pathway) -> tuple[BlockPathway, ...]:
        instead = "Heal one that computes the same neurons for all; groups have train-router."
        return pathway.unclustered(self.domain, instead)

    @property
    def _dense_steps(self) -> int:
        """For how many steps the dense model is trained in the pathway's place."""
        return self.settings.dense_steps(len(self.text.steps))

    def _train_dense(self) -> _Arm:
        """Train the dense model, with the language-modelling loss; as far as it is needed."""
        own = replace(self.settings, loss="lm", teacher="dense")  # of any pathway's loss
        job, steps = replace(self, settings=own), self._dense_steps
        stage = Stage(
            label=f"tune dense {self.domain}",
            end=None if own.dense_partner else steps,
            fork=steps or None,
        )
        student = self._prepare(everything(self.frozen))
        return job._train(student, Objective(terms=LANGUAGE_MODELLING), stage)

    def _prepare(self, blocks: tuple[BlockPathway, ...]) -> Student:
        """Return a pathway's student, ready to be trained."""
        student = make_student(self.frozen, blocks)
        if self.settings.train == "lora":
            add_lora(student, self.settings)
        else:
            for leaf in student.trained_leaves():
                student.model.get_submodule(leaf.place).weight.requires_grad_(True)
        return student

    def _train(self, student: Student, objective: Objective, stage: Stage) -> _Arm:
        plan = describe_plan(student.model, self.text, self.settings, stage.label)
        self._reduce(student.model)
        checkpoints = Checkpoints(self.work_folder, plan)
        run = train(student.model, self.text, objective, self.settings, checkpoints, stage)
        return _Arm(student, run)

    def _teacher(self, partner: _Arm | None, fork: Mapping[str, Tensor]) -> Any:
        """Return the model to distil from, a fork's if there is one; None if the loss does not."""
        if not set(self.settings.terms) - set(LANGUAGE_MODELLING):
            return None
        if partner is not None and self.settings.teacher == "tuned":
            return partner.student.model
        whole = everything(self.frozen)
        if fork:
            teacher = self._prepare(whole).model
            restore(teacher, fork)
            teacher.requires_grad_(False)
        else:
            teacher = make_student(self.frozen, whole).model
        self._reduce(teacher)
        return teacher

    def _reduce(self, model: nn.Module) -> None:
        with calibration_precision(model, self.settings.precision):
            if torch.is_autocast_enabled(next(model.parameters()).device.type):
                reduce_frozen(model)

    def _fold(self, trained: _Arm) -> tuple[BlockPathway, ...]:
        return fold(trained.student, self.frozen, self.settings, STORED_DTYPE)

    def _loss(self, blocks: tuple[BlockPathway, ...] | None) -> float:
        """Return the validation loss of a pathway, or of the dense model."""
        with calibration_precision(self.frozen, self.settings.precision):
            return mean_loss(
                self.frozen,
                self.text.validation,
                blocks,
                find_blocks(self.frozen),
                batch_size=self.settings.batch_size,
            )

    def _report(
        self,
        trained: _Arm,
        healed: float,
        partner: _Arm | None,
        dense: tuple[CurvePoint, ...],
    ) -> HealingReport:
        curve, untrained = trained.run.curve, self.model.pathways[self.domain].blocks
        return HealingReport(
            domain=self.domain,
            settings=self.settings,
            source=self.text.source,
            tokens=curve[-1].tokens,
            passes=self.text.passes,
            seconds=curve[-1].seconds,
            validation_tokens=sum(len(window.ids) - 1 for window in self.text.validation),
            dense=dense[0].validation if dense else self._loss(None),
            before=self._loss(untrained) if self._dense_steps else curve[0].validation,
            healed=healed,
            tuned=None if partner is None else partner.lowest,
            curve=curve,
            dense_curve=dense,
        )

    def _provenance(self, pathway: Pathway, report: HealingReport) -> dict[str, Any]:
        """Return the healed pathway's provenance: the run, and the documents it has seen."""
        known = dict(pathway.provenance)
        return {
            **known,
            "healing": [*known.get("healing", ()), report.to_dict()],
            "text": self.text.added_to(known.get("text", {})),
        }
