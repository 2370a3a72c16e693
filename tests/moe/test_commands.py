"""The commands on mixture-of-experts models, of routed experts alone and with others beside."""

import json

import pytest

import hf_sparse_pathways as sp
from hf_sparse_pathways.measure.analysis import Analysis
from tests.cli.commands import assert_error, run, run_well
from tests.moe.architectures import build_moe
from tests.texts import save_documents, tiny_tokenizer

FEW = ("--max-tokens", "400", "--max-length", "32")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    names = ("code", "law")
    places = [save_documents(root / name, name, count=12, words=40) for name in names]
    return [part for n, p in zip(names, places, strict=True) for part in ("--domain", f"{n}={p}")]


@pytest.fixture(scope="module", params=["olmoe", "deepseek_v3"])
def built(request, tmp_path_factory, texts):
    root = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HOME", str(root))
        build_moe(request.param).save_pretrained(root / "dense")
        tiny_tokenizer().save_pretrained(root / "dense")
        options = ("--experts", "0.5", "--expert-neurons", "0.5", "--expert-score", "usage")
        more = () if request.param == "olmoe" else ("--quick",)
        said = run_well(
            "build", root / "dense", *texts, *FEW, *options, *more, "--output", root / "x"
        )
        yield root, said


def test_what_is_built_is_shown(built):
    root, _ = built
    facts = json.loads(run_well("info", root / "x", "--json"))
    assert facts["dense_experts"] == []
    layer = facts["experts"][0]
    kept = layer["kept"]["code"]
    assert len(kept["experts"]) == layer["experts"] // 2
    assert kept["neurons"] == layer["neurons"] // 2
    assert facts["domains"]["code"]["expert_sparsity"] == 0.75
    shown = run_well("info", root / "x")
    assert "routed experts kept" in shown
    assert "stay dense" not in shown


def test_it_is_measured_beside_a_random_choice_of_experts(built, texts):
    root, _ = built
    said = json.loads(
        run_well("evaluate", root / "x", *texts, "--max-tokens", "200", "--json", "--no-plots")
    )
    roles = {row["role"] for row in said["rows"]}
    assert {"dense", "pathway", "random", "pooled"} <= roles


def test_it_generates(built):
    root, _ = built
    asked = ("--prompt", "def return the value", "--max-new-tokens", "3")
    assert run_well("generate", root / "x", "--domain", "code", *asked)


def test_usage_is_analysed_and_read_again(built, texts, tmp_path):
    root, _ = built
    out = tmp_path / "analysis"
    said = run_well("analyze", root / "dense", *texts, *FEW, "--no-experiments", "--output", out)
    assert (out / "experts.png").is_file()
    assert "Routed experts on code" in said
    assert "Routed experts over domains" in said
    read = Analysis.from_dict(json.loads((out / "analysis.json").read_text()))
    for layer in read.experts:
        for domain in ("code", "law"):
            assert abs(sum(layer.usage[domain]) - layer.top_k) < 1e-9
            assert 1 <= layer.effective(domain) <= len(layer.variance) + 1e-9
            assert -1 <= layer.closest(domain) <= 1 + 1e-9
        assert layer.common("code", "code") == 1.0


def test_a_profile_tells_which_experts_are_used(built, texts, tmp_path):
    root, _ = built
    said = run_well("profile", root / "dense", *texts, *FEW, "--output", tmp_path / "profile")
    assert "Routed experts on law" in said
    assert "Routed experts over domains" in said


def test_what_does_not_fit_is_refused(built, texts, tmp_path):
    root, _ = built
    name = root.name.rstrip("0123456789")
    asked = ("build", root / "dense", *texts, "--output", tmp_path / "x")
    assert_error(run(*asked, "--experts", "1.5"), "experts", "share that stays")
    assert_error(run(*asked, "--expert-score", "raep"), "expert score", "reap")
    if name == "olmoe":
        assert_error(run(*asked), "routed experts alone", "--experts")
        assert_error(run(*asked, "--experts", "0.5", "--sparsity", "0.3"), "--sparsity")
        compared = ("compare", root / "dense", *texts, "--output", tmp_path / "compared")
        assert_error(run(*compared), "build --experts", "evaluate")
    else:
        asked = ("export", root / "x", "--domain", "code", "--output", tmp_path / "y")
        assert_error(run(*asked))
    model = sp.SparsePathwaysForCausalLM.from_pretrained(root / "x")
    with pytest.raises(sp.PathwaysError, match="routed experts"):
        sp.heal(model, tiny_tokenizer(), {"code": ["def return the value"] * 50})


def test_pages_and_plain_checkpoints_are_written(built, tmp_path):
    root, _ = built
    sp.write_html_report(root / "x", tmp_path / "page.html", plots=False)
    assert "Routed experts kept" in (tmp_path / "page.html").read_text()
    if root.name.startswith("olmoe"):
        run_well("export", root / "x", "--domain", "code", "--output", tmp_path / "y")
        config = json.loads((tmp_path / "y" / "config.json").read_text())
        assert (config["model_type"], config["num_experts"]) == ("olmoe", 4)
