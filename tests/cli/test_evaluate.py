"""``evaluate --pathways``: sets from full checkpoints and pathways-only folders in one report."""

import json

import pytest

import hf_sparse_pathways as sp
from hf_sparse_pathways.cli.evaluate import parse_sets
from hf_sparse_pathways.errors import PathwaysError
from tests.cli.commands import assert_error, content, run, run_well
from tests.cli.conftest import save_dense

SMALL = ("--max-tokens", 60, "--max-length", 64)


@pytest.fixture(scope="module")
def others(places, tmp_path_factory):
    """A full checkpoint at another sparsity, and a folder of pathways of another method."""
    root = tmp_path_factory.mktemp("others")
    build = ("build", places.dense, *places.texts, "--allocation", "uniform")
    run_well(*build, "--sparsity", "0.25", "--output", root / "quarter")
    run_well(*build, "--method", "flap", "--sparsity", "0.5", "--output", root / "whole")
    sp.Pathways.from_pretrained(root / "whole").save_pretrained(root / "flap")
    return root


def test_sets_stand_in_one_report(places, others, tmp_path):
    sets = ("--pathways", others / "quarter", "--pathways", others / "flap")
    options = (*SMALL, "--report", tmp_path / "report")
    before = content(others)
    out = run_well("evaluate", places.built, *places.texts, *sets, *options, "--json")
    report = json.loads(out)
    assert content(others) == before
    assert [row["set"] for row in report["rows"] if row["role"] == "dense"] == [None] * 2
    roles = [(row["set"], row["role"]) for row in report["rows"] if row["domain"] == "law"]
    expected = [(name, role) for name in ("built", "quarter", "flap") for role in ROLES]
    assert roles[1:] == expected
    flops = {row["set"]: row["flops"] for row in report["rows"] if row["role"] == "pathway"}
    assert flops == pytest.approx({"built": 0.5, "quarter": 0.75, "flap": 0.5})
    folder = tmp_path / "report"
    names = ["cosines.png", "matrix.png", "ratios.png", "report.json", "report.md"]
    assert sorted(path.name for path in folder.iterdir()) == names
    text = (folder / "report.md").read_text()
    assert text.count("Perplexity ratio to dense: text (rows)") == 3
    assert "| pathway law | quarter | 75.0% |" in text
    alone = json.loads(run_well("evaluate", others / "quarter", *places.texts, *SMALL, "--json"))
    mine = [row for row in report["rows"] if row["set"] in (None, "quarter")]
    assert [{**row, "set": None} for row in mine] == alone["rows"]


ROLES = ("pathway", "pooled", "random", "other")


def test_a_set_can_be_given_a_label(places, others):
    sets = ("--pathways", f"a half={others / 'flap'}")
    shown = run_well("evaluate", places.built, *places.texts, *sets, *SMALL, "--no-controls")
    assert shown.count("a half") == 2
    assert shown.count("pathway code") == 2


def test_report_json_has_its_settings(places):
    options = ("--max-tokens", 60, "--seed", 3, "--no-controls", "--batch-size", 2, "--json")
    settings = json.loads(run_well("evaluate", places.built, *places.texts, *options))["settings"]
    versions = settings.pop("versions")
    assert settings == {
        "max_tokens": 60,
        "max_length": 128,
        "batch_size": 2,
        "seed": 3,
        "seen": "exclude",
        "controls": False,
        "dtype": "float32",
        "adapters": [],
    }
    assert sorted(versions) == ["hf-sparse-pathways", "torch", "transformers"]


def test_what_does_not_fit_is_one_line(places, others, tmp_path):
    def fails(*sets, texts=places.texts):
        return run("evaluate", places.built, *texts, *sets, *SMALL, "--report", tmp_path / "out")

    same = tmp_path / "built"
    sp.Pathways.from_pretrained(others / "flap").save_pretrained(same)
    assert_error(fails("--pathways", same), "called 'built'", "--pathways LABEL=")
    twice = ("--pathways", others / "flap", "--pathways", f"flap={others / 'quarter'}")
    assert_error(fails(*twice), "called 'flap'")
    assert_error(fails("--pathways", f"={same}"), "LABEL=DIR")
    assert_error(fails("--pathways", ""), "LABEL=DIR")
    assert_error(fails("--pathways", tmp_path / "absent"), "absent")
    assert_error(fails("--pathways", places.dense), "pathways.json")
    narrow = tmp_path / "narrow"
    sp.Pathways.from_pretrained(same).subset(["code"]).save_pretrained(narrow)
    assert_error(fails("--pathways", narrow), "'narrow' lacks the domain 'law'")
    save_dense(tmp_path / "gpt2", "gpt2")
    foreign = ("--sparsity", "0.5", "--max-length", 64, "--output", tmp_path / "foreign")
    run_well("build", tmp_path / "gpt2", *places.texts, *foreign)
    assert_error(fails("--pathways", tmp_path / "foreign"), "'foreign' does not fit", "gpt2")
    assert not (tmp_path / "out").exists()


def test_labels_are_read_from_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "share=0.5").mkdir()
    assert parse_sets(["share=0.5", "a=b=c", "org/name", "deep/er/"], "own") == {
        "share=0.5": "share=0.5",
        "a": "b=c",
        "name": "org/name",
        "er": "deep/er/",
    }
    assert parse_sets(["."], "own") == {tmp_path.name: "."}
    with pytest.raises(PathwaysError, match="called 'own'"):
        parse_sets(["x/own"], "own")
