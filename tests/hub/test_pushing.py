"""Pathways pushed to a Hub and pulled from it, with ``huggingface_hub`` as it is."""

from dataclasses import replace

import pytest
import torch
from huggingface_hub import HfApi
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import HubError, PathwaysError
from hf_sparse_pathways.pathways.apart import folder_for
from tests.hub.artefacts import REPO, assert_same, files_of, make_pathways

pytestmark = pytest.mark.usefixtures("hub")


def test_pathways_come_back_as_they_were(hub):
    paths = make_pathways()
    paths = paths.with_controls({"pooled": paths["law"]})
    assert paths.push_to_hub(REPO).startswith("http://")
    assert_same(sp.Pathways.from_pretrained(REPO), paths)
    one = sp.Pathways.from_pretrained(REPO, only="law")
    assert one.domains == ["law"]
    assert_same(one, replace(paths.subset(["law"]), controls={}))
    shared = {".gitattributes", "README.md", "pathways.json", "pathways.safetensors"}
    assert set(files_of(hub)) == shared | {
        f"{folder_for(name)}/{file}"
        for name in ("code", "law")
        for file in ("pathways.json", "pathways.safetensors", "sparsity.png")
    }


def test_one_domain_is_downloaded_alone(tmp_path):
    make_pathways().push_to_hub(REPO)
    sp.Pathways.from_pretrained(REPO, only="law", cache_dir=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if folder_for("code") in path.as_posix()]


def test_a_branch_a_tag_a_commit_and_a_pull_request():
    first, second, third = (make_pathways(seed=seed) for seed in range(3))
    first.push_to_hub(REPO, commit_message="the first")
    api = HfApi()
    sha = api.model_info(REPO).sha
    api.create_tag(REPO, tag="v1")
    second.push_to_hub(REPO, revision="next")
    address = third.push_to_hub(REPO, create_pr=True)
    assert address.endswith("/discussions/1")
    for revision in (None, "v1", sha):
        assert_same(sp.Pathways.from_pretrained(REPO, revision=revision), first)
    assert_same(sp.Pathways.from_pretrained(REPO, revision="next"), second)
    assert_same(sp.Pathways.from_pretrained(REPO, revision="refs/pr/1"), third)
    assert api.list_repo_commits(REPO)[0].title == "the first"
    with pytest.raises(PathwaysError, match="v2"):
        sp.Pathways.from_pretrained(REPO, revision="v2")


def test_private_repositories_and_wrong_tokens(hub, monkeypatch):
    make_pathways().push_to_hub(REPO, private=True)
    assert hub.repos[REPO].private
    monkeypatch.delenv("HF_TOKEN")
    assert_same(sp.Pathways.from_pretrained(REPO, token="hf_of_me"), make_pathways())
    for token in (None, "hf_of_you", "hf_wrong"):
        with pytest.raises(PathwaysError) as caught:
            sp.Pathways.from_pretrained(REPO, token=token, force_download=True)
        assert "hf_" not in str(caught.value)
        with pytest.raises(HubError) as caught:
            make_pathways().push_to_hub(REPO, token=token or False)
        assert "hf_" not in str(caught.value)
    with pytest.raises(HubError, match="403"):
        make_pathways().push_to_hub("me/other", token="hf_of_you")


def test_offline_with_what_was_fetched_before(hub, monkeypatch):
    make_pathways().push_to_hub(REPO)
    sp.Pathways.from_pretrained(REPO)
    hub.repos.clear()
    assert_same(sp.Pathways.from_pretrained(REPO, local_files_only=True), make_pathways())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError):
        make_pathways().push_to_hub(REPO)


def test_pushing_again_replaces_domains_and_leaves_other_files(hub):
    make_pathways().push_to_hub(REPO)
    HfApi().upload_file(path_or_fileobj=b"hello", path_in_repo="notes.txt", repo_id=REPO)
    other = make_pathways(("law", "medicine"), seed=1)
    other.push_to_hub(REPO)
    assert_same(sp.Pathways.from_pretrained(REPO), other)
    assert "notes.txt" in files_of(hub)
    assert not [path for path in files_of(hub) if folder_for("code") in path]


def test_a_large_file_comes_through(hub):
    sizes = {"hidden_size": 1024, "intermediate_size": 4608, "vocab_size": 8}
    dense = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=8, **sizes))
    keep = [torch.ones(4608, dtype=torch.bool)] * 2
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(1024, 4608, generator=generator) for _ in keep]
    blocks = tuple(map(lambda k, d: sp.BlockPathway(keep=k, delta=d), keep, deltas))
    base = sp.Pathways.from_masks(dense, {"big": keep})
    paths = replace(base, by_domain={"big": sp.Pathway(blocks=blocks)})
    paths.push_to_hub(REPO)
    assert max(size for _, size in hub.uploaded) > 36e6
    assert_same(sp.Pathways.from_pretrained(REPO), paths)


def test_an_interrupted_upload_is_repeated(hub):
    hub.failing = 1
    make_pathways().push_to_hub(REPO)
    assert_same(sp.Pathways.from_pretrained(REPO), make_pathways())
