"""A comparison's steps: methods at one sparsity on one domain, each stored when it is finished.

A step's file is named by a digest of everything that its figures depend on, so that an interrupted
comparison goes on, and what other settings have measured is not mistaken for it.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse_pathways.discovery.passes import evaluation_mode
from hf_sparse_pathways.discovery.precision import calibration_precision
from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.recipe import OBS
from hf_sparse_pathways.discovery.resumption import digest_plan
from hf_sparse_pathways.discovery.selection import select
from hf_sparse_pathways.discovery.trials import run_model
from hf_sparse_pathways.discovery.weights import weight_digest
from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.files import code_digest, read_json, write_atomically
from hf_sparse_pathways.measure.arms import (
    DENSE,
    MeasuredArm,
    ScoredText,
    measure_arms,
    pathway_arm,
)
from hf_sparse_pathways.measure.comparison_report import ComparisonRow
from hf_sparse_pathways.measure.contenders import CONTENDERS, METHODS, PATHWAY
from hf_sparse_pathways.measure.peers import PEERS
from hf_sparse_pathways.measure.prompted import PROMPTED, WITH_DOMAIN, prompt_arm
from hf_sparse_pathways.measure.quality import random_partner
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.pathways.names import POOLED
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways
from hf_sparse_pathways.version import __version__

if TYPE_CHECKING:
    from hf_sparse_pathways.measure.comparison import Comparison

logger = logging.getLogger(__name__)

_CODE = "code"
"""File beside stored pathways that names the code which has selected them."""

CONTEXT = 0.5
"""Part of each window that is context only: the prompt of prompt-adaptive methods."""


def stored_sparsities(work: Path | None) -> set[float]:
    """Return the sparsities of all steps in a work folder, whatever comparison they are of."""
    paths = [] if work is None else work.glob("*.json")
    found = [_read_rows(path)[1] for path in paths if "rows" in read_json(path)]
    return {row.sparsity for rows in found for row in rows}


def _stored_rows(path: Path) -> list[ComparisonRow]:
    """Read a finished step; say so if other code than this has measured it."""
    code, rows = _read_rows(path)
    if code != code_digest():
        logger.warning(
            "%s was measured by other code of version %s. Delete it to measure it again.",
            path,
            __version__,
        )
    return rows


def _read_rows(path: Path) -> tuple[Any, list[ComparisonRow]]:
    """Return which code measured a finished step, and what.

    Raises:
        ArtefactError: The file is damaged.
    """
    record = read_json(path)
    try:
        rows = [ComparisonRow.from_dict(row) for row in record["rows"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(
            f"{path} is damaged ({error!r:.200}). Delete it to measure it again."
        ) from error
    return record.get("code"), rows


def _is_by_this_code(folder: Path) -> bool:
    """Whether a folder holds pathways, and this code has selected them."""
    path = folder / _CODE
    return path.is_file() and path.read_text(encoding="utf-8") == code_digest()


@dataclass(frozen=True)
class Steps:
    """All methods at one sparsity; what each gave on a domain is a file of the work folder."""

    model: Any
    profile: Profile
    texts: Mapping[str, ScoredText]
    what: "Comparison"
    sparsity: float
    work: Path | None

    def measure(self, methods: Sequence[str]) -> list[ComparisonRow]:
        """Return some methods' rows, from the work folder if they are there."""
        return [row for domain in self.texts for row in self._on(domain, methods)]

    def measured_before(self, others: Sequence[str]) -> list[ComparisonRow]:
        """Return the rows of methods that the work folder has, but for some."""
        if self.work is None:
            return []
        names = [(m, domain) for m in METHODS if m not in others for domain in self.texts]
        paths = [self.work / f"{self._name(*name)}.json" for name in names]
        return [row for path in paths if path.is_file() for row in _stored_rows(path)]

    def _on(self, domain: str, methods: Sequence[str]) -> list[ComparisonRow]:
        """Return some methods' rows on a domain's text."""
        if self.work is None:
            return [row for rows in self._measure(domain, methods).values() for row in rows]
        paths = {method: self.work / f"{self._name(method, domain)}.json" for method in methods}
        missing = [method for method, path in paths.items() if not path.is_file()]
        for method, rows in self._measure(domain, missing).items():
            record = {"code": code_digest(), "rows": [asdict(row) for row in rows]}
            text = json.dumps(record, indent=1, allow_nan=False)
            write_atomically(paths[method], text.encode())
        return [row for path in paths.values() for row in _stored_rows(path)]

    def _name(self, method: str, domain: str | None = None) -> str:
        """Return a name that tells everything apart that a method's rows depend on.

        Args:
            method: The method.
            domain: Whose text is scored; None for pathways of all domains.
        """
        job = {"shared": self._shared, "sparsity": self.sparsity, "method": method}
        digest = digest_plan({**job, "domain": domain})
        return f"{method}-{self.sparsity:g}-{digest}"

    @cached_property
    def _shared(self) -> str:
        """A digest of the weights, texts and settings."""
        return digest_plan(
            {
                "version": __version__,
                "weights": weight_digest(self.model),
                "scored": {
                    name: [window.ids for window in text.windows]
                    for name, text in self.texts.items()
                },
                "calibrated": {
                    name: [window.ids for window in (*domain.windows, *domain.validation)]
                    for name, domain in self.profile.by_domain.items()
                },
                "settings": repr(replace(self.what, sparsities=(), methods=())),
            }
        )

    def _measure(self, domain: str, methods: Sequence[str]) -> dict[str, list[ComparisonRow]]:
        """Measure methods of one group, in the same passes."""
        if not methods:
            return {}
        arms: Mapping[str, Mapping[str, MeasuredArm]]
        if methods[0] in CONTENDERS:
            model, arms = self._static(domain, methods)
        elif methods[0] in PROMPTED:
            model, arms = self._prompted(domain, methods)
        else:
            model, arms = self.model, self._adaptive(domain, methods)
        rows = self._rows(model, self.texts[domain], arms)
        return {method: rows.get(method, []) for method in methods}

    def _selected(self, method: str, domain: str) -> Pathways:
        """Return a method's pathways, those of one domain at least."""
        if method != PATHWAY and CONTENDERS[method].repaired:
            return self._select(method, domain)  # it takes long, and each domain is kept
        return self._of_all_domains(method)

    def _of_all_domains(self, method: str) -> Pathways:
        """Return a method's pathways of all domains, which its scores may compare."""
        if method not in self._whole:
            self._whole[method] = self._select(method, None)
        return self._whole[method]

    @cached_property
    def _whole(self) -> dict[str, Pathways]:
        return {}

    def _select(self, method: str, domain: str | None) -> Pathways:
        """Select pathways of a domain, or of all; or read them from the work folder."""
        folder = None if self.work is None else self.work / self._name(method, domain)
        if folder is not None and _is_by_this_code(folder):
            return Pathways.from_pretrained(folder)
        options = dict(CONTENDERS[method].options)
        if options["method"] == OBS:
            options = {**self.what.options, **options}
        pathways = select(
            self.model,
            self.profile if domain is None else self.profile.subset([domain]),
            sparsity=self.sparsity,
            precision=self.what.precision,
            seed=self.what.seed,
            controls=method == PATHWAY,
            **options,
        )
        if folder is not None:
            pathways.save_pretrained(folder)
            write_atomically(folder / _CODE, code_digest().encode())
        return pathways

    def _static(
        self, domain: str, methods: Sequence[str]
    ) -> tuple[Any, dict[str, dict[str, MeasuredArm]]]:
        """Return a model with several methods' pathways of a domain, and their arms."""
        arms: dict[str, dict[str, Pathway]] = {}
        for method in methods:
            pathways = self._selected(method, domain)
            arms[method] = {method: pathways[domain]}
            if method == PATHWAY:
                if POOLED in pathways.controls:
                    arms[method][POOLED] = pathways[POOLED]
                arms[method]["random"] = random_partner(
                    pathways[domain], self.profile.base.blocks, self.what.seed
                )
        named = {label: pathway for own in arms.values() for label, pathway in own.items()}
        together = Pathways(base=self.profile.base, by_domain={}, controls=named)
        sparse = SparsePathwaysForCausalLM.from_dense(self.model, together)
        return sparse, {
            method: {
                label: pathway_arm("pathway" if label == method else label, label, together)
                for label in own
            }
            for method, own in arms.items()
        }

    def _adaptive(self, domain: str, methods: Sequence[str]) -> dict[str, dict[str, MeasuredArm]]:
        """Return the arms of peers that choose while the model runs, where they fit it."""
        calibration = self.profile[domain].windows
        arms = {
            method: PEERS[method](self.model, calibration, self.sparsity, CONTEXT)
            for method in methods
        }
        for method, arm in arms.items():
            if arm is None:
                logger.warning(
                    "%s cannot be measured with %.0f%% of the FFN removed: these FFN blocks are "
                    "not made for it, or what it always computes costs more.",
                    method,
                    100 * self.sparsity,
                )
        return {method: {method: arm} for method, arm in arms.items() if arm is not None}

    def _prompted(
        self, domain: str, methods: Sequence[str]
    ) -> tuple[Any, dict[str, dict[str, MeasuredArm]]]:
        """Return a model that picks neurons from prompts, and the arms of methods that do."""
        pathways = Pathways(base=self.profile.base, by_domain={})
        if WITH_DOMAIN in methods:
            pathways = self._of_all_domains(PATHWAY)
        sparse = SparsePathwaysForCausalLM.from_dense(self.model, pathways)
        sparse.set_prompt_pathways(sparsity=self.sparsity, rule="refit")
        return sparse, {
            method: {method: prompt_arm(method, domain, pathways, self.sparsity, CONTEXT)}
            for method in methods
        }

    def _rows(
        self, model: Any, text: ScoredText, arms: Mapping[str, Mapping[str, MeasuredArm]]
    ) -> dict[str, list[ComparisonRow]]:
        """Return every method's rows on one text: dense, and its arms."""
        dense = replace(DENSE, forward=run_model) if model is self.model else DENSE
        labelled = {label: arm for own in arms.values() for label, arm in own.items()}
        if not labelled:
            return {}
        with evaluation_mode(model), calibration_precision(model, self.what.precision):
            measured = measure_arms(
                model,
                text,
                [dense, *labelled.values()],
                batch_size=self.what.batch_size,
                seed=self.what.seed,
            )
        rows = {
            label: ComparisonRow(method=label, sparsity=self.sparsity, quality=row)
            for label, row in zip(["dense", *labelled], measured, strict=True)
        }
        return {method: [rows[label] for label in ("dense", *own)] for method, own in arms.items()}
