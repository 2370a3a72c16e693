"""Every code block of the README runs as it stands, on a tiny model."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hf_sparse_pathways.cli.main import main
from hf_sparse_pathways.pathways.pathway import Pathways
from tests.architectures import build
from tests.texts import documents, save_documents, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder as the README's reader has it: a base model and some text."""
    monkeypatch.chdir(tmp_path)
    model = build("llama")
    model.generation_config.max_new_tokens = 4
    model.save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    save_documents(tmp_path / "src", "code", count=12)
    for path in sorted((tmp_path / "src").iterdir()):
        path.rename(path.with_suffix(".py"))
    save_documents(tmp_path / "law", "law", count=12)
    return tmp_path


@pytest.mark.usefixtures("hub")
def test_commands_then_python(workplace, monkeypatch, capsys):
    install, *commands = _blocks("sh")
    assert install.count("pip install") == 3
    for line in "".join(commands).strip().splitlines():
        words = shlex.split(line.replace(MODEL, "base"), comments=True)
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "def main" in printed

    names = {
        "folder": str(workplace / "my-model"),
        "base": str(workplace / "base"),
        "law_texts": documents("law", seed=1),
        "held_out": documents("law", seed=2),
    }
    for block in _blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["out"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert names["model"].domains == ["code", "law"]
    assert Pathways.from_pretrained("me/my-model").domains == ["code"]
    assert Pathways.from_pretrained("me/adapter", revision="next").domains == ["code", "law"]
    printed = capsys.readouterr().out
    assert "random" in printed
    assert "pooled" in printed
    assert sorted(path.name for path in Path("adapter").iterdir()) == [
        "pathways.json",
        "pathways.safetensors",
    ]
    assert AutoModelForCausalLM.from_pretrained("full").domains == ["code", "law"]


EXAMPLES = {
    "quickstart.py": ["base code=src law=law --output out --max-tokens 200"],
    "own_masks.py": ["base"],
    "own_method.py": ["base src law"],
    "profile_in_parts.py": [
        "part base code=src one",
        "part base law=law two",
        "part base law=src three",
        "join base joined one two three",
    ],
    "mixed_batch.py": ["built"],
    "heal.py": ["built code src healed 2000"],
    "domain_adapters.py": ["built law law lora 3"],
    "add_a_domain.py": ["built me/shared", "built me/shared law"],
}


def test_every_example_is_listed():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.usefixtures("workplace", "hub")
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, monkeypatch, capsys):
    if EXAMPLES[name][0].startswith("built"):
        made = "build base --domain code=src --domain law=law --output built --max-tokens 200"
        monkeypatch.setattr(sys, "argv", ["sparse-pathways", *made.split()])
        with pytest.raises(SystemExit):
            main()
    path = ROOT / "examples" / name
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    capsys.readouterr()
    for arguments in EXAMPLES[name]:
        monkeypatch.setattr(sys, "argv", [str(path), *arguments.split()])
        runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) >= 3
