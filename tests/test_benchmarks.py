"""Benchmarks: what is measured once, and tables that are measured in parts."""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery import profiling
from hf_sparse_pathways.discovery.expansion import COPIES
from hf_sparse_pathways.measure.figures import format_figure
from tests.cli.conftest import save_dense
from tests.texts import save_documents

ROOT = Path(__file__).parents[1]
CAPTION = "30% of the FFN FLOPs removed: on 10 tokens; dense perplexity: code {}, law 10.2"
HEADER = "| method | FFN FLOPs | code | law | geometric mean |\n|---|---:|---:|---:|---:|"
PATHWAY = "| pathway | 70.0% | 1.1 (1-1.2) | 1.2 (1.1-1.3) | 1.149 |"
POOLED = "| pooled | 70.0% | 1.3 (1.2-1.4) | 1.3 (1.2-1.4) | 1.3 |"
FLAP = "| flap | 70.0% | 1.1 (1-1.2) | 1.3 (1.2-1.4) | 1.196 |"


@pytest.fixture
def load(monkeypatch):
    """Return what imports a benchmark."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == ROOT / "benchmarks":
            del sys.modules[name]


@pytest.fixture
def cache(tmp_path):
    """Return a cache folder with a tiny model and texts."""
    save_dense(tmp_path / "tiny", "llama")
    for name in ("code", "law", "medicine"):
        save_documents(tmp_path / "texts" / name, name, count=40, words=60)
    return tmp_path


SECTIONS = re.findall(
    r"^<!-- ([\w ]+): written by `make ([\w-]+)` -->$",
    (ROOT / "docs" / "measured.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def test_every_section_is_written_by_the_target_that_it_names(load):
    scripts = [path.stem for path in (ROOT / "benchmarks").glob("*.py")]
    made = [getattr(load(name), "SECTION", None) for name in scripts]
    own = [(section.name, section.target) for section in made if section is not None]
    assert sorted(own) == sorted(SECTIONS)
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    for _, target in SECTIONS:
        assert f"\n{target}: install\n" in rules
        assert target in rules.split(".PHONY: ")[1].splitlines()[0].split()


def test_a_section_is_printed_and_replaced_in_its_page(load, tmp_path, capsys):
    section, page = load("publishing").Section("one", "make-it"), tmp_path / "page.md"
    page.write_text(f"before\n{section.start}\nold\n{section.end}\nbehind\n")
    section.publish("new", page)
    assert page.read_text() == f"before\n{section.start}\nnew\n{section.end}\nbehind\n"
    assert section.read(page.read_text()).strip() == "new"
    section.publish("printed", None)
    assert capsys.readouterr().out == "new\nprinted\n"


def test_what_was_healed_elsewhere_stays(load):
    healing = load("healing")
    own = healing.SECTION.read((ROOT / "docs" / "measured.md").read_text(encoding="utf-8"))
    how = own.strip().partition(" on at least")[0]
    cells = {("code", "30%"): ["1", "2", "3", "4"]}
    written = str(healing.Table(how, 10**9, 10**9, cells).beside(own))
    line = next(line for line in own.splitlines() if "| code | 30% |" in line)
    assert written == own.strip().replace(line, "| code | 30% | 1 | 2 | 3 | 4 |")
    other = healing.Table("otherwise", 1, 1, cells)
    assert other.beside(own) == other


def test_picking_from_a_prompt_is_timed_beside_dense(load, monkeypatch, tmp_path):
    prompt = load("prompt")
    save_dense(tmp_path / "tiny", "llama")
    page = tmp_path / "page.md"
    page.write_text(f"{prompt.SECTION.start}\n{prompt.SECTION.end}\n")
    given = ["--model", tmp_path / "tiny", "--prompt", 8, "--new-tokens", 4, "--rounds", 2]
    monkeypatch.setattr(sys, "argv", ["prompt.py", *map(str, given), "--page", str(page)])
    prompt.main()
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")][1:]
    assert rows[0].count("1.00 (1.00-1.00)") == 4, "dense over itself"
    assert [row.split("|")[1].strip() for row in rows[2:]] == [f"prompt, {r}" for r in prompt.RULES]


def test_blocks_are_distilled_beside_dense(load, monkeypatch, cache):
    distillation, page = load("distillation"), cache / "page.md"
    page.write_text(f"{distillation.SECTION.start}\n{distillation.SECTION.end}\n")
    monkeypatch.setattr(distillation, "fetch", lambda *_: None)
    given = ["--cache", cache, "--model", "tiny", "--blocks", 0, 2, "--experts", 64]
    given += ["--channels", 2, "--max-tokens", 400, "--steps", 3, "--together", 2]
    monkeypatch.setattr(sys, "argv", ["distillation.py", *map(str, given), "--page", str(page)])
    distillation.main()
    written = page.read_text()
    stored = cache / "benchmarks" / "distillation" / "tiny" / "distillation.json"
    result = json.loads(stored.read_text())
    assert [one["name"] for one in result["stands"]] == 2 * ["sgatlin", "linear map", "mean output"]
    for one in result["stands"]:
        shown = f"| {one['flops']:.1%} | {format_figure(one['error'])} | "
        assert f"| {one['block']} | {one['name']} {shown}{format_figure(one['ratio'])} |" in written
    for one in result["wholes"]:
        assert f"| {one['name']} | {format_figure(one['perplexity'])} | " in written
    assert "n_channels 2" in written
    assert result["tokens"][0] <= 400


@pytest.fixture
def _quick(monkeypatch):
    """Take profiles without the model's own text, which routers alone need."""
    monkeypatch.setattr(profiling, "take_background", lambda *_, **__: None)


@pytest.fixture
def quality(load):
    return load("quality")


def _table(quality, *rows, perplexity="5.4"):
    return quality.Table(CAPTION.format(perplexity), HEADER, rows)


def test_the_written_tables_are_read_and_written_as_they_are(quality):
    text = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    own = quality.SECTION.read(text).strip()
    assert quality.join(quality.split_models(own), {}) == own
    assert own.count("geometric mean") >= 6


def test_rows_measured_elsewhere_stay_in_their_order(quality):
    joined = _table(quality, FLAP, perplexity="5.5").beside(_table(quality, PATHWAY, POOLED))
    assert joined.rows == (PATHWAY, FLAP, POOLED)
    assert str(joined).endswith("As good as pathway, or better: flap on code.")
    assert "5.5" in joined.caption


def test_a_row_that_was_measured_again_takes_the_old_one_s_place(quality):
    better = PATHWAY.replace("1.1 (", "1.05 (")
    joined = _table(quality, better).beside(_table(quality, PATHWAY, FLAP, POOLED))
    assert joined.rows == (better, FLAP, POOLED)
    assert str(joined).endswith("No other method of the table is as good as pathway on any domain.")


def test_other_text_is_another_table(quality):
    known = _table(quality, PATHWAY, POOLED)
    other = quality.Table(known.caption.replace("10 tokens", "20 tokens"), HEADER, (FLAP,))
    assert other.beside(known) == other


@pytest.fixture
def expansion(load, cache, _quick):
    expansion = load("expansion")
    given = argparse.Namespace(
        cache=cache,
        model="tiny",
        domains=["code", "law"],
        sparsity=[0.5],
        clusters=[1, 3],
        pattern="2:4",
        partners=list(expansion.PARTNERS),
        neurons=[3],
        max_tokens=1200,
        scored_tokens=60,
        dtype="float32",
        measured=False,
    )
    return expansion.Benchmark(given)


def test_every_step_of_an_expansion_is_measured_once(expansion, monkeypatch):
    results = expansion.measure()
    titles = [step.title for step in results]
    assert titles == [
        "one SparseGPT model",
        "copies, 3 clusters",
        "neurons, 3 clusters",
        "copy per domain",
        "neurons per domain",
        "neurons, pooled",
    ]
    for step, found in results.items():
        assert list(found["rows"]) == ["code", "law"]
        assert all(0.4 < row["flops"] < 0.56 for row in found["rows"].values()), step
    sizes = {step.title: found["bytes"] for step, found in results.items()}
    assert sizes["copies, 3 clusters"] > 2.9 * sizes["one SparseGPT model"]
    monkeypatch.setattr(type(expansion), "_score", None)
    assert expansion.measure() == results
    table = expansion.table(results)
    assert "| 50% | one SparseGPT model | 50.0% |" in table
    assert "| 1.000 |" in table
    expansion.arguments.pattern, expansion.arguments.measured = "unstructured", True
    assert COPIES not in {step.way for step in expansion.measure()}


def test_prompts_are_routed_for_every_choice_of_known_domains(load, cache):
    routing = load("routing")
    folders = {name: cache / "texts" / name for name in ("code", "law", "medicine")}
    given = argparse.Namespace(cache=cache, model="tiny", lengths=[8, 16], prompts=5)
    text = routing.measure(given, folders, {"more": folders["law"]})
    rows = [line for line in text.splitlines() if line.startswith("| code")]
    known = ["code, law", "code, medicine", "code, law, medicine"]
    assert [row.split("|")[1].strip() for row in rows] == 2 * known
    assert "/10;" in rows[0]
    assert "further text sent anywhere" in text
    tally = routing.Tally([("code", "code"), ("code", None), ("law", "code"), ("law", "law")])
    assert [tally.right[:10], tally.wrong[:10], tally.sent[:10]] == [
        "50.0 % (2/",
        "25.0 % (1/",
        "75.0 % (3/",
    ]


def test_routing_is_measured_beside_dense_the_right_domain_and_the_pooled_one(
    load, cache, monkeypatch, tmp_path
):
    auto, page = load("auto"), tmp_path / "page.md"
    page.write_text(f"{auto.SECTION.start}\n{auto.SECTION.end}\n")
    monkeypatch.setattr(auto, "fetch", lambda *_: None)
    sizes = {"routing.SCORED": 8, "routing.QUALITY_LENGTH": 16, "routing.HALF": 40}
    for name, value in {**sizes, "guarding.HALF": 40}.items():
        monkeypatch.setattr(f"hf_sparse_pathways.measure.{name}", value)
    given = ["--cache", cache, "--models", "tiny", "--unknown", "medicine", "--lengths", 8, 16]
    given += ["--max-tokens", 600, "--prompts", 4, "--quality-prompts", 2, "--page", page]
    monkeypatch.setattr(sys, "argv", ["auto.py", *map(str, given)])
    auto.main()
    text = page.read_text()
    assert "| text | tokens | dense | auto | oracle | pooled |" in text
    assert text.count("| medicine (unknown) |") == 2
    assert "| code, then medicine |" in text
    assert "| tokens | deciding | dense prefill | share |" in text
    monkeypatch.setattr(auto, "measure", None)
    auto.main()
    assert page.read_text() == text


@pytest.fixture
def mixture(load, cache, _quick):
    mixture = load("mixture")
    given = argparse.Namespace(
        cache=cache,
        model="tiny",
        domain="code",
        sparsity=0.5,
        mixture=4,
        top_k=2,
        max_tokens=600,
        training_tokens=200,
        scored_tokens=60,
        arms=list(mixture.ARMS),
    )
    return mixture.Benchmark(given)


def test_groups_are_measured_beside_their_controls(mixture, monkeypatch):
    results = mixture.measure()
    assert all(0.45 < found["flops"] <= 0.5 for found in results.values())
    assert len({found["ratio"] for found in results.values()}) >= 4
    monkeypatch.setattr(type(mixture), "_score", None)
    assert mixture.measure() == results
    table = mixture.table()
    for arm in ("static pathway", "random groups", "random router", "groups, trained"):
        assert f"| {arm} |" in table


@pytest.fixture
def token_speed(load, cache, _quick, monkeypatch):
    token_speed = load("token_speed")
    monkeypatch.setitem(token_speed.ARMS, "clusters-16", {"clusters": 3})
    monkeypatch.setitem(token_speed.ARMS, "clusters-16-skip-50", {"clusters": 3, "skip": 0.5})
    monkeypatch.setitem(token_speed.ARMS, "groups-32", {"mixture": 4})
    given = argparse.Namespace(
        cache=cache,
        model="tiny",
        domain="code",
        sparsity=0.5,
        max_tokens=600,
        arms=list(token_speed.ARMS),
        executors=["compact", "masked"],
        passes=[8, 20],
        new_tokens=4,
        rounds=1,
        threads=1,
    )
    return token_speed.Benchmark(given)


def test_every_way_to_choose_per_token_is_timed_beside_the_static_one(token_speed, monkeypatch):
    text = token_speed.section("float32")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    arms = ["dense", *token_speed.arguments.arms]
    assert [row[:2] for row in rows[2:]] == [[e, a] for e in ("compact", "masked") for a in arms]
    for row in rows[2:]:
        if row[1] == "dense":
            assert row[2] == "100%"
            assert row[3] == row[5] == row[7] == "1.00 (1.00-1.00)"
            continue
        assert 40.0 < float(row[2].rstrip("%")) <= 55.0
        assert (row[4] == row[6] == row[8] == "1.00 (1.00-1.00)") == (row[1] == "static")
    monkeypatch.setattr(sp, "select", None)
    assert token_speed.section("bfloat16").count("groups-32") == 2


@pytest.mark.usefixtures("_quick")
def test_entangled_rows_are_measured_on_held_out_text(load, cache):
    entanglement, materials = load("entanglement"), load("materials")
    own = materials.Materials(cache, "tiny", ["code", "law"], cache / "work")
    text = entanglement.measure(own, 600, 100)
    assert text.count("| code |") == text.count("| law |") == 7, "four relations, three harms"
    assert "most entangled" in text
    assert "sparsegpt" in text
