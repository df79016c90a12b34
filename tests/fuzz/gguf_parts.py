"""A GGUF file in its parts, changed, and put together again: counts, key-value pairs, tensor infos, data."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, ARRAY = 8, 9
KINDS = (*SIZES, TEXT, ARRAY, 13, 255, 2**32 - 1)
WIDE = (0, 1, 2, 31, 32, 33, 255, 2**16, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**63, 2**64 - 1)


@dataclass
class Parts:
    """head: magic and version; pairs: [key, kind, bytes of the value]; infos: [name, dimensions, kind, offset]"""

    head: bytes
    pairs: list[list]
    infos: list[list]
    data: bytes
    counts: tuple[int, int] | None = None


def taken_apart(file: bytes) -> Parts:
    """ValueError, IndexError or struct.error for what cannot be."""
    tensors, pairs = struct.unpack_from("<QQ", file, 8)
    if tensors > 1000 or pairs > 1000:
        raise ValueError("counts")
    at, found, infos = 24, [], []

    def text() -> bytes:
        nonlocal at
        (size,) = struct.unpack_from("<Q", file, at)
        at += 8 + size
        if at > len(file):
            raise ValueError("text")
        return file[at - size : at]

    def skip(kind: int, depth: int = 0) -> None:
        nonlocal at
        if kind == TEXT:
            text()
        elif kind == ARRAY and depth < 3:
            inner, count = struct.unpack_from("<IQ", file, at)
            at += 12
            if inner in SIZES:
                at += SIZES[inner] * count
            elif count <= 10_000:
                for _ in range(count):
                    skip(inner, depth + 1)
            else:
                raise ValueError("array")
        else:
            at += SIZES[kind] if kind in SIZES else len(file)

    for _ in range(pairs):
        key = text()
        (kind,) = struct.unpack_from("<I", file, at)
        at += 4
        start = at
        skip(kind)
        if at > len(file):
            raise ValueError("value")
        found.append([key, kind, file[start:at]])
    for _ in range(tensors):
        name = text()
        (count,) = struct.unpack_from("<I", file, at)
        if count > 8:
            raise ValueError("dimensions")
        dims = list(struct.unpack_from(f"<{count}Q", file, at + 4))
        at += 4 + 8 * count
        infos.append([name, dims, *struct.unpack_from("<IQ", file, at)])
        at += 12
    return Parts(file[:8], found, infos, file[at + -at % 32 :])


def put_together(parts: Parts) -> bytes:
    tensors, pairs = parts.counts or (len(parts.infos), len(parts.pairs))
    out = bytearray(parts.head + struct.pack("<QQ", tensors, pairs))
    for key, kind, value in parts.pairs:
        out += struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
    for name, dims, kind, offset in parts.infos:
        out += struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return bytes(out) + bytes(-len(out) % 32) + parts.data


def changed(file: bytes, random: Random, words: Sequence[str]) -> bytes:
    parts = taken_apart(file)
    draw = random.random()
    if draw < 0.55 and parts.pairs:
        _pair(parts.pairs, random, words)
    elif draw < 0.9 and parts.infos:
        _info(parts.infos, random, words)
    elif draw < 0.95:
        at = random.randrange(len(parts.data) + 1)
        parts.data = parts.data[:at] + random.randbytes(2) + parts.data[at + random.choice((0, 2, 9999)) :]
    else:
        parts.counts = (random.choice((len(parts.infos), *WIDE)), random.choice((len(parts.pairs), *WIDE)))
    return put_together(parts)


def _pair(pairs: list[list], random: Random, words: Sequence[str]) -> None:
    at = random.randrange(len(pairs))
    pair = pairs[at] = list(pairs[at])
    match random.randrange(7):
        case 0:
            del pairs[at]
        case 1:
            pairs.insert(at, list(pair))
        case 2:
            arch = next((p[2][8:] for p in pairs if p[0] == b"general.architecture"), b"llama")
            pair[0] = random.choice((b"", arch + b".", b"tokenizer.ggml.")) + random.choice(words).encode(
                "utf-8", "replace"
            )
        case 3:
            pair[1] = random.choice(KINDS)
        case 4:
            pair[1], pair[2] = ARRAY, _array(random)
        case 5:
            word = random.choice(words).encode("utf-8", "replace")
            pair[1], pair[2] = TEXT, struct.pack("<Q", len(word)) + word
        case 6:
            size = SIZES.get(pair[1], 4)
            if pair[1] in (TEXT, ARRAY):
                pair[2] = pair[2][: -random.randrange(1, 9)]
            else:
                odd = (random.choice(WIDE), random.getrandbits(64), 0x7F800000, 0x7FC00000)
                pair[2] = struct.pack("<Q", random.choice(odd) % 2**64)[:size]


def _array(random: Random) -> bytes:
    inner, count = random.choice(KINDS), random.choice((0, 1, 2, 3, *WIDE))
    body = random.randbytes(SIZES.get(inner, 8) * min(count, 4)) if inner in SIZES else bytes(8 * min(count, 4))
    if inner == ARRAY and random.random() < 0.5:  # arrays of arrays of arrays
        return struct.pack("<IQ", ARRAY, 1) * 3000 + struct.pack("<IQ", 0, 0)
    return struct.pack("<IQ", inner, count) + body


def _info(infos: list[list], random: Random, words: Sequence[str]) -> None:
    at = random.randrange(len(infos))
    info = infos[at] = [*infos[at]]
    info[1] = list(info[1])
    match random.randrange(7):
        case 0:
            del infos[at]
        case 1:
            infos.insert(at, list(info))
        case 2:
            info[0] = random.choice(
                (random.choice(words).encode("utf-8", "replace"), info[0] + b".weight", b"\xff", info[0][:-1])
            )
        case 3 if info[1]:
            info[1][random.randrange(len(info[1]))] = random.choice(WIDE)
        case 4:
            info[1] = random.choice(
                ([], info[1] * 2, info[1][::-1], [1] * 8, [2**32] * 2, info[1] + [1], info[1] + [0])
            )
        case 5:
            info[2] = random.choice((*range(45), 2**31, 2**32 - 1))
        case _:
            info[3] = random.choice((*WIDE, info[3] + 1, info[3] + 32))
