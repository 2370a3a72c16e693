"""The rendered cards in ``model_cards/``: ``python -m tests.hub.cards`` writes them anew."""

from dataclasses import replace
from pathlib import Path

import torch

from hf_sparse_pathways.measure.quality_report import QualityReport, QualityRow, QualitySettings
from hf_sparse_pathways.pathways.apart import folder_for
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways
from hf_sparse_pathways.share.card import CardSettings, render_card
from hf_sparse_pathways.share.pictures import PICTURE_NAME, draw_pictures
from tests.architectures import build

FOLDER = Path(__file__).parents[2] / "model_cards"
PLACES = {name: folder_for(name) for name in ("code", "law")}
PICTURES = {name: f"{place}/{PICTURE_NAME}" for name, place in PLACES.items()}


def pathways(names=("code", "law")):
    """Return pathways of a model on the Hub, with what ``select`` says of how it made them."""
    dense = build("llama")
    masks = {
        name: [torch.arange(64) % (index + 2) > 0 for index in range(3)]
        for index, name in enumerate(names)
    }
    masks = {
        name: [keep[: block.d_ff] for keep, block in zip(kept, _blocks(dense), strict=True)]
        for name, kept in masks.items()
    }
    made = Pathways.from_masks(dense, masks)
    by_domain = {
        name: Pathway(blocks=pathway.blocks, provenance=_provenance(name))
        for name, pathway in made.by_domain.items()
    }
    base = replace(made.base, name="HuggingFaceTB/SmolLM2-135M-Instruct", revision="0" * 40)
    return Pathways(base=base, by_domain=by_domain)


def _provenance(name):
    text = {"source": "law/*.txt", "documents": 120, "tokens": 65536}
    if name == "law":
        text |= {
            "source": "dataset case-law (train)",
            "datasets": [{"name": "case-law", "id": "me/case-law"}],
        }
    return {"method": "obs", "compensation": "refit+bias", "text": text}


def _blocks(dense):
    return Pathways.from_masks(dense, {}).base.blocks


def evaluation():
    """Return an evaluation of both domains; the figures are made up."""
    rows = [
        QualityRow(
            domain=domain,
            role=role,
            pathway=domain if role == "pathway" else None if role == "dense" else role,
            perplexity=perplexity * ratio,
            ratio=ratio,
            interval=None if role == "dense" else (0.98 * ratio, 1.02 * ratio),
            bits_per_byte=1.2 * ratio,
            divergence=ratio - 1.0,
            agreement=1.0 / ratio,
            cosine=1.0 / ratio,
            cosine_per_layer=(1.0, 0.99, 0.98),
            flops=1.0 if role == "dense" else 0.7,
            tokens=16384,
            documents=24,
            excluded=0,
            sparsity=0.0 if role == "dense" else 0.3,
        )
        for domain, perplexity in (("code", 6.0), ("law", 14.0))
        for role, ratio in (("dense", 1.0), ("pathway", 1.12), ("pooled", 1.25), ("random", 60.0))
    ]
    settings = QualitySettings(
        max_tokens=16384,
        max_length=512,
        batch_size=8,
        seed=0,
        seen="exclude",
        controls=True,
        dtype="float32",
    )
    return QualityReport(base="smollm2", rows=tuple(rows), settings=settings)


def rendered():
    """Return file name -> card."""
    said = CardSettings(evaluation=evaluation(), license="apache-2.0")
    return {
        "full.md": render_card(
            pathways(), "me/smollm2-pathways", said, weights=True, pictures=PICTURES
        ),
        "adapter.md": render_card(pathways(), "me/smollm2-code-law", CardSettings(), weights=False),
    }


if __name__ == "__main__":
    for place in PLACES.values():
        (FOLDER / place).mkdir(parents=True, exist_ok=True)
    assert draw_pictures(pathways(), PLACES, FOLDER) == PICTURES
    for file, text in rendered().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
