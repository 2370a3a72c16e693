"""``sparse-pathways train-router`` as a user runs it."""

from transformers import AutoModelForCausalLM

from tests.cli.commands import assert_error, run, run_well

SHORT = ("--tokens", 300, "--batch-size", 2, "--accumulate", 1, "--max-length", 32)
SHORT += ("--validations", 1, "--validation-tokens", 100)


def test_groups_are_built_and_their_routers_trained(places, tmp_path):
    built, out = tmp_path / "built", tmp_path / "out"
    groups = ("--quick", "--sparsity", 0.5, "--mixture", 6, "--always-on", 0.5)
    run_well("build", places.dense, *places.texts, *groups, "--output", built)
    options = ("--domain", f"code={places.code}", *SHORT, "--learning-rate", 0.01, "--no-refit")
    said = run_well("train-router", built, *options, "--output", out)
    for words in ("routers trained on", "entropy", "dead groups", str(out)):
        assert words in said
    before = AutoModelForCausalLM.from_pretrained(built).pathways
    after = AutoModelForCausalLM.from_pretrained(out).pathways
    (entry,) = after["code"].provenance["routers"]
    assert entry["settings"]["refit"] is False
    assert entry["distances"][1] <= entry["distances"][0]
    assert after.flops("code") == before.flops("code")
    assert "routers" not in after["law"].provenance
    assert_error(run("train-router", built, *options, "--output", out), "--overwrite")


def test_pathways_without_groups_have_nothing_to_train(places, tmp_path):
    options = ("--domain", f"code={places.code}", *SHORT, "--output", tmp_path / "out")
    assert_error(run("train-router", places.built, *options), "no groups of neurons")
    wrong = ("--domain", f"cod={places.code}", "--output", tmp_path / "out")
    assert_error(run("train-router", places.built, *wrong), "Did you mean 'code'")
