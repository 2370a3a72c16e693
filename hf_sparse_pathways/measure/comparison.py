"""Methods side by side: the same model, texts, windows and FLOPs; one table.

Static methods make pathways from one profile; others choose while the model runs
(``contenders.py``). All arms are scored on the second part of each window, since prompt-adaptive
ones need the first as their prompt. Every finished step is stored, so that an interrupted
comparison goes on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hf_sparse_pathways.discovery.documents import Documents
from hf_sparse_pathways.discovery.precision import product_dtype
from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.recipe import OBS, make_recipe
from hf_sparse_pathways.discovery.windows import resolve_length
from hf_sparse_pathways.errors import TextError, UnknownNameError, UnsupportedModelError
from hf_sparse_pathways.measure.arms import ScoredText
from hf_sparse_pathways.measure.comparison_report import ComparisonReport, ComparisonRow
from hf_sparse_pathways.measure.comparison_steps import CONTEXT, Steps, stored_sparsities
from hf_sparse_pathways.measure.contenders import DEFAULT_METHODS, METHODS, group_methods
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.version import __version__


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared.

    Attributes:
        sparsities: Fractions of the FFN's FLOPs to remove.
        methods: Names of contenders and peers.
        max_tokens: Tokens per domain of held-out text, in windows.
        max_length: Most tokens per window.
        batch_size: Windows per forward pass.
        precision: Of the model's products, on calibration and on held-out text.
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

    def described(self) -> dict[str, Any]:
        """Return the settings that all rows share as JSON values."""
        options = {name: getattr(given, "__name__", given) for name, given in self.options.items()}
        return {
            "scored_tokens": self.max_tokens,
            "batch_size": self.batch_size,
            "precision": self.precision,
            "options": options,
            "seed": self.seed,
        }

    def check(self) -> None:
        """Check names and options.

        Raises:
            UnknownNameError: A name is unknown.
            PathwaysError: An option of ``select`` is out of range.
        """
        for name in self.methods:
            if name not in METHODS:
                raise UnknownNameError("method", name, METHODS)
        make_recipe(OBS, precision=self.precision, **self.options)


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
            with the same profile, texts and settings goes on from there, and reports the methods
            and sparsities that were measured before beside its own.

    Raises:
        UnknownNameError: An unknown method.
        TextError: All held-out documents of a domain were calibrated on.
        UnsupportedModelError: The model has no FFN blocks.
    """
    what.check()
    check_comparable(profile.base)
    length = resolve_length(model, what.max_length)
    texts = {}
    for name, documents in held_out.items():
        fresh, excluded = _leave_out_seen(name, documents, profile)
        texts[name] = ScoredText.draw(
            name,
            fresh,
            tokenizer,
            max_tokens=what.max_tokens,
            max_length=length,
            seed=what.seed,
            excluded=excluded,
            context=CONTEXT,
        )
    rows: list[ComparisonRow] = []
    for sparsity in sorted({*what.sparsities, *stored_sparsities(work)}):
        steps = Steps(model, profile, texts, what, sparsity, work)
        wanted = what.methods if sparsity in what.sparsities else ()
        for methods in group_methods(wanted):
            rows.extend(steps.measure(methods))
        rows.extend(steps.measured_before(wanted))
    settings = {**what.described(), "max_length": length, "version": __version__}
    settings["products"] = product_dtype(model, what.precision)
    settings["calibration_tokens"] = {n: own.tokens for n, own in profile.by_domain.items()}
    return ComparisonReport(base=profile.base.name, rows=tuple(rows), settings=settings)


def check_comparable(base: BaseModel) -> None:
    """Check that a model has FFN blocks, whose neurons all methods choose.

    Raises:
        UnsupportedModelError: It has none.
    """
    if not base.blocks:
        raise UnsupportedModelError(
            f"Methods choose neurons of FFN blocks, and the FFNs of this {base.model_type} model "
            "are routed experts alone. Keep some of those by `sparse-pathways build --experts`, "
            "and measure that by `sparse-pathways evaluate`, beside a random choice."
        )


def _leave_out_seen(domain: str, documents: Documents, profile: Profile) -> tuple[Documents, int]:
    """Return the documents that no domain's statistics were taken from, and how many were.

    Raises:
        TextError: None is left.
    """
    fresh, seen = documents.unseen(own.provenance for own in profile.by_domain.values())
    if not fresh.items:
        raise TextError(
            f"Domain {domain!r}: all {seen} documents of {documents.source} that were held out are "
            "also calibration text of another domain. Give domains that do not share documents."
        )
    return fresh, seen
