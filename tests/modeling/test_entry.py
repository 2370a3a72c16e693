"""Loading in processes that have not imported the package, do not trust it, or do not have it."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.modeling.tokenizing import load_tokenizer
from hf_sparse_pathways.pathways.entry import BASE, MODULE_NAME
from hf_sparse_pathways.share.pushing import push_folder
from tests.architectures import build, prompt, random_masks
from tests.texts import tiny_tokenizer

IDS = prompt()

WITHOUT_PACKAGE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_sparse_pathways":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, {trust})
    except Exception as error:
        print("->", type(error).__name__, " ".join(str(error).split()))
        continue
    ids = torch.load(sys.argv[1])
    found = model.generate(input_ids=ids, domain="code", max_new_tokens=5, do_sample=False)
    print("->", found.tolist())
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, a whole checkpoint and pathways alone."""
    folder = tmp_path_factory.mktemp("entry")
    dense = build("llama")
    dense.save_pretrained(folder / "base")
    dense = AutoModelForCausalLM.from_pretrained(folder / "base")
    pathways = sp.Pathways.from_masks(dense, random_masks(dense, ("code", "law")))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    model.save_pretrained(folder / "whole")
    pathways.save_pretrained(folder / "alone")
    torch.save(IDS, folder / "ids.pt")
    return folder


def _load(folders, code, cache):
    """Run code in another process; return what it says of either folder."""
    command = [sys.executable, "-c", code, *map(str, (folders / "ids.pt",))]
    command += [str(folders / name) for name in ("whole", "alone")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_MODULES_CACHE": str(cache)},
    )
    assert done.returncode == 0, done.stderr
    lines = [line.rpartition("-> ") for line in done.stdout.splitlines()]
    said = [text for _, arrow, text in lines if arrow]
    assert len(said) == 2
    return said


def test_not_trusted(folders, tmp_path):
    for line in _load(folders, LOAD.format(trust=""), tmp_path):
        assert line.startswith("ValueError")
        assert "trust_remote_code=True" in line


def test_trusted_and_not_installed(folders, tmp_path):
    code = WITHOUT_PACKAGE + LOAD.format(trust="trust_remote_code=True")
    for line in _load(folders, code, tmp_path):
        assert line.startswith("ImportError")
        assert "pip install hf_sparse_pathways" in line


@pytest.mark.parametrize("how", ["trusted", "imported"])
def test_trusted_or_imported(folders, tmp_path, how):
    model = AutoModelForCausalLM.from_pretrained(folders / "whole")
    expected = model.generate(IDS, domain="code", max_new_tokens=5, do_sample=False).tolist()
    code = {
        "trusted": LOAD.format(trust="trust_remote_code=True"),
        "imported": f"import hf_sparse_pathways\n{LOAD.format(trust='')}",
    }[how]
    assert _load(folders, code, tmp_path) == [str(expected)] * 2


def test_what_was_trusted_is_saved_as_usual(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / "whole", trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", MODULE_NAME, "pathways.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folders / "whole" / name).read_bytes()


# -- pathways alone load with their base -------------------------------------------------------


def test_pathways_alone_load_their_base(folders, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(folders / "whole")
    alone = AutoModelForCausalLM.from_pretrained(folders / "alone", dtype=torch.float32)
    assert type(alone) is type(whole)
    for domain in ("law", None):
        assert torch.equal(alone(IDS, domain=domain).logits, whole(IDS, domain=domain).logits)
    assert alone.config.name_or_path == str(folders / "base")
    alone.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "weights_of" not in saved
    assert BASE not in saved
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(IDS, domain="law").logits, whole(IDS, domain="law").logits)


def test_one_domain_of_pathways_alone(folders):
    whole = AutoModelForCausalLM.from_pretrained(folders / "whole", domain="law")
    alone = AutoModelForCausalLM.from_pretrained(folders / "alone", domain="law")
    assert alone.domains == ["law"]
    assert torch.equal(alone(IDS).logits, whole(IDS).logits)


def test_the_configuration_of_pathways_alone_is_the_base_s(folders):
    config = AutoConfig.from_pretrained(folders / "alone")
    assert config.hidden_size == AutoConfig.from_pretrained(folders / "base").hidden_size
    assert "weights_of" not in config.to_diff_dict()
    assert not hasattr(config.base_config, "weights_of")


def test_weights_are_never_hidden_by_a_configuration_of_pathways(folders, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(folders / "whole")
    whole.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    whole.pathways.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_pathways_of_a_base_without_a_name_name_no_other_one(folders, tmp_path):
    named = sp.Pathways.from_pretrained(folders / "alone")
    named.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").is_file()
    replace(named, base=replace(named.base, name="")).save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_the_tokenizer_is_the_base_s_unless_there_is_one(folders, tmp_path):
    _copy_with_base(folders, tmp_path, {"name": str(folders / "base")})
    for kind, place in (("words", folders / "base"), ("characters", tmp_path)):
        tokenizer = tiny_tokenizer(kind)
        tokenizer.save_pretrained(place)
        assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    "of", [None, "base", {}, {"name": ""}, {"name": 3}, {"name": "x", "revision": 3}]
)
def test_a_base_that_is_none(of, folders, tmp_path):
    _copy_with_base(folders, tmp_path, of)
    with pytest.raises(ArtefactError, match="has to name a base model"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_base_that_is_gone_or_has_no_weights(folders, tmp_path):
    _copy_with_base(folders, tmp_path, {"name": str(tmp_path / "gone")})
    with pytest.raises(ArtefactError, match="pass that as the model"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    _copy_with_base(folders, tmp_path, {"name": str(tmp_path)})  # itself
    with pytest.raises(ArtefactError, match="has no weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def _copy_with_base(folders, target, of):
    for file in (folders / "alone").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, BASE: of}))


# -- on the Hub --------------------------------------------------------------------------------


@pytest.mark.usefixtures("hub")
def test_a_base_and_its_pathways_on_the_hub(folders):
    api = HfApi()
    api.create_repo("me/base")
    api.upload_folder(repo_id="me/base", folder_path=folders / "base")
    dense = AutoModelForCausalLM.from_pretrained("me/base")
    pathways = sp.Pathways.from_masks(dense, random_masks(dense, ("code", "law")))
    first = pathways.base.revision
    assert first is not None
    pathways.push_to_hub("me/alone")
    dense.model.embed_tokens.weight.data.zero_()
    dense.save_pretrained(folders / "changed")
    api.upload_folder(repo_id="me/base", folder_path=folders / "changed")
    model = AutoModelForCausalLM.from_pretrained("me/alone", revision="main")
    whole = AutoModelForCausalLM.from_pretrained(folders / "whole")
    assert torch.equal(model(IDS).logits, whole(IDS).logits)  # of the revision that they name
    assert model.pathways.base.revision == first


@pytest.mark.usefixtures("hub")
def test_pathways_beside_weights_keep_the_weights_configuration(folders):
    whole = AutoModelForCausalLM.from_pretrained(folders / "whole")
    whole.push_to_hub("me/whole")
    whole.pathways.push_to_hub("me/whole")
    again = AutoModelForCausalLM.from_pretrained("me/whole")
    assert again.config.name_or_path == "me/whole"
    assert torch.equal(again(IDS, domain="law").logits, whole(IDS, domain="law").logits)


@pytest.mark.usefixtures("hub")
def test_a_folder_of_pathways_leaves_a_repository_its_weights(folders):
    for first, second in (("whole", "alone"), ("alone", "whole")):
        repo = f"me/{first}-first"
        push_folder(folders / first, repo)
        push_folder(folders / second, repo)
        assert AutoModelForCausalLM.from_pretrained(repo).config.name_or_path == repo
    push_folder(folders / "alone", "me/alone")
    found = AutoModelForCausalLM.from_pretrained("me/alone")
    assert found.config.name_or_path == str(folders / "base")
