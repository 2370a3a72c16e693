"""A Llama checkpoint as a GGUF file in float32, biases included, for llama.cpp.

llama.cpp rotates neighbouring pairs of a head's rows where Transformers rotates its two halves, so
rows of q and k are interleaved. The vocabulary is that of a byte-level BPE in ``tokenizer.json``;
llama.cpp knows its way of splitting text by name (``--pre``). Needs gguf and safetensors.

Usage: python benchmarks/llama_gguf.py FOLDER FILE.gguf [--pre smollm]
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open


def main() -> None:
    """Convert a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--pre", default="smollm", help="llama.cpp's name of the pre-tokenizer")
    arguments = parser.parse_args()
    write_gguf(arguments.folder, arguments.file, arguments.pre)


def write_gguf(folder: Path, file: Path, pre: str) -> None:
    """Write a folder's model as one file."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama":
        raise SystemExit(f"{folder} is a {config['model_type']!r} model: only 'llama' fits.")
    writer = gguf.GGUFWriter(file, "llama")
    _add_sizes(writer, config)
    _add_vocabulary(writer, folder, config, pre)
    layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, tensor in _read_tensors(folder):
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(own, np.ascontiguousarray(_interleave(name, tensor, config)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or config
    if rope.get("rope_type", "default") != "default":
        raise SystemExit(f"Scaled positions ({rope['rope_type']!r}) are not converted here.")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])


def _add_vocabulary(
    writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any], pre: str
) -> None:
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {**saved["model"]["vocab"], **{t["content"]: t["id"] for t in saved["added_tokens"]}}
    control = {token["id"] for token in saved["added_tokens"] if token["special"]}
    tokens = {index: token for token, index in ids.items()}
    numbers = range(config["vocab_size"])
    kinds = [
        gguf.TokenType.CONTROL
        if index in control
        else gguf.TokenType.NORMAL
        if index in tokens
        else gguf.TokenType.UNUSED
        for index in numbers
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(index, f"[unused{index}]") for index in numbers])
    writer.add_token_types(kinds)
    merges = saved["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name).float().numpy()


def _interleave(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Return the rows of q and k in llama.cpp's order; any other tensor as it is."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    kind = heads.get(name.split(".")[-2])
    if kind is None:
        return tensor
    halves = tensor.reshape(config[kind], 2, -1, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


if __name__ == "__main__":
    main()
