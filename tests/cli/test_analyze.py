"""``analyze`` and ``evaluate --report``: folders that are whole, and errors that help."""

import json
import shutil

import pytest

from hf_sparse_pathways.cli import report_folder
from tests.cli.commands import assert_error, run, run_well
from tests.cli.conftest import save_dense

PICTURES = ("skippable", "specialisation", "overlap", "preservation", "selection")
SMALL = ("--max-tokens", 120, "--eval-tokens", 40, "--max-length", 32)


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def analysed(places, tmp_path_factory):
    root = tmp_path_factory.mktemp("analyses")
    run_well("analyze", places.dense, *places.texts, *SMALL, "--output", root / "llama")
    other = save_dense(root / "gpt2-model", "gpt2")
    options = ("--no-experiments", "--no-plots")
    run_well("analyze", other, *places.texts, *SMALL, *options, "--output", root / "gpt2")
    return root


def test_an_analysis_is_written_whole(analysed, places):
    assert _names(analysed / "llama") == sorted(
        ["analysis.json", "analysis.md", *(f"{name}.png" for name in PICTURES)]
    )
    assert _names(analysed / "gpt2") == ["analysis.json", "analysis.md"]
    values = json.loads((analysed / "llama" / "analysis.json").read_text())
    assert values["base"] == str(places.dense)
    assert values["tokens"] == {"code": 120, "law": 120}
    assert len(values["experiments"]["preservation"]) == 2 * 3 * 3
    assert len(values["experiments"]["selection"]) == 2 * 3 * 3
    assert values["shuffled"]["neurons"] == values["specialisation"]["neurons"] == 3 * 48
    text = (analysed / "llama" / "analysis.md").read_text()
    for name in PICTURES:
        assert f"({name}.png)" in text
    assert "What the paper states" in text
    assert _names(analysed) == ["gpt2", "gpt2-model", "llama"], "nothing else is left beside it"


def test_without_experiments_nothing_is_measured(analysed):
    values = json.loads((analysed / "gpt2" / "analysis.json").read_text())
    assert values["experiments"] is None
    assert values["shuffled"] is None


def test_entanglement_is_measured_on_demand(places, tmp_path):
    options = (*SMALL, "--entanglement", "--output", tmp_path / "out")
    run_well("analyze", places.dense, *places.texts, *options)
    values = json.loads((tmp_path / "out" / "analysis.json").read_text())["entanglement"]
    assert len(values["spreads"]) == 2 * 3 * 2
    assert len(values["relations"]) == 2 * 4
    assert len(values["harms"]) == 2 * 3
    assert {"entanglement.png", "relation.png"} <= {*_names(tmp_path / "out")}
    saved = tmp_path / "profile"
    taking = ("--max-tokens", 120, "--max-length", 32, "--entanglement", "--output", saved)
    run_well("profile", places.dense, *places.texts, *taking)
    again = run_well("analyze", places.dense, "--profile", saved, "--json")
    assert json.loads(again)["entanglement"]["spreads"] == values["spreads"]


def test_it_prints_tables_or_json(places):
    options = (*SMALL, "--no-experiments")
    shown = run_well("analyze", places.dense, *places.texts, *options)
    for word in ("Specialised neurons", "ratio > 2", "Layer roles", "Jaccard", "Amdahl"):
        assert word in shown
    values = json.loads(run_well("analyze", places.dense, *places.texts, *options, "--json"))
    assert set(values["tokens"]) == {"code", "law"}


def test_a_saved_profile_serves_with_and_without_text(places, tmp_path):
    saved = tmp_path / "profile"
    run_well("profile", places.dense, *places.texts, "--max-tokens", 60, "--output", saved)
    options = ("--profile", saved, "--json")
    bare = json.loads(run_well("analyze", places.dense, *options))
    assert bare["experiments"] is None
    assert bare["tokens"] == {"code": 60, "law": 60}
    measured = json.loads(
        run_well("analyze", places.dense, *options, *SMALL[2:], "--domain", f"code={places.code}")
    )
    assert {row["domain"] for row in measured["experiments"]["preservation"]} == {"code"}
    assert measured["specialisation"] == bare["specialisation"]
    assert {row["rule"] for row in measured["experiments"]["preservation"]} >= {"obs"}


def test_models_are_compared(analysed, tmp_path):
    both = ("--compare", analysed / "llama", "--compare", analysed / "gpt2")
    shown = run_well("analyze", *both, "--output", tmp_path / "both")
    assert "n" in shown
    assert _names(tmp_path / "both") == ["models.json", "models.md", "scale.png"]
    values = json.loads((tmp_path / "both" / "models.json").read_text())
    sizes = [model["parameters"] for model in values["models"]]
    assert sizes == sorted(sizes)
    assert [found["n"] for found in values["seen"]] == [2, 2]
    assert [found["interval"] for found in values["seen"]] == [None, None]
    assert [found["n"] for found in values["published"]] == [6, 6]
    text = (tmp_path / "both" / "models.md").read_text()
    assert "n = 2 is too small for an interval: this says nothing" in text or "vary" in text
    assert "paper: TinyLlama" in text
    assert json.loads(run_well("analyze", *both, "--json")) == values


ERRORS = {
    "nothing": ((), "Give a MODEL"),
    "no text": (("{dense}",), "--domain NAME=PATH"),
    "model and compare": (("{dense}", "--compare", "{llama}"), "give no MODEL"),
    "one to compare": (("--compare", "{llama}"), "at least two"),
    "no analysis": (("--compare", "{dense}", "--compare", "{llama}"), "analysis.json"),
    "percentile": (("{dense}", "{texts}", "--percentile", "100"), "percentile"),
    "no held-out text": (("{dense}", "{texts}", "--held-out", "0"), "--no-experiments"),
    "absent profile": (("{dense}", "--profile", "{dense}"), "profile.json"),
    "foreign output": (("{dense}", "{texts}", "--output", "{dense}"), "analysis.json"),
    "earlier output": (("{dense}", "{texts}", "--output", "{llama}"), "--overwrite"),
    "profile and how to take one": (
        ("{dense}", "{texts}", "--profile", "p", "--max-tokens", "9", "--held-out", "0.5"),
        "With --profile these do nothing: --max-tokens, --held-out.",
    ),
    "profile without text": (
        ("{dense}", "--profile", "p", "--eval-tokens", "9"),
        "With --profile these do nothing: --eval-tokens.",
    ),
    "compare and a seed": (
        ("--compare", "{llama}", "--compare", "{llama}", "--seed", "0"),
        "With --compare these do nothing: --seed.",
    ),
    "unknown dtype": (("{dense}", "{texts}", "--dtype", "float31"), "float32"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_says_what_to_do(kind, places, analysed):
    given, part = ERRORS[kind]
    arguments = []
    for argument in given:
        if argument == "{texts}":
            arguments.extend(places.texts)
        else:
            arguments.append(argument.format(dense=places.dense, llama=analysed / "llama"))
    before = _names(analysed / "llama")
    assert_error(run("analyze", *arguments), part)
    assert _names(analysed / "llama") == before


def _damaged(analysed, folder, change):
    shutil.copytree(analysed / "llama", folder)
    path = folder / "analysis.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return folder


DAMAGE = {
    "newer": (lambda values: values.update(format=2), "format 2"),
    "no size": (lambda values: values.pop("size"), "damaged"),
    "one domain": (lambda values: values.update(specialisation=None), "one domain"),
    "other domains": (lambda values: values["tokens"].update(art=5), "art"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_cannot_be_compared_is_refused(kind, analysed, tmp_path):
    change, part = DAMAGE[kind]
    other = _damaged(analysed, tmp_path / "other", change)
    assert_error(run("analyze", "--compare", analysed / "llama", "--compare", other), part)


def test_a_profile_of_another_model_is_refused(places, analysed, tmp_path):
    saved = tmp_path / "profile"
    options = ("--max-tokens", 60, "--no-grams", "--output", saved)
    run_well("profile", places.dense, *places.texts, *options)
    assert_error(run("analyze", analysed / "gpt2-model", "--profile", saved), "gpt2")


def test_a_failing_picture_leaves_nothing(places, tmp_path, monkeypatch):
    class Broken:
        @staticmethod
        def draw_all(analysis):
            return {"one": analysis}

        @staticmethod
        def save_figures(_figures, folder):
            (folder / "one.png").write_bytes(b"half")
            raise OSError("disk full")

    monkeypatch.setattr(report_folder, "load_plots", lambda: Broken)
    monkeypatch.setattr("hf_sparse_pathways.cli.analyze.load_plots", lambda: Broken)
    options = (*SMALL, "--no-experiments", "--output", tmp_path / "out")
    assert_error(run("analyze", places.dense, *places.texts, *options), "disk full")
    assert _names(tmp_path) == []


def test_without_matplotlib_it_is_said_before_any_work(places, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "hf_sparse_pathways.measure.plots", None)
    monkeypatch.delattr("hf_sparse_pathways.measure.plots", raising=False)
    options = (*SMALL, "--no-experiments", "--output", tmp_path / "out")
    ran = run("analyze", tmp_path / "absent", *places.texts, *options)
    assert_error(ran, "hf-sparse-pathways[plots]", "--no-plots")
    run_well("analyze", places.dense, *places.texts, *options, "--no-plots")


def test_evaluate_writes_a_report(places, tmp_path):
    folder = tmp_path / "report"
    options = ("--max-length", 64, "--max-tokens", 40, "--report", folder)
    printed = json.loads(run_well("evaluate", places.built, *places.texts, *options, "--json"))
    assert _names(folder) == ["cosines.png", "matrix.png", "ratios.png", "report.json", "report.md"]
    assert json.loads((folder / "report.json").read_text()) == printed
    text = (folder / "report.md").read_text()
    assert "(ratios.png)" in text
    assert "| pathway code |" in text
    assert_error(run("evaluate", places.built, *places.texts, *options), "--overwrite")
    run_well("evaluate", places.built, *places.texts, *options, "--overwrite", "--no-controls")
    assert _names(folder) == ["cosines.png", "ratios.png", "report.json", "report.md"]
    taken = ("evaluate", places.built, *places.texts, "--report", places.dense)
    assert_error(run(*taken), "report.json")


@pytest.mark.parametrize("plots", [False, True])
def test_without_matplotlib_a_report_is_written_without_pictures(
    places, tmp_path, monkeypatch, plots
):
    monkeypatch.setitem(__import__("sys").modules, "hf_sparse_pathways.measure.plots", None)
    monkeypatch.delattr("hf_sparse_pathways.measure.plots", raising=False)
    options = ("--max-tokens", 40, "--no-controls", "--json", "--report", tmp_path / "report")
    wanted = () if plots else ("--no-plots",)
    ran = run("evaluate", places.built, *places.texts, *options, *wanted)
    assert ran.status == 0, ran.err
    assert _names(tmp_path / "report") == ["report.json", "report.md"]
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == json.loads(ran.out)
    assert "| pathway code |" in (tmp_path / "report" / "report.md").read_text()
    assert ".png" not in (tmp_path / "report" / "report.md").read_text()
    assert ("hf-sparse-pathways[plots]" in ran.err) == plots
    assert ("--no-plots" in ran.err) == plots


def test_pictures_can_be_left_out(places, tmp_path):
    options = ("--max-tokens", 40, "--no-plots", "--report", tmp_path / "report")
    run_well("evaluate", places.built, *places.texts, *options)
    assert _names(tmp_path / "report") == ["report.json", "report.md"]


def test_the_command_has_help():
    assert "analyze [OPTIONS] [MODEL]" in run_well("analyze", "--help")
    assert "--report" in run_well("evaluate", "--help")
