"""Adapters on a Hub: whose pathways they are, and of which revision."""

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import MismatchError
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.revision import note_revision
from tests.architectures import build, compensate, prompt, random_masks
from tests.hub.artefacts import REPO

IDS = prompt()

pytestmark = pytest.mark.usefixtures("hub")


@pytest.fixture
def two_bases(hub):  # noqa: ARG001
    """A base on the Hub, a fine-tune of it, and an adapter for the base."""
    dense = build("llama")
    dense.push_to_hub("me/base")
    dense.push_to_hub("me/tuned")
    base = AutoModelForCausalLM.from_pretrained("me/base")
    compensate(base, random_masks(base)).push_to_hub(REPO)
    return base


@torch.no_grad()
def test_an_adapter_names_its_base_and_stops_on_another(two_bases, caplog, tmp_path):
    load = sp.SparsePathwaysForCausalLM.from_pretrained
    paths = sp.Pathways.from_pretrained(REPO)
    sha = HfApi().model_info("me/base").sha
    assert (paths.base.name, paths.base.revision) == ("me/base", sha)
    expected = load("me/base", pathways=REPO).eval()(IDS, domain="law").logits
    assert not caplog.messages
    tuned = AutoModelForCausalLM.from_pretrained("me/tuned")
    for attempt in (
        lambda **options: load("me/tuned", pathways=REPO, **options),
        lambda **options: load("me/tuned", pathways=paths, domain="law", **options),
        lambda **options: sp.SparsePathwaysForCausalLM.from_dense(tuned, paths, **options),
    ):
        with pytest.raises(MismatchError, match=rf"'me/base' at revision {sha}.*'me/tuned' at"):
            attempt()
        caplog.clear()
        found = attempt(allow_transfer=True).eval()
        assert (found(IDS, domain="law").logits - expected).abs().max() <= 1e-5
        assert "'me/tuned'" in caplog.text
    caplog.clear()
    two_bases.save_pretrained(tmp_path)
    found = load(tmp_path, pathways=REPO).eval()
    assert torch.equal(found(IDS, domain="law").logits, expected)
    assert str(tmp_path) in caplog.text


@pytest.mark.usefixtures("two_bases")
def test_another_revision_of_the_base_is_another_base():
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="me/base")
    load = sp.SparsePathwaysForCausalLM.from_pretrained
    with pytest.raises(MismatchError, match="revision"):
        load("me/base", pathways=REPO)
    sha = sp.Pathways.from_pretrained(REPO).base.revision
    assert load("me/base", pathways=REPO, revision=sha).domains == ["code", "law"]
    newer = AutoModelForCausalLM.from_pretrained("me/base")
    assert BaseModel.of(newer).revision is None, "two are in the cache"
    note_revision(newer, "me/base")
    assert BaseModel.of(newer).revision == HfApi().model_info("me/base").sha
    more = sp.Pathways.from_masks(newer, random_masks(newer, ["math"]))
    with pytest.raises(MismatchError, match="revision"):
        sp.add_domains(more, REPO)
    sp.add_domains(more, REPO, allow_transfer=True)
    found = sp.Pathways.from_pretrained(REPO)
    assert found.domains == ["code", "law", "math"]
    assert found.base.revision == sha


def test_a_whole_model_on_the_hub_is_nobody_elses(two_bases, caplog):
    paths = sp.Pathways.from_pretrained(REPO)
    sp.SparsePathwaysForCausalLM.from_dense(two_bases, paths).push_to_hub("me/full")
    caplog.clear()
    found = AutoModelForCausalLM.from_pretrained("me/full")
    assert found.pathways.base == paths.base
    assert not caplog.messages
