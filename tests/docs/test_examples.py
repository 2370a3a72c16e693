"""Every example runs, on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT
from tests.texts import documents

EXAMPLES = {
    "quickstart.py": ["base code=src law=law --output out --max-tokens 200"],
    "own_data.py": ["base src rows.jsonl out"],
    "own_masks.py": ["base"],
    "own_method.py": ["base src law"],
    "profile_in_parts.py": [
        "part base code=src one",
        "part base law=law two",
        "part base law=src three",
        "join base joined one two three",
    ],
    "mixed_batch.py": ["my-model"],
    "heal.py": ["my-model code src healed 2000"],
    "domain_adapters.py": ["my-model law law lora 3"],
    "export_and_serve.py": ["my-model code plain court"],
    "add_a_domain.py": ["my-model me/shared", "my-model me/shared law"],
    "push_and_pull.py": ["my-model me/shared"],
    "linear_experts.py": ["base trained 3 code=src law=law"],
}


def test_every_example_is_listed():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.usefixtures("built", "hub")
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, monkeypatch, capsys):
    rows = (json.dumps({"text": text, "source": "made up"}) for text in documents("medicine"))
    Path("rows.jsonl").write_text("\n".join(rows))
    path = ROOT / "examples" / name
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    for arguments in EXAMPLES[name]:
        monkeypatch.setattr(sys, "argv", [str(path), *arguments.split()])
        runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) >= 3
