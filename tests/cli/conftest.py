"""A saved tiny model, texts of two domains, and what ``build`` makes of them."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.architectures import build
from tests.cli.commands import run_well
from tests.texts import save_documents, tiny_tokenizer


@dataclass(frozen=True)
class Places:
    """Folders that tests share and do not change."""

    dense: Path
    code: Path
    law: Path
    built: Path

    @property
    def texts(self):
        return ["--domain", f"code={self.code}", "--domain", f"law={self.law}/*.txt"]


def save_dense(folder, architecture="llama"):
    build(architecture).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The cache in which commands leave unfinished work."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    made = Places(
        dense=save_dense(root / "dense"),
        code=save_documents(root / "texts" / "code", "code"),
        law=save_documents(root / "texts" / "law", "law"),
        built=root / "built",
    )
    run_well("build", made.dense, *made.texts, "--output", made.built, "--sparsity", "0.5")
    return made


@pytest.fixture
def copied(places, tmp_path):
    """A copy of the built folder that a test may damage."""
    return Path(shutil.copytree(places.built, tmp_path / "copied"))
