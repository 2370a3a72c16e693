"""Expert pathways in files: beside the others, refused if they do not fit, absent if unused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import hf_sparse_pathways as sp
from hf_sparse_pathways.pathways.apart import folder_for
from hf_sparse_pathways.pathways.storage import write_pathways
from tests.architectures import prompt, random_masks
from tests.moe.architectures import build_moe
from tests.moe.oracles import expert_pathways
from tests.pathways.hostile import EXPERTS
from tests.pathways.test_hostile import _assert_refused
from tests.pathways.untouched import snapshot


@pytest.fixture(scope="module")
def dense():
    return build_moe("qwen3_moe_mixed")


@pytest.fixture(scope="module")
def routed():
    """A model whose FFNs are routed experts alone, and what it is before anything comes near it."""
    model = build_moe("qwen3_moe")
    model = sp.SparsePathwaysForCausalLM.from_dense(model, expert_pathways(model, ("both", "x")))
    return model, snapshot(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, routed):
    folder = tmp_path_factory.mktemp("saved")
    model, _ = routed
    paths = expert_pathways(model.to_dense(), ("both", "neurons"))
    paths.save_pretrained(folder / "together")
    write_pathways(paths, folder / "apart", apart=True)
    return folder


@pytest.mark.parametrize("only", [{}, {"only": "both"}])
@pytest.mark.parametrize("damage", EXPERTS)
def test_hostile_experts_are_refused(damage, only, saved, tmp_path, routed):
    shutil.copytree(saved / "together", tmp_path / "x")
    EXPERTS[damage](tmp_path / "x" / "pathways.json")
    _assert_refused(tmp_path / "x", routed, **only)


@pytest.mark.parametrize("damage", EXPERTS)
def test_hostile_experts_apart_are_refused(damage, saved, tmp_path, routed):
    shutil.copytree(saved / "apart", tmp_path / "x")
    EXPERTS[damage](tmp_path / "x" / folder_for("both") / "pathways.json")
    _assert_refused(tmp_path / "x", routed)


def test_without_experts_nothing_speaks_of_them(dense, tmp_path):
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    paths.save_pretrained(tmp_path)
    text = (tmp_path / "pathways.json").read_text()
    meta = json.loads(text)
    assert "experts" not in meta["base"]
    assert all("experts" not in entry for entry in meta["domains"])
    assert not any("experts" in name for name in load_file(tmp_path / "pathways.safetensors"))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, sp.Pathways.from_pretrained(tmp_path))
    assert model.domains == ["code", "law"]
    model.pathways.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "pathways.json").read_text()) == meta
    added = model.pathways.merged(expert_pathways(dense, ("both",)))
    assert len(added["both"].experts) == 1


@pytest.mark.parametrize("apart", [False, True])
def test_domains_with_and_without_experts_lie_together(dense, tmp_path, apart):
    plain = sp.Pathways.from_masks(dense, random_masks(dense))
    plain.save_pretrained(tmp_path / "plain")
    plain = sp.Pathways.from_pretrained(tmp_path / "plain")
    both = plain.merged(expert_pathways(dense, ("both",)))
    write_pathways(both, tmp_path / "x", apart=apart)
    again = sp.Pathways.from_pretrained(tmp_path / "x")
    assert again.domains == ["code", "law", "both"]
    assert again.base.experts == both.base.experts
    assert [len(again[name].experts) for name in again.domains] == [0, 0, 1]
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, again)
    ids = prompt(3, 9)
    with torch.no_grad():
        mixed = model(ids, domain=["code", "both", None]).logits
        for row, name in enumerate(("code", "both", None)):
            alone = model(ids, domain=name).logits[row]
            assert (mixed[row] - alone).abs().max().item() <= 1e-5


def test_another_models_experts_are_refused(routed):
    model, _ = routed
    paths = expert_pathways(build_moe("olmoe"), ("both",))
    with pytest.raises(sp.PathwaysError, match="Made for"):
        model.set_pathways(paths)


def test_domains_are_removed_and_added(routed):
    model, _ = routed
    paths = expert_pathways(model.to_dense(), ("both", "neurons"))
    sparse = sp.SparsePathwaysForCausalLM.from_dense(model.to_dense(), paths)
    ids = prompt(2, 7)
    with torch.no_grad():
        before = sparse(ids, domain="neurons").logits
        sparse.set_pathways(paths.subset(["neurons"]))
        assert sparse.domains == ["neurons"]
        assert torch.equal(sparse(ids, domain="neurons").logits, before)
        sparse.set_pathways(paths.subset(["neurons"]).merged(paths.subset(["both"])))
        assert torch.equal(sparse(ids, domain="neurons").logits, before)
        assert not torch.equal(sparse(ids, domain="both").logits, before)


def test_tables_speak_of_experts(routed):
    model, _ = routed
    tables = model.pathways.sections()
    assert tables[-1].title == "Routed experts kept"
    assert any("4 x 5" in cell for row in tables[-1].rows for cell in row)
    assert 0 < model.pathways.expert_sparsity("both") < 1
    assert "qwen3_moe without FFN blocks, 2 layers with routed experts" in repr(
        model.pathways.base.summary
    )
