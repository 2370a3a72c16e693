"""Datasets on the Hub, with ``datasets`` as it is: their addresses, their rows, their origin."""

import json

import datasets
import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.hub_datasets import Address, _files, describe_dataset
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.errors import HubError, TextError
from tests.architectures import build
from tests.cli.commands import assert_error, run, run_well
from tests.texts import documents, tiny_tokenizer

CARD = """---
configs:
- config_name: plain
  default: true
  data_files:
  - {split: train, path: plain/train.jsonl}
  - {split: test, path: plain/test.jsonl}
- config_name: en
  data_files: [{split: test, path: en/test.jsonl}]
- config_name: chats
  data_files: chats.jsonl
---
"""
TEXTS = documents("law", count=300)
CHAT = [{"role": "user", "content": "hello"}]
WHOLE = "hf://datasets/me/law/en@v2:test:body"


def _lines(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def _push(name, files, **options):
    """Push a dataset; return its commit."""
    api = HfApi()
    api.create_repo(name, repo_type="dataset", exist_ok=True, **options)
    added = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(name, added, commit_message="data", repo_type="dataset").oid


@pytest.fixture
def commit(hub):  # noqa: ARG001
    """The commit ``v2`` of a dataset ``me/law``, whose main branch has gone on since."""
    files = {
        "README.md": CARD.encode(),
        "plain/train.jsonl": _lines({"text": text, "n": 1} for text in TEXTS),
        "plain/test.jsonl": _lines({"text": text} for text in TEXTS[:20]),
        "en/test.jsonl": _lines({"body": text, "text": "", "n": 1} for text in TEXTS),
        "chats.jsonl": _lines({"messages": CHAT, "n": 1} for _ in range(3)),
    }
    found = _push("me/law", files)
    HfApi().create_tag("me/law", tag="v2", repo_type="dataset")
    _push("me/law", {"en/test.jsonl": b"{", "plain/test.jsonl": _lines([{"body": 1}])})
    return found


def _known(commit):
    origin = {"id": "me/law", "config": "en", "revision": commit}
    return {**origin, "split": "test", "column": "body"}


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
        ("me/law/en@v2:test:body", _known("v2")),
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


def test_an_address_is_read_at_a_commit(commit):
    read = read_documents(WHOLE, tokens=10)
    assert read.streamed
    assert read.datasets == (_known(commit),)
    assert {document.text for document in read.items} <= set(TEXTS)
    assert {text.origin.rpartition("[")[0] for text in read.items} == {WHOLE}


@pytest.mark.usefixtures("commit")
@pytest.mark.parametrize(
    ("address", "texts"),
    [
        ("me/law", TEXTS),
        ("me/law/plain:train:text", TEXTS),
        ("me/law@v2:test", TEXTS[:20]),
        ("me/lines", ["first", "second"]),
        ("me/split:validation", TEXTS[:3]),
        ("me/mine", TEXTS[3:5]),
        ("me/table", TEXTS[5:]),
    ],
)
def test_configurations_splits_and_files(address, texts, tmp_path):
    _push("me/lines", {"train.txt": b"first\nsecond\n"})
    _push("me/split", {"data/validation-0.jsonl": _lines({"content": t} for t in TEXTS[:3])})
    _push("me/mine", {"a.jsonl": _lines({"text": t} for t in TEXTS[3:5])}, private=True)
    datasets.Dataset.from_dict({"text": TEXTS[5:]}).to_parquet(tmp_path / "rows")
    _push("me/table", {"data/train-00000-of-00001.parquet": (tmp_path / "rows").read_bytes()})
    read = read_documents(f"hf://datasets/{address}")
    assert {document.text for document in read.items} == set(texts)


@pytest.mark.usefixtures("commit")
@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("me/lwa", "cannot be found: 404.*Repository Not Found"),
        ("me/law@v3", "Revision Not Found"),
        ("me/law:dev", r"Bad split: dev.*train.*test"),
        ("me/law/fr", r"'fr' not found.*plain.*en.*chats"),
        ("me/law/en@v2:test:bdy", r"no column 'bdy'.*body, text, n"),
        ("me/law/en@v2:test", "holds no text"),
        ("me/law/en:test", "cannot be read: JSON parse error"),
        ("me/law:test", "cannot be read: Couldn't cast body"),
        ("me/law/chats", r"no column 'text'.*messages, n"),
        ("me/law/chats:train:messages", "column 'messages'.*list.*apply_chat_template"),
        ("me/script", "scripts are no longer supported"),
        ("me/tar", "cannot be read: truncated header"),
        ("me/empty", "any data files"),
    ],
)
def test_what_is_not_there_is_told(address, told):
    _push("me/script", {"script.py": b"import datasets"})
    _push("me/tar", {"train.tar": b"nothing"})
    _push("me/empty", {})
    with pytest.raises(sp.PathwaysError, match=told) as error:
        read_documents(f"hf://datasets/{address}")
    assert "\n" not in str(error.value)


def test_who_may_read(commit, monkeypatch):  # noqa: ARG001
    _push("me/mine", {"a.jsonl": _lines([{"text": "mine"}])}, private=True)
    _push("me/gated", {"a.jsonl": _lines([{"text": "ours"}])})
    HfApi().update_repo_settings("me/gated", repo_type="dataset", gated="auto")
    assert read_documents("hf://datasets/me/gated").items[0].text == "ours"
    monkeypatch.setenv("HF_TOKEN", "hf_of_you")
    with pytest.raises(HubError, match="Repository Not Found"):
        read_documents("hf://datasets/me/mine")
    with pytest.raises(HubError, match=r"gated.*ask for access"):
        read_documents("hf://datasets/me/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="Invalid credentials") as error:
        read_documents("hf://datasets/me/law")
    assert "hf_wrong" not in str(error.value)


def test_the_provenance_of_a_pathway_names_its_datasets(commit, tmp_path):
    model = build("llama")
    texts = {"law": WHOLE, "code": documents("code")}
    profile = sp.profile(model, tiny_tokenizer(), texts, max_tokens=300)
    profile.save_pretrained(tmp_path)
    paths = sp.select(model, sp.Profile.from_pretrained(tmp_path), sparsity=0.5, method="wanda")
    assert paths["law"].provenance["text"]["datasets"] == [_known(commit)]
    assert paths["code"].provenance["text"]["datasets"] == []
    assert paths.controls["pooled"].provenance["text"]["datasets"] == [_known(commit)]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"^hf://datasets/me/law:train cannot be found: "):
        read_documents("hf://datasets/me/law")


def test_the_command_line_takes_addresses(commit, tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    arguments = ["profile", tmp_path / "dense", "--output", tmp_path / "out", "--domain"]
    run_well(*arguments, f"law={WHOLE}", "--max-tokens", 300)
    found = sp.Profile.from_pretrained(tmp_path / "out")["law"]
    assert found.provenance["datasets"] == [_known(commit)]
    held = read_documents(WHOLE, tokens=10_000).split(0.2)[1]
    assert set(found.provenance["digests"]).isdisjoint(d.digest for d in held.items)
    assert_error(run(*arguments, "law=hf://datasets/", "--overwrite"), "OWNER/NAME")
    assert_error(run(*arguments, "law=hf://datasets/me/law/en:test", "--overwrite"), "read")
    made = ["--profile", tmp_path / "out", "--sparsity", 0.5, "--method", "wanda"]
    run_well("build", tmp_path / "dense", *made, "--output", tmp_path / "model")
    measured = ["--domain", f"law={WHOLE}", "--max-tokens", 300, "--report", tmp_path / "quality"]
    said = run_well("evaluate", tmp_path / "model", *measured)
    assert "calibration documents left out" in said


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_knows_its_repository(commit, streaming):
    dataset = datasets.load_dataset(
        "me/law", "en", revision="v2", split="test", streaming=streaming
    ).select_columns(["body"])
    known = _known(commit) | {"name": "law"}
    del known["column"]
    assert describe_dataset(dataset) == known
    read = read_documents(dataset, tokens=10)
    assert read.datasets == (known,)
    assert describe_dataset(dataset.map(lambda row: row)) == known
    assert {document.text for document in read.items} <= set(TEXTS)


def test_what_is_no_dataset_of_the_hub_is_not_described():
    assert describe_dataset(["a text"]) == {}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.usefixtures("commit")
def test_splits_are_no_text(streaming):
    splits = datasets.load_dataset("me/law", "plain", revision="v2", streaming=streaming)
    with pytest.raises(TextError, match=r"'train', 'test'.*dataset\['train'\]"):
        read_documents(splits)


def test_a_stream_tells_its_files(tmp_path):
    path = str(tmp_path / "rows.jsonl")
    datasets.Dataset.from_list([{"text": "a"}]).to_json(path)
    stream = datasets.load_dataset("json", data_files=path, split="train", streaming=True)
    for source in (stream, stream.map(lambda row: row).shuffle(seed=0)):
        assert list(_files(source)) == [path]
