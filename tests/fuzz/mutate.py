"""Damage that keeps enough of a format for its reader to go on: `mutated(tree, random, words, others)`.

A tree is {file name: bytes, or where a symbolic link points to}. JSON is changed as values and written again, also with
what `json.dumps` cannot write; headers of safetensors likewise, with their length put right; GGUF in its key-value
pairs and tensor infos (`gguf_parts.py`); everything as bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from random import Random
from typing import Any

import gguf_parts

Tree = dict[str, "bytes | str"]

NUMBERS = (0, 1, -1, 2, 3, 7, 8, 16, 31, 32, 64, 127, 128, 255, 256, 4096, 65535, 2**31 - 1, 2**31, 2**32, 2**53, 2**63)
NUMBERS += (2**63 - 1, -(2**31), -(2**63), 2**64 - 1, 2**64, 10**9, 10**12, 10**18, 10**30)
FLOATS = (0.0, -0.0, 0.5, 1e-5, 1.0, -1.5, 1e30, 1e308, 5e-324)
TEXTS = (
    "",
    " ",
    "a" * 300,
    "x" * 5000,
    "..",
    "../../outside.txt",
    "/etc/passwd",
    "C:\\x",
    "a/b",
    "\x00",
    "\ud800",
    "é",
)
TEXTS += ("\x1b[2J", "a\nb", "%s%n", "{text}", "re:(a+)+$", "re:(.*.*)*!", "re:[", "(.|.)*$", "nan", "1e999", "-1")
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "-" + "9" * 400, "9" * 400, "[" * 2000 + "]" * 2000)
RAW += ('{"a":' * 1500 + "1" + "}" * 1500, '{"a":1,"a":2}', '"\\ud800"', "1e-999", "0.1e400", "tru", '"\\x"')
LINKS = ("../outside.txt", "/etc/passwd", "/dev/zero", "/dev/null", "/proc/self/mem", ".", "loop", "missing")
ODD = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"null",
    b"[]",
    b"{}",
    b"0",
    b'"',
    b"\x80\x04.",
    b"[" * 100_000,
    b"{" * 100,
)


KINDS = ("F4", "F6_E2M3", "F8_E4M3", "F8_E8M0", "F16", "F64", "C64", "BOOL", "U8", "U16", "I16", "I64", "U64")
"""Dtypes of safetensors."""


def mutated(tree: Tree, random: Random, words: Sequence[str], others: Sequence[Tree]) -> Tree:
    """One to four changes, mostly one."""
    found = dict(tree)
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 4))):
        if not found:
            return found
        name = random.choice(sorted(found))
        if random.random() < 0.03:
            _in_the_tree(found, name, random, others)
        elif isinstance(found[name], bytes):
            found[name] = _in_a_file(name, found[name], random, words, others)
    return found


def _in_the_tree(tree: Tree, name: str, random: Random, others: Sequence[Tree]) -> None:
    match random.randrange(5):
        case 0:
            del tree[name]
        case 1:
            tree[name] = random.choice(LINKS)
        case 2:
            tree[name] = random.choice(ODD)
        case 3:
            other = random.choice(others)
            tree.update({n: other[n] for n in random.sample(sorted(other), 1)} if other else {})
        case 4:
            second = random.choice(sorted(tree))
            tree[name], tree[second] = tree[second], tree[name]


def _in_a_file(name: str, data: bytes, random: Random, words: Sequence[str], others: Sequence[Tree]) -> bytes:
    if random.random() < 0.08:
        mates = [other[name] for other in others if isinstance(other.get(name), bytes)]
        return _bytes(data, random, mates)
    suffix = name.rpartition(".")[2]
    try:
        match suffix:
            case "json":
                return written(changed(json.loads(data), random, words))
            case "safetensors":
                return _safetensors(data, random, words)
            case "gguf":
                return gguf_parts.changed(data, random, words)
            case "jsonl":
                return _lines(data, random, words)
            case "csv" | "tsv" | "txt" | "md" | "yaml" | "jinja":
                return _text(data, random, words)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, struct.error):
        pass  # it is damaged already
    return _bytes(data, random, [])


def _bytes(data: bytes, random: Random, mates: Sequence[bytes]) -> bytes:
    at, size = random.randrange(len(data) + 1), random.choice((1, 2, 4, 8, 32))
    match random.randrange(8):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[at + size :]
        case 2:
            return data[:at] + random.randbytes(size) + data[at + size :]
        case 3:
            return data[:at] + random.randbytes(size) + data[at:]
        case 4 if data and at < len(data):
            return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
        case 5:
            number = struct.pack("<Q", random.choice(NUMBERS) % 2**64)[: random.choice((1, 2, 4, 8))]
            return data[:at] + number + data[at + len(number) :]
        case 6 if mates:
            mate = random.choice(mates)
            return data[:at] + mate[random.randrange(len(mate) + 1) :]
        case _:
            return data + data[at : at + size]


class Raw:
    """Text that stands in JSON as it is."""

    def __init__(self, text: str):
        self.text = text


def written(value: Any) -> bytes:
    """JSON in UTF-8, with `Raw` parts as they are."""
    raws: list[str] = []

    def put(part: Any) -> str:
        raws.append(part.text)
        return f"@@{len(raws) - 1}@@"

    text = json.dumps(value, default=put, ensure_ascii=True)
    for i, raw in enumerate(raws):
        text = text.replace(f'"@@{i}@@"', raw)
    return text.encode("utf-8", "surrogatepass")


def changed(value: Any, random: Random, words: Sequence[str]) -> Any:
    """`value` with one place in it changed."""
    places = list(_places(value))
    if not places:
        return leaf(value, random, words)
    home, key = random.choice(places)
    match random.randrange(7):
        case 0:
            del home[key]
        case 1 if isinstance(home, dict):
            home[random.choice(words) if random.random() < 0.7 else random.choice(TEXTS)] = home.pop(key)
        case 2 if isinstance(home, dict):
            home[random.choice(words)] = leaf(None, random, words)
        case 3 if isinstance(home, list):
            home.insert(random.randrange(len(home) + 1), leaf(home[key], random, words))
        case 4:
            other, at = random.choice(places)
            home[key] = json.loads(json.dumps(other[at])) if at in other or isinstance(other, list) else None
        case 5 if isinstance(home, dict):
            own = json.dumps({str(key): leaf(home[key], random, words, raw=False)})[1:-1]
            home[key] = Raw(json.dumps(home[key]) + ", " + own)
        case _:
            home[key] = leaf(home[key], random, words)
    return value


def _places(value: Any):
    """(container, key) of everything below `value`."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def leaf(value: Any, random: Random, words: Sequence[str], raw: bool = True) -> Any:
    """Something in place of `value`, more often than not of its kind."""
    draw = random.random()
    if isinstance(value, int) and not isinstance(value, bool) and draw < 0.5:
        return random.choice((random.choice(NUMBERS), value + random.choice((-1, 1)), -value, value * 2, value // 2))
    if isinstance(value, str) and draw < 0.5:
        at = random.randrange(len(value) + 1)
        return random.choice(
            (random.choice(words), value[:at], value + value, value[:at] + "é" + value[at:], value.upper())
        )
    match random.randrange(10 if raw else 8):
        case 0:
            return random.choice(NUMBERS)
        case 1:
            return random.choice(FLOATS)
        case 2:
            return random.choice(TEXTS)
        case 3:
            return random.choice((None, True, False))
        case 4:
            return random.choice(([], {}, [[]], [None], {"a": 1}, [1, 2], ["a"], {"name": "x"}))
        case 5:
            return [value] * random.choice((1, 2, 3))
        case 6:
            return random.choice(words)
        case 7:
            return random.choice(KINDS)
        case _:
            return Raw(random.choice(RAW))


def _safetensors(data: bytes, random: Random, words: Sequence[str]) -> bytes:
    (size,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + size], data[8 + size :]
    if random.random() < 0.2:
        rest = _bytes(rest, random, [])
    else:
        told = json.loads(header)
        if "__metadata__" in told and random.random() < 0.3:
            for key, text in told["__metadata__"].items():
                if text[:1] == "{":
                    told["__metadata__"][key] = written(changed(json.loads(text), random, words)).decode(
                        "utf-8", "replace"
                    )
        else:
            changed(told, random, words)
        header = written(told)
        header += b" " * (-len(header) % 8)
    size = random.choice(NUMBERS) % 2**64 if random.random() < 0.03 else len(header)
    return struct.pack("<Q", size) + header + rest


def _lines(data: bytes, random: Random, words: Sequence[str]) -> bytes:
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    match random.randrange(5):
        case 0:
            lines[at] = _bytes(lines[at], random, lines)
        case 1:
            lines.insert(at, random.choice(ODD))
        case _:
            lines[at] = written(changed(json.loads(lines[at] or b"{}"), random, words))
    return b"\n".join(lines)


MARKS = (
    b'"',
    b"'",
    b",",
    b"\t",
    b"\n",
    b"\r",
    b"\r\n",
    b"{",
    b"}",
    b"[",
    b"]",
    b": ",
    b"- ",
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!int ",
)
MARKS += (
    b"!!python/object/apply:os.system ",
    b"!!binary ",
    b"|",
    b">",
    b"---\n",
    b"#",
    b"%",
    b"\x00",
    b"\xff",
    b"\xc3",
    b"? ",
    b"~",
)
MARKS += (
    b"1e999",
    b"9" * 400,
    b"1:1:1:1",
    b".inf",
    b".nan",
    b"0x" + b"f" * 300,
    b"{% for i in range(99999) %}",
    b"{{ '' * 9999 }}",
)


def _text(data: bytes, random: Random, words: Sequence[str]) -> bytes:
    at, draw = random.randrange(len(data) + 1), random.random()
    if draw < 0.4:
        return data[:at] + random.choice(MARKS) * random.choice((1, 1, 1, 2, 200)) + data[at:]
    if draw < 0.6:
        return data[:at] + random.choice(words).encode() + data[at:]
    lines = data.split(b"\n")
    one, two = random.randrange(len(lines)), random.randrange(len(lines))
    if draw < 0.8:
        lines[one] = lines[two]
        return b"\n".join(lines)
    return _bytes(data, random, lines)
