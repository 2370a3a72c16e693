"""Domains of a repository: added, replaced, renamed and removed, one commit each."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import (
    ArtefactError,
    HubError,
    MismatchError,
    PathwaysError,
    UnknownNameError,
)
from hf_sparse_pathways.pathways.apart import folder_for
from hf_sparse_pathways.share import hub as sharing
from tests.architectures import build, random_masks
from tests.hub.artefacts import (
    REPO,
    assert_same,
    files_of,
    make_model,
    make_pathways,
)
from tests.pathways.signatures import make_signature

pytestmark = pytest.mark.usefixtures("hub")


def test_adding_a_domain_uploads_it_alone(hub):
    model = make_model()
    model.push_to_hub(REPO)
    before = dict(files_of(hub))
    hub.uploaded.clear()
    added = make_pathways(("medicine",), seed=5)
    sp.add_domains(added, REPO)
    place = folder_for("medicine")
    new = {path for path, blob in files_of(hub).items() if before.get(path) != blob}
    own = {f"{place}/{file}" for file in ("pathways.json", "pathways.safetensors", "sparsity.png")}
    assert new == {"README.md", "pathways.json", *own}
    assert len(hub.uploaded) == 5
    found = AutoModelForCausalLM.from_pretrained(REPO)
    assert found.domains == ["code", "law", "medicine"]
    merged = model.pathways.merged(added)
    assert_same(found.pathways, merged)


def test_a_domain_that_is_there_is_replaced_where_it_lies(hub):
    make_pathways().push_to_hub(REPO)
    changed = make_pathways(("law",), seed=9)
    sp.add_domains(changed, REPO)
    assert_same(sp.Pathways.from_pretrained(REPO), make_pathways().merged(changed))
    assert len(files_of(hub)) == 10


@pytest.mark.parametrize("together", [False, True])
def test_removing_and_renaming(hub, together, tmp_path):
    paths = make_pathways(("code", "law", "math"))
    signed = {
        name: replace(path, signature=make_signature(seed))
        for seed, (name, path) in enumerate(paths.by_domain.items())
    }
    paths = replace(paths, by_domain=signed)
    if together:
        paths.save_pretrained(tmp_path)
        HfApi().create_repo(REPO)
        HfApi().upload_folder(repo_id=REPO, folder_path=tmp_path)
    else:
        paths.push_to_hub(REPO)
    hub.uploaded.clear()
    sp.rename_domain("code", "Rust+C", REPO)
    assert not [place for place, _ in hub.uploaded if len(place) == 64], "no tensors"
    sp.remove_domains(["law"], REPO, commit_message="law is out")
    found = sp.Pathways.from_pretrained(REPO)
    assert found.domains == ["Rust+C", "math"]
    for mine, theirs in (("Rust+C", "code"), ("math", "math")):
        assert all(map(torch.equal, found[mine].keep, paths[theirs].keep))
        assert torch.equal(found[mine].signature.tokens, paths[theirs].signature.tokens)
    again = make_pathways(("code",), seed=3)
    sp.add_domains(again, REPO)
    found = sp.Pathways.from_pretrained(REPO)
    assert sorted(found.domains) == ["Rust+C", "code", "math"]
    assert sorted(found.routed) == ["Rust+C", "math"]
    assert all(map(torch.equal, found["code"].keep, again["code"].keep))
    assert all(map(torch.equal, found["Rust+C"].keep, paths["code"].keep))
    assert not [path for path in files_of(hub) if folder_for("law") in path]


def test_a_change_as_a_pull_request_or_on_a_branch():
    make_pathways().push_to_hub(REPO)
    address = sp.add_domains(make_pathways(("math",), seed=2), REPO, create_pr=True)
    assert address.endswith("/discussions/1")
    assert sp.Pathways.from_pretrained(REPO).domains == ["code", "law"]
    found = sp.Pathways.from_pretrained(REPO, revision="refs/pr/1")
    assert found.domains == ["code", "law", "math"]
    sp.remove_domains(["code"], REPO, revision="refs/pr/1")
    assert sp.Pathways.from_pretrained(REPO, revision="refs/pr/1").domains == ["law", "math"]


def test_a_stranger_proposes(hub, monkeypatch):
    make_pathways().push_to_hub(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_of_you")
    with pytest.raises(HubError, match="403"):
        sp.remove_domains(["law"], REPO)
    assert sp.remove_domains(["law"], REPO, create_pr=True).endswith("/discussions/1")
    assert make_pathways(("math",)).push_to_hub(REPO, create_pr=True).endswith("/discussions/2")
    assert sp.Pathways.from_pretrained(REPO).domains == ["code", "law"]
    assert sp.Pathways.from_pretrained(REPO, revision="refs/pr/1").domains == ["code"]
    assert sp.Pathways.from_pretrained(REPO, revision="refs/pr/2").domains == ["math"]
    assert hub.repos[REPO].pulls == 2


def test_changes_at_the_same_time_are_all_made():
    make_pathways().push_to_hub(REPO)
    names = ["a", "b", "c", "d"]

    def add(name):
        return sp.add_domains(make_pathways((name,), seed=ord(name)), REPO)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(add, names))) == 4
    assert sorted(sp.Pathways.from_pretrained(REPO).domains) == sorted([*names, "code", "law"])


def test_a_push_in_between_is_built_upon(monkeypatch):
    make_pathways().push_to_hub(REPO)
    between = [make_pathways(("math",), seed=4)]

    class Late(HfApi):
        def create_commit(self, *args, **kwargs):
            if between:
                sp.add_domains(between.pop(), REPO)
            return super().create_commit(*args, **kwargs)

    monkeypatch.setattr(sharing, "HfApi", Late)
    sp.add_domains(make_pathways(("physics",), seed=6), REPO)
    assert sp.Pathways.from_pretrained(REPO).domains == ["code", "law", "math", "physics"]


def test_what_cannot_be_changed_says_why():
    with pytest.raises(HubError, match="me/x"):
        sp.add_domains(make_pathways(), REPO)
    HfApi().create_repo(REPO)
    with pytest.raises(ArtefactError, match="sparse-pathways push"):
        sp.add_domains(make_pathways(), REPO)
    make_pathways().push_to_hub(REPO)
    with pytest.raises(UnknownNameError, match="'law'"):
        sp.remove_domains(["lwa"], REPO)
    with pytest.raises(UnknownNameError, match="'law'"):
        sp.rename_domain("lwa", "legal", REPO)
    with pytest.raises(PathwaysError, match="has a domain 'code'"):
        sp.rename_domain("law", "code", REPO)
    with pytest.raises(PathwaysError, match="cannot be a domain"):
        sp.rename_domain("law", "../law", REPO)
    dense = build("gpt2")
    other = sp.Pathways.from_masks(dense, random_masks(dense))
    with pytest.raises(MismatchError):
        sp.add_domains(other, REPO)
    with pytest.raises(HubError, match="Revision Not Found"):
        sp.add_domains(make_pathways(), REPO, revision="next")
    assert_same(sp.Pathways.from_pretrained(REPO), make_pathways())
