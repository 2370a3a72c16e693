"""The commands that change a Hub repository."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp
from tests.cli.commands import assert_error, run, run_well

REPO = "me/x"

pytestmark = pytest.mark.usefixtures("hub")


def test_a_folder_is_pushed_and_used_from_the_hub(places):
    address = run_well("push", places.built, REPO, "--message", "all of it").strip()
    assert address.startswith("http://")
    assert AutoModelForCausalLM.from_pretrained(REPO).domains == ["code", "law"]
    assert AutoTokenizer.from_pretrained(REPO).vocab_size > 10
    here, there = (
        json.loads(run_well("info", source, "--json")) for source in (places.built, REPO)
    )
    assert here["domains"] == there["domains"]
    assert there["bytes"] > here["bytes"], "a description for each domain"
    args = ("--prompt", "a", "--domain", "code", "--max-new-tokens", "3")
    assert run_well("generate", REPO, *args) == run_well("generate", places.built, *args)


def test_domains_are_added_removed_and_renamed(places):
    run_well("push", places.built, REPO, "--pathways-only", "--private")
    run_well("remove-domain", REPO, "law")
    assert sp.Pathways.from_pretrained(REPO).domains == ["code"]
    run_well("push", places.built, REPO, "--domain", "law")
    run_well("rename-domain", REPO, "law", "case law", "--create-pr")
    assert sp.Pathways.from_pretrained(REPO).domains == ["code", "law"]
    found = sp.Pathways.from_pretrained(REPO, revision="refs/pr/1")
    assert found.domains == ["code", "case law"]


def test_the_card_has_what_was_measured(places, tmp_path, hub):
    report = tmp_path / "report"
    run_well("evaluate", places.built, *places.texts, "--report", report, "--no-plots")
    card = ("--license", "mit", "--evaluation", report / "report.json")
    run_well("push", places.built, REPO, *card)
    text = hub.repos[REPO].at("main").files["README.md"].content.decode()
    assert "license: mit" in text
    assert (report / "report.md").read_text().split("\n\n")[1] in text
    assert "| random |" in text
    assert_error(run("push", places.built, REPO, *card, "--domain", "law"), "--evaluation")
    wrong = ("--evaluation", places.built / "config.json")
    assert_error(run("push", places.built, REPO, *wrong), "no report")


def test_errors_are_one_line(places, monkeypatch):
    assert_error(run("push", places.dense, REPO), "pathways.json")
    assert_error(run("push", places.built, REPO, "--domain", "law"), REPO)
    assert_error(run("push", places.built, REPO, "--domain", "lwa"), "'law'")
    assert_error(run("push", places.built, "you/x"), "403")
    assert_error(run("remove-domain", REPO, "law"), REPO)
    assert_error(run("rename-domain", REPO, "law", "../law"), "cannot be a domain")
    assert_error(run("push", places.built, "a/b/c"), "a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    ran = run("push", places.built, REPO)
    assert_error(ran, "401")
    assert "hf_wrong" not in ran.err
