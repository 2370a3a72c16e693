"""The model card of pathways: written from the artefact and, if there is one, its evaluation.

The table of domains stands between two marks, so that adding, renaming or removing a domain changes
its row alone: all that the card says of a domain is in its row, its picture and the datasets that
the metadata list too. A card without the package's mark is somebody's own, and is left as it is.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from hf_sparse_pathways.measure.figures import markdown_table
from hf_sparse_pathways.measure.quality_report import QualityReport
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import Pathways
from hf_sparse_pathways.pathways.summary import text_of
from hf_sparse_pathways.shares import format_share
from hf_sparse_pathways.version import __version__

CARD_NAME = "README.md"
PICTURE_TEXT = "neurons removed in each FFN block"
_MARK = "<!-- written by hf-sparse-pathways"
_DATASET_ID = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")
_START, _END = "<!-- domains -->", "<!-- /domains -->"
_NOT_WORDS = re.compile(r"[^\w ,:+%=()-]+")
_DATASET = re.compile(r"\[[^\]]*\]\(https://huggingface\.co/datasets/([\w./-]+)\)")
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


def render_card(
    pathways: Pathways,
    repo_id: str,
    settings: CardSettings,
    *,
    weights: bool,
    pictures: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return the card of a repository.

    Args:
        pathways: What it holds.
        repo_id: Where it is going to be.
        settings: What else it says.
        weights: Whether the weights are there, too.
        pictures: Domain -> path in the repository, for those that have one.
    """
    base, evaluation = pathways.base, settings.evaluation
    base_id = base.name if is_hub_id(base.name) else None
    title = repo_id.rpartition("/")[2]
    rows = [_row(pathways, name, pictures.get(name)) for name in pathways.domains]
    return render(
        "card.md.jinja",
        metadata=_metadata(title, base_id, settings, rows),
        title=title,
        repo=repo_id,
        weights=weights,
        base=link_base(base, base_id),
        base_id=base_id or "BASE",
        summary=base.summary,
        domains=_table(rows),
        quality=None if evaluation is None else evaluation.to_markdown(),
        example=next(iter(pathways.domains), "code"),
        routed=bool(pathways.routed),
    )


def render(template: str, *, metadata: ModelCardData, **values: Any) -> str:
    """Return a template of this folder with values, metadata and the package's mark put in."""
    text = files(__package__).joinpath(template).read_text(encoding="utf-8")
    # It is Markdown, not HTML, and what is put in is the artefact's own.
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(text).render(
        metadata=f"---\n{metadata.to_yaml()}\n---",
        own_mark=f"{_MARK} {__version__} -->",
        **values,
    )


def _metadata(
    title: str, base_id: str | None, settings: CardSettings, rows: Sequence[Sequence[str]]
) -> ModelCardData:
    """Return what the Hub reads."""
    results = None if settings.evaluation is None else _results(settings.evaluation)
    return ModelCardData(
        library_name="hf-sparse-pathways",
        pipeline_tag="text-generation",
        base_model=base_id,
        # With the weights or without: they are the base's, and nothing else fits what is added.
        base_model_relation="adapter" if base_id else None,
        datasets=_datasets(rows) or None,
        license=settings.license,
        tags=["sparse-pathways", "transformers", *settings.tags, *(row[0] for row in rows)],
        model_name=title if results else None,
        eval_results=results,
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
    pictures: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return a card with changed rows of domains; what has no such table stays as it is. Pure.

    Args:
        text: The card.
        added: Pathways whose domains get a row, in place of one of their name.
        gone: A domain whose row goes.
        renamed: Old and new name.
        pictures: As in ``render_card``, of what is added.
    """
    before, start, rest = text.partition(_START)
    table, end, after = rest.partition(_END)
    if not (is_own_card(text) and start and end):
        return text
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    listed_cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rows = {row[0]: row for row in listed_cells if row}
    known, listed = set(rows), _datasets(list(rows.values()))
    rows.pop(gone or "", None)
    if renamed is not None:
        old, new = renamed
        rows = {new if n == old else n: [new if n == old else n, *r[1:]] for n, r in rows.items()}
    if added is not None:
        rows |= {name: _row(added, name, pictures.get(name)) for name in added.domains}
    cells = list(rows.values())
    before = _change_list(before, "datasets", set(listed), _datasets(cells))
    return f"{_change_list(before, 'tags', known, list(rows))}{_table(cells)}{after}"


def _change_list(text: str, key: str, known: set[str], names: Sequence[str]) -> str:
    """Put others in place of those that are known into a list of a card's metadata.

    What somebody has added by hand stays, and so does a list that is written otherwise. A list that
    is not there stands before the library.
    """
    forms = (rf"^{key}:\n(- .*\n)+", "^(?=library_name:)")
    found = next(filter(None, (re.search(form, text, re.MULTILINE) for form in forms)), None)
    if found is None:
        return text
    try:
        listed = yaml.safe_load(found[0])[key] if found[0] else []
    except yaml.YAMLError:
        return text
    if not all(isinstance(entry, str) for entry in listed):
        return text
    entries = list(dict.fromkeys([*(entry for entry in listed if entry not in known), *names]))
    written = yaml.safe_dump({key: entries}, allow_unicode=True, sort_keys=False) if entries else ""
    return f"{text[: found.start()]}{written}{text[found.end() :]}"


def _datasets(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the Hub datasets that rows name, each once."""
    return list(dict.fromkeys(name for row in rows for name in _DATASET.findall(row[-1])))


def _table(rows: Sequence[Sequence[str]]) -> str:
    return f"{_START}\n{markdown_table(_HEADER, rows)}\n{_END}"


def _row(pathways: Pathways, name: str, picture: str | None) -> list[str]:
    """Describe a domain, by what it keeps and how it was made."""
    made, text = pathways[name].provenance, text_of(pathways[name])
    shares = pathways.sparsity(name, per_block=True)
    shown = "" if picture is None else f" ![{PICTURE_TEXT}]({picture})"
    how = [str(made[key]) for key in ("method", "compensation") if made.get(key)]
    counted = [f"{text[key]} {key}" for key in ("tokens", "documents") if key in text]
    return [
        name,
        _removed(pathways, name),
        f"{format_share(min(shares))} to {format_share(max(shares))}{shown}" if shares else "-",
        format_share(pathways.flops(name)),
        words(", ".join(how)) or "unknown",
        (words(", ".join(counted)) or "unknown") + _linked_datasets(text.get("datasets")),
    ]


def _removed(pathways: Pathways, name: str) -> str:
    """Say how much a domain removes, of FFN blocks and of routed experts."""
    removed = [format_share(pathways.sparsity(name))] if pathways.base.blocks else []
    if pathways[name].experts:
        removed.append(f"{format_share(pathways.expert_sparsity(name))} of routed experts")
    return ", ".join(removed) or format_share(0.0)


def words(text: str) -> str:
    """Return what an artefact says of itself as words, cut at 80 characters: no markup, no address.

    Whoever made it may have written anything there.
    """
    return _NOT_WORDS.sub(" ", text).strip()[:80]


def _linked_datasets(described: Any) -> str:
    """Link the Hub datasets that an artefact says it was made from; whatever is no id is left out.

    A path of the machine that it was made on is never an id: it starts with a slash or dot.
    """
    listed = described if isinstance(described, list) else []
    ids = (one.get("id") for one in listed if isinstance(one, dict))
    known = dict.fromkeys(id for id in ids if isinstance(id, str) and _DATASET_ID.fullmatch(id))
    links = [f"[{name}](https://huggingface.co/datasets/{name})" for name in known]
    return f" of {', '.join(links)}" if links else ""


def _results(evaluation: QualityReport) -> list[EvalResult]:
    """Return what the Hub shows of an evaluation: each text's perplexity, dense and own.

    Where several sets of pathways were measured, the model's own is the first.
    """
    shown = (None, *evaluation.sets[:1])
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
        if row.role in ("dense", "pathway", "pooled", "random") and row.set in shown
    ]


def is_hub_id(name: str) -> bool:
    """Whether a name is that of a repository, and not of a folder."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not os.path.exists(name)


def link_base(base: BaseModel, base_id: str | None) -> str:
    """Return a base as a card names it: a link, or no name if it has none that others know."""
    if base_id is None:
        return "a local base model"
    at = f" at revision `{base.revision}`" if base.revision else ""
    return f"[{base_id}](https://huggingface.co/{base_id}){at}"
