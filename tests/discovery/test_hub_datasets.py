"""Datasets on the Hub: their addresses, what is asked for, and what is kept of their origin."""

from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.hub_datasets import Address, _files, describe_dataset
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.errors import HubError, TextError
from tests.architectures import build
from tests.cli.commands import assert_error, run
from tests.texts import documents, tiny_tokenizer

COMMIT = "c" * 40
KNOWN = {"id": "me/law", "config": "en", "revision": COMMIT, "split": "test", "column": "body"}
WHOLE = "hf://datasets/me/law/en@v2:test:body"


@pytest.fixture
def asked(monkeypatch):
    """What a Hub that has one dataset is asked for."""
    requests = []

    def find(_, name, *, revision=None):
        if name != "me/law":
            raise FileNotFoundError(f"404: no dataset {name}")
        requests.append(revision)
        return SimpleNamespace(sha=COMMIT)

    def load(name, config, **options):
        requests.append((name, config, options))
        if options["split"] not in ("train", "test"):
            raise ValueError(f"Bad split: {options['split']}.")
        rows = [{"body": text, "text": "", "n": 1} for text in documents("law", count=300)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", find)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return requests


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("me/law", {"id": "me/law", "split": "train"}),
        ("me/law:test", {"id": "me/law", "split": "test"}),
        ("me/law:train:body", {"id": "me/law", "split": "train", "column": "body"}),
        ("me/law@main", {"id": "me/law", "split": "train", "revision": "main"}),
        ("me/law@refs/pr/1:test", {"id": "me/law", "split": "test", "revision": "refs/pr/1"}),
        ("me/law/en:test[:9]", None),
        ("law", {"id": "law", "split": "train"}),
        ("me/law/en@v2:test:body", {**KNOWN, "revision": "v2"}),
        ("", None),
        ("me/law/en/more", None),
        ("me/law::body", None),
    ],
)
def test_addresses(text, known):
    if known is None:
        with pytest.raises(TextError, match="OWNER/NAME"):
            Address.parse(f"hf://datasets/{text}")
    else:
        address = Address.parse(f"hf://datasets/{text}")
        assert address.described() == known
        assert Address.parse(str(address)) == address


@pytest.mark.parametrize("text", ["hf://me/law", "hf://dataset/me/law:train"])
def test_an_address_of_something_else_is_no_text(text):
    with pytest.raises(TextError, match="is no address of a dataset"):
        read_documents(text)


def test_an_address_is_streamed_at_a_commit(asked):
    read = read_documents(WHOLE, tokens=10)
    options = {"split": "test", "revision": COMMIT, "streaming": True}
    assert asked == ["v2", ("me/law", "en", options)]
    assert read.streamed
    assert read.datasets == (KNOWN,)
    assert {document.text for document in read.items} <= set(documents("law", count=300))


def test_the_provenance_of_a_pathway_names_its_datasets(asked, tmp_path):
    model = build("llama")
    texts = {"law": WHOLE, "code": documents("code")}
    profile = sp.profile(model, tiny_tokenizer(), texts, max_tokens=300)
    profile.save_pretrained(tmp_path)
    paths = sp.select(model, sp.Profile.from_pretrained(tmp_path), sparsity=0.5, method="wanda")
    assert paths["law"].provenance["text"]["datasets"] == [KNOWN]
    assert paths["code"].provenance["text"]["datasets"] == []
    assert paths.controls["pooled"].provenance["text"]["datasets"] == [KNOWN]
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("hf://datasets/me/lwa", "no dataset me/lwa"),
        ("hf://datasets/me/law:dev", "Bad split"),
        ("hf://datasets/me/law:test:bdy", r"no column 'bdy'.*body, text, n"),
        ("hf://datasets/me/law", "holds no text"),
    ],
)
@pytest.mark.usefixtures("asked")
def test_what_is_not_there_is_told(address, told):
    with pytest.raises(sp.PathwaysError, match=told):
        read_documents(address)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"^hf://datasets/me/law:train cannot be found: "):
        read_documents("hf://datasets/me/law")


@pytest.mark.usefixtures("asked")
def test_the_command_line_takes_addresses(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    arguments = ["profile", tmp_path / "dense", "--output", tmp_path / "out", "--domain"]
    ran = run(*arguments, f"law={WHOLE}", "--max-tokens", 300)
    assert ran.status == 0, ran.err
    found = sp.Profile.from_pretrained(tmp_path / "out")["law"]
    assert found.provenance["datasets"] == [KNOWN]
    held = read_documents(WHOLE, tokens=10_000).split(0.2)[1]
    assert set(found.provenance["digests"]).isdisjoint(d.digest for d in held.items)
    assert_error(run(*arguments, "law=hf://datasets/", "--overwrite"), "OWNER/NAME")


def test_a_downloaded_dataset_knows_its_repository():
    files = {f"hf://datasets/me/law@{COMMIT}/en/test-0.parquet": {}}
    info = datasets.DatasetInfo(dataset_name="law", config_name="en", download_checksums=files)
    downloaded = SimpleNamespace(info=info, split=datasets.Split.TEST)
    described = describe_dataset(downloaded)
    assert described == {
        "name": "law",
        "config": "en",
        "split": "test",
        "id": "me/law",
        "revision": COMMIT,
    }
    streamed = SimpleNamespace(
        info=datasets.DatasetInfo(dataset_name="law", config_name="en"),
        split=datasets.Split.TEST,
        _ex_iterable=SimpleNamespace(
            ex_iterable=SimpleNamespace(kwargs={"base_files": list(files)})
        ),
    )
    assert describe_dataset(streamed) == described
    assert describe_dataset(["a text"]) == {}


def test_a_stream_tells_its_files(tmp_path):
    path = str(tmp_path / "rows.jsonl")
    datasets.Dataset.from_list([{"text": "a"}]).to_json(path)
    stream = datasets.load_dataset("json", data_files=path, split="train", streaming=True)
    for source in (stream, stream.map(lambda row: row).shuffle(seed=0)):
        assert list(_files(source)) == [path]
