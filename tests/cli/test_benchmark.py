"""``sparse-pathways benchmark``: what it prints and writes, on tiny models."""

import json

import pytest
import torch

from tests.cli.commands import assert_error, run, run_well

SMALL = ("--prompt-tokens", 2, "--new-tokens", 2, "--rounds", 1, "--budget", 0, "--batch", 1)
COMPACT = ("--executor", "compact")


def _record(*arguments):
    return json.loads(run_well("benchmark", *arguments, "--json"))


def test_the_options_say_what_is_timed(places, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    options = (*SMALL, "--prefill", 5, "--executor", "masked", "--domain", "law", "--threads", 1)
    record = _record(places.built, *options, "--sparsity", "25%,0.75")
    assert [timing["label"] for timing in record["timings"]] == [
        "decode, batch 1",
        "prefill, 5 tokens",
        "FFN blocks alone, 5 tokens",
    ]
    assert {arm["executor"] for arm in record["arms"]} == {None, "masked"}
    found = {arm["pathway"]: arm["sparsity"] for arm in record["arms"] if arm["pathway"]}
    assert found == {"law": 0.5, "random 0.25": 0.25, "random 0.75": 0.75}
    assert threads == [1]


def test_the_terminal_shows_tables(places):
    shown = run_well("benchmark", places.built, *SMALL, *COMPACT)
    assert 'executor="auto" is' in shown
    assert "Decode, batch 1: 1 round, 2 new tokens" in shown
    assert "compact, code (-50%)" in shown
    assert "Switching between two resident pathways" in shown
    assert "Resident bytes per domain" in shown


def test_a_report_is_a_folder(places, tmp_path):
    folder = tmp_path / "report"
    run_well("benchmark", places.built, *SMALL, *COMPACT, "--report", folder)
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md", "plot.png"}
    assert json.loads((folder / "report.json").read_text())["base"] == str(places.dense)
    assert "![plot](plot.png)" in (folder / "report.md").read_text()
    again = ("benchmark", places.built, *SMALL, *COMPACT, "--report", folder)
    assert_error(run(*again), "--overwrite")
    run_well(*again, "--overwrite", "--no-plots")
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md"}


def test_a_dense_folder_or_a_shape_is_timed_with_random_masks(places):
    record = _record(places.dense, *SMALL, *COMPACT, "--sparsity", 0.5)
    assert record["base"] == str(places.dense)
    record = _record("--shape", "2x32x48", *SMALL, *COMPACT, "--sparsity", 0.5)
    assert record["base"] == "random Llama 2x32x48"
    assert {arm["pathway"] for arm in record["arms"]} == {None, "random 0.5"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [False, True])
def test_a_dtype_can_be_chosen(places, dtype, shape):
    source = ("--shape", "2x32x48") if shape else (places.built,)
    record = _record(*source, *SMALL, *COMPACT, "--sparsity", 0.5, "--dtype", dtype)
    assert record["dtype"] == dtype


WRONG = {
    "neither": (("--sparsity", 0.5), "neither"),
    "both": (("{built}", "--shape", "2x32x48"), "both"),
    "no shape": (("--shape", "2x32", "--sparsity", 0.5), "LAYERSxD_MODELxD_FF"),
    "shape without masks": (("--shape", "2x32x48"), "--sparsity"),
    "shape with a domain": (("--shape", "2x32x48", "--sparsity", 0.5, "--domain", "x"), "--domain"),
    "dense without masks": (("{dense}",), "--sparsity"),
    "dtype": (("{built}", "--dtype", "int3"), "int3"),
    "dtype of a shape": (("--shape", "2x32x48", "--sparsity", 0.5, "--dtype", "f"), "'float16'"),
    "executor": (("{built}", "--executor", "compct"), "'compact'"),
    "sparsity": (("{built}", "--sparsity", "half"), "half"),
    "positions": (("{built}", "--prefill", 4096), "positions"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_one_line(places, kind):
    arguments, part = WRONG[kind]
    filled = [str(a).format(built=places.built, dense=places.dense) for a in arguments]
    assert_error(run("benchmark", *filled), part)


@pytest.mark.parametrize(
    "options", [("--batch", 0), ("--prefill", 0), ("--new-tokens", 1), ("--budget", -1)], ids=str
)
def test_wrong_usage_is_status_2(options):
    assert run("benchmark", "x", *options).status == 2
