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
from hf_sparse_pathways.pathways.apart import folder_for
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways
from hf_sparse_pathways.share.card import change_rows, is_own_card, render_card
from tests.architectures import build, compensate, random_masks
from tests.hub.cards import FOLDER, PICTURES, evaluation, pathways, rendered

REPO = "me/x"
PLAIN = sp.CardSettings()
_LAW = pathways()["law"].blocks


def _rows(text):
    table = text.split("<!-- domains -->")[1].split("<!-- /domains -->")[0]
    return [line.split("|")[1].strip() for line in table.strip().splitlines()[2:]]


def _card(hub, revision="main"):
    return hub.repos[REPO].at(revision).files["README.md"].content.decode()


@pytest.mark.parametrize("name", ["full.md", "adapter.md"])
def test_the_examples_are_what_is_rendered(name):
    files = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    assert files == {"adapter.md", "full.md", *PICTURES.values()}
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


def test_the_hub_shows_the_models_own_pathways_alone():
    """Others that were measured beside them are in the tables, with their label."""
    rows = evaluation().rows
    own = [replace(row, set=None if row.role == "dense" else "mine") for row in rows]
    others = [replace(row, set="other", perplexity=99.0) for row in rows if row.role != "dense"]
    report = replace(evaluation(), rows=(*own, *others))
    text = render_card(pathways(), REPO, sp.CardSettings(evaluation=report), weights=True)
    shown = [result.metric_value for result in ModelCard(text).data.eval_results]
    assert shown == [
        result.metric_value for result in ModelCard(rendered()["full.md"]).data.eval_results
    ]
    assert report.to_markdown() in text


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
    empty = change_rows(less, gone="case law")
    again = change_rows(empty, added=pathways(), pictures=PICTURES)
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


def test_datasets_follow_the_rows():
    """What a domain was made from stands in its row, and the metadata list that of all rows."""
    text = rendered()["full.md"]
    assert ModelCard(text).data.datasets == ["me/case-law"]
    by_hand = text.replace("- me/case-law\n", "- me/case-law\n- me/mine\n", 1)
    gone = change_rows(by_hand, gone="law")
    assert ModelCard(gone).data.datasets == ["me/mine"]
    assert ModelCard(change_rows(text, gone="law")).data.datasets is None
    renamed = change_rows(by_hand, renamed=("law", "case law"))
    assert ModelCard(renamed).data.datasets == ["me/mine", "me/case-law"]
    added = change_rows(gone, added=pathways())
    assert ModelCard(added).data.datasets == ["me/mine", "me/case-law"]


@pytest.mark.parametrize("id", ["/home/me/texts", "./texts", "../a/b", "a b/c", "x](y)", 5, None])
@pytest.mark.parametrize("described", [lambda id: [{"id": id}], lambda id: [id], lambda id: id])
def test_what_is_no_dataset_is_not_linked(id, described):
    made = {"text": {"datasets": described(id), "tokens": 5}}
    own = replace(pathways(), by_domain={"law": Pathway(blocks=_LAW, provenance=made)})
    text = render_card(own, REPO, PLAIN, weights=False)
    assert ModelCard(text).data.datasets is None
    assert "| 5 tokens |" in text


@pytest.mark.usefixtures("hub")
def test_metadata_come_back_through_the_hubs_own_reader(tmp_path):
    for text in rendered().values():
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        data = ModelCard.load(tmp_path / "README.md").data
        again = ModelCard(f"---\n{data.to_yaml()}\n---\n").data
        assert again.to_dict() == data.to_dict()
        assert data.pipeline_tag == "text-generation"


def _pictures(hub):
    return {path for path in hub.repos[REPO].at("main").files if path.endswith(".png")}


def _shown(hub):
    return {part.split("](")[1].split(")")[0] for part in _card(hub).split("![")[1:]}


def test_a_picture_goes_with_its_domain(hub):
    _pushed()
    places = {name: f"{folder_for(name)}/sparsity.png" for name in ("code", "law", "math")}
    assert _pictures(hub) == _shown(hub) == {places["code"], places["law"]}
    dense = build("llama")
    sp.add_domains(Pathways.from_masks(dense, random_masks(dense, ["math"])), REPO)
    sp.rename_domain("law", "case law", REPO)
    sp.remove_domains(["code"], REPO)
    assert _pictures(hub) == _shown(hub) == {places["law"], places["math"]}


def test_without_matplotlib_a_card_goes_without_pictures(hub, monkeypatch):
    _pushed()

    def missing():
        raise sp.PathwaysError("Plots need matplotlib.")

    monkeypatch.setattr("hf_sparse_pathways.share.pictures.load_plots", missing)
    dense = build("llama")
    sp.add_domains(Pathways.from_masks(dense, random_masks(dense, ["law"], seed=3)), REPO)
    left = {f"{folder_for('code')}/sparsity.png"}
    assert _pictures(hub) == _shown(hub) == left, "the other one showed what was there before"
    _pushed()
    assert _pictures(hub) == _shown(hub) == set()


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
