"""What the reader of a page has: a base model, text of two domains, and a Hub account."""

import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.architectures import build
from tests.cli.commands import run_well
from tests.texts import documents, save_documents, tiny_tokenizer

BUILT = "--domain code=src --domain law=law --output my-model --max-tokens 200"


@pytest.fixture(scope="session")
def _prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("reader")
    model = build("llama")
    model.generation_config.max_new_tokens = 4
    model.save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    save_documents(root / "src", "code", count=12)
    for path in sorted((root / "src").iterdir()):
        path.rename(path.with_suffix(".py"))
    save_documents(root / "law", "law", count=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run_well("build", "base", *BUILT.split())
    return root


@pytest.fixture
def built(_prepared, tmp_path, monkeypatch):
    """The reader's folder, with ``base``, ``src``, ``law`` and what ``build`` makes of them."""
    shutil.copytree(_prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def workplace(built):
    """The same before anything was built."""
    shutil.rmtree(built / "my-model")
    return built


@pytest.fixture
def names():
    """What blocks of Python find when they begin, beside a model."""
    return {
        "folder": "my-model",
        "base": "base",
        "law_texts": documents("law", seed=1),
        "held_out": documents("law", seed=2),
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "AutoTokenizer": AutoTokenizer,
    }
