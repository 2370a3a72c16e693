"""``sparse-pathways compare``: tables, going on, and what it refuses."""

import json

import pytest

from tests.cli.commands import assert_error, run, run_well

SMALL = ("--max-tokens", 200)


def test_compare_writes_its_tables_and_goes_on(places, tmp_path):
    words = ("--sparsity", "0.5", "--method", "wanda", "--method", "griffin", *SMALL)
    words = (*words, "--output", tmp_path / "out")
    said = run_well("compare", places.dense, *places.texts, *words)
    assert "50% of the FFN FLOPs removed" in said
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert {row["method"] for row in report["rows"]} == {"dense", "wanda", "griffin"}
    assert "| griffin | 50.0% |" in (tmp_path / "out" / "comparison.md").read_text()
    assert run_well("compare", places.dense, *places.texts, *words, "--method", "teal")


def test_compare_leaves_other_folders_alone(places, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    words = (*places.texts, "--output")
    assert_error(run("compare", places.dense, *words, tmp_path), "was not written by this command")
    assert_error(run("compare", places.dense, *words, tmp_path / "notes.txt"), "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("method", ["clusters-2", "skip-50", "clusters-16-shared", "mixture-8"])
def test_compare_takes_what_computes_other_neurons_for_other_tokens(method, places, tmp_path):
    words = ("--sparsity", "0.5", "--method", "pathway", "--method", method, *SMALL)
    run_well("compare", places.dense, *places.texts, *words, "--output", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    flops = {row["quality"]["flops"] for row in rows if row["method"] == method}
    assert flops
    assert max(flops) <= 0.5


def test_compare_takes_a_bypass(places, tmp_path):
    words = ("--sparsity", "0.3", "--compensation", "refit+bias+bypass:2", *SMALL)
    words = (*words, "--method", "pathway", "--method", "one-shot", "--output", tmp_path / "out")
    said = run_well("compare", places.dense, *places.texts, *words)
    assert "one-shot" in said


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--method", "wand"), "Did you mean 'wanda'"),
        (("--sparsity", "0.3,x"), "0.2,0.3,0.5"),
        (("--sparsity", "1.5"), "[0, 1)"),
        (("--held-out", "0"), "--held-out"),
        (("--compensation", "refitt"), "'refitt'"),
        (("--allocation", "fair"), "fair"),
        (("--precision", "half"), "half"),
    ],
)
def test_compare_refuses_what_does_not_fit(places, tmp_path, words, part):
    words = (*places.texts, *words, "--output", tmp_path / "out")
    assert_error(run("compare", places.dense, *words), part)
    assert not (tmp_path / "out").exists()
