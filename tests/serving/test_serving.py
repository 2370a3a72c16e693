"""OpenAI's own client against a server on this machine: the same text as from ``generate``."""

import http.client
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import urlsplit

import openai
import pytest

from hf_sparse_pathways.errors import PathwaysError
from tests.pathways.signatures import make_signature
from tests.serving.running import CHAT, Gate, running, tiny_model, wait_until

PROMPT = "return class"
GREEDY = {"temperature": 0, "max_tokens": 12}
NAMED = {"me/tiny": None, "me/tiny@code": "code", "me/tiny@law": "law"}
MODELS = {**NAMED, "me/tiny@prompt": "prompt"}
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
]
SPOKEN = "system: Be short.\nuser: a b\nassistant: "


@pytest.fixture(scope="module")
def server():
    with running(workers=3) as started:
        yield started


def _complete(server, model="me/tiny@code", **fields):
    given = {"model": model, "prompt": PROMPT, **GREEDY, **fields}
    return server.client.completions.create(**given)


def _chat(server, model="me/tiny@code", **fields):
    given = {"model": model, "messages": MESSAGES, **GREEDY, **fields}
    return server.client.chat.completions.create(**given)


def _post(server, body, path="/v1/completions", kind="application/json"):
    """Return the status of a request, and its answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"content-type": kind})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


def test_the_models_are_the_name_and_each_domain(server):
    assert [model.id for model in server.client.models.list()] == list(MODELS)
    with urllib.request.urlopen(f"{server.url}/health", timeout=30) as answer:
        assert json.load(answer) == {"status": "ok"}


def _model_that_knows_its_text():
    model = tiny_model()
    paths = model.pathways
    for seed, name in enumerate(paths.domains):
        signed = replace(paths[name], signature=make_signature(seed))
        paths = replace(paths, by_domain={**paths.by_domain, name: signed})
    model.set_pathways(paths)
    return model


def test_the_prompt_chooses_if_its_domains_are_known():
    with running(_model_that_knows_its_text()) as server:
        assert [one.id for one in server.client.models.list()] == [
            *NAMED,
            "me/tiny@auto",
            "me/tiny@prompt",
        ]
        for prompt in (PROMPT, "a", "the court of the law " * 3):
            text = _complete(server, "me/tiny@auto", prompt=prompt).choices[0].text
            assert text == server.alone(prompt, "auto")


@pytest.mark.parametrize("name", ["code", "law", "auto"])
def test_a_guard_watches_domains_whose_text_is_known(name):
    with running(_model_that_knows_its_text(), guard=True) as server:
        text = _complete(server, f"me/tiny@{name}", max_tokens=60).choices[0].text
        assert text == server.alone(PROMPT, name, tokens=60, guard=True)
        for other, domain in (("me/tiny", None), ("me/tiny@prompt", "prompt")):
            assert _complete(server, other).choices[0].text == server.alone(PROMPT, domain)


def test_a_guard_changes_a_text_that_leaves_its_domain():
    with running(_model_that_knows_its_text(), guard=True) as server:
        text = _complete(server, "me/tiny@code", max_tokens=60).choices[0].text
        assert text != server.alone(PROMPT, "code", tokens=60)


def test_a_guard_that_would_know_no_text_is_refused():
    with pytest.raises(PathwaysError, match="sparse-pathways build"), running(guard=True):
        pass


@pytest.mark.parametrize("model", MODELS)
def test_the_name_chooses_the_domain(server, model):
    expected = server.alone(PROMPT, MODELS[model])
    answer = _complete(server, model)
    assert answer.choices[0].text == expected
    assert answer.model == model
    stream = _complete(server, model, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected
    spoken = _chat(server, model)
    assert spoken.choices[0].message.content == server.alone(SPOKEN, MODELS[model])


def test_the_domains_differ(server):
    texts = {_complete(server, model).choices[0].text for model in MODELS}
    assert len(texts) == len(MODELS)


def test_without_a_domain_the_default_one_holds():
    with running(tiny_model(default_domain="law")) as server:
        assert _complete(server, "me/tiny").choices[0].text == server.alone(PROMPT, "law")


def test_a_chat_streams_a_role_then_text_then_a_reason_and_the_counts(server):
    chunks = list(_chat(server, stream=True, stream_options={"include_usage": True}))
    *said, counted = chunks
    assert said[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in said)
    assert text == server.alone(SPOKEN, "code")
    reasons = [chunk.choices[0].finish_reason for chunk in said]
    assert reasons == [None] * (len(said) - 1) + ["length"]
    assert counted.choices == []
    assert counted.usage == _chat(server).usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in _chat(server, stream=True))


def test_tokens_are_counted(server):
    prompt = len(server.tokenizer(PROMPT)["input_ids"])
    usage = _complete(server, max_tokens=5).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        prompt,
        5,
        prompt + 5,
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_and_the_work(server, stream):
    whole = server.alone(PROMPT, "code", 40)
    stop = whole[4:6]
    place = whole.index(stop)
    fields = {"max_tokens": 40, "stop": ["\x00", stop]}
    if stream:
        chunks = list(_complete(server, stream=True, **fields))
        text = "".join(chunk.choices[0].text for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        answer = _complete(server, **fields)
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
        assert answer.usage.completion_tokens <= place + len(stop) + 3  # special ones are no text
    assert (text, reason) == (whole[:place], "stop")


def test_an_end_token_ends_the_text():
    model = tiny_model()
    with running(model) as server:
        whole = server.alone(PROMPT, "code")
    last = server.tokenizer(whole[3])["input_ids"][0]
    model.generation_config.eos_token_id = [2, last]
    with running(model) as server:
        choice = _complete(server).choices[0]
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(whole[3])], "stop")


def test_requests_at_the_same_time_have_the_texts_that_they_have_alone(server):
    asked = [(model, f"{PROMPT} {index}") for index in range(6) for model in MODELS]
    expected = [server.alone(prompt, MODELS[model], 24) for model, prompt in asked]

    def ask(one):
        model, prompt = one
        stream = _complete(server, model, prompt=prompt, max_tokens=24, stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(ask, asked)) == expected
    wait_until(lambda: not server.service._active and not server.app.state.watchers)


def test_a_seed_gives_the_same_text_again_whatever_else_is_running(server):
    fields = {"temperature": 1, "max_tokens": 24}
    alone = _complete(server, seed=7, **fields).choices[0].text
    with ThreadPoolExecutor(6) as pool:
        seeds = [7, 1, 7, 2, 7, 3]
        texts = list(pool.map(lambda seed: _complete(server, seed=seed, **fields), seeds))
    found = [text.choices[0].text for text in texts]
    assert [found[0], found[2], found[4]] == [alone] * 3
    assert len({*found}) == 4


def test_sampling_follows_the_request_and_then_the_model(server):
    greedy = _complete(server).choices[0].text
    narrow = _complete(server, temperature=2, top_p=1e-6, seed=1).choices[0].text
    wide = _complete(server, temperature=2, seed=1).choices[0].text
    assert narrow == greedy != wide
    model = tiny_model()
    model.generation_config.update(do_sample=True, temperature=0.5, top_k=1)
    with running(model) as other:
        assert _complete(other, temperature=2, seed=1).choices[0].text == greedy


def test_without_a_length_a_chat_goes_on_and_a_completion_has_16_tokens(server):
    given = {"temperature": 0, "max_tokens": None}
    assert _complete(server, **given).usage.completion_tokens == 16
    usage = _chat(server, **given).usage
    positions = server.model.config.max_position_embeddings
    assert usage.total_tokens == positions
    assert _chat(server, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize("model", ["me/tiny@cod", "me/tinny@code", "code", "me/tiny@"])
def test_an_unknown_model_or_domain_is_not_found(server, model):
    with pytest.raises(openai.NotFoundError, match=r"Unknown model.*Known: 'me/tiny', ") as caught:
        _complete(server, model)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        _chat(server, model, stream=True)


WRONG = {
    "logprobs": ({"logprobs": 3}, "logprobs is not supported"),
    "domain": ({"domain": "code"}, "domain is not supported.*Known: model, "),
    "two texts": ({"n": 2}, "n: Input should be 1"),
    "negative": ({"temperature": -1}, "temperature: .*greater than or equal to 0"),
    "words": ({"max_tokens": "9"}, "max_tokens: .*integer"),
    "nothing": ({"max_tokens": 0}, "max_tokens"),
    "stop": ({"stop": [""]}, "stop"),
    "prompts": ({"prompt": ["a", "b"]}, "prompt: .*string"),
    "empty": ({"prompt": ""}, "prompt is empty"),
    "no model": ({"model": None}, "model: "),
    "long prompt": ({"prompt": "a" * 500}, "500 tokens.*128 positions"),
    "long answer": ({"max_tokens": 120}, "120 new.*128 positions"),
    "over the limit": ({"max_tokens": 5000}, "limit of 4096"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_computed_is_refused(server, case):
    fields, told = WRONG[case]
    body = {"model": "me/tiny", "prompt": PROMPT, **fields}
    status, error = _post(server, body)
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert_matches(told, error["message"])
    assert _post(server, {**body, "stream": True})[0] == 400


def assert_matches(pattern, text):
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


@pytest.mark.parametrize(("path", "status"), [("/v1/nope", 404), ("/v1/models", 405)])
def test_an_unknown_path_or_method_is_told_as_other_errors_are(server, path, status):
    found, error = _post(server, {}, path=path)
    assert (found, error["type"]) == (status, "invalid_request_error")
    assert f"POST {path}" in error["message"]


def test_bodies_are_bounded_and_json(server):
    status, error = _post(server, b" " * (5 * 2**20))
    assert (status, "bytes" in error["message"]) == (413, True)
    assert _post(server, b"{")[0] == 400
    assert _post(server, {"model": "me/tiny", "prompt": "a"}, kind="text/plain")[0] == 415


def test_messages_are_checked(server):
    with pytest.raises(openai.BadRequestError, match="Begin with a user"):
        _chat(server, messages=[{"role": "assistant", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match=r"messages\.0\.name is not supported"):
        _chat(server, messages=[{"role": "user", "content": "a", "name": "b"}])
    with pytest.raises(openai.BadRequestError, match="two names of one limit"):
        _chat(server, max_completion_tokens=3)


def test_without_a_chat_template_there_are_completions_only():
    with running(template=None) as server:
        assert _complete(server).choices[0].text == server.alone(PROMPT, "code")
        with pytest.raises(openai.BadRequestError, match=r"no chat template.*/v1/completions"):
            _chat(server)


@pytest.fixture
def gated():
    """A server with one worker, and the gate before its model's passes."""
    model, gate = tiny_model(), Gate()
    model.register_forward_pre_hook(gate)
    with running(model, workers=1, requests=3) as started:
        yield started, gate
        gate.opened.set()


def test_while_text_is_generated_other_questions_are_answered(gated):
    server, gate = gated
    stream = _chat(server, stream=True)
    wait_until(lambda: gate.passes == 1)
    assert len(list(server.client.models.list())) == 4
    assert _post(server, {"model": "me/tiny@cod", "prompt": "a"})[0] == 404
    gate.opened.set()
    assert len(list(stream)) > 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_stops_its_generation(gated, stream):
    server, gate = gated
    if stream:
        answer = _chat(server, stream=True, max_tokens=60)
        next(iter(answer))
    else:
        body = json.dumps({"model": "me/tiny", "prompt": PROMPT, **GREEDY})
        place = urlsplit(server.url)
        answer = http.client.HTTPConnection(place.hostname, place.port)
        answer.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    wait_until(lambda: gate.passes == 1)
    answer.close()
    wait_until(lambda: all(one.stopped for one in server.service._active))
    gate.opened.set()
    wait_until(lambda: not server.service._active)
    assert gate.passes == 1


def test_too_many_requests_are_told_to_come_back_and_one_that_went_costs_nothing(gated):
    server, gate = gated
    first, second, third = [_chat(server, stream=True, max_tokens=4) for _ in range(3)]
    wait_until(lambda: gate.passes == 1)
    with pytest.raises(openai.InternalServerError, match="waiting already") as caught:
        _complete(server)
    assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
    third.close()
    wait_until(lambda: any(one.stopped for one in server.service._active))
    gate.opened.set()
    assert len(list(first)) == len(list(second)) > 3
    wait_until(lambda: not server.service._active)
    assert gate.passes == 8


def test_a_failure_is_told_and_the_next_request_is_answered():
    model = tiny_model()
    handle = model.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with running(model, template=CHAT) as server:
        with pytest.raises(openai.InternalServerError, match="its log says why"):
            _complete(server)
        with pytest.raises(openai.APIError, match="its log says why"):
            list(_complete(server, stream=True))
        handle.remove()
        assert _complete(server).choices[0].text == server.alone(PROMPT, "code")
