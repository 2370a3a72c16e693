"""Ways to damage a pair of ``<name>.json`` and ``<name>.safetensors``, for pathways and profiles.

A damage is a function of the JSON file's path that changes the files in place. Those that change
what the description says keep the pair consistent: the SHA-256 is computed anew.
"""

import copy
import hashlib
import json
import shutil

from safetensors.torch import load, save

DEEP = "[" * 100_000


def read_meta(path):
    return json.loads(path.read_text(encoding="utf-8"))


def rewrite(path, meta=None, data=None):
    """Write a description and tensors (bytes) that belong together."""
    tensors = path.with_suffix(".safetensors")
    data = tensors.read_bytes() if data is None else data
    meta = read_meta(path) if meta is None else meta
    tensors.write_bytes(data)
    described = {**meta, "tensors_sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(described), encoding="utf-8")


def set_field(path, keys, value):
    """Set one nested field of the description."""
    meta = copy.deepcopy(read_meta(path))
    place = meta
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    rewrite(path, meta)


def drop_field(path, keys):
    """Remove one nested field of the description."""
    meta = copy.deepcopy(read_meta(path))
    place = meta
    for key in keys[:-1]:
        place = place[key]
    del place[keys[-1]]
    rewrite(path, meta)


def change_tensors(path, change):
    """Replace the tensors by ``change(tensors)``, with the right SHA-256."""
    tensors = load(path.with_suffix(".safetensors").read_bytes())
    rewrite(path, data=save(change(tensors)))


def flipped(data, position, bits):
    return data[:position] + bytes([data[position] ^ bits]) + data[position + 1 :]


def _json_text(text):
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def _json_cut(fraction):
    return lambda path: path.write_bytes(path.read_bytes()[: int(fraction * _size(path))])


def _size(path):
    return path.stat().st_size


def _tensors(change, *, consistent):
    def damage(path):
        tensors = path.with_suffix(".safetensors")
        data = change(tensors.read_bytes())
        if consistent:
            rewrite(path, data=data)
        else:
            tensors.write_bytes(data)

    return damage


def _folder_instead(suffix):
    def damage(path):
        path.with_suffix(suffix).unlink()
        path.with_suffix(suffix).mkdir()

    return damage


def _field(name, value):
    return lambda path: set_field(path, [name], value)


def _sha(value):
    def damage(path):
        meta = {**read_meta(path), "tensors_sha256": value}
        path.write_text(json.dumps(meta))

    return damage


def _raw_field(name, text):
    """Put a JSON text that ``json.dumps`` would not write in front of the other fields."""

    def damage(path):
        path.write_text(f'{{"{name}": {text}, {path.read_text().lstrip()[1:]}')

    return damage


# fmt: off
FILES = {
    "json absent": lambda path: path.unlink(),
    "tensors absent": lambda path: path.with_suffix(".safetensors").unlink(),
    "both absent": lambda path: shutil.rmtree(path.parent),
    "json is a folder": _folder_instead(".json"),
    "tensors are a folder": _folder_instead(".safetensors"),
    **{f"json cut at {part}": _json_cut(part) for part in (0, 0.001, 0.3, 0.7, 0.99)},
    "json list": _json_text("[]"),
    "json number": _json_text("1"),
    "json string": _json_text('"format"'),
    "json null": _json_text("null"),
    "json empty object": _json_text("{}"),
    "json deep list": _json_text(DEEP),
    "json deep object": _json_text('{"a":' * 100_000),
    "json invalid utf-8": _json_text(b'{"format": 1, "a": "\xff"}'),
    "json utf-16": lambda path: path.write_text(path.read_text(), encoding="utf-16"),
    "json with a mark": lambda path: path.write_text(path.read_text(), encoding="utf-8-sig"),
    "json twice": lambda path: path.write_text(path.read_text() * 2),
    "json NaN": _raw_field("extra", "NaN"),
    "json Infinity": _raw_field("extra", "-Infinity"),
    "json overflow": _raw_field("extra", "1e999"),
    "json huge integer": _raw_field("extra", "1" * 5000),
    **{f"format {value!r}": _field("format", value)
       for value in (99, 10**30, 0, -1, "1", 1.0, True, None, [1], {})},
    "format missing": lambda path: drop_field(path, ["format"]),
    "format NaN": _field("format", float("nan")),
    **{f"sha {value!r}": _sha(value) for value in ("0" * 64, "", None, 5, [], {})},
    "tensors empty": _tensors(lambda _: b"", consistent=False),
    **{f"tensors cut at {part}": _tensors(lambda data, part=part: data[: int(part * len(data))],
                                          consistent=False) for part in (0.01, 0.5, 0.99)},
    "tensors longer": _tensors(lambda data: data + b"\0", consistent=False),
    "tensors empty, consistent": _tensors(lambda _: b"", consistent=True),
    **{f"tensors cut at {part}, consistent": _tensors(
        lambda data, part=part: data[: int(part * len(data))], consistent=True)
       for part in (0.01, 0.5, 0.99)},
    "tensors longer, consistent": _tensors(lambda data: data + b"\0", consistent=True),
    "tensors garbage, consistent": _tensors(lambda _: b"garbage " * 50, consistent=True),
    "tensors huge header, consistent": _tensors(
        lambda data: b"\xff" * 8 + data[8:], consistent=True),
    "tensors none, consistent": _tensors(lambda _: save({}), consistent=True),
}
# fmt: on

WRONG = (None, True, 5, -1, 1.5, "x", [], ["x"], {}, {"x": 1})
"""One value of every JSON type, or two: a field takes some and has to refuse the others."""


def taken(path, keys, values, artefact, refused):
    """Return those values of a field with which the artefact is read without complaint.

    Any other exception than the refusals is raised.
    """
    read = []
    for value in values:
        set_field(path, keys, value)
        try:
            artefact.from_pretrained(path.parent)
        except refused:
            continue
        read.append(value)
    return read
