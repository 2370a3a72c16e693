"""``domain="prompt"`` in every way of calling: passes, caches, assistants, scopes and threads."""

import copy
import threading

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer

import hf_sparse_pathways as sp
from hf_sparse_pathways.modeling.picked import LEAST_TOKENS
from tests.architectures import prompt
from tests.modeling.test_generate import _generate
from tests.prompted import IDS, griffin, griffin_masks, make_case, reference
from tests.texts import tiny_tokenizer


@pytest.fixture(scope="module")
def case():
    return make_case()


def test_a_forward_pass_is_dense_and_picks(case):
    dense, model = case
    output = model(IDS, domain="prompt")
    assert torch.equal(output.logits, dense(IDS).logits)
    for row, pathway in enumerate(output.picked.pathways):
        masks = griffin_masks(dense, IDS[row : row + 1])
        assert all(map(torch.equal, pathway.keep, masks))


@torch.no_grad()
def test_a_loop_of_passes_goes_on_with_what_was_picked(case):
    dense, model = case
    expected = _generate(griffin(dense, IDS[:1]), IDS[:1], do_sample=False)[:, 12:]
    output = model(IDS[:1], domain="prompt", use_cache=True)
    picked, tokens = output.picked, []
    for _ in range(expected.shape[1]):
        tokens.append(output.logits[:, -1:].argmax(-1))
        output = model(tokens[-1], cache=output.past_key_values, domain=picked)
    assert torch.equal(torch.cat(tokens, dim=1), expected)
    assert "prompt" not in model.resident
    with model.pathway(picked):
        model(IDS[:1])
        assert model.resident["prompt"] > 0
        again = model(IDS[:1]).logits
    assert torch.equal(again, model(IDS[:1], domain=picked).logits)
    assert "prompt" not in model.resident


def test_a_text_in_a_cache_goes_on_with_what_was_picked_before(case):
    dense, model = case
    first = _generate(
        model, IDS[:1], domain="prompt", do_sample=False, return_dict_in_generate=True
    )
    longer = torch.cat([first.sequences, prompt(1, 3, seed=9)], dim=1)
    masks = [block.keep for block in first.picked.pathways[0].blocks]
    expected = _generate(reference(dense, masks, 12), longer, do_sample=False)
    cache = first.past_key_values
    with pytest.raises(sp.PathwaysError, match="domain=picked"):
        _generate(model, longer, domain="prompt", past_key_values=cache, do_sample=False)
    found = _generate(model, longer, domain=first.picked, past_key_values=cache, do_sample=False)
    assert torch.equal(found, expected)


def test_prompts_of_few_tokens_are_dense(case):
    dense, model = case
    for length in (1, LEAST_TOKENS - 1):
        ids = prompt(1, length)
        output = _generate(
            model, ids, domain="prompt", do_sample=False, return_dict_in_generate=True
        )
        assert output.domains == [None]
        assert output.picked.pathways == (None,)
        assert torch.equal(output.sequences, _generate(dense, ids, do_sample=False))


def test_embeddings_instead_of_tokens(case):
    dense, model = case
    embeds = model.get_input_embeddings()(IDS[:1]).detach()
    settings = {"inputs_embeds": embeds, "max_new_tokens": 6, "do_sample": False}
    found = model.generate(**settings, domain="prompt", attention_mask=torch.ones(1, 12))
    expected = _generate(griffin(dense, IDS[:1]), IDS[:1], do_sample=False)[:, 12:]
    assert torch.equal(found, expected)


def test_a_prompt_in_parts_is_seen_whole(case):
    dense, model = case
    expected = _generate(griffin(dense, IDS[:1]), IDS[:1], do_sample=False)
    config = GenerationConfig(prefill_chunk_size=5, do_sample=False, max_new_tokens=6)
    found = model.generate(IDS[:1], generation_config=config, domain="prompt")
    assert torch.equal(found, expected)


def test_an_assistant_guesses_and_the_result_stays(case):
    dense, model = case
    expected = _generate(griffin(dense, IDS[:1]), IDS[:1], do_sample=False)
    for assistant in (dense, copy.deepcopy(model)):
        found = _generate(
            model, IDS[:1], domain="prompt", do_sample=False, assistant_model=assistant
        )
        assert torch.equal(found, expected)
    with pytest.raises(sp.PathwaysError, match="assistant_early_exit"):
        _generate(model, IDS[:1], domain="prompt", assistant_early_exit=1)


def test_scopes_ask_each_call(case):
    dense, model = case
    expected = _generate(griffin(dense, IDS[:1]), IDS[:1], do_sample=False)
    with model.pathway("prompt"):
        assert torch.equal(_generate(model, IDS[:1], do_sample=False), expected)
        law = _generate(model, IDS[:1], domain="law", do_sample=False)
    assert torch.equal(law, _generate(model, IDS[:1], domain="law", do_sample=False))


def test_threads_pick_apart(case):
    dense, model = case
    model.set_executor("compact")
    rows = [IDS[row : row + 1] for row in range(3)]
    expected = [_generate(griffin(dense, ids), ids, do_sample=False) for ids in rows]
    wrong, gate = [], threading.Barrier(6)

    def work(number):
        gate.wait()
        for _ in range(4):
            row, settings = number % 3, {"do_sample": False, "max_new_tokens": 6}
            mask = torch.ones_like(rows[row])
            found = model.generate(rows[row], attention_mask=mask, domain="prompt", **settings)
            if not torch.equal(found, expected[row]):
                wrong.append(row)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert "prompt" not in model.resident


def test_streaming_from_another_thread(case):
    dense, model = case
    tokenizer = tiny_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    arguments = {"domain": "prompt", "do_sample": False, "max_new_tokens": 6, "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(IDS[:1],), kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = _generate(griffin(dense, IDS[:1]), IDS[:1], do_sample=False)[0, 12:]
    assert text == tokenizer.decode(expected)
