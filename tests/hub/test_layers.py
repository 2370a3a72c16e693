"""Models with FFN layers of their own, on a Hub: no pathways, a card of their own."""

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import hf_sparse_pathways as sp
from hf_sparse_pathways.share.card import CardSettings
from tests.architectures import LLAMA_LIKE, build, prompt, random_masks
from tests.cli.commands import run
from tests.sgatlin.models import random_pathways

REPO = "me/x"
IDS = prompt()
FFN = sp.SgatlinConfig(n_experts=16, n_channels=2, top_k=3, d_key=8)

pytestmark = pytest.mark.usefixtures("hub")


def _make():
    torch.manual_seed(0)
    config = sp.SparsePathwaysConfig.from_base(LlamaConfig(**LLAMA_LIKE), ffn=FFN)
    return AutoModelForCausalLM.from_config(config).eval()


def _files():
    return set(HfApi().list_repo_files(REPO)) - {".gitattributes"}


def _card():
    return open(HfApi().hf_hub_download(REPO, "README.md"), encoding="utf-8").read()


OWN = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "sparse_pathways_plugin.py",
}


@torch.no_grad()
def test_a_model_comes_back_as_it_was():
    model = _make()
    address = model.push_to_hub(REPO, card=CardSettings(license="mit"), tags=["tiny"])
    assert address.startswith("http://")
    assert _files() == OWN
    again = AutoModelForCausalLM.from_pretrained(REPO)
    assert type(again) is type(model)
    assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-6)
    assert AutoConfig.from_pretrained(REPO).ffn == FFN
    direct = type(model).from_pretrained(REPO)
    assert torch.allclose(direct(IDS).logits, model(IDS).logits, atol=1e-6)


def test_the_card_says_what_the_layers_are():
    _make().push_to_hub(REPO, card=CardSettings(license="mit"), tags=["tiny"])
    card = _card()
    for text in ("license: mit", "- sgatlin", "- tiny", "`llama`", "| `n_experts` | 16 |"):
        assert text in card
    assert f'from_pretrained("{REPO}")' in card
    assert "domain" not in card


def test_a_saved_folder_is_pushed_by_save_and_by_the_command(tmp_path):
    model = _make()
    model.save_pretrained(tmp_path / "x", push_to_hub=True, repo_id=REPO)
    assert _files() == OWN
    ran = run("push", tmp_path / "x", "me/other")
    assert ran.status == 0, ran.err
    assert AutoConfig.from_pretrained("me/other").ffn == FFN


@torch.no_grad()
def test_pathways_are_pushed_with_it_and_alone():
    model = _make()
    model.push_to_hub("me/bare")
    pathways = random_pathways(model)
    model.set_pathways(pathways)
    model.push_to_hub(REPO)
    assert AutoConfig.from_pretrained(REPO).ffn == FFN
    again = AutoModelForCausalLM.from_pretrained(REPO)
    assert again.domains == ["code", "law"]
    sp.add_domains(random_pathways(model, ("math",), seed=1), REPO)
    more = AutoModelForCausalLM.from_pretrained(REPO)
    assert more.domains == ["code", "law", "math"]
    for loaded in (again, more):
        for domain in ("code", "law", None):
            expected = model(IDS, domain=domain).logits
            assert torch.allclose(loaded(IDS, domain=domain).logits, expected, atol=1e-6)
    pathways.push_to_hub("me/alone")
    apart = AutoModelForCausalLM.from_pretrained("me/bare", pathways="me/alone")
    expected = model(IDS, domain="law").logits
    assert torch.allclose(apart(IDS, domain="law").logits, expected, atol=1e-6)
    assert "of routed experts" in _card()


def test_somebody_s_own_card_stays():
    HfApi().create_repo(REPO)
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="README.md", repo_id=REPO)
    _make().push_to_hub(REPO)
    assert _card() == "mine"
    assert _files() == OWN


def test_a_repository_with_pathways_is_not_overwritten():
    dense = build("llama")
    sp.Pathways.from_masks(dense, random_masks(dense)).push_to_hub(REPO)
    with pytest.raises(sp.PathwaysError, match="has pathways"):
        _make().push_to_hub(REPO)
