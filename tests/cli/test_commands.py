"""From text to a measured model, one command after the other."""

import json
import re
import stat
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.version import __version__
from tests.architectures import build, prompt, random_masks
from tests.cli.commands import assert_error, run, run_well
from tests.cli.conftest import save_dense
from tests.texts import documents, tiny_tokenizer

COMMANDS = ("profile", "build", "heal", "evaluate", "generate", "benchmark", "info")


def _info(folder):
    return json.loads(run_well("info", folder, "--json"))


def test_build_writes_a_checkpoint_that_the_auto_classes_load(places):
    model = AutoModelForCausalLM.from_pretrained(places.built)
    assert isinstance(model, sp.SparsePathwaysForCausalLM)
    assert model.domains == ["code", "law"]
    assert list(model.pathways.controls) == ["pooled"]
    dense = AutoModelForCausalLM.from_pretrained(places.dense)
    ids = AutoTokenizer.from_pretrained(places.built)("the court", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, dense(**ids).logits)
    assert stat.S_IMODE(places.built.stat().st_mode) == 0o755
    assert sorted(path.name for path in places.built.parent.iterdir()) == [
        "built",
        "dense",
        "texts",
    ], "nothing else is left beside it"


def test_info_says_what_was_built(places):
    facts = _info(places.built)
    pathways = sp.Pathways.from_pretrained(places.built)
    assert facts["base"]["model_type"] == "llama"
    assert facts["base"]["name"] == str(places.dense)
    assert list(facts["domains"]) == ["code", "law"]
    assert list(facts["controls"]) == ["pooled"]
    for name, arm in {**facts["domains"], **facts["controls"]}.items():
        assert arm["sparsity"] == pytest.approx(pathways.sparsity(name)) == 0.5
        assert arm["flops"] == pathways.flops(name)
        assert arm["sparsity_per_block"] == pathways.sparsity(name, per_block=True)
        assert "digests" not in arm["text"]
    assert facts["domains"]["code"]["text"]["documents"] == 8, "two of ten are held out"
    files = ("pathways.json", "pathways.safetensors")
    assert facts["bytes"] == sum((places.built / name).stat().st_size for name in files)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_what_starts_from_the_dense_model_finds_it_in_a_folder_with_pathways(
    places, tmp_path, kind
):
    folder = places.built
    if kind == "adapter":
        folder = tmp_path / "adapter"
        sp.Pathways.from_pretrained(places.built).save_pretrained(folder)
    options = [*places.texts[:2], "--sparsity", "0.5", "--method", "wanda", "--max-tokens", "300"]
    for source, output in ((places.dense, "expected"), (folder, "found")):
        run_well("build", source, *options, "--output", tmp_path / output)
    found, expected = (sp.Pathways.from_pretrained(tmp_path / of) for of in ("found", "expected"))
    assert found.domains == ["code"]
    assert all(map(torch.equal, found["code"].keep, expected["code"].keep))


def test_info_prints_a_row_per_arm_and_block(places):
    shown = run_well("info", places.built)
    for word in ("code", "law", "pooled", "50.0%", *_info(places.built)["blocks"]):
        assert word in shown


HOW = {"method": "obs", "order": "sequential", "compensation": "refit+bias"}


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ((), HOW),
        (("--percentile", 50), {"method": "mean_abs", "allocation": "percentile", "ridge": "-"}),
        (("--ridge", 0.2, "--allocation", "depth"), {**HOW, "ridge": "0.2", "allocation": "depth"}),
    ],
    ids=["auto", "percentile", "given"],
)
def test_build_and_info_say_what_was_chosen(places, tmp_path, monkeypatch, options, shown):
    monkeypatch.setenv("COLUMNS", "100")
    said = run_well("build", places.dense, *places.texts, *options, "--output", tmp_path / "built")
    facts = _info(tmp_path / "built")
    table = said.partition("what was chosen")[2].splitlines()
    assert said in run_well("info", tmp_path / "built")
    assert max(map(len, said.splitlines())) <= 100
    header = table[2].split()
    for arm, label in [("code", "code"), ("law", "law"), ("pooled", "pooled (control)")]:
        (row,) = [line for line in table if line.strip().startswith(label)]
        cells = dict(zip(header[1:], row.removeprefix(f"  {label}").split(), strict=True))
        made = {**facts["domains"], **facts["controls"]}[arm]
        assert cells == {**{name: str(made[name]) for name in cells}, **shown}


def test_info_of_masks_of_ones_own_says_nothing_of_a_choice(tmp_path):
    model = build("llama")
    sp.Pathways.from_masks(model, random_masks(model)).save_pretrained(tmp_path)
    assert "what was chosen" not in run_well("info", tmp_path)


def test_evaluate_measures_what_build_held_out(places):
    options = ("--batch-size", 2, "--max-length", 64, "--json")
    report = json.loads(run_well("evaluate", places.built, *places.texts, *options))
    roles = ["dense", "pathway", "pooled", "random", "other"]
    assert [row["role"] for row in report["rows"]] == roles * 2
    assert {row["documents"] for row in report["rows"]} == {2}
    assert {row["excluded"] for row in report["rows"]} == {8}
    held_out = {d.digest for d in read_documents(str(places.code)).split(0.2)[1].items}
    pathways = sp.Pathways.from_pretrained(places.built)
    assert not held_out & set(pathways["code"].provenance["text"]["digests"])
    assert held_out | set(pathways["code"].provenance["text"]["digests"]) == {
        document.digest for document in read_documents(str(places.code)).items
    }
    model = AutoModelForCausalLM.from_pretrained(places.built)
    texts = {"code": str(places.code), "law": f"{places.law}/*.txt"}
    own = sp.evaluate(model, tiny_tokenizer(), texts, max_tokens=8192, max_length=64, batch_size=2)
    assert report == json.loads(json.dumps(own.to_dict()))


def test_evaluate_prints_a_table_per_domain(places):
    shown = run_well("evaluate", places.built, *places.texts, "--no-controls")
    assert shown.count("pathway code") == 1
    assert shown.count("pathway law") == 1
    assert "8 calibration documents left out" in shown
    assert "random" not in shown


def test_generate_equals_the_models_own(places):
    model = AutoModelForCausalLM.from_pretrained(places.built)
    tokenizer = AutoTokenizer.from_pretrained(places.built)
    inputs = tokenizer("the court of", return_tensors="pt")
    options = ("--prompt", "the court of", "--max-new-tokens", 5)
    texts = set()
    for choice, domain in ((("--domain", "law"), "law"), (("--dense",), None), ((), None)):
        record = json.loads(run_well("generate", places.built, *options, *choice, "--json"))
        output = model.generate(**inputs, domain=domain, do_sample=False, max_new_tokens=5)[0]
        new = output[inputs["input_ids"].shape[1] :]
        assert record == {
            "domain": domain,
            "prompt": "the court of",
            "continuation": tokenizer.decode(new, skip_special_tokens=True),
            "tokens": len(new),
        }
        texts.add(record["continuation"])
        plain = run_well("generate", places.built, *options, *choice)
        assert plain == f"the court of{record['continuation']}\n"
    assert len(texts) == 2, "the pathway changes what is said"
    watched = run_well("generate", places.built, *options, "--domain", "law", "--guard", "--json")
    assert json.loads(watched)["switches"] == []


def test_generate_tells_who_computed_what_others_decided(places):
    text = documents("law", count=1, words=60, seed=7)[0]
    options = ("--prompt", text, "--max-new-tokens", 5)
    ran = run("generate", places.built, *options, "--domain", "auto")
    assert ran.status == 0
    record = json.loads(run_well("generate", places.built, *options, "--domain", "auto", "--json"))
    assert ran.out == f"{text}{record['continuation']}\n"
    assert f"[computed by {record['domain'] or 'the dense model'}]" in ran.err
    assert "computed by" not in run("generate", places.built, *options, "--domain", "law").err


def test_generate_takes_what_the_prompt_uses(places):
    model = AutoModelForCausalLM.from_pretrained(places.built)
    tokenizer = AutoTokenizer.from_pretrained(places.built)
    text = "the court of the law " * 3
    for domain in ("prompt", "prompt:law"):
        options = ("--prompt", text, "--max-new-tokens", 5, "--domain", domain, "--json")
        record = json.loads(run_well("generate", places.built, *options))
        inputs = tokenizer(text, return_tensors="pt")
        output = model.generate(**inputs, domain=domain, do_sample=False, max_new_tokens=5)[0]
        new = output[inputs["input_ids"].shape[1] :]
        assert record["continuation"] == tokenizer.decode(new, skip_special_tokens=True)
        assert record["domain"] == domain


def test_generate_reads_stdin_and_samples_by_seed(places):
    options = ("--max-new-tokens", 8, "--temperature", 2.0)
    seeds = ["0", "0", "1"]
    said = [
        run_well("generate", places.built, *options, "--seed", seed, stdin="the judge")
        for seed in seeds
    ]
    assert all(text.startswith("the judge") for text in said)
    assert said[0] == said[1] != said[2]


def test_build_from_a_profile_equals_build_from_text(places, tmp_path):
    run_well("profile", places.dense, *places.texts, "--output", tmp_path / "profile")
    options = ("--sparsity", "0.5", "--output", tmp_path / "built")
    run_well("build", places.dense, "--profile", tmp_path / "profile", *options)
    for name in ("pathways.json", "pathways.safetensors", "model.safetensors"):
        assert (tmp_path / "built" / name).read_bytes() == (places.built / name).read_bytes()
    assert Profile.from_pretrained(tmp_path / "profile").domains == ["code", "law"]


UNIFORM = ("--allocation", "uniform")


@pytest.mark.parametrize(
    ("options", "per_block", "recipe"),
    [
        (("--sparsity", "0,0.25,0.5"), [0, 0.25, 0.5], {"method": "obs", "allocation": "given"}),
        ((*UNIFORM, "--sparsity", "0.25"), [0.25] * 3, {"order": "sequential"}),
        ((*UNIFORM, "--quick"), [15 / 48] * 3, {"order": "one-shot", "seed": 0}),
        (("--percentile", "50"), [0.5] * 3, {"method": "mean_abs", "pool": "layer"}),
        (("--score", "random", "--sparsity", 0.5, "--seed", 3), [0.5] * 3, {"seed": 3}),
        ((*UNIFORM, "--held-out", 0, "--sparsity", 0.5), [0.5] * 3, {"method": "obs"}),
        ((*UNIFORM, "--method", "flap"), [15 / 48] * 3, {"compensation": "bias"}),
        ((*UNIFORM, "--multiple", 16, "--sparsity", 0.5), [1 / 3 * 2] * 3, {"multiple": 16}),
        ((*UNIFORM, "--ridge", 0.2, "--sparsity", 0.5), [0.5] * 3, {"ridge": 0.2}),
    ],
    ids=[
        "list",
        "one",
        "quick",
        "percentile",
        "random",
        "nothing_held_out",
        "flap",
        "multiple",
        "ridge",
    ],
)
def test_build_takes_any_rule(places, tmp_path, options, per_block, recipe):
    run_well("build", places.dense, *places.texts[:2], *options, "--output", tmp_path / "built")
    facts = _info(tmp_path / "built")
    arm = facts["domains"]["code"]
    assert arm["sparsity"] == pytest.approx(sum(per_block) / 3), "what is removed, not asked for"
    assert arm["sparsity_per_block"] == pytest.approx(per_block)
    assert {name: arm[name] for name in recipe} == recipe
    assert arm["text"]["documents"] == (10 if "--held-out" in options else 8)
    assert not facts["controls"]


@pytest.mark.parametrize("quick", [(), ("--quick",)])
def test_build_clusters_tokens(places, tmp_path, quick):
    options = (*UNIFORM, "--sparsity", 0.5, "--clusters", 3, *quick)
    said = run_well("build", places.dense, *places.texts, *options, "--output", tmp_path / "built")
    assert "each block's tokens go to 3 experts" in said
    facts = _info(tmp_path / "built")
    for arm in (*facts["domains"].values(), *facts["controls"].values()):
        assert arm["clusters"] == arm["clustering"]["count"] == 3
        assert arm["order"] == "sequential"
        assert arm["flops"] <= 0.5
    report = run_well("evaluate", tmp_path / "built", *places.texts, "--json")
    assert "pooled" in report
    said = run_well("generate", tmp_path / "built", "--domain", "code", "--prompt", "the", "--json")
    assert "code" in said


@pytest.mark.parametrize("quick", [(), ("--quick",)], ids=["default", "quick"])
def test_build_skips_by_token(places, tmp_path, quick):
    options = (*UNIFORM, "--sparsity", 0.5, "--skip", 0.4, *quick)
    said = run_well("build", places.dense, *places.texts, *options, "--output", tmp_path / "built")
    assert re.search(r"each token skips \d+%", said)
    facts = _info(tmp_path / "built")
    for arm in (*facts["domains"].values(), *facts["controls"].values()):
        assert arm["skip"] == 0.4
        assert 0.2 < arm["skipped"] < 0.6
        assert arm["order"] == "sequential"
        assert arm["flops"] <= 0.5
    report = run_well("evaluate", tmp_path / "built", *places.texts, "--json")
    assert "pooled" in report
    said = run_well("generate", tmp_path / "built", "--domain", "code", "--prompt", "the", "--json")
    assert "code" in said


def test_build_makes_groups(places, tmp_path):
    options = ("--allocation", "uniform", "--sparsity", 0.5, "--mixture", 6, "--always-on", 0.5)
    said = run_well(
        "build", places.dense, *places.texts, *options, "--quick", "--output", tmp_path / "built"
    )
    assert re.search(r"each token skips \d+%", said)
    facts = _info(tmp_path / "built")
    for arm in (*facts["domains"].values(), *facts["controls"].values()):
        assert arm["mixture"] == {"count": 6, "top_k": 2, "always_on": 0.5, "seed": 0}
        assert 0.1 < arm["skipped"] < 0.9
        assert arm["flops"] <= 0.5
    report = run_well("evaluate", tmp_path / "built", *places.texts, "--json")
    assert "pooled" in report
    said = run_well("generate", tmp_path / "built", "--domain", "code", "--prompt", "the", "--json")
    assert "code" in said


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--clusters", 3, "--order", "one-shot"), "Clusters of tokens"),
        (("--clusters", 3, "--method", "wanda"), "Clusters of tokens"),
        (("--clusters", 5000), "2 to 1024"),
        (("--clusters", 3, "--target-speedup", 1.1), "same neurons for all tokens"),
        (("--skip", 0.5, "--target-speedup", 1.1), "same neurons for all tokens"),
        (("--mixture", 4, "--target-speedup", 1.1), "same neurons for all tokens"),
        (("--mixture", 4, "--skip", 0.5), "divided into groups"),
        (("--mixture", 2), "2 to 1024 groups"),
        (("--mixture", 4, "--always-on", 1.0), "share in [0, 1)"),
        (("--top-k", 2), "give that"),
        (("--skip", 1.5), "share of kept neurons"),
    ],
)
def test_build_says_what_clusters_need(places, tmp_path, options, told):
    ran = run("build", places.dense, *places.texts, *options, "--output", tmp_path / "built")
    assert_error(ran, told)
    assert not (tmp_path / "built").exists()


def test_build_permutes_and_says_so(places, tmp_path):
    output = ("--output", tmp_path / "permuted", "--layout", "permuted")
    said = run_well("build", places.dense, *places.texts, *output, "--sparsity", "0.5")
    permuted = AutoModelForCausalLM.from_pretrained(tmp_path / "permuted")
    order = _info(tmp_path / "permuted")["base"]["neuron_order"]
    assert order == permuted.config.neuron_order
    assert order[:8] in said
    original = AutoModelForCausalLM.from_pretrained(places.built)
    assert _info(places.built)["base"]["neuron_order"] is None
    ids = prompt()
    for domain in ("code", None):
        with torch.no_grad():
            found, expected = (m(ids, domain=domain).logits for m in (permuted, original))
        assert torch.allclose(found, expected, atol=1e-4)
    ran = run(
        "build", places.dense, *places.texts, "--output", tmp_path / "x", "--layout", "permute"
    )
    assert_error(ran, "Did you mean 'permuted'")


def test_build_sets_the_default_domain(places, tmp_path):
    options = ("--default-domain", "law", "--output", tmp_path / "built")
    run_well("build", places.dense, *places.texts, *options)
    said = run_well("generate", tmp_path / "built", "--prompt", "the", "--json")
    assert json.loads(said)["domain"] == "law"


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_other_architectures_go_all_the_way(places, tmp_path, architecture):
    save_dense(tmp_path / "dense", architecture)
    options = ("--max-length", 64, "--output", tmp_path / "built")
    run_well("build", tmp_path / "dense", *places.texts, *options)
    options = ("--max-length", 64, "--json")
    report = json.loads(run_well("evaluate", tmp_path / "built", *places.texts, *options))
    assert len(report["rows"]) == 10


def test_version_and_help():
    assert run_well("--version") == f"sparse-pathways {__version__}\n"
    shown = run_well("--help")
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    assert f"{command} [OPTIONS]" in run_well(command, "--help")


USAGE = {
    "no command": (),
    "unknown command": ("bild",),
    "unknown option": ("info", "x", "--jsn"),
    "no argument": ("info",),
    "no output": ("profile", "x", "--domain", "a=b"),
    "no number": ("build", "x", "--output", "y", "--percentile", "many"),
    "too small": ("generate", "x", "--max-new-tokens", "0"),
    "negative temperature": ("generate", "x", "--temperature", "-1"),
    "no rounds": ("benchmark", "x", "--rounds", "0"),
}


@pytest.mark.parametrize("kind", USAGE)
def test_wrong_usage_is_status_2(kind):
    ran = run(*USAGE[kind])
    assert ran.status == 2
    assert "Usage" in ran.err + ran.out
    assert "Traceback" not in ran.err


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from hf_sparse_pathways.cli.main import app\n"
        "for arguments in (['--help'], ['build', '--help']):\n"
        "    app(arguments, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "Usage" in ran.stdout


def test_a_profile_without_gram_matrices_is_built_from_with_a_word_said_once(
    places, tmp_path, caplog
):
    taken = tmp_path / "profile"
    options = ("--max-tokens", 80, "--no-grams", "--output", taken)
    run_well("profile", places.dense, *places.texts, *options)
    command = ("build", places.dense, "--profile", taken, "--max-perplexity-increase", "30%")
    run_well(*command, "--output", tmp_path / "silent", "--method", "wanda")
    assert "wanda" not in caplog.text
    run_well(*command, "--output", tmp_path / "built")
    assert _info(tmp_path / "built")["domains"]["code"]["method"] == "wanda"
    assert caplog.text.count("neurons are chosen by 'wanda' instead") == 1
    for part in ("grams=True (--grams)", "method='wanda' (--method wanda)", "'obs'"):
        assert part in caplog.text


def test_pathways_alone_are_enough_for_the_commands(places, tmp_path):
    sp.Pathways.from_pretrained(places.built).save_pretrained(tmp_path / "alone")
    options = ("--domain", "code", "--prompt", "the court", "--max-new-tokens", 3)
    found = run_well("generate", tmp_path / "alone", *options)
    assert found == run_well("generate", places.built, *options)
