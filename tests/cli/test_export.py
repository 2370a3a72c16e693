"""``sparse-pathways export`` as a user runs it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.architectures import prompt
from tests.cli.commands import assert_error, content, run, run_well

IDS = prompt() % 60


def _logits(folder, **options):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(IDS, **options).logits


def test_a_domain_becomes_a_plain_checkpoint(places, tmp_path):
    out = tmp_path / "code"
    said = run_well("export", places.built, "--domain", "code", "--output", out)
    for words in ("intermediate_size: 48 -> ", "mlp_bias: False -> True", "parameters", str(out)):
        assert words in said
    expected = _logits(places.built, domain="code")
    assert (_logits(out) - expected).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(out)("court").input_ids
    again = ("export", places.built, "--domain", "law", "--output", out, "--license", "mit")
    assert_error(run(*again), "--overwrite")
    run_well(*again, "--overwrite", "--dtype", "bfloat16")
    assert "license: mit" in (out / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_one_width_is_selected_from_text_or_a_profile(places, tmp_path):
    common = ("export", places.built, "--domain", "code", "--widths", "reselect")
    common += ("--multiple-of", 8)
    run_well(*common, "--text", places.code, "--max-tokens", 200, "--output", tmp_path / "text")
    limits = ("--max-tokens", 200, "--output", tmp_path / "profile")
    run_well("profile", places.dense, *places.texts, *limits)
    run_well(*common, "--profile", tmp_path / "profile", "--output", tmp_path / "saved")
    for name in ("text", "saved"):
        facts = json.loads((tmp_path / name / "export.json").read_text())
        assert facts["padded_neurons"] == 0
        assert facts["fields"]["intermediate_size"] == 24
    assert torch.equal(_logits(tmp_path / "text"), _logits(tmp_path / "saved"))


@pytest.mark.usefixtures("hub")
def test_it_is_pushed(places, tmp_path):
    out = tmp_path / "code"
    words = ("export", places.built, "--domain", "code", "--output", out)
    said = run_well(*words, "--push", "me/code", "--private", "--message", "code alone")
    assert said.strip().splitlines()[-1].startswith("http")
    assert torch.equal(_logits("me/code"), _logits(out))
    assert AutoTokenizer.from_pretrained("me/code")("court").input_ids


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--domain", "lwa"], "'law'"),
        (["--domain", "law", "--widths", "pd"], "'pad'"),
        (["--domain", "law", "--widths", "reselect"], "--text PATH"),
        (["--domain", "law", "--text", "x"], "--widths reselect"),
        (["--domain", "law", "--bias", "lose"], "'keep'"),
        (["--domain", "law", "--max-tokens", "9"], "--max-tokens"),
        (["--domain", "law", "--create-pr"], "--create-pr"),
        (["--domain", "law", "--multiple-of", "48"], "no narrower"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(places, tmp_path, words, said):
    assert_error(run("export", places.built, *words, "--output", tmp_path / "out"), said)
    assert content(tmp_path) == {}


def test_other_folders_are_left_alone(places, copied, tmp_path):
    before = content(copied)
    words = ("--domain", "code", "--overwrite", "--output")
    assert_error(run("export", places.built, *words, copied), "left alone")
    assert content(copied) == before
    assert_error(run("export", places.dense, *words, tmp_path / "out"), "pathways.json")
