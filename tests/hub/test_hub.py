"""Pathways pushed to a Hub and pulled from it, with ``huggingface_hub`` as it is."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import (
    ArtefactError,
    HubError,
    MismatchError,
    PathwaysError,
    UnknownNameError,
)
from hf_sparse_pathways.pathways import storage
from hf_sparse_pathways.pathways.apart import folder_for
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.revision import note_revision
from hf_sparse_pathways.share import hub as sharing
from tests.architectures import build, compensate, prompt, random_masks
from tests.pathways.signatures import make_signature

REPO = "me/x"
IDS = prompt()

pytestmark = pytest.mark.usefixtures("hub")


def _pathways(domains=("code", "law"), seed=0):
    dense = build("llama")
    return compensate(dense, random_masks(dense, domains, seed=seed))


def _model(**options):
    return sp.SparsePathwaysForCausalLM.from_dense(build("llama"), _pathways(), **options)


def _assert_same(found, expected):
    assert found.base == expected.base
    assert found.domains == expected.domains
    assert list(found.controls) == list(expected.controls)
    for name in (*found.domains, *found.controls):
        assert found[name].provenance == expected[name].provenance
        for mine, theirs in zip(found[name].blocks, expected[name].blocks, strict=True):
            assert mine.parts().keys() == theirs.parts().keys()
            assert all(map(torch.equal, mine.parts().values(), theirs.parts().values()))


def _files(hub, revision="main"):
    return hub.repos[REPO].at(revision).files


def _weights(hub):
    return [place for place, _ in hub.uploaded if place == _files(hub)["model.safetensors"].sha256]


# -- pathways alone ---------------------------------------------------------------------------


def test_pathways_come_back_as_they_were(hub):
    paths = _pathways()
    paths = paths.with_controls({"pooled": paths["law"]})
    assert paths.push_to_hub(REPO).startswith("http://")
    _assert_same(sp.Pathways.from_pretrained(REPO), paths)
    one = sp.Pathways.from_pretrained(REPO, only="law")
    assert one.domains == ["law"]
    _assert_same(one, replace(paths.subset(["law"]), controls={}))
    shared = {".gitattributes", "README.md", "pathways.json", "pathways.safetensors"}
    assert set(_files(hub)) == shared | {
        f"{folder_for(name)}/{file}"
        for name in ("code", "law")
        for file in ("pathways.json", "pathways.safetensors", "sparsity.png")
    }


def test_one_domain_is_downloaded_alone(tmp_path):
    _pathways().push_to_hub(REPO)
    sp.Pathways.from_pretrained(REPO, only="law", cache_dir=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if folder_for("code") in path.as_posix()]


def test_a_branch_a_tag_a_commit_and_a_pull_request():
    first, second, third = (_pathways(seed=seed) for seed in range(3))
    first.push_to_hub(REPO, commit_message="the first")
    api = HfApi()
    sha = api.model_info(REPO).sha
    api.create_tag(REPO, tag="v1")
    second.push_to_hub(REPO, revision="next")
    address = third.push_to_hub(REPO, create_pr=True)
    assert address.endswith("/discussions/1")
    for revision in (None, "v1", sha):
        _assert_same(sp.Pathways.from_pretrained(REPO, revision=revision), first)
    _assert_same(sp.Pathways.from_pretrained(REPO, revision="next"), second)
    _assert_same(sp.Pathways.from_pretrained(REPO, revision="refs/pr/1"), third)
    assert api.list_repo_commits(REPO)[0].title == "the first"
    with pytest.raises(PathwaysError, match="v2"):
        sp.Pathways.from_pretrained(REPO, revision="v2")


def test_private_repositories_and_wrong_tokens(hub, monkeypatch):
    _pathways().push_to_hub(REPO, private=True)
    assert hub.repos[REPO].private
    monkeypatch.delenv("HF_TOKEN")
    _assert_same(sp.Pathways.from_pretrained(REPO, token="hf_of_me"), _pathways())
    for token in (None, "hf_of_you", "hf_wrong"):
        with pytest.raises(PathwaysError) as caught:
            sp.Pathways.from_pretrained(REPO, token=token, force_download=True)
        assert "hf_" not in str(caught.value)
        with pytest.raises(HubError) as caught:
            _pathways().push_to_hub(REPO, token=token or False)
        assert "hf_" not in str(caught.value)
    with pytest.raises(HubError, match="403"):
        _pathways().push_to_hub("me/other", token="hf_of_you")


def test_offline_with_what_was_fetched_before(hub, monkeypatch):
    _pathways().push_to_hub(REPO)
    sp.Pathways.from_pretrained(REPO)
    hub.repos.clear()
    _assert_same(sp.Pathways.from_pretrained(REPO, local_files_only=True), _pathways())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError):
        _pathways().push_to_hub(REPO)


def test_pushing_again_replaces_domains_and_leaves_other_files(hub):
    _pathways().push_to_hub(REPO)
    HfApi().upload_file(path_or_fileobj=b"hello", path_in_repo="notes.txt", repo_id=REPO)
    other = _pathways(("law", "medicine"), seed=1)
    other.push_to_hub(REPO)
    _assert_same(sp.Pathways.from_pretrained(REPO), other)
    assert "notes.txt" in _files(hub)
    assert not [path for path in _files(hub) if folder_for("code") in path]


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
    _assert_same(sp.Pathways.from_pretrained(REPO), paths)


def test_an_interrupted_upload_is_repeated(hub):
    hub.failing = 1
    _pathways().push_to_hub(REPO)
    _assert_same(sp.Pathways.from_pretrained(REPO), _pathways())


# -- domains of a repository ------------------------------------------------------------------


def test_adding_a_domain_uploads_it_alone(hub):
    model = _model()
    model.push_to_hub(REPO)
    before = dict(_files(hub))
    hub.uploaded.clear()
    added = _pathways(("medicine",), seed=5)
    sp.add_domains(added, REPO)
    place = folder_for("medicine")
    new = {path for path, blob in _files(hub).items() if before.get(path) != blob}
    own = {f"{place}/{file}" for file in ("pathways.json", "pathways.safetensors", "sparsity.png")}
    assert new == {"README.md", "pathways.json", *own}
    assert len(hub.uploaded) == 5
    found = AutoModelForCausalLM.from_pretrained(REPO)
    assert found.domains == ["code", "law", "medicine"]
    merged = model.pathways.merged(added)
    _assert_same(found.pathways, merged)


def test_a_domain_that_is_there_is_replaced_where_it_lies(hub):
    _pathways().push_to_hub(REPO)
    changed = _pathways(("law",), seed=9)
    sp.add_domains(changed, REPO)
    _assert_same(sp.Pathways.from_pretrained(REPO), _pathways().merged(changed))
    assert len(_files(hub)) == 10


@pytest.mark.parametrize("together", [False, True])
def test_removing_and_renaming(hub, together, tmp_path):
    paths = _pathways(("code", "law", "math"))
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
    again = _pathways(("code",), seed=3)
    sp.add_domains(again, REPO)
    found = sp.Pathways.from_pretrained(REPO)
    assert sorted(found.domains) == ["Rust+C", "code", "math"]
    assert sorted(found.routed) == ["Rust+C", "math"]
    assert all(map(torch.equal, found["code"].keep, again["code"].keep))
    assert all(map(torch.equal, found["Rust+C"].keep, paths["code"].keep))
    assert not [path for path in _files(hub) if folder_for("law") in path]


def test_a_change_as_a_pull_request_or_on_a_branch():
    _pathways().push_to_hub(REPO)
    address = sp.add_domains(_pathways(("math",), seed=2), REPO, create_pr=True)
    assert address.endswith("/discussions/1")
    assert sp.Pathways.from_pretrained(REPO).domains == ["code", "law"]
    found = sp.Pathways.from_pretrained(REPO, revision="refs/pr/1")
    assert found.domains == ["code", "law", "math"]
    sp.remove_domains(["code"], REPO, revision="refs/pr/1")
    assert sp.Pathways.from_pretrained(REPO, revision="refs/pr/1").domains == ["law", "math"]


def test_a_stranger_proposes(hub, monkeypatch):
    _pathways().push_to_hub(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_of_you")
    with pytest.raises(HubError, match="403"):
        sp.remove_domains(["law"], REPO)
    assert sp.remove_domains(["law"], REPO, create_pr=True).endswith("/discussions/1")
    assert _pathways(("math",)).push_to_hub(REPO, create_pr=True).endswith("/discussions/2")
    assert sp.Pathways.from_pretrained(REPO).domains == ["code", "law"]
    assert sp.Pathways.from_pretrained(REPO, revision="refs/pr/1").domains == ["code"]
    assert sp.Pathways.from_pretrained(REPO, revision="refs/pr/2").domains == ["math"]
    assert hub.repos[REPO].pulls == 2


def test_changes_at_the_same_time_are_all_made():
    _pathways().push_to_hub(REPO)
    names = ["a", "b", "c", "d"]

    def add(name):
        return sp.add_domains(_pathways((name,), seed=ord(name)), REPO)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(add, names))) == 4
    assert sorted(sp.Pathways.from_pretrained(REPO).domains) == sorted([*names, "code", "law"])


def test_a_push_in_between_is_built_upon(monkeypatch):
    _pathways().push_to_hub(REPO)
    between = [_pathways(("math",), seed=4)]

    class Late(HfApi):
        def create_commit(self, *args, **kwargs):
            if between:
                sp.add_domains(between.pop(), REPO)
            return super().create_commit(*args, **kwargs)

    monkeypatch.setattr(sharing, "HfApi", Late)
    sp.add_domains(_pathways(("physics",), seed=6), REPO)
    assert sp.Pathways.from_pretrained(REPO).domains == ["code", "law", "math", "physics"]


def test_what_cannot_be_changed_says_why():
    with pytest.raises(HubError, match="me/x"):
        sp.add_domains(_pathways(), REPO)
    HfApi().create_repo(REPO)
    with pytest.raises(ArtefactError, match="sparse-pathways push"):
        sp.add_domains(_pathways(), REPO)
    _pathways().push_to_hub(REPO)
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
        sp.add_domains(_pathways(), REPO, revision="next")
    _assert_same(sp.Pathways.from_pretrained(REPO), _pathways())


# -- whole models -----------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_comes_back_as_it_was(hub, tmp_path):
    model = _model(executor="compact")
    model.push_to_hub(REPO)
    found = AutoModelForCausalLM.from_pretrained(REPO, cache_dir=tmp_path).eval()
    for domain in ("code", "law", None):
        assert torch.equal(found(IDS, domain=domain).logits, model(IDS, domain=domain).logits)
    alone = AutoModelForCausalLM.from_pretrained(REPO, domain="code", executor="masked").eval()
    expected = model(IDS, domain="code").logits
    assert (alone(IDS).logits - expected).abs().max() <= 1e-5
    assert len(_weights(hub)) == 1


def test_sharded_weights_and_a_saved_folder(hub, tmp_path):
    model = _model()
    model.push_to_hub(REPO, max_shard_size="50kB")
    shards = [path for path in _files(hub) if path.startswith("model-")]
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
    _pathways().push_to_hub(REPO)
    real = storage.list_apart

    def push_meanwhile(meta):
        monkeypatch.setattr(storage, "list_apart", real)
        _pathways(seed=1).push_to_hub(REPO)
        return real(meta)

    monkeypatch.setattr(storage, "list_apart", push_meanwhile)
    _assert_same(sp.Pathways.from_pretrained(REPO), _pathways())
    _assert_same(sp.Pathways.from_pretrained(REPO), _pathways(seed=1))


def test_save_pretrained_can_push(tmp_path):
    _model().save_pretrained(tmp_path / "x", push_to_hub=True, repo_id=REPO, token="hf_of_me")
    assert AutoModelForCausalLM.from_pretrained(REPO).domains == ["code", "law"]


@torch.no_grad()
def test_weights_from_one_repository_and_pathways_from_another():
    model = _model()
    model.to_dense().push_to_hub("me/base")
    model.pathways.push_to_hub(REPO)
    found = sp.SparsePathwaysForCausalLM.from_pretrained("me/base", pathways=REPO).eval()
    assert torch.equal(found(IDS, domain="law").logits, model(IDS, domain="law").logits)


# -- whose pathways they are ------------------------------------------------------------------


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
