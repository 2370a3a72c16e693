"""The card of a model whose FFNs are layers of another kind than its base's."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from hf_sparse_pathways.pathways.entry import BASE_TYPE
from hf_sparse_pathways.sgatlin.settings import read_ffn
from hf_sparse_pathways.share.card import CardSettings, render, words


def render_layers_card(config: Mapping[str, Any], repo_id: str, settings: CardSettings) -> str:
    """Return the card of a repository.

    Args:
        config: What its ``config.json`` holds.
        repo_id: Where it is going to be.
        settings: What else it says.

    Raises:
        ArtefactError: The configuration's layers are none.
    """
    ffn = read_ffn(config["ffn"]).to_dict()
    kind = ffn.pop("kind")
    metadata = ModelCardData(
        library_name="hf-sparse-pathways",
        pipeline_tag="text-generation",
        license=settings.license,
        tags=["sparse-pathways", "transformers", kind, *settings.tags],
    )
    return render(
        "layers_card.md.jinja",
        metadata=metadata,
        title=repo_id.rpartition("/")[2],
        base_type=words(str(config.get(BASE_TYPE))),
        kind=kind,
        fields=ffn.items(),
        repo=repo_id,
    )
