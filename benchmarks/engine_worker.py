"""One engine with one model, which decodes what it is asked for.

``benchmarks/engines.py`` starts one for each arm. It needs the engine alone, so it runs with the
interpreter of the engine's own environment. Each line on standard input is
``{"ids": [...], "new_tokens": n}``; each answer is ``{"tokens": [...], "seconds": s}`` of greedy
decoding in float32.

Usage: PYTHON benchmarks/engine_worker.py ENGINE PLACE THREADS
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

Decode = Callable[[list[int], int], list[int]]


def load_ctranslate2(place: str, threads: int) -> Decode:
    """Load a folder that CTranslate2 has converted."""
    import ctranslate2

    engine = ctranslate2.Generator(place, device="cpu", intra_threads=threads)
    vocabulary = json.loads(Path(place, "vocabulary.json").read_text(encoding="utf-8"))

    def decode(ids: list[int], new_tokens: int) -> list[int]:
        (result,) = engine.generate_batch(
            [[vocabulary[index] for index in ids]],
            max_length=new_tokens,
            min_length=new_tokens,
            include_prompt_in_result=False,
        )
        return list(result.sequences_ids[0])

    return decode


def load_llama_cpp(place: str, threads: int) -> Decode:
    """Load a GGUF file with llama.cpp."""
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    llama_cpp.ggml_backend_load_all()
    model = llama_cpp.LlamaModel(path_model=place, params=llama_cpp.LlamaModelParams())
    settings = llama_cpp.LlamaContextParams()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 1024, threads, threads
    context = llama_cpp.LlamaContext(model, settings)
    sampler = llama_cpp.LlamaSampler(llama_cpp.LlamaSamplerChainParams())
    sampler.add_greedy()

    def decode(ids: list[int], new_tokens: int) -> list[int]:
        context.kv_cache_clear()
        tokens: list[int] = []
        batch, position = ids, 0
        while len(tokens) < new_tokens:
            context.decode(llama_cpp.llama_batch_get_one(batch, position))
            position += len(batch)
            batch = [sampler.sample(context, -1)]
            tokens += batch
        return tokens

    return decode


def load_vllm(place: str, threads: int) -> Decode:
    """Load a checkpoint with vLLM on the CPU."""
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    import vllm

    engine = vllm.LLM(model=place, dtype="float32", max_model_len=1024, enforce_eager=True)

    def decode(ids: list[int], new_tokens: int) -> list[int]:
        settings = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        (result,) = engine.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False)
        return list(result.outputs[0].token_ids)

    return decode


ENGINES = {"ctranslate2": load_ctranslate2, "llama.cpp": load_llama_cpp, "vllm": load_vllm}


def main() -> None:
    """Answer until standard input ends."""
    engine, place, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # engines print to standard output, too
    decode = ENGINES[engine](place, int(threads))
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        tokens = decode(asked["ids"], asked["new_tokens"])
        seconds = time.perf_counter() - started
        answers.write(json.dumps({"tokens": tokens, "seconds": seconds}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
