"""What is said of an exported checkpoint: its card, and the same as JSON. No path of a machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from hf_sparse_pathways.measure.figures import format_figure
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways
from hf_sparse_pathways.share.card import CARD_NAME, is_hub_id, link_base, render, words
from hf_sparse_pathways.shares import format_share
from hf_sparse_pathways.version import __version__

_HOW = ("method", "compensation", "allocation", "order", "ridge", "sparsity", "seed")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of an export.

    Attributes:
        pathways: The domain's pathway, and what it was made for.
        domain: Its name.
        architecture: The model's class.
        fields: Field of the configuration -> its value in the base and here.
        parameters: Their number in the base and here.
        padded: How many neurons are zeros.
        dtype: Of the weights.
        error: How far the logits are from the pathway's, relative to their size.
        dropped: What leaving the bias out has changed, in words; None if it is there.
        license: Of the weights, as the Hub calls it.
    """

    pathways: Pathways
    domain: str
    architecture: str
    fields: Mapping[str, tuple[Any, Any]]
    parameters: tuple[int, int]
    padded: int
    dtype: str
    error: float
    dropped: str | None
    license: str | None

    @property
    def pathway(self) -> Pathway:
        """The domain's pathway."""
        return self.pathways[self.domain]

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        base = self.pathways.base
        known = is_hub_id(base.name)
        made = self.pathway.provenance
        return {
            "version": __version__,
            "domain": self.domain,
            "base": base.name if known else None,
            "revision": base.revision if known else None,
            "fields": {name: after for name, (_, after) in self.fields.items()},
            "sparsity": self.pathways.sparsity(self.domain),
            "padded_neurons": self.padded,
            "made": {name: made[name] for name in _HOW if name in made},
            "text": _counts(made),
            "healed": "healing" in made,
            "bias_dropped": self.dropped,
            "dtype": self.dtype,
            "error": self.error,
        }


def render_plain_card(facts: Facts, repo_id: str | None) -> str:
    """Return an export's card.

    Args:
        facts: What is known of it.
        repo_id: Where it is going to be, if that is known.
    """
    base = facts.pathways.base
    base_id = base.name if is_hub_id(base.name) else None
    title = repo_id or f"{(base_id or base.model_type)}, {facts.domain}"
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_id,
        base_model_relation="finetune" if base_id else None,
        license=facts.license,
        tags=["sparse-pathways", facts.domain],
    )
    return render(
        "plain_card.md.jinja",
        metadata=metadata,
        title=title.rpartition("/")[2],
        base=_capital(link_base(base, base_id)),
        domain=facts.domain,
        architecture=facts.architecture,
        fields=[(name, *values) for name, values in facts.fields.items()],
        parameters=[f"{number:,}" for number in facts.parameters],
        share=format_share(facts.pathways.sparsity(facts.domain)),
        made=_describe(facts.pathway.provenance),
        padded=facts.padded,
        dropped=facts.dropped,
        error=format_figure(facts.error),
        dtype=facts.dtype,
        repo=repo_id or "path/to/this/folder",
    )


def find_license(source: str | Path) -> str | None:
    """Return the licence that a folder's own card names; None if there is none."""
    card = Path(source) / CARD_NAME
    if not card.is_file():
        return None
    try:
        found = (metadata_load(card) or {}).get("license")
    except ValueError:  # it is somebody's own, and may hold anything
        return None
    return found if isinstance(found, str) else None


def _counts(made: Mapping[str, Any]) -> dict[str, Any]:
    """Return how much text a pathway was calibrated on, as far as its provenance says."""
    text = made.get("text")
    known = text if isinstance(text, Mapping) else {}
    return {name: known[name] for name in ("tokens", "documents") if name in known}


def _describe(made: Mapping[str, Any]) -> str:
    """Return of a pathway's provenance what one sentence says."""
    counted = words(" of ".join(f"{number} {name}" for name, number in _counts(made).items()))
    parts = [f"by `{words(str(made['method']))}`"] if made.get("method") else []
    if made.get("compensation") not in (None, "none"):
        parts.append(f"what stayed was repaired (`{words(str(made['compensation']))}`)")
    if counted:
        parts.append(f"on {counted}")
    if "healing" in made:
        parts.append("and it was trained afterwards")
    return " ".join("".join(f", {part}" for part in parts).split())


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
