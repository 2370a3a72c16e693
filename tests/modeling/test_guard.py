"""``generate(guard=True)``: rows whose text leaves their domain go on densely, and come back."""

import copy
import inspect
import itertools
import logging
import random
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, TextIteratorStreamer

import hf_sparse_pathways as sp
from hf_sparse_pathways.modeling.guard import FULL, NEEDED, Guard, Switch, Watched
from hf_sparse_pathways.pathways.signature import LENGTHS, LEVELS
from tests.architectures import VOCAB, build, random_masks
from tests.pathways.signatures import make_signature
from tests.texts import WORDS as OWN
from tests.texts import tiny_tokenizer

DOMAINS = ("code", "law")
LENGTH = 60
OLD_CACHE = "past_key_values"  # its name in older versions of Transformers


@pytest.fixture(scope="module")
def case():
    """A model whose pathways know their domains' words, and its tokenizer."""
    dense, tokenizer = build("llama"), tiny_tokenizer()
    dense.generation_config.eos_token_id = None
    dense.generation_config.pad_token_id = 0
    paths = sp.Pathways.from_masks(dense, random_masks(dense, DOMAINS))
    known = {
        name: replace(pathway, signature=_signature(tokenizer, name))
        for name, pathway in paths.by_domain.items()
    }
    paths = replace(paths, by_domain=known)
    return sp.SparsePathwaysForCausalLM.from_dense(dense, paths).eval(), tokenizer


def _signature(tokenizer, domain):
    """Return a signature by which a domain's own words speak for it, and others against it."""
    tokens = torch.full((VOCAB,), -0.4)
    tokens[tokenizer.convert_tokens_to_ids(list(OWN[domain]))] = 1.3
    levels = torch.linspace(0.2, 2.0, len(LEVELS)).repeat(len(LENGTHS), 1)
    return replace(make_signature(), tokens=tokens.half(), own=levels, background=levels - 2.0)


def _text(tokenizer, *names):
    """Return token ids of texts of some domains' own words, one after the other."""
    generator = random.Random(5)
    said = [" ".join(generator.choices(OWN[name], k=LENGTH)) for name in names]
    return tokenizer(" ".join(said), return_tensors="pt")["input_ids"][0]


class _Forced(LogitsProcessor):
    """Makes the new tokens of each row what they are to be."""

    def __init__(self, texts, prompt):
        self._texts, self._prompt = texts, prompt

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self._prompt
        only = torch.full_like(scores, -torch.inf)
        for row in range(len(scores)):
            only[row, self._texts[row * len(self._texts) // len(scores)][step]] = 0.0
        return only


def _generate(model, prompt, **options):
    settings = {"do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(
            prompt,
            **{"attention_mask": torch.ones_like(prompt), **settings, **options},
        )


def _forced(model, prompt, texts, **options):
    count = len(texts[0])
    return _generate(
        model,
        prompt,
        max_new_tokens=count,
        output_logits=True,
        guard=True,
        logits_processor=[_Forced(texts, prompt.shape[1])],
        **options,
    )


def _expected(model, new, domain, choices):
    """Return what a row computes before each of its new tokens, the slow and plain way."""
    evidence = {name: FULL if name == domain else 0.0 for name in model.domains}
    found = [domain]
    for token in new.tolist()[:-1]:
        for name in evidence:
            signature = model.pathways[name].signature
            ignored = token in signature.ignored.tolist()
            weight = 0.0 if ignored else float(signature.tokens[token].float())
            evidence[name] = min(FULL, max(0.0, evidence[name] + weight - NEEDED))
        if domain is not None and evidence[domain] == 0.0:
            domain = None
        full = [name for name, nats in evidence.items() if nats == FULL]
        if len(full) == 1 and sum(evidence.values()) == FULL and full[0] in choices:
            domain = full[0]
        found.append(domain)
    return found


def _logits(model, prompt, new, domains):
    """Return the logits of a row's new tokens, one pass for each with the domain of its own."""
    cache, steps = DynamicCache(), [prompt, *new[:-1, None]]
    found = []
    with torch.no_grad():
        for ids, domain in zip(steps, domains, strict=True):
            name = "cache" if "cache" in inspect.signature(model.forward).parameters else OLD_CACHE
            output = model(ids[None], domain=domain, use_cache=True, **{name: cache})
            found.append(output.logits[0, -1])
    return torch.stack(found)


def _switches(domains):
    return [
        Switch(token=token, domain=after)
        for token, (before, after) in enumerate(itertools.pairwise(domains), start=1)
        if before != after
    ]


@pytest.mark.parametrize("executor", ["masked", "compact", "auto"])
def test_from_a_switch_on_all_is_computed_by_the_dense_model_and_then_by_the_domain(case, executor):
    model, tokenizer = copy.deepcopy(case[0]), case[1]
    model.set_executor(executor)
    prompt, new = _text(tokenizer, "code")[:12], _text(tokenizer, "code", "law")
    expected = _expected(model, new, "code", {"code"})
    assert {*expected} == {"code", None}
    assert expected[:LENGTH] == ["code"] * LENGTH
    output = _forced(model, prompt[None], [new], domain="code")
    assert output.domains == ["code"]
    assert output.switches == [_switches(expected)]
    assert len(output.switches[0]) == 1
    logits = torch.stack(output.logits, 1)[0]
    assert torch.allclose(logits, _logits(model, prompt, new, expected), atol=1e-5)
    unguarded = _logits(model, prompt, new, ["code"] * len(new))
    at = output.switches[0][0].token
    assert torch.allclose(logits[:at], unguarded[:at], atol=1e-5)
    assert not torch.allclose(logits[at], unguarded[at], atol=1e-5)


def test_text_that_comes_back_is_computed_by_its_domain_again(case):
    model, tokenizer = case
    prompt, new = _text(tokenizer, "law")[:8], _text(tokenizer, "code")
    both = torch.cat([new, _text(tokenizer, "law")])
    output = _forced(model, prompt[None], [both], domain="law")
    assert [switch.domain for switch in output.switches[0]] == [None, "law"]
    assert output.switches[0][1].token > LENGTH


def test_auto_may_go_to_another_domain_and_a_named_one_only_home(case):
    model, tokenizer = case
    prompt, new = _text(tokenizer, "code")[:40], _text(tokenizer, "code", "law", "code")
    for domain, choices in (("auto", {*DOMAINS}), ("code", {"code"})):
        output = _forced(model, prompt[None], [new], domain=domain)
        expected = _expected(model, new, "code", choices)
        assert output.domains == ["code"]
        assert output.switches == [_switches(expected)]
        assert ("law" in expected) == (domain == "auto")
        logits = torch.stack(output.logits, 1)[0]
        assert torch.allclose(logits, _logits(model, prompt, new, expected), atol=1e-5)


def test_a_prompt_that_says_too_little_begins_densely_and_finds_its_domain(case):
    model, tokenizer = case
    prompt, new = _text(tokenizer, "law")[:4], _text(tokenizer, "law")
    output = _forced(model, prompt[None], [new], domain="auto")
    assert output.domains == [None]
    assert [switch.domain for switch in output.switches[0]] == ["law"]


def test_rows_are_watched_each_for_itself(case):
    model, tokenizer = case
    prompts = [_text(tokenizer, name)[:size] for name, size in (("code", 12), ("law", 7))]
    prompts += [prompts[0], prompts[1]]
    new = [_text(tokenizer, *names) for names in (("code", "law"), ("law", "law"))]
    new += [new[0], _text(tokenizer, "law", "code")]
    ids = torch.zeros(4, 12, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(prompts):
        ids[row, 12 - len(text) :], mask[row, 12 - len(text) :] = text, 1
    named = ["code", "law", None, "law"]
    output = _forced(model, ids, new, domain=named, attention_mask=mask)
    logits = torch.stack(output.logits, 1)
    for row, domain in enumerate(named):
        expected = _expected(model, new[row], domain, {domain})
        assert output.switches[row] == _switches(expected)
        alone = _logits(model, prompts[row], new[row], expected)
        assert torch.allclose(logits[row], alone, atol=1e-4)
    assert [len(switches) for switches in output.switches] == [1, 0, 0, 1]


FORMS = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "returned": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beam_sampling": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "static_cache": {"cache_implementation": "static"},
    "no_cache": {"use_cache": False},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "chunked_prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("domain", ["code", "auto"])
def test_every_pass_computes_what_the_text_before_it_says(case, form, domain, monkeypatch):
    model, tokenizer = case
    rows = 1 if form == "prompt_lookup" else 2
    prompt = torch.stack([_text(tokenizer, "code")[:20], _text(tokenizer, "law")[:20]])[:rows]
    begun = [domain] * rows if domain == "code" else model.route(prompt)
    passes = []
    forward = type(model).enter_forward

    def enter(self, named, args, kwargs):
        choice = forward(self, named, args, kwargs)
        index = choice.pathway
        listed = index.tolist() if isinstance(index, torch.Tensor) else [index]
        passes.append([None if i in (None, -1) else self.domains[i] for i in listed])
        return choice

    followed = []
    follow = Guard.follow
    monkeypatch.setattr(type(model), "enter_forward", enter)
    monkeypatch.setattr(
        Guard, "follow", lambda self, ids: followed.append(ids.clone()) or follow(self, ids)
    )
    torch.manual_seed(0)
    settings = {"max_new_tokens": 40, "domain": domain, "guard": True, **FORMS[form]}
    output = _generate(model, prompt, **settings)
    assert len(passes) == len(followed) >= 3
    for used, ids in zip(passes, followed, strict=True):
        new = torch.cat([ids[:, 20:], torch.zeros(len(ids), 1, dtype=torch.int64)], 1)
        for row in range(len(ids)):
            first = begun[row * rows // len(ids)]
            choices = {*DOMAINS} if domain == "auto" else {"code"}
            computed = used[row] if len(used) > 1 else used[0]
            assert computed == _expected(model, new[row], first, choices)[-1]
    assert len(output.switches) == len(output.sequences)
    assert any(output.switches)


def test_what_stays_in_its_domain_is_generated_as_without_a_guard(case):
    model, tokenizer = case
    prompt = _text(tokenizer, "code")[None, :30]
    plain = _generate(model, prompt, domain="code", max_new_tokens=6)
    watched = _generate(model, prompt, domain="code", max_new_tokens=6, guard=True)
    assert torch.equal(plain.sequences, watched.sequences)
    assert watched.switches == [[]]
    assert not hasattr(plain, "switches")


def test_reordered_and_replaced_rows_are_judged_by_their_own_tokens(case):
    model = case[0]
    rows = [Watched(domain="code", choices=frozenset(["code"]))] * 2
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 90, (4, 50), generator=generator)
    guard = Guard(model.text_router, rows, 0)
    for step in range(1, 50):
        order = torch.cat([torch.randperm(2, generator=generator) + at for at in (0, 2)])
        ids[:, :step] = ids[order, :step]
        if step % 7 == 0:  # as rejected drafts do
            ids[:, step - 3 : step] = torch.randint(4, 90, (4, 3), generator=generator)
        fresh = Guard(model.text_router, rows, 0)
        assert guard.follow(ids[:, :step]) == fresh.follow(ids[:, :step])


def test_threads_have_guards_of_their_own(case):
    model, tokenizer = case
    texts = [_text(tokenizer, *names) for names in (("code", "law"), ("law", "code"))]
    found = [None] * 4

    def run(index):
        prompt, domain = texts[index % 2][None, :10], DOMAINS[index % 2]
        guarded = [
            _forced(model, prompt, [texts[index % 2]], domain=domain).switches for _ in range(2)
        ]
        plain = _generate(model, prompt, domain=domain, max_new_tokens=4)
        found[index] = [*guarded, hasattr(plain, "switches")]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, (first, second, plain) in enumerate(found):
        domain = DOMAINS[index % 2]
        expected = _switches(_expected(model, texts[index % 2], domain, {domain}))
        assert first == second == [expected]
        assert not plain


def test_streams_and_plain_tensors_are_guarded_and_the_log_tells(case, caplog):
    model, tokenizer = case
    caplog.set_level(logging.INFO, "hf_sparse_pathways.modeling.guard")
    prompt, new = _text(tokenizer, "code")[None, :10], _text(tokenizer, "code", "law")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = {"domain": "code", "streamer": streamer, "return_dict_in_generate": False}
    thread = threading.Thread(target=_forced, args=(model, prompt, [new]), kwargs=options)
    thread.start()
    assert "".join(streamer) == tokenizer.decode(new)
    thread.join()
    assert "Guarded 1 rows: 1 to dense." in caplog.text


def test_embeddings_may_stand_for_the_prompt(case):
    model, tokenizer = case
    prompt, new = _text(tokenizer, "code")[None, :10], _text(tokenizer, "code", "law")
    embeds = model.get_input_embeddings()(prompt).detach()
    output = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=len(new),
        domain="code",
        guard=True,
        logits_processor=[_Forced([new], 0)],
        return_dict_in_generate=True,
    )
    assert output.switches == [_switches(_expected(model, new, "code", {"code"}))]


def test_scopes_and_the_default_domain_are_guarded(case):
    model, tokenizer = case
    prompt, new = _text(tokenizer, "code")[None, :40], _text(tokenizer, "code", "law")
    expected = [_switches(_expected(model, new, "code", {*DOMAINS}))]
    with model.pathway("auto"):
        assert _forced(model, prompt, [new]).switches == expected
    paths = model.pathways
    other = sp.SparsePathwaysForCausalLM.from_dense(
        model.to_dense(), paths, default_domain="code"
    ).eval()
    home = [_switches(_expected(model, new, "code", {"code"}))]
    assert _forced(other, prompt, [new]).switches == home


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma3"])
def test_what_a_model_prepares_is_read_as_before(name):
    dense = build(name)
    paths = sp.Pathways.from_masks(dense, random_masks(dense, DOMAINS))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    read = [inspect.signature(one.prepare_inputs_for_generation) for one in (dense, model)]
    assert read[0] == read[1]


def test_text_that_is_not_known_cannot_be_guarded(case, tmp_path):
    dense = build("llama")
    paths = sp.Pathways.from_masks(dense, random_masks(dense, DOMAINS))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    prompt = torch.full((1, 4), 7)
    with pytest.raises(sp.PathwaysError, match=r"'code'.*sparse-pathways build"):
        _generate(model, prompt, domain="code", max_new_tokens=2, guard=True)
    dense_rows = _generate(model, prompt, domain=None, max_new_tokens=2, guard=True)
    assert dense_rows.switches == [[]]
    case[0].save_pretrained(tmp_path)
    alone = sp.SparsePathwaysForCausalLM.from_pretrained(tmp_path, domain="law")
    with pytest.raises(sp.PathwaysError, match="no dense model"):
        _generate(alone, prompt, max_new_tokens=2, guard=True)


def test_domains_that_come_after_are_guarded_by_what_is_saved(case, tmp_path):
    model, tokenizer = case
    prompt, new = _text(tokenizer, "law")[None, :10], _text(tokenizer, "law", "code")
    expected = _forced(model, prompt, [new], domain="law").switches
    model.save_pretrained(tmp_path)
    loaded = sp.SparsePathwaysForCausalLM.from_pretrained(tmp_path).eval()
    for other in (loaded, copy.deepcopy(model)):
        assert _forced(other, prompt, [new], domain="law").switches == expected


def test_what_was_picked_from_a_prompt_cannot_be_guarded(case):
    model, tokenizer = case
    ids = torch.stack([_text(tokenizer, name)[:40] for name in DOMAINS])
    for asked in ("prompt", ["prompt", DOMAINS[0]]):
        with pytest.raises(sp.PathwaysError, match="what is picked from a prompt has none"):
            _generate(model, ids, domain=asked, max_new_tokens=2, guard=True)
        picked = _generate(model, ids, domain=asked, max_new_tokens=2).picked
        with pytest.raises(sp.PathwaysError, match="what is picked from a prompt has none"):
            _generate(model, ids, domain=picked, max_new_tokens=2, guard=True)
        with (
            pytest.raises(sp.PathwaysError, match="what is picked from a prompt has none"),
            model.pathway(picked),
        ):
            _generate(model, ids, max_new_tokens=2, guard=True)
