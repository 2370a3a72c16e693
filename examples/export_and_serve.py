"""Write one domain as an ordinary checkpoint, and run it with an engine that knows no pathways.

The engine here is CTranslate2 (pip install ctranslate2). What it converts is a plain Llama, or
whatever the base is; vLLM and llama.cpp take the same folder. Greedy tokens are compared with those
of the model with pathways.

Usage: python examples/export_and_serve.py FOLDER DOMAIN OUTPUT [PROMPT]
"""

import sys
from pathlib import Path

import ctranslate2
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp

NEW_TOKENS = 24


def main() -> None:
    """Run the example."""
    folder, domain, output, *prompt = sys.argv[1:]
    done = sp.export(folder, domain, output, multiple_of=8)
    print(f"{domain} is an ordinary {done.facts.architecture} in {output}")

    engine_folder = Path(output, "ctranslate2")
    converter = ctranslate2.converters.TransformersConverter(output)
    converter.convert(str(engine_folder))
    engine = ctranslate2.Generator(str(engine_folder), device="cpu")

    tokenizer = AutoTokenizer.from_pretrained(output)
    inputs = tokenizer(prompt[0] if prompt else "The first", return_tensors="pt")
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    (result,) = engine.generate_batch(
        [tokens], max_length=NEW_TOKENS, include_prompt_in_result=False
    )
    served = result.sequences_ids[0]
    print(f"CTranslate2: {tokenizer.decode(served)!r}")

    model = AutoModelForCausalLM.from_pretrained(folder)
    own = model.generate(**inputs, domain=domain, max_new_tokens=NEW_TOKENS, do_sample=False)
    expected = own[0, inputs["input_ids"].shape[1] :].tolist()
    print(f"with pathways: {tokenizer.decode(expected, skip_special_tokens=True)!r}")
    print(f"the same tokens: {served == expected[: len(served)]}")


if __name__ == "__main__":
    main()
