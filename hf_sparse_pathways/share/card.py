"""The model card of pathways: written from the artefact and, if there is one, its evaluation.

The table of domains stands between two marks, so that adding, renaming or removing a domain changes
its row alone. A card without the package's mark is somebody's own, and is left as it is.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from hf_sparse_pathways.measure.figures import markdown_table
from hf_sparse_pathways.measure.quality_report import QualityReport
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import Pathways
from hf_sparse_pathways.shares import format_share
from hf_sparse_pathways.version import __version__

CARD_NAME = "README.md"
_MARK = "<!-- written by hf-sparse-pathways"
_START, _END = "<!-- domains -->", "<!-- /domains -->"
_TAGS = re.compile(r"^tags:\n(- .*\n)+", re.MULTILINE)
_HEADER = ["domain", "neurons removed", "per block", "FFN FLOPs", "made by", "calibrated on"]


@dataclass(frozen=True, kw_only=True)
class CardSettings:
    """What a card says beside what the artefact says of itself.

    Attributes:
        evaluation: What ``evaluate`` measured; without, the card says how to.
        license: Of the weights, as the Hub calls it.
        tags: More of them.
    """

    evaluation: QualityReport | None = None
    license: str | None = None
    tags: Sequence[str] = ()


def render_card(pathways: Pathways, repo_id: str, settings: CardSettings, *, weights: bool) -> str:
    """Return the card of a repository.

    Args:
        pathways: What it holds.
        repo_id: Where it is going to be.
        settings: What else it says.
        weights: Whether the weights are there, too.
    """
    evaluation = settings.evaluation
    base = pathways.base
    base_id = base.name if is_hub_id(base.name) else None
    title = repo_id.rpartition("/")[2]
    quality = evaluation.to_markdown() if evaluation is not None else None
    results = None if evaluation is None else _results(evaluation)
    metadata = ModelCardData(
        library_name="hf-sparse-pathways",
        pipeline_tag="text-generation",
        base_model=base_id,
        base_model_relation="adapter" if base_id else None,
        license=settings.license,
        tags=["sparse-pathways", "transformers", *settings.tags, *pathways.domains],
        model_name=title if results else None,
        eval_results=results,
    )
    template = files(__package__).joinpath("card.md.jinja").read_text(encoding="utf-8")
    # It is Markdown, not HTML, and what is put in is the artefact's own.
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template).render(
        metadata=f"---\n{metadata.to_yaml()}\n---",
        own_mark=f"{_MARK} {__version__} -->",
        title=title,
        repo=repo_id,
        weights=weights,
        base=_linked(base, base_id),
        base_id=base_id or "BASE",
        summary=base.summary,
        domains=_domain_table(pathways),
        quality=quality,
        example=next(iter(pathways.domains), "code"),
    )


def is_own_card(text: str) -> bool:
    """Whether a card was written by this package, and may be written anew."""
    return _MARK in text


def change_rows(
    text: str,
    *,
    added: Pathways | None = None,
    gone: str | None = None,
    renamed: tuple[str, str] | None = None,
) -> str:
    """Return a card with changed rows of domains; what has no such table stays as it is. Pure.

    Args:
        text: The card.
        added: Pathways whose domains get a row, in place of one of their name.
        gone: A domain whose row goes.
        renamed: Old and new name.
    """
    before, start, rest = text.partition(_START)
    table, end, after = rest.partition(_END)
    if not (is_own_card(text) and start and end):
        return text
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    rows = {cells[0]: cells for cells in ([c.strip() for c in ln.split("|")[1:-1]] for ln in lines)}
    known = set(rows)
    rows.pop(gone or "", None)
    if renamed is not None:
        old, new = renamed
        rows = {new if n == old else n: [new if n == old else n, *r[1:]] for n, r in rows.items()}
    if added is not None:
        rows |= {name: _row(added, name) for name in added.domains}
    return f"{_change_tags(before, known, list(rows))}{_table(list(rows.values()))}{after}"


def _change_tags(text: str, known: set[str], names: Sequence[str]) -> str:
    """Put other domains in place of those that are known into a card's list of tags."""
    found = _TAGS.search(text)
    if found is None:
        return text
    tags = [tag for tag in yaml.safe_load(found[0])["tags"] if tag not in known]
    written = yaml.safe_dump({"tags": [*tags, *names]}, allow_unicode=True, sort_keys=False)
    return f"{text[: found.start()]}{written}{text[found.end() :]}"


def _domain_table(pathways: Pathways) -> str:
    return _table([_row(pathways, name) for name in pathways.domains])


def _table(rows: Sequence[Sequence[str]]) -> str:
    return f"{_START}\n{markdown_table(_HEADER, rows)}\n{_END}"


def _row(pathways: Pathways, name: str) -> list[str]:
    """Describe a domain, by what it keeps and how it was made."""
    made = pathways[name].provenance
    text = made.get("text")
    text = text if isinstance(text, dict) else {}
    shares = pathways.sparsity(name, per_block=True)
    how = [str(made[key]) for key in ("method", "compensation") if made.get(key)]
    counted = [f"{text[key]} {key}" for key in ("tokens", "documents") if key in text]
    return [
        name,
        format_share(pathways.sparsity(name)),
        f"{format_share(min(shares))} to {format_share(max(shares))}",
        format_share(pathways.flops(name)),
        _cell(how),
        _cell(counted),
    ]


def _cell(parts: Sequence[str]) -> str:
    """Join what an artefact says of itself, so that it stays within its cell."""
    return " ".join(", ".join(parts).split()).replace("|", "/")[:80] or "unknown"


def _results(evaluation: QualityReport) -> list[EvalResult]:
    """Return what the Hub shows of an evaluation: each text's perplexity, dense and own."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=row.domain,
            dataset_name=f"{row.domain}, {row.documents} held-out documents",
            metric_type="perplexity",
            metric_name=f"perplexity, {row.label}",
            metric_value=round(row.perplexity, 4),
        )
        for row in evaluation.rows
        if row.role in ("dense", "pathway", "pooled", "random")
    ]


def is_hub_id(name: str) -> bool:
    """Whether a name is that of a repository, and not of a folder."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not os.path.exists(name)


def _linked(base: BaseModel, base_id: str | None) -> str:
    if base_id is None:
        return "a local base model"
    at = f" at revision `{base.revision}`" if base.revision else ""
    return f"[{base_id}](https://huggingface.co/{base_id}){at}"
