"""Fuzzing saved pathways: ``python -m tests.pathways.fuzz --seconds 600 --seed 0``.

A case takes a good pair and changes it by its seed: values of the description, or bytes of the
tensors, whose SHA-256 is then computed anew, so that the change is seen and not only the wrong sum.
The pair has to be refused by one of the package's errors, or to be read: then it is what it says,
can be saved and read again, shown, rendered as a card, and used, or refused, by a model. Anything
else is printed with its seed, and the command fails.
"""

import argparse
import copy
import json
import random
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.cli.info import describe
from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.pathways.pathway import Pathways
from hf_sparse_pathways.pathways.storage import JSON_NAME, TENSORS_NAME
from hf_sparse_pathways.share.card import CardSettings, change_rows, render_card
from tests.architectures import build, compensate, random_masks
from tests.clustered import clustered
from tests.grouped import grouped
from tests.pathways.corruption import rewrite
from tests.pathways.hostile import parse_header, with_header
from tests.pathways.signatures import make_signature

VALUES = (
    *(None, True, False, 0, 1, -1, 2, 48, 2**31, 2**63, 2**64, -(2**70), 10**400, 1.5, -0.0, 1e308),
    *(
        "",
        "x",
        "code",
        "law",
        "pooled",
        "keep",
        "..",
        "/",
        "\0",
        "\x1b[2J",
        "\ud800",
        "\u202e",
        "|",
    ),
    *([], {}, [[]], {"": {}}, ["keep"], ["keep", "keep"], {"digests": [1]}, [None], "9" * 30, "²"),
)
NUMBERS = (0, 1, 2, 3, 7, 47, 48, 49, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**30, -1)
DTYPES = ("BOOL", "U8", "I8", "I32", "I64", "F16", "BF16", "F32", "F64", "F8_E4M3", "F4", "X", "")
IDS = torch.arange(1, 6)[None]


def make_pair(folder):
    """Write a good pair into a folder; return its model and its two contents."""
    dense = build("llama")
    paths = compensate(dense, random_masks(dense))
    text = {"source": "x", "digests": ["a"], "tokens": 5, "documents": 1}
    made = {"method": "obs", "compensation": "refit+bias", "text": text, "healing": [{"a": 1}]}
    named = {**paths.by_domain, "clusters": clustered(dense)["code"]}
    named["groups"] = grouped(paths)["code"]
    named["law"] = replace(named["law"], signature=make_signature())
    by_domain = {n: replace(p, provenance=made) for n, p in named.items()}
    control = {"pooled": replace(paths["law"], provenance=made)}
    paths = Pathways(base=paths.base, by_domain=by_domain, controls=control)
    paths.save_pretrained(folder)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths, executor="masked").eval()
    return model, json.loads((folder / JSON_NAME).read_text()), (folder / TENSORS_NAME).read_bytes()


def _places(value, place=()):
    """Yield the keys that lead to every value of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*place, key)
        if isinstance(inner, dict | list):
            yield from _places(inner, (*place, key))


def _change_value(meta, draw):
    """Change, remove, move or double one value of a description, in place."""
    *keys, last = draw.choice(list(_places(meta)))
    holder = meta
    for key in keys:
        holder = holder[key]
    kind = draw.randrange(6)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[last]))
    elif kind == 2:
        *keys, other = draw.choice(list(_places(meta)))
        source = meta
        for key in keys:
            source = source[key]
        holder[last] = copy.deepcopy(source[other])
    elif kind == 3 and isinstance(holder, dict):
        holder[str(draw.choice(VALUES))] = holder.pop(last)
    elif kind == 4 and type(holder[last]) is int:
        holder[last] += draw.choice((-1, 1, 2**31, 2**62))
    else:
        holder[last] = copy.deepcopy(draw.choice(VALUES))


def _change_text(text, draw):
    """Flip, cut out, double or insert characters of a description's text."""
    start = draw.randrange(len(text))
    stop = min(len(text), start + draw.choice((1, 1, 2, 9, 200)))
    middle = draw.choice(
        ["", text[start:stop] * 2, chr(draw.randrange(128)), '"', "}", "[", ",", "1e999", "\\ud800"]
    )
    return text[:start] + middle + text[stop:]


def _change_header(data, draw):
    """Change one entry of a safetensors header."""
    header, body = parse_header(data)
    name = draw.choice(list(header))
    entry, other = header[name], header[draw.choice(list(header))]
    kind = draw.randrange(8)
    if kind == 0:
        entry["dtype"] = draw.choice(DTYPES)
    elif kind == 1:
        entry["shape"] = [draw.choice(NUMBERS) for _ in range(draw.randrange(4))]
    elif kind == 2 and entry["shape"]:
        entry["shape"][draw.randrange(len(entry["shape"]))] = draw.choice(NUMBERS)
    elif kind == 3:
        entry["data_offsets"][draw.randrange(2)] = draw.choice((*NUMBERS, len(body)))
    elif kind == 4:
        header[draw.choice((f"{name}x", "9.9.keep", "c0.0.bias", "0.0", "²", ""))] = header.pop(
            name
        )
    elif kind == 5:
        entry.update(copy.deepcopy(other))
    elif kind == 6:
        entry["shape"] = entry["shape"][::-1]
    else:
        del header[name]
    return with_header(header, body)


def _change_bytes(data, draw):
    """Flip, cut, insert or overwrite bytes; half of the time in the header."""
    last = len(data) if draw.randrange(2) else 8 + int.from_bytes(data[:8], "little")
    at = draw.randrange(last)
    kind = draw.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + draw.randbytes(draw.randrange(1, 20)) + data[at:]
    if kind == 2:
        return data[:at] + data[at + draw.randrange(1, 50) :]
    changed = bytearray(data)
    for place in range(at, min(len(data), at + draw.choice((1, 1, 8, 500)))):
        changed[place] = draw.choice((0, 1, 2, 0x7F, 0x80, 0xFF, changed[place] ^ 1))
    return bytes(changed)


def make_case(path, meta, data, seed):
    """Write the pair of a seed."""
    draw = random.Random(seed)
    meta, kind = copy.deepcopy(meta), draw.randrange(5)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        if kind == 0:
            data = _change_header(data, draw)
        elif kind == 1 and len(data) > 8:
            data = _change_bytes(data, draw)
            break  # its header may be none any more
        elif kind in (2, 3):
            _change_value(meta, draw)
    rewrite(path, meta, data)
    if kind == 4:
        text = _change_text(path.read_text(), draw)
        path.write_text(text, encoding="utf-8")


def try_case(folder, model):
    """Read a pair and do with it what users do; return whether it could be read.

    Raises:
        PathwaysError: It is refused.
        Exception: Anything else is a defect.
    """
    found = Pathways.from_pretrained(folder)
    for name in (*found.domains, *found.controls):
        for block, shape in zip(found[name].blocks, found.base.blocks, strict=True):
            assert block.keep.shape == (shape.d_ff,)
            assert int(block.keep.sum()) == int(block.keep.nonzero().numel()) > 0
            assert all(bool(t.isfinite().all()) for t in block.parts().values())
    with tempfile.TemporaryDirectory() as other:
        found.save_pretrained(other)
        again = Pathways.from_pretrained(other)
    assert again.base == found.base
    assert again.domains == found.domains
    assert repr(found).isprintable()
    json.dumps(describe(folder))
    card = render_card(found, "me/x", CardSettings(), weights=False)
    change_rows(card, added=found.subset(found.domains[:1]))
    for name in found.domains:
        assert Pathways.from_pretrained(folder, only=name).domains == [name]
    _use(model, found)


@torch.no_grad()
def _use(model, found):
    """Give a model pathways, and compute; refused, it still has the earlier ones."""
    before = model.pathways
    try:
        model.set_pathways(found)
    except PathwaysError:
        assert model.pathways is before
        return
    for name in (None, *found.domains):
        assert model(IDS, domain=name).logits.shape[:2] == IDS.shape
    model.set_pathways(before)


def run(seeds, folder, stop=None):
    """Try seeds until they or the time end; return ``(tried, read, failed)``.

    A failed case is printed with its seed.
    """
    path = Path(folder, JSON_NAME)
    model, meta, data = make_pair(path.parent)
    tried = read = failed = 0
    for seed in seeds:
        if stop is not None and time.monotonic() > stop:
            break
        tried += 1
        make_case(path, meta, data, seed)
        try:
            try_case(path.parent, model)
            read += 1
        except PathwaysError as error:
            if not str(error).isprintable():
                failed += 1
                print(f"seed {seed}: {error!r} holds what a terminal obeys")  # noqa: T201
        except Exception:  # noqa: BLE001 - whatever it is, it is a defect
            failed += 1
            print(f"seed {seed}:\n{traceback.format_exc()}")  # noqa: T201
    return tried, read, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="How long.")
    parser.add_argument("--seed", type=int, default=0, help="The first seed; the others follow.")
    parser.add_argument("--cases", type=int, default=10**9, help="Most cases.")
    given = parser.parse_args()
    seeds = range(given.seed, given.seed + given.cases)
    with tempfile.TemporaryDirectory() as folder:
        tried, read, failed = run(seeds, folder, time.monotonic() + given.seconds)
    print(f"{tried} cases: {read} read, {tried - read - failed} refused, {failed} failed")  # noqa: T201
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
