"""The text from which a domain is told: more than is calibrated on, none that is validated on."""

import pytest
import torch
from safetensors.torch import load_file

from hf_sparse_pathways.discovery.documents import Documents
from hf_sparse_pathways.discovery.profile_storage import JSON_NAME
from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.discovery.signatures import learn_signature
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.discovery.windows import count_tokens, join_windows, number_documents
from hf_sparse_pathways.files import read_json, write_pair
from tests.architectures import tiny_llama
from tests.texts import documents, tiny_tokenizer

MODEL, TOKENIZER = tiny_llama(), tiny_tokenizer()
TEXTS = documents("code", 60, 30)


def _take(texts=TEXTS, **options):
    usual = {
        "max_length": 32,
        "max_tokens": 300,
        "validation_tokens": 200,
        "validation_share": 0.2,
        "router_tokens": 1000,
        "grams": False,
    }
    return profile(MODEL, TOKENIZER, {"code": texts}, **{**usual, **options})


@pytest.fixture(scope="module")
def taken():
    """A profile of which the router knows more text than was calibrated on."""
    return _take()


def test_more_is_read_than_calibrated_on_and_none_that_is_validated_on(taken):
    own = taken["code"]
    assert own.tokens == count_tokens(own.windows) == 300
    assert count_tokens(own.routing) == 1000
    validated = {window.document.digest for window in own.validation}
    told = {window.document.digest for window in own.routing}
    assert validated
    assert not validated & told
    assert own.provenance["router_digests"] == sorted(told)


def test_the_model_runs_over_the_calibration_text_alone(taken):
    without = _take(router_tokens=0)["code"]
    assert not without.routing
    assert without.windows == taken["code"].windows
    assert torch.equal(without.blocks[0].abs_sum, taken["code"].blocks[0].abs_sum)


def test_the_domain_is_told_from_it(taken):
    own = taken["code"]
    expected = learn_signature(own.routing, own.validation, taken.background)
    assert torch.equal(taken.signature("code").tokens, expected.tokens)
    other = learn_signature(own.windows, own.validation, taken.background)
    assert not torch.equal(taken.signature("code").tokens, other.tokens)


@pytest.mark.parametrize("options", [{"router_tokens": 300}, {"max_tokens": 100_000}])
def test_where_there_is_no_more_the_calibration_text_serves(options):
    taken = _take(**{"validation_share": 0.0, **options})
    own = taken["code"]
    assert own.routing == ()
    assert own.told_from == own.windows
    assert own.provenance["router_digests"] == []
    assert taken.signature("code") is not None


def test_saved_and_loaded_it_tells_the_same(taken, tmp_path):
    taken.save_pretrained(tmp_path)
    loaded = Profile.from_pretrained(tmp_path)
    routing = [one["code"].routing for one in (taken, loaded)]
    ids = [[window.ids for window in windows] for windows in routing]
    assert ids[0] == ids[1]
    numbers = [number_documents(windows) for windows in routing]
    assert numbers[0] == numbers[1] != list(range(len(ids[0])))
    for name, part in taken.signature("code").parts().items():
        assert torch.equal(getattr(loaded.signature("code"), name), part), name


def test_a_profile_that_knows_of_none_is_read(taken, tmp_path):
    """As older versions wrote it."""
    taken.save_pretrained(tmp_path)
    path = tmp_path / JSON_NAME
    tensors = load_file(path.with_suffix(".safetensors"))
    later = (".routing.", ".documents")
    older = {n: part for n, part in tensors.items() if not any(name in n for name in later)}
    write_pair(path, read_json(path), older)
    loaded = Profile.from_pretrained(tmp_path)["code"]
    assert loaded.routing == ()
    assert [window.ids for window in loaded.told_from] == [w.ids for w in taken["code"].windows]
    assert number_documents(loaded.windows) == list(range(len(loaded.windows)))


def test_documents_of_merged_stored_profiles_are_others(taken, tmp_path):
    taken.save_pretrained(tmp_path)
    loaded = Profile.from_pretrained(tmp_path)["code"].routing
    count = len({*number_documents(loaded)})
    assert number_documents(join_windows(loaded, loaded))[len(loaded) :] == [
        number + count for number in number_documents(loaded)
    ]


def test_merged_profiles_know_both_texts(taken):
    more = _take(documents("code", 130, 30)[60:], router_tokens=0)
    for one, other in ((taken, more), (more, taken)):
        together = one.merged(other)["code"]
        assert together.routing == one["code"].told_from + other["code"].told_from
    without = _take(documents("code", 190, 30)[130:], router_tokens=0)
    together = more.merged(without)["code"]
    assert together.routing == ()
    assert together.told_from == more["code"].windows + without["code"].windows


def test_what_one_is_told_from_is_no_validation_text_of_both(taken):
    own = taken["code"]
    validated = {window.document.digest for window in own.validation}
    texts = tuple(one for one in read_documents(TEXTS).items if one.digest in validated)
    others = documents("law", 30, 30)
    mixed = Documents(items=(*read_documents(others).items, *texts), source="mixed")
    more = _take(mixed, max_tokens=40, router_tokens=100_000, validation_share=0.0)
    told = {*more["code"].provenance["router_digests"]}
    assert validated & told
    together = taken.merged(more)["code"]
    assert not told & {window.document.digest for window in together.validation}


def test_the_router_is_measured_on_text_that_it_was_not_told(taken):
    seen = [taken["code"].provenance]
    everything = read_documents(TEXTS)
    quality, _ = everything.unseen(seen)
    routing, excluded = everything.unseen(seen, routed=True)
    told = {*taken["code"].provenance["router_digests"]}
    assert told & {document.digest for document in quality.items}
    assert not told & {document.digest for document in routing.items}
    assert len(routing.items) + excluded == len(everything.items)
