"""Mutated messages and configurations by the million: no errors but our own, no hang, no memory beyond their size.

Messages: valid ones of every kind and format with bytes flipped, cut, doubled, or with header fields replaced under
a right checksum. Configurations: valid YAML with lines, values and characters changed. Whatever is not refused must
be a message or a configuration; every other exception counts as foreign and is shown.

`--engine atheris` has the mutations chosen by what they reach in the code (`pip install atheris`), from the same
valid messages and configurations.

    .venv/bin/python benchmarks/fuzz.py
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import REPOSITORY, Bar, fresh_folder, make_console, make_parser, record, table

from parablock.config.load import load_config, parse_config
from parablock.errors import CodecError, ConfigError
from parablock.seeding import generator_for
from parablock.wire.codec import CHECKSUM, PREFIX
from parablock.wire.messages import (
    Chunk,
    Finish,
    Join,
    Mark,
    NewValue,
    RoundStart,
    Skip,
    Update,
    Welcome,
    from_bytes,
    to_bytes,
)
from parablock.wire.quantize import FORMATS, pack

VALUES = torch.linspace(-1, 1, 300)
WORDS: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    -(2**70),
    10**400,
    0.5,
    -1e308,
    "",
    "int4",
    "Update",
    [],
    {},
]
WORDS += [
    [1],
    [[]],
    [-1],
    [2**62],
    {"shape": [3]},
    [{"format": "int2", "shape": [10**9]}],
    float("nan"),
    float("inf"),
]
SCRAPS = [
    "",
    "{}",
    "[]",
    "null",
    "true",
    ".nan",
    "-1",
    "1e999",
    "0x",
    "2020-13-45",
    "!!bool x",
    "&a [*a]",
    "? [a]",
    "'",
]
MIB = 1 << 20
Random = np.random.Generator


def main() -> None:
    options = parse_options()
    console, place = make_console(), fresh_folder(options) / "run.yaml"
    if options.engine == "atheris":
        found = {
            "messages": guided("messages", valid_messages(), options.messages, options.seed, place.parent),
            "configurations": guided(
                "configurations", map(str.encode, valid_texts()), options.configs, options.seed, place.parent
            ),
        }
    else:
        found = {
            "messages": fuzz(mutated_messages(options), from_bytes, CodecError),
            "configurations": fuzz(
                mutated_texts(options), lambda text: read_configuration(text, place), ConfigError
            ),
        }
    foreign = sum(part["foreign"] for part in found.values())
    bars = [
        Bar("messages", found["messages"]["tried"], options.messages, at_most=False),
        Bar("configurations", found["configurations"]["tried"], options.configs, at_most=False),
        Bar("foreign exceptions", foreign, 0),
        Bar("slowest of all, seconds", max(part["slowest_s"] for part in found.values()), 5.0),
        Bar("growth of memory, MiB", max(part["memory_growth_mib"] for part in found.values()), 256),
    ]
    made = table("Fuzz", "", *found)
    for key in next(iter(found.values())):
        made.add_row(key, *(str(part[key]) for part in found.values()))
    console.print(made)
    record(options, found, bars, config={}, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("fuzz", "Mutated messages and configurations.", "--messages 100000 --seed 7")
    parser.add_argument("--messages", type=int, default=1_000_000, help="mutated messages")
    parser.add_argument("--configs", type=int, default=10_000, help="mutated configurations")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--engine", choices=("drawn", "atheris"), default="drawn", help="who chooses mutations")
    options = parser.parse_args()
    if options.smoke:
        options.messages, options.configs = 2000, 50
    return options


class Tally:
    """Reads inputs, and counts what came of them: read, refused with an error of ours, a foreign exception."""

    def __init__(self, read: Callable[[Any], object], own: type[Exception]) -> None:
        self._read, self._own = read, own
        self._counts, self._foreign, self._slowest_s = Counter[str](), Counter[str](), 0.0
        self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def tried(self) -> int:
        """How many inputs there were."""
        return self._counts.total() + self._foreign.total()

    def read(self, raw: Any) -> None:
        """Read one input."""
        began = time.perf_counter()
        try:
            self._read(raw)
        except self._own:
            self._counts["refused"] += 1
        except Exception as error:
            self._foreign[repr(error)[:80]] += 1
        else:
            self._counts["read"] += 1
        self._slowest_s = max(self._slowest_s, time.perf_counter() - began)

    def result(self) -> dict[str, Any]:
        """Give what was counted, the slowest input and how much the process has grown."""
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "tried": self.tried,
            **self._counts,
            "foreign": self._foreign.total(),
            "examples": dict(self._foreign.most_common(5)),
            "slowest_s": self._slowest_s,
            "memory_growth_mib": (after - self._before) / MIB,
        }


def fuzz(inputs: Iterator[Any], read: Callable[[Any], object], own: type[Exception]) -> dict[str, Any]:
    """Read every input; count what came of it."""
    tally = Tally(read, own)
    for raw in inputs:
        tally.read(raw)
    return tally.result()


def guided(what: str, valid: Iterator[bytes], number: int, seed: int, folder: Path) -> dict[str, Any]:
    """Let atheris choose so many mutations, in a process of its own; give what it counted."""
    if find_spec("atheris") is None:
        sys.exit("--engine atheris needs atheris, which is no part of the extras: pip install atheris")
    corpus, output = folder / what, folder / f"{what}.json"
    corpus.mkdir()
    for place, raw in enumerate(valid):
        (corpus / f"valid-{place}").write_bytes(raw)
    script = Path(__file__).with_name("_guided.py")
    arguments = [what, str(corpus), str(number), str(seed), str(output)]
    with output.with_suffix(".log").open("wb") as log:
        done = subprocess.run([sys.executable, str(script), *arguments], stdout=log, stderr=log, check=False)
    if done.returncode != 0:
        sys.exit(f"atheris ended with {done.returncode}:\n{output.with_suffix('.log').read_text()[-3000:]}")
    return json.loads(output.read_text(encoding="utf-8"))


def mutated_messages(options: argparse.Namespace) -> Iterator[bytes]:
    draw = generator_for(options.seed, "fuzz messages")
    seeds = list(valid_messages())
    mutations = (flipped, cut, doubled, spliced, lying, lying, lying_payload)
    for _ in range(options.messages):
        mutate = mutations[int(draw.integers(len(mutations)))]
        yield mutate(seeds[int(draw.integers(len(seeds)))], draw)


def valid_messages() -> Iterator[bytes]:
    for name in FORMATS:
        vector = pack(VALUES, name)
        news = (NewValue(1, 3, 0.5, "value", vector), NewValue(0, 2, 1.0, "difference", vector))
        yield to_bytes(Update(5, 2, 3, 120, 4, 1.25, 8, 0.5, 1, 3, vector))
        yield to_bytes(RoundStart(5, 2, 8, 40, 3, news))
        yield to_bytes(Finish(7, news))
        yield to_bytes(Chunk(2, 7, "value", vector))
    yield from map(to_bytes, (Mark(8, stop=True), Skip(4), Join((3, -1), (4, 5)), Welcome()))


def flipped(raw: bytes, draw: Random) -> bytes:
    changed = bytearray(raw)
    for place in draw.integers(len(raw), size=int(draw.integers(1, 5))):
        changed[place] ^= int(draw.integers(1, 256))
    return sealed_anew(bytes(changed)) if draw.random() < 0.5 else bytes(changed)


def cut(raw: bytes, draw: Random) -> bytes:
    return raw[: int(draw.integers(len(raw)))]


def doubled(raw: bytes, draw: Random) -> bytes:
    return raw + raw[: int(draw.integers(len(raw)))]


def spliced(raw: bytes, draw: Random) -> bytes:
    first, second = sorted(draw.integers(len(raw), size=2).tolist())
    return sealed_anew(raw[:first] + raw[second:] + draw.bytes(second - first))


def lying(raw: bytes, draw: Random) -> bytes:
    """Replace a field of the header, or add one."""
    header, payload = parts_of(raw)
    for _ in range(int(draw.integers(1, 4))):
        keys = [*header, "extra"]
        key, word = keys[int(draw.integers(len(keys)))], WORDS[int(draw.integers(len(WORDS)))]
        if isinstance(header.get(key), list) and header[key] and draw.random() < 0.5:
            header[key] = [*header[key][:-1], word]
        else:
            header[key] = word
    return sealed(json.dumps(header).encode(), payload)


def lying_payload(raw: bytes, draw: Random) -> bytes:
    """Keep the header; replace the payload by noise, of another length at times."""
    header, payload = parts_of(raw)
    size = len(payload) if draw.random() < 0.5 else int(draw.integers(0, 4000))
    return sealed(json.dumps(header).encode(), draw.bytes(size))


def parts_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<I", raw, 6)
    return json.loads(raw[PREFIX.size : PREFIX.size + length]), raw[PREFIX.size + length : -CHECKSUM.size]


def sealed(header: bytes, payload: bytes) -> bytes:
    body = PREFIX.pack(b"PBLK", 1, len(header), len(payload)) + header + payload
    return body + CHECKSUM.pack(zlib.crc32(body))


def sealed_anew(raw: bytes) -> bytes:
    body = raw[: -CHECKSUM.size]
    return body + CHECKSUM.pack(zlib.crc32(body))


def mutated_texts(options: argparse.Namespace) -> Iterator[str]:
    draw, texts = generator_for(options.seed, "fuzz configurations"), valid_texts()
    for _ in range(options.configs):
        lines = texts[int(draw.integers(len(texts)))].splitlines()
        for _ in range(int(draw.integers(1, 4))):
            change(lines, draw)
        yield "\n".join(lines)


def valid_texts() -> list[str]:
    whole = parse_config({"model": {"name_or_path": "m"}, "data": {"train": ["a.jsonl"]}}).to_yaml()
    return [whole, *(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "configs").glob("*.yaml")))]


def change(lines: list[str], draw: Random) -> None:
    """Change one line: its value, its characters, its place."""
    place, other = draw.integers(len(lines), size=2).tolist()
    line = lines[place]
    key, colon, _ = line.partition(":")
    match int(draw.integers(5)):
        case 0:
            lines[place] = f"{key}{colon} {SCRAPS[int(draw.integers(len(SCRAPS)))]}"
        case 1:
            lines[place], lines[other] = lines[other], line
        case 2:
            lines.insert(other, line)
        case 3:
            lines[place] = " " * int(draw.integers(6)) + line
        case _:
            middle = int(draw.integers(len(line) + 1))
            lines[place] = line[:middle] + chr(int(draw.integers(1, 0x2FF))) + line[middle:]


def read_configuration(text: str, path: Path) -> object:
    path.write_text(text, encoding="utf-8")
    return load_config(path)


if __name__ == "__main__":
    main()
