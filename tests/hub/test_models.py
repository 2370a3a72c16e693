"""Whole models on a Hub, and weights from another repository than their pathways."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.pathways import storage
from tests.architectures import prompt
from tests.hub.artefacts import (
    REPO,
    assert_same,
    files_of,
    make_model,
    make_pathways,
    uploads_of_weights,
)

IDS = prompt()

pytestmark = pytest.mark.usefixtures("hub")


@torch.no_grad()
def test_a_model_comes_back_as_it_was(hub, tmp_path):
    model = make_model(executor="compact")
    model.push_to_hub(REPO)
    found = AutoModelForCausalLM.from_pretrained(REPO, cache_dir=tmp_path).eval()
    for domain in ("code", "law", None):
        assert torch.equal(found(IDS, domain=domain).logits, model(IDS, domain=domain).logits)
    alone = AutoModelForCausalLM.from_pretrained(REPO, domain="code", executor="masked").eval()
    expected = model(IDS, domain="code").logits
    assert (alone(IDS).logits - expected).abs().max() <= 1e-5
    assert len(uploads_of_weights(hub)) == 1


def test_sharded_weights_and_a_saved_folder(hub, tmp_path):
    model = make_model()
    model.push_to_hub(REPO, max_shard_size="50kB")
    shards = [path for path in files_of(hub) if path.startswith("model-")]
    assert len(shards) > 1
    assert AutoModelForCausalLM.from_pretrained(REPO).domains == ["code", "law"]
    model.save_pretrained(tmp_path / "x")
    (tmp_path / "x" / ".hidden").write_text("secret")
    (tmp_path / "x" / "tokenizer.json").write_text("{}")
    sp.push_folder(tmp_path / "x", "me/y")
    assert AutoModelForCausalLM.from_pretrained("me/y").domains == ["code", "law"]
    pushed = set(hub.repos["me/y"].at("main").files)
    assert "tokenizer.json" in pushed
    assert ".hidden" not in pushed
    with pytest.raises(ArtefactError):
        sp.push_folder(tmp_path, "me/z")
    with pytest.raises(ArtefactError, match="--pathways-only"):
        sp.push_folder("me/y", "me/z")


def test_files_of_one_read_are_of_one_commit(monkeypatch):
    make_pathways().push_to_hub(REPO)
    real = storage.list_apart

    def push_meanwhile(meta):
        monkeypatch.setattr(storage, "list_apart", real)
        make_pathways(seed=1).push_to_hub(REPO)
        return real(meta)

    monkeypatch.setattr(storage, "list_apart", push_meanwhile)
    assert_same(sp.Pathways.from_pretrained(REPO), make_pathways())
    assert_same(sp.Pathways.from_pretrained(REPO), make_pathways(seed=1))


def test_save_pretrained_can_push(tmp_path):
    make_model().save_pretrained(tmp_path / "x", push_to_hub=True, repo_id=REPO, token="hf_of_me")
    assert AutoModelForCausalLM.from_pretrained(REPO).domains == ["code", "law"]


@torch.no_grad()
def test_weights_from_one_repository_and_pathways_from_another():
    model = make_model()
    model.to_dense().push_to_hub("me/base")
    model.pathways.push_to_hub(REPO)
    found = sp.SparsePathwaysForCausalLM.from_pretrained("me/base", pathways=REPO).eval()
    assert torch.equal(found(IDS, domain="law").logits, model(IDS, domain="law").logits)
