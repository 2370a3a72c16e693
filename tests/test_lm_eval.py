"""The evaluation harness's own ``hf`` model takes ``domain=`` among its arguments."""

import json

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

import hf_sparse_pathways as sp
from tests.architectures import build, random_masks, zeroed
from tests.texts import documents, tiny_tokenizer

CHOICES = """
task: tiny_choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
TEXTS = """
task: tiny_text
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["the"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""
SHARED = """
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
doc_to_text: "{{question}}"
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks over local questions."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = documents("code", count=24, words=9)
    rows = [
        {"question": texts[i], "choices": texts[i + 1 : i + 4], "answer": i % 3}
        for i in range(0, 24, 4)
    ]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, task in {"choice": CHOICES, "text": TEXTS}.items():
        (folder / f"{name}.yaml").write_text(task + SHARED % file, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with pathways, and a plain one whose neurons outside ``code`` are zero."""
    root = tmp_path_factory.mktemp("models")
    dense = build("llama")
    masks = random_masks(dense)
    paths = sp.Pathways.from_masks(dense, masks)
    sp.SparsePathwaysForCausalLM.from_dense(dense, paths).save_pretrained(root / "paths")
    zeroed(dense, masks["code"]).save_pretrained(root / "zeroed")
    for folder in root.iterdir():
        tiny_tokenizer().save_pretrained(folder)
    return root


def _run(tasks, folder, arguments="", **options):
    """Return each sample's likelihoods and each one's text."""
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},dtype=float32{arguments}",
        tasks=["tiny_choice", "tiny_text"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
        **options,
    )["samples"]
    likelihoods = [float(value[0][0]) for one in found["tiny_choice"] for value in one["resps"]]
    return likelihoods, [one["resps"][0][0] for one in found["tiny_text"]]


@pytest.mark.parametrize("argument", ["domain", "default_domain"])
def test_a_domain_is_scored_as_the_model_with_its_neurons_alone(tasks, folders, argument):
    expected = _run(tasks, folders / "zeroed")
    likelihoods, texts = _run(tasks, folders / "paths", f",{argument}=code")
    assert likelihoods == pytest.approx(expected[0], abs=1e-3)
    assert texts == expected[1]
    dense = _run(tasks, folders / "paths")
    assert dense[0] != pytest.approx(likelihoods, abs=0.1)
    assert dense[1] != texts


def test_an_unknown_domain_ends_it(tasks, folders):
    with pytest.raises(sp.PathwaysError, match=r"Unknown domain 'cod'.*Did you mean 'code'"):
        _run(tasks, folders / "paths", ",domain=cod")
