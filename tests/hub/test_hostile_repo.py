"""A repository whose description somebody has made on purpose is refused, and not written to."""

import json

import pytest
from huggingface_hub import HfApi

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.pathways.apart import folder_for
from tests.architectures import build, compensate, random_masks

REPO = "me/x"


def _pathways(domains=("code", "law")):
    dense = build("llama")
    return compensate(dense, random_masks(dense, domains))


CALLS = {
    "read": lambda: sp.Pathways.from_pretrained(REPO),
    "add": lambda: sp.add_domains(_pathways(["math"]), REPO),
    "remove": lambda: sp.remove_domains(["law"], REPO),
    "rename": lambda: sp.rename_domain("law", "case law", REPO),
}

DESCRIPTIONS = {
    "no object": "[]",
    "no JSON": "{",
    "deep": "[" * 100_000,
    "empty": "{}",
    **{
        name: json.dumps({"format": 1, "controls": [], **fields})
        for name, fields in {
            "no base": {"domains": [], "apart": {"law": folder_for("law")}},
            "a base of text": {"base": "x", "domains": [], "apart": {"law": folder_for("law")}},
            "domains no list": {"base": {}, "domains": 5},
            "domains of numbers": {"base": {}, "domains": [5]},
            "no name": {"base": {}, "domains": [{"provenance": {}}]},
            "apart above": {"base": {}, "domains": [], "apart": {"law": "pathways/../../x"}},
            "apart elsewhere": {"base": {}, "domains": [], "apart": {"law": "/etc"}},
        }.items()
    },
}


def _replace(path, content):
    HfApi().upload_file(path_or_fileobj=content.encode(), path_in_repo=path, repo_id=REPO)


WITHOUT_BASE = ("no base", "a base of text")
"""From these a domain can be taken out, or renamed: nobody asks for what it is of."""

REFUSED = [
    (text, call)
    for text in DESCRIPTIONS
    for call in CALLS
    if text not in WITHOUT_BASE or call in ("read", "add")
]


@pytest.mark.parametrize(("text", "call"), REFUSED)
def test_a_hostile_description_is_refused(text, call, hub):
    _pathways().push_to_hub(REPO)
    _replace("pathways.json", DESCRIPTIONS[text])
    head = hub.repos[REPO].at("main")
    with pytest.raises(PathwaysError):
        CALLS[call]()
    assert hub.repos[REPO].at("main") is head


@pytest.mark.parametrize("text", ["{}", "[]", json.dumps({"domains": [5]}), "[" * 100_000])
def test_a_hostile_description_of_one_domain_is_refused(text, hub):
    _pathways().push_to_hub(REPO)
    _replace(f"{folder_for('law')}/pathways.json", text)
    head = hub.repos[REPO].at("main")
    for call in ("read", "rename"):
        with pytest.raises(PathwaysError):
            CALLS[call]()
    assert hub.repos[REPO].at("main") is head
