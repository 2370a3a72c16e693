"""Tokens stand in no message, log, repr or card."""

import logging
import traceback

import pytest
from huggingface_hub.errors import HfHubHTTPError

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import HubError, PathwaysError
from hf_sparse_pathways.share.hub import Push
from hf_sparse_pathways.tokens import check_token, hide_tokens
from hf_sparse_pathways.transport import hub_errors
from tests.architectures import build, compensate, random_masks

SECRET = "sEcReT" * 5 + "1234"
REPO = "me/x"
UNSENDABLE = [f"hf_{SECRET}\n", f"hf_{SECRET} ", f"hf_\n{SECRET}", f"hf_{SECRET}é", f"\0{SECRET}"]


def _pathways():
    dense = build("llama")
    return compensate(dense, random_masks(dense))


CALLS = {
    "read": lambda token: sp.Pathways.from_pretrained(REPO, token=token, force_download=True),
    "load": lambda token: sp.SparsePathwaysForCausalLM.from_pretrained(REPO, token=token),
    "push": lambda token: _pathways().push_to_hub(REPO, token=token),
    "add": lambda token: sp.add_domains(_pathways(), REPO, token=token),
    "remove": lambda token: sp.remove_domains(["code"], REPO, token=token),
    "rename": lambda token: sp.rename_domain("law", "x", REPO, token=token),
}


@pytest.mark.parametrize("token", [*UNSENDABLE, f"hf_{SECRET}", f"{SECRET}"], ids=ascii)
@pytest.mark.parametrize("call", CALLS)
def test_no_error_or_log_repeats_a_token(call, token, hub, caplog, capsys):
    assert not hub.repos
    with caplog.at_level(logging.DEBUG), pytest.raises(Exception, match=r".") as caught:
        CALLS[call](token)
    if call != "load":  # which asks Transformers for the configuration first
        assert isinstance(caught.value, PathwaysError)
    told = "".join(traceback.format_exception(caught.value))
    shown = capsys.readouterr()
    for text in (told, caplog.text, shown.out, shown.err, repr(caught.value)):
        assert SECRET not in text


def test_the_repr_of_a_push_has_no_token():
    assert SECRET not in repr(Push(token=f"hf_{SECRET}", private=True))
    assert "private=True" in repr(Push(token=f"hf_{SECRET}", private=True))


def test_a_card_has_no_token(hub):
    _pathways().push_to_hub(REPO, token="hf_of_me")
    for file in hub.repos[REPO].at("main").files.values():
        assert b"hf_of_me" not in file.content


@pytest.mark.parametrize("text", [f"x Bearer {SECRET}", f"hf_{SECRET}", f"b'Bearer hf_{SECRET}'"])
def test_a_token_in_somebody_elses_error_is_hidden(text):
    assert SECRET not in hide_tokens(text)
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, text)
    with pytest.raises(HubError) as caught, hub_errors():
        raise error
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("token", [None, True, False, "hf_abc", "a-b.c~"])
def test_a_token_that_can_be_sent_is_taken(token):
    check_token(token)


def test_ordinary_text_stays():
    for text in (
        "No pathways.json in 'me/hfx': 404",
        "the bearer of this",
        "half_done",
        "as in hf_sparse_pathways/ffn/layouts.py; quantised ones do not fit",
        "There is no folder '/home/me/hf_models/llama'. Check the path.",
        "kept in /data/hf_home/sparse_pathways/unfinished/0123456789abcdef",
    ):
        assert hide_tokens(text) == text


@pytest.mark.parametrize("kind", ["", "oauth_", "jwt_"])
def test_of_a_token_the_beginning_stays(kind):
    hidden = hide_tokens(f"of 'hf_{kind}{SECRET}.{SECRET}' once")
    assert hidden == f"of 'hf_{kind}***' once" == hide_tokens(hidden)
