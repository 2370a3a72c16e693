"""``generate`` in all its forms equals the same form on a plain model with zeroed weights."""

import threading
import warnings

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, TextIteratorStreamer, pipeline

import hf_sparse_pathways as sp
from tests.architectures import build, prompt, random_masks, zeroed
from tests.texts import tiny_tokenizer

DOMAINS = ("code", "law", "chat", "math")


@pytest.fixture(scope="module")
def case():
    """A dense model, the model with pathways, and a zeroed plain model per domain."""
    dense = build("llama")
    dense.generation_config.pad_token_id = 0
    dense.generation_config.eos_token_id = None
    masks = random_masks(dense, DOMAINS)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, sp.Pathways.from_masks(dense, masks))
    references = {name: zeroed(dense, keep) for name, keep in masks.items()}
    return model, {**references, None: dense}


FORMS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam_sampling": {"do_sample": True, "num_beams": 2},
    "returned_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams_returned": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "static_cache": {"do_sample": False, "cache_implementation": "static"},
    "no_cache": {"do_sample": False, "use_cache": False},
    "prompt_lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "contrast_free_penalty": {"do_sample": False, "repetition_penalty": 1.3},
}


def _generate(model, ids, **arguments):
    torch.manual_seed(0)
    mask = arguments.pop("attention_mask", torch.ones_like(ids))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(ids, attention_mask=mask, max_new_tokens=6, **arguments)


@pytest.mark.parametrize(
    "executor",
    [
        "masked",
        "compact",
        "sliced",
        pytest.param("packed-all", marks=pytest.mark.needs_packing),
        pytest.param("indexed", marks=pytest.mark.needs_compiler),
    ],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("every_form_pays")
def test_every_form_equals_zeroed_weights(case, form, executor):
    model, references = case
    model.set_executor(executor)
    assert model.execution.executor == executor
    ids = prompt(1 if form == "prompt_lookup" else 2)
    outputs = {}
    for domain in ("code", "law", None):
        outputs[domain] = _generate(model, ids, domain=domain, **FORMS[form])
        assert torch.equal(outputs[domain], _generate(references[domain], ids, **FORMS[form]))
    assert not torch.equal(outputs["code"], outputs[None])


@pytest.mark.parametrize("form", ["greedy", "beams", "beams_returned", "returned_sequences"])
def test_rows_of_a_left_padded_batch_choose_their_domain(case, form):
    model, references = case
    model.set_executor("auto")
    arguments = {**FORMS[form], "do_sample": False, "num_beams": FORMS[form].get("num_beams", 3)}
    lengths, domains = (3, 7, 5), ["law", None, "math"]
    ids = torch.zeros(3, 7, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    alone = []
    for row, (length, domain) in enumerate(zip(lengths, domains, strict=True)):
        text = prompt(1, length, seed=row)
        ids[row, 7 - length :], mask[row, 7 - length :] = text[0], 1
        alone.append(_generate(references[domain], text, **arguments)[:, length:])
    output = _generate(model, ids, attention_mask=mask, domain=domains, **arguments)
    assert torch.equal(output[:, 7:], torch.cat(alone))


def test_rows_that_agree_run_as_one_pathway(case):
    model, references = case
    model.set_executor("compact")
    output = _generate(model, prompt(), domain=["code", "code"], do_sample=False)
    assert torch.equal(output, _generate(references["code"], prompt(), do_sample=False))


@pytest.mark.parametrize("assistant", ["plain", "sparse", "sparse_other_order"])
def test_assisted_decoding(case, assistant):
    model, references = case
    draft = build("llama")
    draft.generation_config.eos_token_id = None
    if assistant != "plain":
        order = DOMAINS if assistant == "sparse" else DOMAINS[::-1]
        masks = random_masks(draft, order, seed=5)
        paths = sp.Pathways.from_masks(draft, masks)
        draft = sp.SparsePathwaysForCausalLM.from_dense(draft, paths)
    expected = _generate(references["law"], prompt(1), do_sample=False)
    seen = []
    if assistant != "plain":
        draft.register_forward_hook(lambda *_: seen.append(_selected(draft)))
    output = _generate(model, prompt(1), do_sample=False, assistant_model=draft, domain="law")
    assert torch.equal(output, expected)
    if assistant != "plain":
        assert set(seen) == {draft.domains.index("law")}


def _selected(model):
    """Return the pathway index in force for a model on this thread."""
    from hf_sparse_pathways.ffn.choices import find_choice

    choice = find_choice(model._attachment.key)
    return None if choice is None else choice.pathway


def test_cache_and_attention_mask_are_used_as_by_the_dense_model(case):
    model, references = case
    shapes = {"sparse": [], "dense": []}

    def record(name):
        def hook(module, args, kwargs):  # noqa: ARG001
            ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
            shapes[name].append((tuple(ids.shape), None if mask is None else tuple(mask.shape)))

        return hook

    for name, target, domain in (
        ("sparse", model, {"domain": "code"}),
        ("dense", references[None], {}),
    ):
        handle = target.register_forward_pre_hook(record(name), with_kwargs=True)
        _generate(target, prompt(), do_sample=False, **domain)
        handle.remove()
    assert shapes["sparse"] == shapes["dense"]
    assert [shape[0][1] for shape in shapes["sparse"]] == [7, 1, 1, 1, 1, 1]


def test_four_threads_with_four_domains(case):
    model, references = case
    model.set_executor("compact")
    model._attachment.copies.drop()
    ids = {name: prompt(2, 9, seed=index) for index, name in enumerate(DOMAINS)}
    expected = {n: _generate(references[n], ids[n], do_sample=False) for n in DOMAINS}
    wrong = []
    gate = threading.Barrier(len(DOMAINS))

    def work(name):
        gate.wait()
        for _ in range(8):
            output = model.generate(
                ids[name],
                attention_mask=torch.ones_like(ids[name]),
                domain=name,
                do_sample=False,
                max_new_tokens=6,
            )
            if not torch.equal(output, expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in DOMAINS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_streaming_from_another_thread(case):
    model, references = case
    tokenizer = tiny_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    arguments = {"domain": "chat", "do_sample": False, "max_new_tokens": 6, "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(prompt(1),), kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = _generate(references["chat"], prompt(1), do_sample=False)[0, 7:]
    assert text == tokenizer.decode(expected)


def test_pipeline(case):
    model, references = case
    tokenizer = tiny_tokenizer()
    text = tokenizer.decode(prompt(1)[0])
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)
    reference = pipeline("text-generation", model=references["law"], tokenizer=tokenizer)
    arguments = {"do_sample": False, "max_new_tokens": 6, "return_full_text": False}
    assert made(text, domain="law", **arguments) == reference(text, **arguments)
    assert made(text, domain="code", **arguments) != reference(text, **arguments)


def test_generation_config_and_processors_pass_through(case):
    model, references = case

    class OnlyEven(LogitsProcessor):
        def __call__(self, ids, scores):  # noqa: ARG002
            scores[:, 1::2] = -torch.inf
            return scores

    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    output = model.generate(prompt(), config, [OnlyEven()], domain="code")
    expected = references["code"].generate(prompt(), config, [OnlyEven()])
    assert torch.equal(output, expected)
    assert (output[:, 7:] % 2 == 0).all()


def test_inputs_embeds(case):
    model, references = case
    embeds = model.get_input_embeddings()(prompt()).detach()
    mask = torch.ones(2, 7, dtype=torch.int64)
    arguments = {"inputs_embeds": embeds, "attention_mask": mask, "max_new_tokens": 5}
    rows = model.generate(**arguments, domain=["code", "law"], do_sample=False)
    for row, name in enumerate(("code", "law")):
        one = {key: v[row : row + 1] if torch.is_tensor(v) else v for key, v in arguments.items()}
        assert torch.equal(rows[row], references[name].generate(**one, do_sample=False)[0])


@pytest.mark.parametrize("domain", [["code"], ["code", "law", None], []])
def test_a_list_of_the_wrong_length_is_refused(case, domain):
    model, _ = case
    with pytest.raises(sp.PathwaysError, match="one"):
        model.generate(prompt(), domain=domain, max_new_tokens=2)
    with pytest.raises(sp.PathwaysError, match="one"):
        model(prompt(), domain=domain)


@pytest.mark.parametrize("call", ["generate", "__call__"])
def test_an_unknown_domain_lists_what_there_is(case, call):
    model, _ = case
    for domain in ("cod", ["cod", "law"]):
        with pytest.raises(sp.PathwaysError, match=r"'cod'.*Did you mean 'code'.*'law'"):
            getattr(model, call)(prompt(), domain=domain)
    for domain in (3, {"code": 1}, [1, 2], torch.tensor([0, 9]), torch.tensor([0.5, 1.0])):
        with pytest.raises(sp.PathwaysError):
            getattr(model, call)(prompt(), domain=domain)
