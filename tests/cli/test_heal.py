"""``sparse-pathways heal`` as a user runs it."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.healing import checkpoints, training
from tests.cli.commands import assert_error, run, run_well
from tests.healing.healings import same
from tests.texts import tiny_tokenizer

SHORT = ("--steps", 4, "--batch-size", 2, "--accumulate", 1, "--rank", 2, "--validations", 2)


@pytest.mark.parametrize("teacher", ["tuned", "cut"])
def test_heal_can_begin_with_the_dense_model(teacher, places, tmp_path):
    options = ("--train", "weights", "--loss", "kl", "--teacher", teacher, "--dense-partner")
    options += ("--dense-first", 0.5, "--output", tmp_path / "out")
    run_well("heal", places.built, "--domain", f"code={places.code}", *SHORT, *options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    (entry,) = model.pathways["code"].provenance["healing"]
    assert entry["settings"]["dense_first"] == 0.5
    assert entry["settings"]["teacher"] == teacher
    assert [point["step"] for point in entry["dense_curve"]] == [0, 2, 4]
    assert [point["step"] for point in entry["curve"]] == [2, 4]
    again = run("heal", tmp_path / "out", "--domain", f"code={places.code}", *SHORT, *options)
    assert_error(again, "--overwrite")


def test_heal_writes_a_checkpoint_with_the_healed_pathway(places, tmp_path):
    out = tmp_path / "healed"
    code = f"code={places.code}"
    options = ("--dense-partner", "--loss", "lm+kl", "--teacher", "tuned", "--learning-rate", 0.01)
    shown = run_well("heal", places.built, "--domain", code, "--output", out, *SHORT, *options)
    for words in ("dense, tuned equally", "healed pathway", "of dense tuned", str(out)):
        assert words in shown
    model = AutoModelForCausalLM.from_pretrained(out)
    built = AutoModelForCausalLM.from_pretrained(places.built)
    assert model.domains == built.domains
    assert not same(model.pathways, built.pathways)
    for name, value in built.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    (entry,) = model.pathways["code"].provenance["healing"]
    assert entry["settings"]["rank"] == 2
    assert entry["honest_ratio"] == pytest.approx(entry["ratio"] / entry["ratio_tuned"])
    assert "healing" not in model.pathways["law"].provenance
    assert list(tmp_path.iterdir()) == [out], "nothing else is left beside it"
    shown = json.loads(run_well("evaluate", out, "--domain", code, "--json"))
    assert {row["role"] for row in shown["rows"]} >= {"dense", "pathway", "tuned"}
    assert {row["excluded"] for row in shown["rows"]} == {8}, "healed on calibration text only"


def test_an_adapter_is_written_beside_the_model(places, tmp_path):
    out = tmp_path / "healed"
    options = ("--keep", "lora", "--attention")
    run_well(
        "heal", places.built, "--domain", f"law={places.law}", "--output", out, *SHORT, *options
    )
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, sp.SparsePathwaysForCausalLM), "the adapter is not put on by itself"
    peft.PeftModel.from_pretrained(model, out / "adapters" / "law")


def test_the_printed_lines_put_an_adapter_on(places, tmp_path):
    out = tmp_path / "healed"
    texts = ("--domain", f"law={places.law}", "--domain", f"code={places.code}")
    options = ("--keep", "lora", "--learning-rate", 0.05, "--output", out)
    shown = run_well("heal", places.built, *texts, *SHORT, *options)
    for name in ("law", "code"):
        assert f"  {out}/adapters/{name}\n" in shown
    first, second = (line for line in shown.splitlines() if "PeftModel" in line)
    model = AutoModelForCausalLM.from_pretrained(out)
    inputs = tiny_tokenizer()("the court of", return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs, domain="law").logits
    names = {"model": model, "inputs": inputs}
    exec(f"{first.strip()}\n{second.strip()}", names)
    with torch.no_grad():
        after = names["adapted"](**inputs, domain="law").logits
    assert (after - before).abs().max() > 0.01
    model.generation_config.max_new_tokens = 4
    line = shown.splitlines()[-1].partition("and name its domain: ")[2]
    told = eval(line, names)[0, -4:]
    ids = inputs["input_ids"]
    for _ in range(4):
        with torch.no_grad():
            logits = names["adapted"](input_ids=ids, domain="law").logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert told.tolist() == ids[0, -4:].tolist()


def test_without_adapters_nothing_is_said_of_them(places, tmp_path):
    command = ("heal", places.built, "--domain", f"code={places.code}", *SHORT)
    assert "PeftModel" not in run_well(*command, "--output", tmp_path / "out")


def test_an_interrupted_command_goes_on(places, tmp_path, monkeypatch, cache):
    command = ("heal", places.built, "--domain", f"code={places.code}", *SHORT)
    run_well(*command, "--output", tmp_path / "whole")
    monkeypatch.setattr(checkpoints, "STORE_SECONDS", 0.0)
    step, taken = training._Run._step, []

    def stop(self, windows):
        taken.append(windows)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return step(self, windows)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_step", stop)
        ran = run(*command, "--output", tmp_path / "parted")
        assert ran.status == 130
        assert not (tmp_path / "parted").exists()
        assert list(cache.rglob("run-*.safetensors"))
        run_well(*command, "--output", tmp_path / "parted")
    assert len(taken) == 5, "two of four steps, one interrupted, the other two"
    assert not list(cache.rglob("run-*.safetensors"))
    whole, parted = (sp.Pathways.from_pretrained(tmp_path / n) for n in ("whole", "parted"))
    assert same(whole, parted)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--domain", "medicine={code}"], ["Unknown domain 'medicine'", "'code', 'law'"]),
        (["--domain", "code={code}", "--attention"], ["--keep lora"]),
        (["--domain", "code={code}", "--loss", "ce"], ["'ce'", "lm, kl, hidden"]),
        (["--domain", "code={code}", "--rank", "0"], ["rank"]),
        (["--domain", "code={code}", "--tokens", "1"], ["--tokens", "at least 2"]),
        (["--domain", "code={code}", "--teacher", "tuned"], ["dense_partner"]),
        (["--domain", "code=nowhere/at/all"], ["nowhere/at/all"]),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(options, words, places, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sparse_pathways.cli.heal.load_sparse", lambda *_: pytest.fail("loaded"))
    given = [option.format(code=places.code) for option in options]
    ran = run("heal", places.built, *given, "--output", tmp_path / "healed")
    assert_error(ran, *words)
    assert not (tmp_path / "healed").exists()


def test_an_earlier_output_is_replaced_on_request_only(places, copied):
    command = ("heal", places.built, "--domain", f"code={places.code}", "--output", copied, *SHORT)
    assert_error(run(*command), "--overwrite")
    run_well(*command, "--overwrite")
    assert "healing" in sp.Pathways.from_pretrained(copied)["code"].provenance


def test_a_dense_model_has_nothing_to_heal(places, tmp_path):
    command = ("heal", places.dense, "--domain", f"code={places.code}", "--output", tmp_path / "x")
    assert_error(run(*command), "pathways.json")
