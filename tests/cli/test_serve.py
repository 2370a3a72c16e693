"""The command that serves: what it loads, where it listens, what it needs."""

import sys

import peft
import pytest
import uvicorn
from transformers import AutoModelForCausalLM

from hf_sparse_pathways.modeling.adapting import Adapting
from tests.cli.commands import assert_error, run, run_well


@pytest.fixture
def served(monkeypatch):
    """What the command would have served, instead of serving it."""
    calls = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: calls.append((app, options)))
    return calls


def test_it_listens_on_this_machine_only_and_says_the_names(places, served):
    out = run_well("serve", places.built)
    assert (
        out
        == "built, built@code, built@law, built@auto, built@prompt at http://127.0.0.1:8000/v1\n"
    )
    [(app, options)] = served
    assert (options["host"], options["port"]) == ("127.0.0.1", 8000)
    assert "/v1/chat/completions" in {route.path for route in app.routes}
    out = run_well("serve", places.built, "--name", "me/x", "--host", "0.0.0.0", "--port", 81)
    assert out == "me/x, me/x@code, me/x@law, me/x@auto, me/x@prompt at http://0.0.0.0:81/v1\n"


@pytest.mark.usefixtures("served")
def test_domains_get_their_adapters(places, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(places.dense), config).save_pretrained(
        tmp_path
    )
    with pytest.MonkeyPatch.context() as patch:
        attached = []
        patch.setattr(Adapting, "attach_adapters", lambda _, given: attached.append(given))
        run_well("serve", places.built, "--adapter", f"law={tmp_path}")
    assert attached == [{"law": str(tmp_path)}]
    out = run_well("serve", places.built, "--adapter", f"law={tmp_path}")
    assert out.count("@law") == 1
    assert "@prompt" not in out
    for wrong, told in ((f"lwa={tmp_path}", "domain 'lwa'"), ("law", "--adapter NAME=PATH")):
        assert_error(run("serve", places.built, "--adapter", wrong), told)
    twice = ["--adapter", "law=a", "--adapter", "law=b"]
    assert_error(run("serve", places.built, *twice), "--adapter 'law' was given twice")


def test_a_dense_folder_or_a_wrong_executor_is_refused(places, served):
    assert_error(run("serve", places.dense), "pathways")
    assert_error(run("serve", places.built, "--executor", "fast"), "executor 'fast'")
    assert served == []


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(places, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert_error(run("serve", places.built), "pip install hf-sparse-pathways[serve]", missing)
