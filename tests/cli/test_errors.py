"""An error is one line and status 1; nothing half-made is left, nothing foreign is touched."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_sparse_pathways.cli import build as build_command
from hf_sparse_pathways.cli import heal as heal_command
from hf_sparse_pathways.cli import profile as profile_command
from hf_sparse_pathways.cli.tables import print_table
from tests.cli.commands import assert_error, content, run, run_well
from tests.cli.conftest import save_dense


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


BUILDS = {
    "no such model": (("{tmp}/absent", "{texts}"), "absent"),
    "no such repository": (("nobody/no-such-model-at-all", "{texts}"), "huggingface"),
    "no domain": (("{dense}",), "--domain"),
    "domain without =": (("{dense}", "--domain", "code"), "NAME=PATH"),
    "domain without a name": (("{dense}", "--domain", "=x"), "NAME=PATH"),
    "domain without a path": (("{dense}", "--domain", "code="), "NAME=PATH"),
    "domain twice": (("{dense}", "--domain", "code={code}", "--domain", "code=x"), "twice"),
    "domain and profile": (("{dense}", "{texts}", "--profile", "x"), "--profile"),
    "bad domain name": (("{dense}", "--domain", "../code={code}"), "../code"),
    "reserved domain name": (("{dense}", "--domain", "pooled={code}"), "pooled"),
    "absent text": (("{dense}", "--domain", "code={tmp}/absent.txt"), "absent.txt"),
    "text too short": (("{dense}", "--domain", "code={code}/code000.txt"), "too few"),
    "sparsity 1": (("{dense}", "{texts}", "--sparsity", "1"), "sparsity"),
    "sparsity negative": (("{dense}", "{texts}", "--sparsity=-0.1"), "sparsity"),
    "sparsity NaN": (("{dense}", "{texts}", "--sparsity", "nan"), "sparsity"),
    "sparsity words": (("{dense}", "{texts}", "--sparsity", "much"), "--sparsity"),
    "sparsity list": (("{dense}", "{texts}", "--sparsity", "0.1,0.2"), "3 FFN blocks"),
    "sparsity comma": (("{dense}", "{texts}", "--sparsity", "0.1,"), "--sparsity"),
    "ridge words": (("{dense}", "{texts}", "--ridge", "some"), "--ridge"),
    "ridge 0": (("{dense}", "{texts}", "--ridge", "0"), "ridge"),
    "two rules": (("{dense}", "{texts}", "--sparsity", "0.1", "--percentile", "5"), "not both"),
    "percentile 100": (("{dense}", "{texts}", "--percentile", "100"), "percentile"),
    "unknown pool": (("{dense}", "{texts}", "--percentile", "5", "--pool", "x"), "pool"),
    "unknown score": (("{dense}", "{texts}", "--score", "wnda"), "Did you mean 'wanda'?"),
    "unknown dtype": (("{dense}", "{texts}", "--dtype", "float31"), "float32"),
    "unknown default": (("{dense}", "{texts}", "--default-domain", "lwa"), "'law'"),
    "held out 1": (("{dense}", "{texts}", "--held-out", "1"), "held_out"),
    "no tokens": (("{dense}", "{texts}", "--max-tokens", "0"), "max_tokens"),
    "few tokens": (("{dense}", "{texts}", "--max-tokens", "5"), "5 tokens"),
    "no length": (("{dense}", "{texts}", "--max-length", "0"), "max_length"),
    "length 1": (("{dense}", "{texts}", "--max-length", "1"), "max_length (--max-length)"),
    "no memory": (("{dense}", "{texts}", "--max-memory", "1"), "raise max_memory (--max-memory)"),
    "no batch": (("{dense}", "{texts}", "--batch-size", "0"), "batch_size"),
    "absent profile": (("{dense}", "--profile", "{tmp}/absent"), "profile.json"),
}


def _filled(arguments, places, tmp):
    words = []
    for word in arguments:
        if word == "{texts}":
            words.extend(places.texts)
        else:
            names = {"dense": places.dense, "code": places.code, "built": places.built}
            words.append(word.format(**names, tmp=tmp))
    return words


@pytest.mark.parametrize("kind", BUILDS)
def test_a_failed_build_is_one_line_and_leaves_nothing(places, tmp_path, kind):
    arguments, part = BUILDS[kind]
    words = _filled(arguments, places, tmp_path)
    assert_error(run("build", *words, "--output", tmp_path / "deep" / "out"), part)
    assert not list(tmp_path.rglob("*out*"))


RUNS = {
    "evaluate an unknown domain": (("evaluate", "{built}", "--domain", "cod={code}"), "'code'"),
    "evaluate without =": (("evaluate", "{built}", "--domain", "code"), "NAME=PATH"),
    "evaluate seen text": (
        ("evaluate", "{built}", "--domain", "code={code}", "--seen", "both"),
        "'include'",
    ),
    "evaluate a plain model": (("evaluate", "{dense}", "--domain", "code={code}"), "pathways.json"),
    "generate an unknown domain": (
        ("generate", "{built}", "--prompt", "a", "--domain", "lw"),
        "'law'",
    ),
    "generate both": (
        ("generate", "{built}", "--prompt", "a", "--domain", "law", "--dense"),
        "both",
    ),
    "generate from nothing": (("generate", "{built}", "--prompt", ""), "empty"),
    "generate by an unknown executor": (
        ("generate", "{built}", "--prompt", "a", "--executor", "compct"),
        "'compact'",
    ),
    "generate with a plain model": (("generate", "{dense}", "--prompt", "a"), "pathways.json"),
    "benchmark an unknown domain": (("benchmark", "{built}", "--domain", "cod"), "'code'"),
    "benchmark sparsity 1": (("benchmark", "{built}", "--sparsity", "1"), "sparsity"),
    "info of nothing": (("info", "{tmp}/absent"), "absent"),
    "info of a plain model": (("info", "{dense}"), "pathways.json"),
    "info of a file": (("info", "{code}/code000.txt"), "code000.txt"),
    "info of no repository": (("info", "not a repository !"), "not a repository !"),
}  # fmt: skip


@pytest.mark.parametrize("kind", RUNS)
def test_a_failed_command_is_one_line(places, tmp_path, kind):
    arguments, part = RUNS[kind]
    assert_error(run(*_filled(arguments, places, tmp_path)), part)


def _cut(path, fraction=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])


def _narrow(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**weights, name: weights[name][:, :-1].contiguous()}, folder / "model.safetensors")


def _set(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


DAMAGES = {
    "weights cut": lambda f: _cut(f / "model.safetensors"),
    "weights empty": lambda f: _cut(f / "model.safetensors", 0),
    "weights absent": lambda f: (f / "model.safetensors").unlink(),
    "weights of another shape": _narrow,
    "config cut": lambda f: _cut(f / "config.json"),
    "config absent": lambda f: (f / "config.json").unlink(),
    "config of a newer format": lambda f: _set(f / "config.json", pathways_format=99),
    "config of another base": lambda f: _set(f / "config.json", base_model_type="no_such_type"),
    "tokenizer cut": lambda f: _cut(f / "tokenizer.json"),
    "tokenizer absent": lambda f: [path.unlink() for path in f.glob("tokenizer*")],
    "pathways.json cut": lambda f: _cut(f / "pathways.json"),
    "pathways.safetensors cut": lambda f: _cut(f / "pathways.safetensors"),
    "pathways absent": lambda f: (f / "pathways.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_corrupt_folder_is_one_line(copied, damage):
    DAMAGES[damage](copied)
    assert_error(run("generate", copied, "--prompt", "the court", "--domain", "law"))


@pytest.mark.parametrize(
    "damage", [name for name in DAMAGES if name.startswith(("weights", "tokenizer", "config cut"))]
)
def test_a_corrupt_base_is_one_line(places, tmp_path, damage):
    dense = Path(shutil.copytree(places.dense, tmp_path / "dense"))
    DAMAGES[damage](dense)
    assert_error(run("build", dense, *places.texts, "--output", tmp_path / "out"))
    assert os.listdir(tmp_path) == ["dense"]


def test_a_profile_of_another_model_is_one_line(places, tmp_path):
    save_dense(tmp_path / "other", "gpt2")
    options = ("--max-length", 64, "--output", tmp_path / "profile")
    run_well("profile", tmp_path / "other", *places.texts, *options)
    ran = run("build", places.dense, "--profile", tmp_path / "profile", "--output", tmp_path / "o")
    assert_error(ran, "gpt2", "llama")


def test_windows_beyond_the_positions_are_one_line(places, tmp_path):
    save_dense(tmp_path / "dense", "gpt2")
    long = tmp_path / "long.txt"
    long.write_text(" ".join(path.read_text() for path in places.code.iterdir()) * 50)
    options = ("--domain", f"code={long}", "--output", tmp_path / "out", "--max-length", 500)
    assert_error(run("build", tmp_path / "dense", *options))


def test_a_nan_model_is_one_line_and_leaves_nothing(places, tmp_path):
    dense = Path(shutil.copytree(places.dense, tmp_path / "dense"))
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0] = torch.nan
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    assert_error(run("build", dense, *places.texts, "--output", tmp_path / "out"), "NaN")
    assert os.listdir(tmp_path) == ["dense"]


def _build(places, output, *options):
    return run("build", places.dense, *places.texts, "--output", output, *options)


def test_an_empty_folder_may_be_the_output(places, tmp_path):
    (tmp_path / "out").mkdir()
    assert _build(places, tmp_path / "out").status == 0
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "pathways.json").is_file()


def test_an_earlier_output_is_replaced_only_if_asked(places, copied):
    (copied / "leftover.txt").write_text("of the earlier output")
    before = content(copied)
    assert_error(_build(places, copied), "--overwrite")
    assert content(copied) == before
    assert _build(places, copied, "--overwrite", "--sparsity", "0.25").status == 0
    assert not (copied / "leftover.txt").exists()
    assert json.loads(run_well("info", copied, "--json"))["domains"]["law"]["sparsity"] == 0.25
    assert os.listdir(copied.parent) == ["copied"]


FOREIGN = {
    "a folder with a file": lambda path: (path.mkdir(), (path / "notes.txt").write_text("mine")),
    "a folder with a folder": lambda path: (path / "inner").mkdir(parents=True),
    "a hidden file": lambda path: (path.mkdir(), (path / ".git").write_text("mine")),
    "a file": lambda path: path.write_text("mine"),
    "an empty file": lambda path: path.write_text(""),
    "the marker is a folder": lambda path: (path / "pathways.json").mkdir(parents=True),
}


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["plain", "overwrite"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_places_are_never_touched(places, tmp_path, kind, options):
    FOREIGN[kind](tmp_path / "out")
    before = content(tmp_path)
    assert_error(_build(places, tmp_path / "out", *options), tmp_path / "out")
    assert content(tmp_path) == before


def test_the_base_is_never_overwritten(places, tmp_path):
    dense = Path(shutil.copytree(places.dense, tmp_path / "dense"))
    before = content(tmp_path)
    assert_error(run("build", dense, *places.texts, "--output", dense, "--overwrite"))
    assert content(tmp_path) == before


@pytest.mark.parametrize("command", ["profile", "build"])
def test_one_commands_output_is_foreign_to_the_other(places, tmp_path, command):
    other = {"profile": "build", "build": "profile"}[command]
    arguments = (places.dense, *places.texts, "--output", tmp_path / "out")
    run_well(other, *arguments)
    before = content(tmp_path)
    assert_error(run(command, *arguments, "--overwrite"), "not written by this command")
    assert content(tmp_path) == before
    run_well(other, *arguments, "--overwrite")


FAILURES = {
    "saving the model": "transformers.PreTrainedModel.save_pretrained",
    "saving the tokenizer": "transformers.PreTrainedTokenizerBase.save_pretrained",
    "saving the pathways": "hf_sparse_pathways.pathways.pathway.Pathways.save_pretrained",
    "profiling": "hf_sparse_pathways.discovery.profiling.profile",
    "selecting": "hf_sparse_pathways.discovery.selection.select",
}


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(
    ("error", "status"), [(OSError(28, "No space left"), 1), (KeyboardInterrupt(), 130)]
)
def test_a_build_that_fails_midway_leaves_what_was_there(
    places, tmp_path, monkeypatch, failure, earlier, error, status
):
    if earlier:
        shutil.copytree(places.built, tmp_path / "out")
    before = content(tmp_path)

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(FAILURES[failure], fail)
    ran = _build(places, tmp_path / "out", *(["--overwrite"] if earlier else []))
    assert ran.status == status
    assert content(tmp_path) == before
    assert len(ran.err.strip().splitlines()) == 1


def _stop(monkeypatch, place, error):
    def stop(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(place, stop)


@pytest.mark.parametrize(
    ("error", "status", "start"),
    [
        (KeyboardInterrupt, 130, "interrupted; no output is left half-written. Unfinished work ("),
        (lambda: OSError(28, "No space left"), 1, "error: [Errno 28] No space left. Unfinished"),
    ],
    ids=["interrupted", "failed"],
)
def test_where_unfinished_work_is_kept_is_said(
    places, tmp_path, monkeypatch, cache, error, status, start
):
    with monkeypatch.context() as patch:
        _stop(patch, FAILURES["selecting"], error())
        ran = _build(places, tmp_path / "out")
    assert ran.status == status
    assert ran.err.startswith(start)
    assert ran.err.count("\n") == 1
    told = re.search(r"is kept in (\S+) for 7 days: the same command goes on from there", ran.err)
    work = Path(told[1])
    assert work.is_relative_to(cache)
    assert list(work.rglob("0000-0.safetensors"))
    assert _build(places, tmp_path / "out").status == 0
    assert not work.exists()


def test_an_interruption_with_nothing_to_keep_promises_nothing(places, tmp_path, monkeypatch):
    _stop(monkeypatch, FAILURES["profiling"], KeyboardInterrupt())
    ran = _build(places, tmp_path / "out")
    assert ran.err == "interrupted; no output is left half-written.\n"
    _stop(monkeypatch, "hf_sparse_pathways.measure.quality.evaluate", KeyboardInterrupt())
    ran = run("evaluate", places.built, *places.texts)
    assert ran.err == "interrupted; no output is left half-written.\n"


def test_an_interrupted_comparison_says_that_its_steps_are_kept(places, tmp_path, monkeypatch):
    _stop(monkeypatch, "hf_sparse_pathways.measure.comparison.compare", KeyboardInterrupt())
    words = ("compare", places.dense, *places.texts, "--output", tmp_path / "out")
    ran = run(*words)
    assert ran.status == 130
    assert ran.err.startswith("interrupted; finished steps are kept in the output folder")
    assert list((tmp_path / "out" / "steps").rglob("*.safetensors")), "as it says"


def test_the_real_program_fails_in_one_line(places):
    program = [sys.executable, "-m", "hf_sparse_pathways.cli.main"]
    ran = subprocess.run(
        [*program, "info", str(places.dense)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stderr.startswith("error: ")


def test_a_traceback_can_be_asked_for(places, monkeypatch):
    monkeypatch.setenv("SPARSE_PATHWAYS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="Unknown domain"):
        run("generate", places.built, "--prompt", "a", "--domain", "lw")


def test_jobs_with_different_outputs_do_not_share_unfinished_work(places, tmp_path, monkeypatch):
    """Two builds on the same texts at the same time would delete each other's."""
    jobs = []

    def stop(*job):
        jobs.append(repr(job))
        raise KeyboardInterrupt

    for module in (build_command, profile_command, heal_command):
        monkeypatch.setattr(module, "unfinished_work", stop)
    for name in ("one", "two", "one"):
        options = (*places.texts, "--output", tmp_path / name)
        run("build", places.dense, *options)
        run("profile", places.dense, *options)
        run("heal", places.built, *options)
    assert len(jobs) == 9
    assert jobs[:3] == jobs[6:]
    assert len(set(jobs)) == 6


def test_a_default_domain_that_a_profile_does_not_have_is_refused_before_the_model(
    places, tmp_path
):
    run_well("profile", places.dense, *places.texts, "--output", tmp_path / "p", "--no-grams")
    words = ("--profile", tmp_path / "p", "--default-domain", "lew", "--output", tmp_path / "o")
    assert_error(run("build", tmp_path / "no model", *words), "lew", "law")


@pytest.mark.parametrize(
    "words",
    [
        ("--percentile", 50, "--multiple", 8),
        ("--percentile", 50, "--allocation", "depth"),
        ("--sparsity", "0.3,0.3,0.3", "--allocation", "depth"),
        ("--sparsity", 0.3, "--pool", "model"),
        ("--max-perplexity-increase", "5%", "--pool", "layer"),
        ("--target-speedup", 1.2, "--pool", "model"),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_options_that_another_makes_void_are_refused(places, tmp_path, words):
    words = (*words, "--output", tmp_path / "out")
    assert_error(run("build", tmp_path / "no model", *places.texts, *words), "leave out")


@pytest.mark.parametrize("command", ["profile", "build", "analyze"])
@pytest.mark.parametrize(
    ("option", "value", "part"),
    [("--max-memory", "4XB", "'4XB'"), ("--max-length", "1", "got 1:")],
    ids=["memory", "length"],
)
def test_what_needs_no_model_is_checked_before_it_is_loaded(
    places, tmp_path, command, option, value, part
):
    words = (tmp_path / "no model", *places.texts, "--output", tmp_path / "out", option, value)
    assert_error(run(command, *words), part)


VOID = ("--max-tokens", "--max-length", "--batch-size", "--held-out", "--max-memory")


@pytest.mark.parametrize("given", [VOID[:1], VOID[2:4], VOID], ids=len)
def test_what_a_saved_profile_makes_void_is_refused_by_name(tmp_path, given):
    values = {"--held-out": "0.5", "--max-memory": "4GB"}
    words = [word for option in given for word in (option, values.get(option, "99"))]
    words += ["--profile", tmp_path / "profile", "--output", tmp_path / "out"]
    ran = run("build", tmp_path / "no model", *words, "--seed", 0, "--precision", "model")
    assert_error(ran, f"With --profile these do nothing: {', '.join(given)}. Leave them out.")


def test_tables_show_brackets_as_they_are(capsys):
    print_table("[a] title", ["of [/x]", "n"], [["law/[a-m]*.txt", "[bold]1"]])
    shown = capsys.readouterr().out
    for part in ("[a] title", "of [/x]", "law/[a-m]*.txt", "[bold]1"):
        assert part in shown
