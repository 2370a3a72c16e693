"""Methods side by side: the same model, texts, windows and FLOPs; one table.

Static methods make pathways from one profile; peers (``peers.py``) choose while the model runs.
All arms are scored on the second part of each window, since prompt-adaptive ones need the first as
their prompt. Every finished step is stored, so that an interrupted comparison goes on.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_sparse_pathways.discovery.passes import calibration_precision, evaluation_mode
from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.recipe import OBS
from hf_sparse_pathways.discovery.selection import select
from hf_sparse_pathways.discovery.text import Documents
from hf_sparse_pathways.discovery.trials import run_model
from hf_sparse_pathways.discovery.windows import draw_windows, resolve_length
from hf_sparse_pathways.errors import UnknownNameError
from hf_sparse_pathways.files import read_json, write_atomically
from hf_sparse_pathways.measure.arms import (
    DENSE,
    MeasuredArm,
    ScoredText,
    measure_arms,
    pathway_arm,
)
from hf_sparse_pathways.measure.comparison_report import ComparisonReport, ComparisonRow
from hf_sparse_pathways.measure.peers import PEERS
from hf_sparse_pathways.measure.quality import random_partner
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.pathways.pathway import POOLED, Pathway, Pathways
from hf_sparse_pathways.pathways.storage import JSON_NAME

CONTEXT = 0.5
"""Part of each window that is context only: the prompt of prompt-adaptive methods."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One static method in a comparison.

    Attributes:
        label: What the table calls it.
        options: What ``select`` is given.
    """

    label: str
    options: Mapping[str, Any]


CONTENDERS: Mapping[str, Contender] = {
    contender.label: contender
    for contender in (
        Contender(label="pathway", options={"method": OBS}),
        Contender(label="one-shot", options={"method": OBS, "order": "one-shot"}),
        Contender(
            label="random+repair",
            options={"method": "random", "compensation": "refit+bias", "order": "sequential"},
        ),
        Contender(label="wanda", options={"method": "wanda"}),
        Contender(label="flap", options={"method": "flap"}),
        Contender(label="mean_abs", options={"method": "mean_abs"}),
        Contender(label="magnitude", options={"method": "magnitude"}),
        Contender(label="taylor", options={"method": "taylor"}),
        Contender(label="lape", options={"method": "lape"}),
    )
}
"""The first has its pooled control measured too."""

DEFAULT_METHODS = ("pathway", "one-shot", "random+repair", "wanda", "flap", "taylor", *PEERS)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared.

    Attributes:
        sparsities: Fractions of the FFN's FLOPs to remove.
        methods: Names of contenders and peers.
        max_tokens: Tokens per domain of held-out text, in windows.
        max_length: Most tokens per window.
        batch_size: Windows per forward pass.
        precision: While the model runs over calibration text.
        options: More options of ``select`` for ``obs``.
        seed: Of windows, random masks and resampling.
    """

    sparsities: tuple[float, ...]
    methods: tuple[str, ...] = DEFAULT_METHODS
    max_tokens: int = 16384
    max_length: int | None = None
    batch_size: int = 2
    precision: str = "model"
    options: Mapping[str, Any]
    seed: int = 0

    def check(self) -> None:
        """Check the methods' names.

        Raises:
            UnknownNameError: One is unknown.
        """
        for name in self.methods:
            if name not in CONTENDERS and name not in PEERS:
                raise UnknownNameError("method", name, [*CONTENDERS, *PEERS])


def compare(
    model: nn.Module,
    tokenizer: Any,
    profile: Profile,
    held_out: Mapping[str, Documents],
    what: Comparison,
    *,
    work: Path | None = None,
) -> ComparisonReport:
    """Measure every method at every sparsity on every domain's held-out text.

    Args:
        model: The dense model; it is as it was afterwards.
        tokenizer: Its tokenizer.
        profile: Its profile on other documents.
        held_out: Domain -> documents.
        what: The methods and sparsities.
        work: Folder for finished steps, and for the pathways that were compared; a comparison
            with the same profile, texts and settings goes on from there.

    Raises:
        UnknownNameError: An unknown method.
    """
    what.check()
    length = resolve_length(model, what.max_length)
    texts = {
        name: ScoredText(
            name,
            tuple(
                draw_windows(
                    documents,
                    tokenizer,
                    max_tokens=what.max_tokens,
                    max_length=length,
                    seed=what.seed,
                )
            ),
            0,
            tokenizer,
            CONTEXT,
        )
        for name, documents in held_out.items()
    }
    rows: list[ComparisonRow] = []
    for sparsity in what.sparsities:
        for method in what.methods:
            step = _Step(model, profile, texts, what, sparsity, method)
            rows.extend(step.measure(work))
    return ComparisonReport(base=profile.base.name, rows=tuple(rows))


@dataclass(frozen=True)
class _Step:
    """One method at one sparsity."""

    model: Any
    profile: Profile
    texts: Mapping[str, ScoredText]
    what: Comparison
    sparsity: float
    method: str

    def measure(self, work: Path | None) -> list[ComparisonRow]:
        """Return the step's rows, from the work folder if they are there."""
        if work is None:
            return self._measure(None)
        name = f"{self.method}-{self.sparsity:g}-{self._digest()}"
        path = work / f"{name}.json"
        if path.is_file():
            return [ComparisonRow.from_dict(row) for row in read_json(path)["rows"]]
        rows = self._measure(work / name)
        record = {"rows": [asdict(row) for row in rows]}
        write_atomically(path, json.dumps(record, indent=1).encode())
        return rows

    def _digest(self) -> str:
        """Return what identifies the step."""
        named = {name: [w.ids for w in text.windows] for name, text in self.texts.items()}
        calibrated = {name: domain.windows for name, domain in self.profile.by_domain.items()}
        settings = {**asdict(self.what), "sparsities": None, "methods": None}
        job = [
            named,
            repr(calibrated),
            settings,
            self.sparsity,
            self.method,
            self.profile.base.name,
        ]
        return hashlib.sha256(json.dumps(job, default=repr).encode()).hexdigest()[:24]

    def _measure(self, folder: Path | None) -> list[ComparisonRow]:
        """Measure the method; what is selected is kept in a folder, or found there."""
        if self.method in PEERS:
            return self._measure_peer()
        if folder is not None and (folder / JSON_NAME).is_file():
            return self._measure_pathways(Pathways.from_pretrained(folder))
        pathways = self._select()
        if folder is not None:
            pathways.save_pretrained(folder)
        return self._measure_pathways(pathways)

    def _select(self) -> Pathways:
        options = dict(CONTENDERS[self.method].options)
        if options["method"] == OBS:
            options = {**self.what.options, **options}
        return select(
            self.model,
            self.profile,
            sparsity=self.sparsity,
            precision=self.what.precision,
            seed=self.what.seed,
            controls=self.method == "pathway",
            **options,
        )

    def _measure_pathways(self, pathways: Pathways) -> list[ComparisonRow]:
        first = self.method == "pathway"
        random: dict[str, Pathway] = {}
        if first:
            random = {
                f"random {name}": random_partner(pathway, self.what.seed)
                for name, pathway in pathways.by_domain.items()
            }
        pathways = pathways.with_controls(random)
        sparse = SparsePathwaysForCausalLM.from_dense(self.model, pathways)
        rows = []
        for name, text in self.texts.items():
            arms = {self.method: pathway_arm("pathway", name, pathways)}
            if first and POOLED in pathways.controls:
                arms[POOLED] = pathway_arm("pooled", POOLED, pathways)
            if first:
                arms["random"] = pathway_arm("random", f"random {name}", pathways)
            rows.extend(self._rows(sparse, text, arms))
        return rows

    def _measure_peer(self) -> list[ComparisonRow]:
        rows = []
        for name, text in self.texts.items():
            calibration = self.profile[name].windows
            arm = PEERS[self.method](self.model, calibration, self.sparsity, CONTEXT)
            if arm is not None:
                rows.extend(self._rows(self.model, text, {self.method: arm}))
        return rows

    def _rows(
        self, model: Any, text: ScoredText, arms: Mapping[str, MeasuredArm]
    ) -> list[ComparisonRow]:
        dense = replace(DENSE, forward=run_model) if model is self.model else DENSE
        with evaluation_mode(model), calibration_precision(model, self.what.precision):
            measured = measure_arms(
                model,
                text,
                [dense, *arms.values()],
                batch_size=self.what.batch_size,
                seed=self.what.seed,
            )
        return [
            ComparisonRow(method=label, sparsity=self.sparsity, quality=row)
            for label, row in zip(["dense", *arms], measured, strict=True)
        ]
