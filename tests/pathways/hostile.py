"""Files that somebody made on purpose: a corpus of ways to change a pair so that it still agrees.

As in ``corruption``, a change is a function of the JSON file's path; the SHA-256 is computed anew,
so that nothing is refused for the sum alone.
"""

import json
import os
import struct

import torch
from safetensors.torch import load, save

from hf_sparse_pathways import limits
from tests.pathways.corruption import change_tensors, read_meta, rewrite, set_field


def parse_header(data):
    """Return a safetensors file's header and what follows it."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header, body):
    """Return a safetensors file; a header may be a dictionary or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _header(change):
    """Change the header alone."""

    def damage(path):
        header, body = parse_header(path.with_suffix(".safetensors").read_bytes())
        rewrite(path, data=with_header(change(header), body))

    return damage


def _entry(name, **fields):
    return _header(lambda header: {**header, name: {**header[name], **fields}})


def _more(name, dtype, shape, size=0):
    """Append a tensor."""

    def damage(path):
        header, body = parse_header(path.with_suffix(".safetensors").read_bytes())
        at = len(body)
        more = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        rewrite(path, data=with_header({**header, name: more}, body + bytes(size)))

    return damage


def _bytes(data):
    return lambda path: rewrite(path, data=data)


def _tensor(name, change):
    return lambda path: change_tensors(path, lambda t: {**t, name: change(t[name])})


def _without(name):
    """Leave a tensor out."""
    return lambda path: change_tensors(
        path, lambda t: {key: tensor for key, tensor in t.items() if key != name}
    )


def _raw(name, data):
    """Replace the bytes of a tensor."""

    def damage(path):
        header, body = parse_header(path.with_suffix(".safetensors").read_bytes())
        start, stop = header[name]["data_offsets"]
        content = data * (stop - start) if len(data) == 1 else data
        rewrite(path, data=with_header(header, body[:start] + content + body[stop:]))

    return damage


def _renamed_part(old, new):
    """Give a part of every block another name, in the tensors and in what is held."""

    def damage(path):
        tensors = load(path.with_suffix(".safetensors").read_bytes())
        meta = read_meta(path)
        for entry in meta["domains"]:
            entry["holds"] = [new if part == old else part for part in entry["holds"]]
        named = {
            f"{k.rpartition('.')[0]}.{new}" if k.endswith(f".{old}") and k[0] != "c" else k: v
            for k, v in tensors.items()
        }
        rewrite(path, meta, save(named))

    return damage


def _text(change):
    """Change the text of the description."""
    return lambda path: path.write_text(change(path.read_text()))


def _meta(change):
    def damage(path):
        meta = read_meta(path)
        change(meta)
        rewrite(path, meta)

    return damage


def _field(*keys_and_value):
    *keys, value = keys_and_value
    return lambda path: set_field(path, keys, value)


def _instead(make):
    """Put something that is no file in place of the description."""

    def damage(path):
        path.unlink()
        make(path)

    return damage


def _nest(depth):
    return json.loads("[" * depth + "]" * depth)


def _large(path):
    with path.open("r+b") as file:  # a hole: it takes no space on the disk
        file.truncate(limits.MOST_JSON_BYTES + 1)


KEEP, DELTA = "0.0.keep", "0.0.delta"

# fmt: off
JSON = {
    "a key twice": _text(lambda text: '{"format": 1, ' + text.lstrip()[1:]),
    "a key of a block twice": _text(lambda text: text.replace('"d_in"', '"d_ff": 48, "d_in"', 1)),
    "a gigabyte": _large,
    "an empty gigabyte of lists": _text(lambda _: "[" * 10**6),
    "an integer of a million digits": _text(lambda _: '{"a": ' + "1" * 10**6 + "}"),
    "an integer of 65 bits": _field("domains", 0, "provenance", "seed", 2**64),
    "a float that overflows": _text(lambda text: text.replace('"base"', '"x": 1e400, "base"', 1)),
    "half a surrogate pair": _text(lambda text: text.replace('"llama"', '"\\ud800"')),
    "half a pair in a provenance": _field("domains", 0, "provenance", "x", "\ud800"),
    "nested provenance": _field("domains", 0, "provenance", "x", _nest(limits.MOST_DEPTH)),
    "a zero": _text(lambda text: text.replace("llama", "lla\0ma")),
    "many blocks": _meta(lambda meta: meta["base"].update(
        blocks=meta["base"]["blocks"] * (limits.MOST_BLOCKS // 3 + 1))),
    "a million blocks": _meta(lambda meta: meta["base"].update(blocks=[{}] * 10**6)),
    "many domains": _meta(lambda meta: meta.update(
        domains=meta["domains"] * (limits.MOST_DOMAINS // 2 + 1))),
    "many apart": _field(
        "apart", {f"d{i}": f"pathways/d-{i:08x}" for i in range(limits.MOST_DOMAINS + 1)}),
    "blocks no list": _field("base", "blocks", {"0": {}}),
    "block no object": _field("base", "blocks", 0, "x"),
    **{f"{name} {value!r:.12}": _field("base", "blocks", 0, name, value)
       for name in ("d_in", "d_ff", "d_out", "branches")
       for value in (limits.MOST_WIDTH + 1, 2**63, True, "48", [48], None)},
    **{f"{name} {value!r:.20}": _field("base", name, value)
       for name in ("revision", "model_type", "neuron_order")
       for value in ("\x1b[2J", "a\nb", "`x`", "<script>", "[x](http://x)", "\u202e", 5, [],
                     "x" * 300)},
    "a block's name of control characters": _field("base", "blocks", 0, "name", "\x1b]0;x\x07"),
    "a long block's name": _field("base", "blocks", 0, "name", "x" * 10_000),
    "a routed name of markup": _field("base", "routed", ["<img src=x>"]),
    "a long name": _field("base", "name", "x" * 5000),
    **{f"domain {name!r:.20}": _field("domains", 0, "name", name)
       for name in ("..", "../../etc", "/etc/passwd", "C:\\x", "a/b", "a\\b", "a\0b", "a\x1b[31m",
                    "a\u202eb", "a\u200bb", "a|b", "<b>", "`", "\u2028", "", " ", "x" * 65,
                    "a\u0301", "\uff0e\uff0e/", "pooled")},
    "a control of control characters": _field("controls", 0, "name", "\x1b[31m"),
    **{f"text {value!r:.40}": _field("domains", 0, "provenance", "text", value)
       for value in (5, "x", [1], None, {"digests": 5}, {"digests": [5]}, {"digests": {"a": 1}},
                     {"cut_digests": "abc"}, {"tokens": "many"}, {"source": ["x"]},
                     {"datasets": "me/x"}, {"datasets": ["me/x"]})},
    "healing no list": _field("domains", 0, "provenance", "healing", 5),
    "holds unknown": _field("domains", 0, "holds", ["keep", "__class__"]),
    "holds objects": _field("domains", 0, "holds", [{"keep": 1}]),
    "a pipe": _instead(os.mkfifo),
    "a link to itself": _instead(lambda path: path.symlink_to(path.name)),
    "a link to a device": _instead(lambda path: path.symlink_to("/dev/zero")),
}

TENSORS = {
    "header of 2**60 bytes": _bytes(struct.pack("<Q", 2**60)),
    "header of 2**63 bytes": _bytes(struct.pack("<Q", 2**63) + b"{}"),
    "header longer than the file": _bytes(struct.pack("<Q", 1000) + b"{}"),
    "header larger than may be": _bytes(struct.pack("<Q", limits.MOST_HEADER_BYTES + 1)),
    "seven bytes": _bytes(b"\0" * 7),
    "header no object": _bytes(with_header(b"[]", b"")),
    "header no JSON": _bytes(with_header(b"{", b"")),
    "header deep": _bytes(with_header(b'{"a":' * 10**5, b"")),
    "shape of 2**62": _entry(KEEP, shape=[2**62]),
    "shape whose product overflows": _entry(KEEP, shape=[2**40, 2**40]),
    "shape negative": _entry(KEEP, shape=[-48]),
    "shape no numbers": _entry(KEEP, shape=["48"]),
    "shape of many dimensions": _entry(KEEP, shape=[48] + [1] * 5000),
    "empty of 2**62 rows": _more("0.0.more", "F32", [2**62, 0, 2**62]),
    "more than is described": _more("9.0.keep", "BOOL", [48], 48),
    "a name of control characters": _more("\x1b[2J", "BOOL", [1], 1),
    "a name of another alphabet's digits": _more("²." * 3, "BOOL", [1], 1),
    "offsets beyond the file": _entry(KEEP, data_offsets=[0, 2**60]),
    "offsets backwards": _entry(KEEP, data_offsets=[48, 0]),
    "offsets that overlap": _header(lambda header: {
        **header, KEEP: {**header[KEEP], "data_offsets": header["0.1.keep"]["data_offsets"]}}),
    "a hole": lambda path: rewrite(path, data=path.with_suffix(".safetensors").read_bytes() + b"x"),
    "keep in bytes": _entry(KEEP, dtype="U8"),
    "keep in four bits": _entry(KEEP, dtype="F4", shape=[96]),
    "an unknown dtype": _entry(KEEP, dtype="X9"),
    "delta in integers": _entry(DELTA, dtype="I32"),
    "delta in eight bits": _tensor(DELTA, lambda t: t.to(torch.float8_e4m3fn)),
    "delta in complex numbers": _tensor(DELTA, lambda t: t.to(torch.complex64)),
    "keep neither true nor false": _raw(KEEP, b"\x02"),
    "keep all ones": _raw(KEEP, b"\xff"),
    "keep more than delta has": _tensor(KEEP, torch.ones_like),
    "keep nothing": _tensor(KEEP, torch.zeros_like),
    "keep of another width": _tensor(KEEP, lambda _: torch.ones(49, dtype=torch.bool)),
    "keep a matrix": _tensor(KEEP, lambda t: t[None]),
    "delta a scalar": _tensor(DELTA, lambda t: t[0, 0].clone()),
    "delta a vector": _tensor(DELTA, lambda t: t[0].clone()),
    "delta empty": _tensor(DELTA, lambda t: t[:, :0].clone()),
    "delta of another height": _tensor(DELTA, lambda t: t[:-1].clone()),
    "delta wider than the block": _tensor(DELTA, lambda _: torch.zeros(32, 49)),
    "delta of NaN": _raw(DELTA, b"\xff"),
    "delta infinite": _tensor(DELTA, lambda t: t / 0.0),
    "bias of another width": _tensor("0.0.bias", lambda t: t[:-1].clone()),
    "bias a scalar": _tensor("0.0.bias", lambda t: t[0].clone()),
    "a rank of a thousand": lambda path: change_tensors(path, lambda t: {
        **t, "0.1.delta_outer": torch.zeros(32, 1000),
        "0.1.delta_inner": torch.zeros(1000, t["0.1.delta_inner"].shape[1])}),
    "ranks that differ": _tensor("0.1.delta_outer", lambda t: t[:, :-1].clone()),
    "a factor missing": _without("0.1.delta_outer"),
    "a factor a vector": _tensor("0.1.delta_outer", lambda t: t[:, 0].clone()),
    "a factor a scalar": _tensor("0.1.delta_inner", lambda t: t[0, 0].clone()),
    "bypass of another width": _tensor("0.0.bypass_inner", lambda t: t[:, :-1].clone()),
    "an incoming scalar": _tensor("0.0.incoming0", lambda t: t[0, 0].clone()),
    "incoming rows of another number": _tensor("0.0.incoming0", lambda t: t[:-1].clone()),
    "incoming rows without columns": _tensor("0.0.incoming0", lambda t: t[:, :0].clone()),
    "a whole bypass": _renamed_part("bypass_outer", "bypass"),
}

CLUSTERED = {
    "router of no clusters": _tensor("0.0.router", lambda t: t[:0].clone()),
    "router of fewer clusters": _tensor("0.0.router", lambda t: t[:-1].clone()),
    "router of a billion clusters": _entry("0.0.router", shape=[2**30, 32]),
    "router of more clusters": _tensor("0.0.router", lambda t: t.repeat(2, 1)),
    "router of too many clusters": _tensor("0.0.router", lambda t: t[:1].repeat(1025, 1)),
    "router a scalar": _tensor("0.0.router", lambda t: t[0, 0].clone()),
    "router of another width": _tensor("0.0.router", lambda t: t[:, :-1].clone()),
    "router in half precision": _tensor("0.0.router", lambda t: t.half()),
    "shares in half precision": _tensor("0.0.share", lambda t: t.bfloat16()),
    "router of integers": _tensor("0.0.router", lambda t: t.int()),
    "router of NaN": _raw("0.0.router", b"\xff"),
    "router without a bias": _without("0.0.router_bias"),
    "router with a bias too long": _tensor("0.0.router_bias", lambda t: t.repeat(2)),
    "shares of NaN": _raw("0.0.share", b"\xff"),
    "shares below zero": _tensor("0.0.share", lambda t: t - 1.0),
    "an expert without a mask": _without("0.0.1.keep"),
    "an expert that keeps nothing": _tensor("0.0.1.keep", torch.zeros_like),
    "an expert's mask neither true nor false": _raw("0.0.1.keep", b"\x02"),
    "an expert beyond the clusters": _more("0.0.3.keep", "BOOL", [48], 48),
    "an expert below zero": _more("0.0.-1.keep", "BOOL", [48], 48),
    "an expert's refit of another width": _tensor("0.0.1.delta", lambda t: t[:, :-1].clone()),
    "a block with a mask beside its experts": _more("0.0.keep", "BOOL", [48], 48),
    "a shared refit that nobody speaks of": _more("0.0.shared", "F32", [32, 48], 4 * 32 * 48),
}

SHARED = {
    "a shared refit of another width": _tensor("0.0.shared", lambda t: t[:, :-1].clone()),
    "a shared refit a vector": _tensor("0.0.shared", lambda t: t[0].clone()),
    "a shared refit of integers": _tensor("0.0.shared", lambda t: t.int()),
    "a shared refit of NaN": _raw("0.0.shared", b"\xff"),
    "no shared refit": lambda path: [_without(f"0.{n}.shared")(path) for n in range(3)],
    "a shared refit of a billion rows": _entry("0.0.shared", shape=[2**30, 48]),
    "a refit of an expert beside it": _more("0.0.1.delta", "F32", [32, 24], 4 * 32 * 24),
}

SKIPPING = {
    "thresholds of another width": _tensor("0.0.threshold", lambda t: t[:-1].clone()),
    "a threshold for all": _tensor("0.0.threshold", lambda t: t[0].clone()),
    "thresholds in half precision": _tensor("0.0.threshold", lambda t: t.half()),
    "thresholds of NaN": _raw("0.0.threshold", b"\xff"),
    "thresholds without a share": _without("0.0.active"),
    "a share without thresholds": _without("0.0.threshold"),
    "a share above one": _tensor("0.0.active", lambda t: t + 1.0),
    "a share below zero": _tensor("0.0.active", lambda t: t - 1.0),
    "several shares": _tensor("0.0.active", lambda t: t.repeat(2)),
    "a share a scalar": _tensor("0.0.active", lambda t: t[0].clone()),
}

GROUPS = {
    "groups of another number of neurons": _tensor("0.0.group", lambda t: t[:-1].clone()),
    "groups of floating-point numbers": _tensor("0.0.group", lambda t: t.float()),
    "groups in eight bytes": _tensor("0.0.group", lambda t: t.long()),
    "a group a scalar": _tensor("0.0.group", lambda t: t[0].clone()),
    "a group beyond the router": _tensor("0.0.group", lambda t: t + (t == 3).int()),
    "a group below all": _tensor("0.0.group", lambda t: t - (t == -1).int()),
    "groups of several sizes": _tensor("0.0.group", lambda t: t.masked_fill(t == 3, 2)),
    "no neuron for all tokens": _tensor("0.0.group", lambda t: t.clamp_min(0)),
    "all neurons for all tokens": _tensor("0.0.group", lambda t: t.clamp_max(-1)),
    "a router of groups of another width": _tensor("0.0.group_router", lambda t: t[:, 1:].clone()),
    "a router of no groups": _tensor("0.0.group_router", lambda t: t[:0].clone()),
    "a router of a billion groups": _entry("0.0.group_router", shape=[2**30, 32]),
    "a router of too many groups": _tensor("0.0.group_router", lambda t: t[:1].repeat(1025, 1)),
    "a router of groups a scalar": _tensor("0.0.group_router", lambda t: t[0, 0].clone()),
    "a router of groups in half precision": _tensor("0.0.group_router", lambda t: t.half()),
    "a router of groups of NaN": _raw("0.0.group_router", b"\xff"),
    "biases of more groups": _tensor("0.0.group_bias", lambda t: t.repeat(2)),
    "shares of groups above one": _tensor("0.0.group_share", lambda t: t + 1.0),
    "shares of groups of NaN": _raw("0.0.group_share", b"\xff"),
    "as many groups a token as none": _tensor("0.0.top_k", torch.zeros_like),
    "more groups a token than there are": _tensor("0.0.top_k", lambda t: t + 9),
    "several numbers of groups a token": _tensor("0.0.top_k", lambda t: t.repeat(2)),
    "a number of groups that is none": _tensor("0.0.top_k", lambda t: t.float()),
    "groups without a router": _without("0.0.group_router"),
    "a router without groups": _without("0.0.group"),
    "groups beside changed rows": _more("0.0.incoming0", "F32", [48, 32], 4 * 48 * 32),
}

# Of a model with 8 routed experts of 12 neurons, of which a token has 2.
_ROUTED, _NEURONS = "experts.0.0.keep", "experts.0.0.neurons"

EXPERTS = {
    "no experts": _tensor(_ROUTED, torch.zeros_like),
    "fewer experts than a token has": _tensor(_ROUTED, lambda t: t & (t.cumsum(0) < 2)),
    "experts of another number": _tensor(_ROUTED, lambda t: torch.cat([t, t[:1]])),
    "experts in integers": _tensor(_ROUTED, lambda t: t.int()),
    "experts a scalar": _tensor(_ROUTED, lambda t: t[0].clone()),
    "experts a matrix": _tensor(_ROUTED, lambda t: t[None]),
    "experts neither true nor false": _raw(_ROUTED, b"\x02"),
    "experts of a billion": _entry(_ROUTED, shape=[2**30]),
    "experts missing in a layer": _without(_ROUTED),
    "experts of a layer too many": _more("experts.0.9.keep", "BOOL", [8], 8),
    "experts of a domain too many": _more("experts.9.0.keep", "BOOL", [8], 8),
    "experts of another kind": _more("experts.0.0.router", "F32", [8], 32),
    "neurons without their experts": _without("experts.0.1.keep"),
    "neurons neither true nor false": _raw(_NEURONS, b"\x02"),
    "neurons none": _tensor(_NEURONS, torch.zeros_like),
    "neurons of removed experts": _tensor(_NEURONS, torch.ones_like),
    "neurons unequally many": _tensor(
        _NEURONS, lambda t: t & (t.flatten().cumsum(0) > 1).view(8, -1)),
    "neurons of another width": _tensor(_NEURONS, lambda t: t[:, :-1].clone()),
    "neurons of another number": _tensor(_NEURONS, lambda t: t[:-1].clone()),
    "neurons in bytes": _tensor(_NEURONS, lambda t: t.to(torch.uint8)),
    **{f"held {value!r:.20}": _field("domains", 0, "experts", value)
       for value in (5, "keep", {}, ["neurons"], ["keep", "x"], [["keep"]], [], True, None)},
    **{f"{name} {value!r:.12}": _field("base", "experts", 0, name, value)
       for name in ("experts", "top_k", "groups", "top_groups", "d_in", "d_ff", "d_out", "branches")
       for value in (0, limits.MOST_WIDTH + 1, "8")},
    **{f"channels {value!r:.12}": _field("base", "experts", 0, "channels", value)
       for value in (0, 3, limits.MOST_WIDTH + 1, "2", True, None)},
    "more per token than there are": _field("base", "experts", 0, "top_k", 9),
    "groups that do not divide": _field("base", "experts", 0, "groups", 3),
    "more groups than there are": _field("base", "experts", 0, "top_groups", 2),
    "layers no list": _field("base", "experts", {"0": {}}),
    "a layer no object": _field("base", "experts", 0, "x"),
    "layers not named": _field("base", "experts", []),
    "many layers": _meta(lambda meta: meta["base"].update(
        experts=meta["base"]["experts"] * (limits.MOST_BLOCKS // 2 + 1))),
    "a layer's name of control characters": _field("base", "experts", 0, "name", "\x1b]0;x\x07"),
    "a field too many": _field("base", "experts", 0, "x", 1),
}
# fmt: on
