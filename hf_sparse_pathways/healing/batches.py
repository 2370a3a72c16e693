"""What a healing run reads: fresh windows in a fixed order, and others to validate on.

Windows are drawn at random over all documents. One step is ``batch_size * accumulate`` windows in
the order in which they were drawn; when the text is used up it is drawn again in another order.
Nothing but the documents, the settings and the tokenizer decides the steps, so a run that goes on
from step n sees what it would have seen. The documents that the pathway was validated on when it
was made are left for validation; if there are none, a tenth of all is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_sparse_pathways.discovery.documents import Documents, join_datasets
from hf_sparse_pathways.discovery.windows import Window, count_tokens, draw_windows, list_digests
from hf_sparse_pathways.errors import TextError
from hf_sparse_pathways.healing.settings import HealingSettings

VALIDATION_SHARE = 0.1
_EPOCH_SEED = 1_000_003  # far from the seeds with which windows are drawn elsewhere

Steps = tuple[tuple[Window, ...], ...]


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """One domain's windows.

    Attributes:
        steps: The windows of each optimiser step.
        validation: Windows of other documents.
        source: What the documents were read from.
        datasets: The datasets among that, as ``Documents`` has them.
        passes: How often the text was drawn anew, the first time included.
    """

    steps: Steps
    validation: tuple[Window, ...]
    source: str
    datasets: tuple[Mapping[str, str], ...]
    passes: int

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return sum(count_tokens(step) for step in self.steps)

    def added_to(self, seen: Mapping[str, Any]) -> dict[str, Any]:
        """Return a pathway's text provenance with these documents among its digests. Pure."""
        training = [window for step in self.steps for window in step]
        digests, cut = list_digests(training)
        validation, validation_cut = list_digests(self.validation)
        added = {
            "digests": digests,
            "cut_digests": cut,
            "validation_digests": validation,
            "validation_cut_digests": validation_cut,
        }
        both = {name: sorted({*seen.get(name, ()), *more}) for name, more in added.items()}
        return {**seen, **both, "datasets": join_datasets(seen, self.datasets)}


def draw_text(
    domain: str,
    documents: Documents,
    seen: Mapping[str, Any],
    tokenizer: Any,
    settings: HealingSettings,
    max_length: int,
) -> TrainingText:
    """Draw the windows of a healing run.

    Args:
        domain: For messages.
        documents: All may be trained or validated on.
        seen: The pathway's text provenance.
        tokenizer: A Transformers tokenizer.
        settings: How much is drawn.
        max_length: Most tokens of a window.

    Raises:
        TextError: There is too little text.
    """
    training, validation = _set_validation_aside(documents, seen, settings.seed)
    windows, passes = _draw_often(domain, training, tokenizer, settings, max_length)
    size = settings.step_windows
    steps = tuple(tuple(windows[start : start + size]) for start in range(0, len(windows), size))
    return TrainingText(
        steps=steps,
        validation=_draw_validation(domain, validation, tokenizer, settings, max_length),
        source=documents.source,
        datasets=documents.datasets,
        passes=passes,
    )


def _draw_validation(
    domain: str, documents: Documents, tokenizer: Any, settings: HealingSettings, max_length: int
) -> tuple[Window, ...]:
    drawn = draw_windows(
        documents,
        tokenizer,
        max_tokens=settings.validation_tokens,
        max_length=max_length,
        seed=settings.seed,
    )
    kept = tuple(window for window in drawn if len(window.ids) > 1)
    if not kept:
        raise TextError(f"Domain {domain!r} has no validation text of two tokens or more.")
    return kept


def _set_validation_aside(
    documents: Documents, seen: Mapping[str, Any], seed: int
) -> tuple[Documents, Documents]:
    """Return training and validation documents, disjoint."""
    digests = {*seen.get("validation_digests", ())}
    known = tuple(document for document in documents.items if document.digest in digests)
    if not known:
        return documents.split(VALIDATION_SHARE, seed)
    cut = seen.get("validation_cut_digests", ())
    training = documents.without(digests, cut)
    return training, replace(documents, items=known)


def _draw_often(
    domain: str,
    documents: Documents,
    tokenizer: Any,
    settings: HealingSettings,
    max_length: int,
) -> tuple[list[Window], int]:
    """Draw until there is enough; return the windows, and how often the text was gone through."""
    most = None if settings.steps is None else settings.steps * settings.step_windows
    budget = settings.tokens if most is None else most * max_length
    windows: list[Window] = []
    passes = 0
    while count_tokens(windows) < budget and (most is None or len(windows) < most):
        drawn = draw_windows(
            documents,
            tokenizer,
            max_tokens=budget - count_tokens(windows),
            max_length=max_length,
            seed=settings.seed + (passes + 1) * _EPOCH_SEED,
        )
        passes += 1
        fresh = [window for window in drawn if len(window.ids) > 1]
        if not fresh and windows:
            break  # one token was left to draw
        if not fresh:
            raise TextError(
                f"Domain {domain!r} has no training text of two tokens or more beside its "
                f"validation documents ({documents.source}). Give more documents."
            )
        windows.extend(fresh)
    return windows[:most], passes
