"""The iso-FLOP experiment: equal FLOPs, stored runs, a table and a picture."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hf_sparse_pathways.errors import PathwaysError
from tests.texts import documents

ROOT = Path(__file__).parents[2]


@pytest.fixture
def isoflop(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import isoflop

    yield isoflop
    for name in ("isoflop", "isoflop_training"):
        del sys.modules[name]


@pytest.fixture
def run(isoflop, monkeypatch, tmp_path):
    for name in ("code", "law"):
        (tmp_path / name).mkdir()
        for index, text in enumerate(documents(name, count=20)):
            (tmp_path / name / f"{index}.txt").write_text(text)

    def call(*options):
        arguments = ["--text", tmp_path / "code", tmp_path / "law", "--output", tmp_path / "out"]
        arguments += ["--d-model", 32, "--layers", 1, "--length", 16, "--batch", 2]
        arguments += ["--scored", 64, "--budgets", 2e7, 8e7, *options]
        monkeypatch.setattr(sys, "argv", ["isoflop.py", *map(str, arguments)])
        isoflop.main()
        return tmp_path / "out"

    return call


@pytest.mark.usefixtures("isoflop")
@pytest.mark.parametrize("d_model", [32, 128])
def test_kinds_have_equal_flops_per_token(d_model):
    import isoflop_training as training

    shape = training.Shape(d_model=d_model, d_key=8)
    most = 16 * d_model**2
    found = {kind: training.make_ffn(kind, shape).flops(d_model) for kind in training.KINDS}
    assert all(0.9 * most <= flops <= most for flops in found.values()), found


def test_small_runs_are_stored_and_gone_on_with(run, monkeypatch, capsys):
    kinds = ["--kinds", "sgatlin", "swiglu", "--seeds", 0, 1, "--learning-rates", 1e-3, 1e-2]
    out = run(*kinds)
    runs = sorted((out / "runs").rglob("*.json"))
    assert len(runs) == 2 * (2 * 2 + 1), "each kind's other learning rate was tried once"
    for path in runs:
        made = json.loads(path.read_text())
        step = 3 * made["forward_flops_per_token"] * 2 * 16
        assert made["flops"] == made["tokens"] // 32 * step
        assert made["budget"] - step < made["flops"] <= made["budget"]
        assert 0 < made["test"] < 8
    table = (out / "isoflop.md").read_text()
    assert "| sgatlin |" in table
    assert "8.0e+07 FLOPs" in table
    read = [json.loads(path.read_text()) for path in runs]
    own = sorted({r["tokens"] for r in read if r["kind"] == "sgatlin"})
    assert f"sgatlin was trained on {own[0]:,}, {own[1]:,} bytes, the others" in table
    assert table.count("(end) |") == 2, "both of the two rates that were tried are ends"
    assert (out / "isoflop.png").stat().st_size > 5000
    assert "perplexity" in capsys.readouterr().out
    import isoflop

    before = {path: path.stat().st_mtime_ns for path in runs}
    monkeypatch.setattr(isoflop, "train", None)  # not needed any more
    run(*kinds)
    assert {path: path.stat().st_mtime_ns for path in runs} == before
    assert (out / "isoflop.md").read_text() == table


def test_another_text_and_near_budgets_are_other_runs(run):
    chosen = ["--kinds", "mlp", "--seeds", 0, "--learning-rates", 1e-2, "--budgets"]
    out = run(*chosen, 2e7, 2.0001e7)
    first = (out / "isoflop.md").read_text()
    assert len(list((out / "runs").rglob("*.json"))) == 2
    for place in (out.parent / "code").iterdir():
        place.write_text(place.read_text().upper())
    run(*chosen, 2e7, 2.0001e7)
    assert len(list((out / "runs").rglob("*.json"))) == 4
    assert (out / "isoflop.md").read_text() != first


def test_what_does_not_fit_is_said(run, capsys):
    with pytest.raises(PathwaysError, match="smaller --length"):
        run("--length", 100_000, "--scored", 100_000)
    for options, told in (
        (("--budgets", -1), "above 0"),
        (("--batch", 0), "above 0"),
        (("--learning-rates", "nan"), "above 0"),
        (("--scored", 8), "--scored takes"),
        (("--seeds", 0, 0), "each seed once"),
    ):
        with pytest.raises(SystemExit):
            run(*options)
        assert told in capsys.readouterr().err


def test_several_runs_at_a_time_are_the_same_runs(isoflop, run, monkeypatch):
    chosen = ["--kinds", "mlp", "swiglu", "--seeds", 0, "--learning-rates", 1e-2]
    with monkeypatch.context() as here:
        here.setattr(isoflop, "train", None)  # of this process: others import their own
        out = run(*chosen, "--processes", 2)
    found = {path.name: json.loads(path.read_text()) for path in (out / "runs").rglob("*.json")}
    assert len(found) == 4
    for path in (out / "runs").rglob("*.json"):
        path.unlink()
    run(*chosen)
    again = {path.name: json.loads(path.read_text()) for path in (out / "runs").rglob("*.json")}
    assert again.keys() == found.keys()
    for name, own in again.items():
        assert abs(own["test"] - found[name]["test"]) < 1e-3


def test_a_run_that_fails_ends_the_others(isoflop, tmp_path):
    shape = isoflop.Shape(d_model=32, layers=1, length=16, batch=2)
    text = isoflop.Text(b"some text " * 50, b"more " * 50, b"other " * 50)

    def run(kind, flops):
        return isoflop.Run(kind=kind, flops=flops, seed=0, learning_rate=1e-2, shape=shape)

    endless = {tmp_path / f"{flops:g}": run("mlp", flops) for flops in (1e15, 2e15, 3e15)}
    with pytest.raises(KeyError, match="nonsense"):
        isoflop.train_all({tmp_path / "x": run("nonsense", 9e15), **endless}, text, 64, 2)
    assert not list(tmp_path.iterdir())


def test_no_process_outlives_one_that_is_stopped(tmp_path):
    (tmp_path / "text").mkdir()
    for index in range(20):
        (tmp_path / "text" / f"{index}.txt").write_text(f"document {index:02} " * 50)
    command = [sys.executable, ROOT / "benchmarks" / "isoflop.py", "--text", tmp_path / "text"]
    command += ["--output", tmp_path / "out", "--processes", "2", "--budgets", "1e15"]
    with subprocess.Popen(command) as started:
        own = psutil.Process(started.pid)
        while len(running := own.children(recursive=True)) < 3:  # a tracker of theirs is one
            assert started.poll() is None
            time.sleep(0.1)
        started.terminate()
        assert started.wait(60) == 1
    _, alive = psutil.wait_procs(running, timeout=30)
    for process in alive:
        process.kill()
    assert not alive


def test_no_document_is_in_two_parts(isoflop, tmp_path):
    for index in range(40):
        (tmp_path / f"{index}.txt").write_text(f"document {index:02} " * 5)
    text = isoflop.read_text([str(tmp_path)])
    parts = [set(bytes(part.tolist()).split(b"\0")) - {b""} for part in text.tensors.values()]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 40
    assert [len(part) for part in parts] == [32, 4, 4]


@pytest.mark.usefixtures("isoflop")
def test_training_learns_and_is_repeated_by_the_seed():
    import isoflop_training as training

    data = bytes(range(97, 117)) * 50
    text = training.Text(data, data, data)
    shape = training.Shape(d_model=32, layers=1, length=32, batch=4, n_experts=16, d_key=8)

    def loss(flops, seed=0):
        run = training.Run(kind="swiglu", flops=flops, seed=seed, learning_rate=1e-2, shape=shape)
        return training.train(run, text, 256)["test"]

    few, many = loss(3e7), loss(1e9)
    assert many < 0.5 * few
    assert loss(3e7) == few
    assert loss(3e7, seed=1) != few
