"""Damages the files of a folder, as a broken download or an attacker would. The same random state, the same damage."""

from __future__ import annotations

import json
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

Files = dict[str, bytes]
OUTSIDE = "../outside"  # beside the folder, with copies of its files: no reader may open them

_NUMBERS = (0, 1, -1, 2, 7, 31, 255, 2**15, 2**24, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
_VALUES = (
    *_NUMBERS, -(2**63), 2**200, 1.5, 1e308, float("nan"), float("inf"), "", "..", ".", "/", "\0", "\ud800",
    "/dev/zero",
    "C:\\x", "é" * 5000, None, True, [], {}, [[]], {"": {}}, [2**31, 2**31], [-1, 4], "F32", "I4", "int4", "group",
)  # fmt: skip


def damage(files: Files, rng: Random, outside: Path) -> tuple[Files, str]:
    """One to three damages of a copy of `files`, and what they were. outside: a folder that files are made to name."""
    result, told = dict(files), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(sorted(result))
        suited = [change for ends, changes in _BY_KIND for change in changes if name.endswith(ends)]
        change = rng.choice(suited if suited and rng.random() < 0.7 else _BYTES)
        try:
            result[name] = change(result[name], rng, [f"{OUTSIDE}/{name}", f"{outside}/{name}", f"./{name}"])
        except _NotThis:
            result[name] = _flip(result[name], rng, [])
        told.append(f"{change.__name__.strip('_')} {name}")
    return result, ", ".join(told)


class _NotThis(Exception):
    """An earlier damage left nothing that this one could parse."""


def _number(rng: Random, size: int) -> bytes:
    value = rng.choice(_NUMBERS) if rng.random() < 0.7 else rng.getrandbits(8 * size)
    return (value % (1 << 8 * size)).to_bytes(size, "little")


def _position(data: bytes, rng: Random) -> int:
    """Anywhere, but mostly near the start, where headers are."""
    limit = len(data) if rng.random() < 0.3 else min(len(data), rng.choice((16, 64, 512, 4096)))
    return rng.randrange(max(1, limit))


def _truncate(data: bytes, rng: Random, paths: list[str]) -> bytes:
    return data[: rng.choice((0, 1, 7, 8, len(data) - 1, len(data) // 2, _position(data, rng)))]


def _flip(data: bytes, rng: Random, paths: list[str]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 32)) if changed else 0):
        changed[_position(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(data: bytes, rng: Random, paths: list[str]) -> bytes:
    at, size = _position(data, rng), rng.choice((1, 2, 4, 8))
    return data[:at] + _number(rng, size) + data[at + size :]


def _insert(data: bytes, rng: Random, paths: list[str]) -> bytes:
    at = _position(data, rng)
    return data[:at] + rng.choice((b"\xff\xfe", b"\0", b'"', b"{", b"[" * 200_000, rng.randbytes(9))) + data[at:]


def _cut(data: bytes, rng: Random, paths: list[str]) -> bytes:
    at = _position(data, rng)
    return data[:at] + data[at + rng.choice((1, 4, 8, 100)) :]


def _repeat(data: bytes, rng: Random, paths: list[str]) -> bytes:
    at = _position(data, rng)
    return data[:at] + data[at : at + rng.choice((8, 64, 1000))] * 2 + data[at:]


def _json(data: bytes, rng: Random, paths: list[str]) -> bytes:
    try:
        return _damaged_json(json.loads(data), rng, paths).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError) as error:
        raise _NotThis from error


def _damaged_json(root: Any, rng: Random, paths: list[str]) -> str:
    holder: Any = [root]
    parents = list(_containers(holder))
    for _ in range(rng.choice((1, 1, 2, 4))):
        node = rng.choice(parents)
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            continue
        key, kind = rng.choice(keys), rng.randrange(10)
        if kind == 0 and node is not holder:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(("", "x", *map(str, paths), "../x", "dtype"))] = node[key]
        elif kind == 2:
            node[key] = rng.choice(paths)
        elif kind == 3:
            other = rng.choice(parents)
            values = list(other.values()) if isinstance(other, dict) else list(other)
            node[key] = json.loads(json.dumps(rng.choice(values))) if values else None
        elif kind == 4 and isinstance(node[key], int | float):
            node[key] += rng.choice((-1, 1, 8, 1000, 2**40))
        else:
            node[key] = rng.choice(_VALUES)
    text = json.dumps(holder[0])
    extra = rng.randrange(30)
    if extra == 0:
        return text.replace("{", '{"x": ' + "[" * 100_000 + "]" * 100_000 + ",", 1)
    if extra < 4:  # a key twice
        colons = [i for i in range(len(text)) if text.startswith('": ', i)]
        if colons:
            end = rng.choice(colons)
            start = text.rfind('"', 0, end)
            return text[:start] + text[start : end + 3] + "0, " + text[start:]
    return text


def _containers(node: Any) -> Iterator[Any]:
    if isinstance(node, dict | list):
        yield node
        for child in node.values() if isinstance(node, dict) else node:
            yield from _containers(child)


def _safetensors(data: bytes, rng: Random, paths: list[str]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise _NotThis
    header = _json(data[8 : 8 + length], rng, paths)
    count = len(header) + rng.choice((0, 0, 0, 0, 1, -1, 2**62))
    return (count % 2**64).to_bytes(8, "little") + header + data[8 + length :]


def _gguf(data: bytes, rng: Random, paths: list[str]) -> bytes:
    """A count, length, type or offset of the header becomes another."""
    changed = bytearray(data)
    try:
        places = list(_gguf_numbers(data))
    except (struct.error, OverflowError, MemoryError, KeyError) as error:
        raise _NotThis from error
    for _ in range(rng.choice((1, 1, 2))):
        near_an_end = rng.random() < 0.7  # most numbers are lengths of the tokenizer's strings
        at, size = rng.choice(places[:60] + places[-300:] if near_an_end else places)
        changed[at : at + size] = _number(rng, size)
    return bytes(changed)


def _gguf_numbers(data: bytes) -> Iterator[tuple[int, int]]:
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    at = 4
    found: list[tuple[int, int]] = []

    def read(size: int) -> int:
        nonlocal at
        found.append((at, size))
        at += size
        return int(struct.unpack_from("<I" if size == 4 else "<Q", data, at - size)[0])

    def pass_string() -> None:
        nonlocal at
        length = read(8)
        at += length

    read(4)
    tensors, pairs = read(8), read(8)
    for _ in range(pairs):
        pass_string()
        kind = read(4)
        count = 1
        if kind == 9:
            kind, count = read(4), read(8)
        if kind == 8:
            for _ in range(count):
                pass_string()
        else:
            found.append((at, sizes[kind]))
            at += sizes[kind] * count
    for _ in range(tensors):
        pass_string()
        for _ in range(read(4)):
            read(8)
        read(4)
        read(8)
    yield from found


def _xml(data: bytes, rng: Random, paths: list[str]) -> bytes:
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError) as error:
        raise _NotThis from error
    nodes = list(root.iter())
    for _ in range(rng.choice((1, 1, 2, 4))):
        node, kind = rng.choice(nodes), rng.randrange(6)
        if kind == 0 and len(node):
            node.remove(rng.choice(list(node)))
        elif kind == 1 and len(node):
            node.append(rng.choice(list(node)))
        elif kind == 2:
            node.text = str(rng.choice(_NUMBERS))
        elif node.attrib:
            told = [str(v).replace("\0", "").replace("\ud800", "") for v in (*_VALUES, *paths)]
            node.set(rng.choice(sorted(node.attrib)), rng.choice(told))
    text = ElementTree.tostring(root, encoding="unicode")
    extra = rng.randrange(12)
    if extra == 0:
        bomb = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "x" * 100}">' for i in range(10))
        return f"<!DOCTYPE net [{bomb}]>{text.replace('>', '>&e9;', 1)}".encode()
    if extra == 1:
        return f'<!DOCTYPE net [<!ENTITY x SYSTEM "file://{paths[1]}">]>{text.replace(">", ">&x;", 1)}'.encode()
    if extra == 2:
        return ("<a>" * 200_000 + text).encode()
    return text.encode()


def _onnx(data: bytes, rng: Random, paths: list[str]) -> bytes:
    """Fields of the protobuf become hostile, at any depth."""
    import onnx

    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:
        raise _NotThis from error
    messages = list(_messages(model))
    for _ in range(rng.choice((1, 1, 2, 4))):
        message = rng.choice(messages)
        fields = message.ListFields()
        if not fields:
            continue
        field, value = rng.choice(fields)
        repeated = hasattr(value, "append") or hasattr(value, "add")
        if rng.random() < 0.2:
            message.ClearField(field.name)
            continue
        if repeated and field.type == field.TYPE_MESSAGE:
            chosen = rng.randrange(len(value))
            if rng.random() < 0.5:
                del value[chosen]
            else:
                value.add().CopyFrom(value[chosen])
            continue
        hostile = _for_field(field, rng, paths)
        if hostile is None:
            continue
        try:
            if repeated:
                value[rng.randrange(len(value))] = hostile
            else:
                setattr(message, field.name, hostile)
        except (ValueError, TypeError):
            continue
    return bytes(model.SerializeToString())


def _for_field(field: Any, rng: Random, paths: list[str]) -> Any:
    if field.type == field.TYPE_STRING:
        return rng.choice(("", "..", "x", "0", "-1", str(2**63), *paths))
    if field.type == field.TYPE_BYTES:
        return rng.choice((b"", b"\xff\xfe", b"x" * 100, *(path.encode() for path in paths)))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))
    return None if field.type == field.TYPE_MESSAGE else rng.choice(_NUMBERS)


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for child in value if hasattr(value, "add") else [value]:
                yield from _messages(child)


_BYTES: tuple[Callable[..., bytes], ...] = (_truncate, _flip, _overwrite, _insert, _cut, _repeat)
_BY_KIND: tuple[tuple[str, tuple[Callable[..., bytes], ...]], ...] = (
    (".json", (_json,)),
    (".safetensors", (_safetensors,)),
    (".phiq", (_safetensors,)),
    (".gguf", (_gguf,)),
    (".xml", (_xml,)),
    (".onnx", (_onnx,)),
)
