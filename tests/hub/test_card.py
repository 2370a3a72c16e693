"""Model cards say what was measured, are valid for the Hub, and are nobody else's."""

import json
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, snapshot_download

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.limits import MOST_ROWS
from hf_sparse_pathways.measure.quality_report import QualityReport
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways
from hf_sparse_pathways.share.card import change_rows, is_own_card, render_card
from tests.architectures import build, compensate, random_masks
from tests.hub.cards import FOLDER, evaluation, pathways, rendered

REPO = "me/x"
PLAIN = sp.CardSettings()


def _rows(text):
    table = text.split("<!-- domains -->")[1].split("<!-- /domains -->")[0]
    return [line.split("|")[1].strip() for line in table.strip().splitlines()[2:]]


def _card(hub, revision="main"):
    return hub.repos[REPO].at(revision).files["README.md"].content.decode()


@pytest.mark.parametrize("name", ["full.md", "adapter.md"])
def test_the_examples_are_what_is_rendered(name):
    assert sorted(path.name for path in FOLDER.iterdir()) == ["adapter.md", "full.md"]
    assert (FOLDER / name).read_text(encoding="utf-8") == rendered()[name]


@pytest.mark.usefixtures("hub")
def test_the_hub_takes_the_metadata():
    for text in rendered().values():
        ModelCard(text).validate()
    full, adapter = (ModelCard(text).data for text in rendered().values())
    assert full.base_model == adapter.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert full.base_model_relation == adapter.base_model_relation == "adapter"
    assert full.library_name == "hf-sparse-pathways"
    assert full.license == "apache-2.0"
    assert {"code", "law"} <= set(full.tags)
    found = {(r.dataset_type, r.metric_name): r.metric_value for r in full.eval_results}
    assert found["law", "perplexity, pathway law"] == pytest.approx(14 * 1.12)
    assert found["law", "perplexity, dense"] == 14.0
    assert {name for _, name in found} >= {"perplexity, pooled", "perplexity, random"}
    assert adapter.eval_results is None


def test_what_is_measured_stands_beside_its_partners():
    text = rendered()["full.md"]
    assert evaluation().to_markdown() in text
    assert "Not measured" not in text
    assert "Not measured" in rendered()["adapter.md"]


def test_an_artefact_cannot_write_into_the_card():
    evil = 'x"\n---\n# Owned | <!-- /domains -->\n'
    paths = pathways()
    keep = paths["law"].blocks
    made = {"method": evil, "compensation": evil, "text": {"tokens": evil, "documents": evil}}
    paths = replace(paths, by_domain={"law": Pathway(blocks=keep, provenance=made)})
    for name in (evil, "/home/somebody/secret", "../secret"):
        text = render_card(
            replace(paths, base=replace(paths.base, name=name)),
            REPO,
            sp.CardSettings(),
            weights=False,
        )
        header = yaml.safe_load(text.split("---\n")[1])
        assert "base_model" not in header
        assert "secret" not in text
        assert "\n# Owned" not in text
        assert len(text.split("<!-- /domains -->")[0].splitlines()) < 40
    odd = replace(paths, by_domain={"law": Pathway(blocks=keep, provenance={"text": [1]})})
    assert "unknown" in render_card(odd, REPO, PLAIN, weights=True)


MARKUP = ("<script>alert(1)</script>", "![x](http://evil/x.png)", "`", "**x**", "{{ 7 * 7 }}", "|")


@pytest.mark.parametrize("text", MARKUP)
def test_a_provenance_is_words_in_a_card(text):
    paths = pathways()
    made = {"method": f"obs {text}", "text": {"tokens": text, "documents": text}}
    by_domain = {"law": Pathway(blocks=paths["law"].blocks, provenance=made)}
    card = render_card(replace(paths, by_domain=by_domain), REPO, PLAIN, weights=True)
    (row,) = [line for line in card.splitlines() if line.startswith("| law |")]
    cells = row.split("|")[1:-1]
    assert len(cells) == 6
    assert cells[4].startswith(" obs")
    assert text not in "".join(cells[4:])
    assert "49" not in row


def test_no_domain_at_all():
    assert _rows(render_card(replace(pathways(), by_domain={}), REPO, PLAIN, weights=False)) == []


def test_rows_change_and_the_rest_stays():
    text = rendered()["full.md"].replace("## Limits", "My own words.\n\n## Limits")
    more = change_rows(text, added=pathways(("law", "math")))
    assert _rows(more) == ["code", "law", "math"]
    assert ModelCard(more).data.tags[-3:] == ["code", "law", "math"]
    renamed = change_rows(more, renamed=("law", "case law"))
    assert _rows(renamed) == ["code", "case law", "math"]
    less = change_rows(change_rows(renamed, gone="code"), gone="math")
    assert _rows(less) == ["case law"]
    assert ModelCard(less).data.tags == ["sparse-pathways", "transformers", "case law"]
    again = change_rows(change_rows(less, gone="case law"), added=pathways())
    assert again == text
    assert change_rows("# My own card", added=pathways()) == "# My own card"
    odd_names = change_rows(rendered()["full.md"], added=pathways(("on", "1e5")))
    assert ModelCard(odd_names).data.tags[-2:] == ["on", "1e5"]
    unmarked = text.replace("<!-- /domains -->", "")
    assert change_rows(unmarked, gone="code") == unmarked


def test_a_card_that_somebody_has_broken_is_changed_as_far_as_it_goes():
    text = rendered()["full.md"]
    broken = (
        text.replace("| code |", "|\n|x|\n| code |", 1),
        text.replace("- code\n", "- [a\n", 1),
        text.replace("- code\n", "- {a: 1}\n", 1),
        text.replace("- code\n", "- &a [*a]\n", 1),
    )
    for card in broken:
        assert card != text
        assert "law" not in _rows(change_rows(card, gone="law"))


def _pushed(**options):
    dense = build("llama")
    paths = compensate(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    model.push_to_hub(REPO, **options)
    return paths


def test_a_card_is_pushed_and_follows_the_domains(hub):
    paths = _pushed(card=sp.CardSettings(evaluation=evaluation(), license="mit"), tags=["mine"])
    text = _card(hub)
    assert is_own_card(text)
    assert 'from_pretrained("me/x")' in text
    assert HfApi().model_info(REPO).card_data.license == "mit"
    assert _rows(text) == ["code", "law"]
    assert "mine" in HfApi().model_info(REPO).tags
    dense = build("llama")
    sp.add_domains(Pathways.from_masks(dense, random_masks(dense, ["math"])), REPO)
    sp.rename_domain("law", "case law", REPO)
    sp.remove_domains(["code"], REPO)
    assert _rows(_card(hub)) == ["case law", "math"]
    assert "| given masks |" in _card(hub)
    paths.push_to_hub(REPO)
    assert _rows(_card(hub)) == ["code", "law"]
    assert 'from_pretrained("me/x")' in _card(hub), "the weights are still there"


def test_a_card_of_somebody_else_is_left_alone(hub, tmp_path):
    HfApi().create_repo(REPO)
    own = b"---\nlicense: mit\n---\n# Mine\n"
    HfApi().upload_file(path_or_fileobj=own, path_in_repo="README.md", repo_id=REPO)
    paths = _pushed()
    sp.rename_domain("law", "case law", REPO)
    assert _card(hub).encode() == own
    paths.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# In the folder")
    sp.push_folder(tmp_path, REPO)
    assert _card(hub) == "# In the folder"


def test_an_evaluation_is_read_back():
    values = json.loads(json.dumps(evaluation().to_dict()))
    found = QualityReport.from_dict(values)
    assert found == evaluation()
    assert found.settings == evaluation().settings
    for wrong in ({}, {**values, "rows": 5}, {**values, "rows": [{}]}, {**values, "settings": 1}):
        with pytest.raises(ArtefactError, match="report"):
            QualityReport.from_dict(wrong)


NAMES = ("<script>", "a|b", "[x](y)", "a\nb", "\x1b[2J", "x" * 300, 5, ["x"], None)
FIGURES = ("1", None, True, [1], {})


@pytest.mark.parametrize("name", ["domain", "role", "pathway", "set", "dtype", "seen"])
def test_a_name_in_an_evaluation_cannot_write_into_a_card(name):
    for value in NAMES:
        values = json.loads(json.dumps(evaluation().to_dict()))
        place = values["settings"] if name in ("dtype", "seen") else values["rows"][0]
        place[name] = value
        if value is None and name in ("pathway", "set"):
            QualityReport.from_dict(values)
            continue
        with pytest.raises(ArtefactError):
            QualityReport.from_dict(values)


@pytest.mark.parametrize("name", ["perplexity", "ratio", "flops", "cosine", "tokens", "documents"])
def test_a_figure_in_an_evaluation_is_a_number(name):
    for value in (*FIGURES, *([1.5] if name in ("tokens", "documents") else [])):
        values = json.loads(json.dumps(evaluation().to_dict()))
        values["rows"][0][name] = value
        with pytest.raises(ArtefactError, match="report"):
            QualityReport.from_dict(values)


def test_an_evaluation_of_endless_rows_is_refused():
    values = json.loads(json.dumps(evaluation().to_dict()))
    values["rows"] *= MOST_ROWS
    with pytest.raises(ArtefactError, match="rows"):
        QualityReport.from_dict(values)


def test_a_link_out_of_the_folder_is_not_pushed(hub, tmp_path):
    (tmp_path / "secret").write_text("mine")
    folder = tmp_path / "x"
    pathways().save_pretrained(folder)
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtefactError, match=r"notes\.txt.*link"):
        sp.push_folder(folder, REPO)
    assert not hub.repos
    (folder / "notes.txt").unlink()
    (folder / "own.txt").write_text("shown")
    (folder / "again.txt").symlink_to("own.txt")
    sp.push_folder(folder, REPO)
    assert hub.repos[REPO].at("main").files["again.txt"].content == b"shown"


@pytest.mark.usefixtures("hub")
def test_a_snapshot_of_the_cache_can_be_pushed():
    pathways().push_to_hub(REPO)
    snapshot = snapshot_download(REPO)
    assert sp.push_folder(snapshot, "me/copy")
