"""``sparse-pathways route-report``: where prompts go, from the command line."""

import json

import pytest

from tests.cli.commands import assert_error, run, run_well
from tests.texts import save_documents

QUICK = ("--lengths", "8,16", "--max-prompts", 6, "--no-cost")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save_documents(tmp_path_factory.mktemp("other") / "medicine", "medicine")


def test_it_counts_every_prompt_of_known_and_unknown_text(places, other):
    report = json.loads(
        run_well(
            "route-report",
            places.built,
            *places.texts,
            "--unknown",
            f"medicine={other}",
            *QUICK,
            "--json",
        )
    )
    rows = {(row["text"], row["length"]): row for row in report["rows"]}
    assert {text for text, _ in rows} == {"code", "law", "medicine"}
    for (text, _), row in rows.items():
        assert sum(row["decided"].values()) == row["prompts"] <= 6
        assert row["known"] == (text != "medicine")
        assert {*row["decided"]} <= {"code", "law", "dense"}


def test_it_writes_a_report_with_quality_cost_and_a_picture(places, tmp_path):
    options = ("--lengths", "8", "--max-prompts", 4, "--quality", "--report", tmp_path / "routing")
    ran = run("route-report", places.built, *places.texts, *options)
    assert_error(ran, "no document has 128 tokens")
    assert not (tmp_path / "routing").exists()
    long = save_documents(tmp_path / "long", "code", words=300, seed=9)
    texts = ("--domain", f"code={long}")
    shown = run_well("route-report", places.built, *texts, *options)
    assert "oracle" in shown
    assert "pooled" in shown
    names = {path.name for path in (tmp_path / "routing").iterdir()}
    assert {"routing.json", "routing.md"} <= names
    assert any(name.endswith(".png") for name in names)
    assert "![Where prompts went]" in (tmp_path / "routing" / "routing.md").read_text()
    assert_error(run("route-report", places.built, *texts, *options), "--overwrite")


def test_it_measures_a_guard(places, tmp_path):
    texts = []
    for name in ("code", "law"):
        long = save_documents(tmp_path / name, name, count=3, words=300, seed=9)
        texts += ["--domain", f"{name}={long}"]
    options = ("--lengths", "8", "--max-prompts", 1, "--no-cost", "--guard", "--json")
    report = json.loads(run_well("route-report", places.built, *texts, *options))
    pairs = {(row["before"], row["after"]) for row in report["guarded"]}
    assert pairs == {(one, other) for one in ("code", "law") for other in ("code", "law")}
    for row in report["guarded"]:
        assert {*row["ratios"]} == {"unguarded", "guard", "guard of auto", "oracle"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--lengths", "8,x"), "8,64,512"),
        (("--lengths", "0"), "at least one token"),
        (("--lengths", "100000"), "no document has 100000 tokens"),
        (("--unknown", "law=LAW"), "is a domain"),
    ],
)
def test_what_does_not_fit_is_said(places, options, told):
    given = [str(option).replace("LAW", str(places.law)) for option in options]
    assert_error(run("route-report", places.built, *places.texts, *given, "--no-cost"), told)


def test_a_domain_that_is_not_there_is_named(places, other):
    ran = run("route-report", places.built, "--domain", f"medicine={other}", *QUICK)
    assert_error(ran, "medicine", "code")
