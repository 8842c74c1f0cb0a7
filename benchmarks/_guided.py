"""The process in which atheris mutates inputs, guided by what they reach in the decoders; started by fuzz.py.

libFuzzer, which does the work, ends the process when it is done, so what was counted goes into a file.

    python _guided.py messages|configurations CORPUS NUMBER SEED OUTPUT
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["parablock.wire", "parablock.config", "parablock.section"]):
    from parablock.config import load_config
    from parablock.errors import CodecError, ConfigError
    from parablock.wire.messages import from_bytes

from fuzz import MIB, sealed_anew


def main() -> None:
    what, corpus, number, seed, output = sys.argv[1:]
    place = Path(output).with_suffix(".yaml")

    def read_message(raw: bytes) -> None:
        # mutations hardly ever leave the checksum right: every other input gets a right one
        from_bytes(sealed_anew(raw) if tried % 2 and len(raw) > 8 else raw)

    def read_configuration(raw: bytes) -> None:
        place.write_bytes(raw)
        load_config(place)

    read, own = {
        "messages": (read_message, CodecError),
        "configurations": (read_configuration, ConfigError),
    }[what]
    tried, slowest_s = 0, 0.0
    counts, foreign = Counter[str](), Counter[str]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def one(raw: bytes) -> None:
        nonlocal tried, slowest_s
        began = time.perf_counter()
        try:
            read(raw)
        except own:
            counts["refused"] += 1
        except Exception as error:
            foreign[repr(error)[:80]] += 1
        else:
            counts["read"] += 1
        slowest_s = max(slowest_s, time.perf_counter() - began)
        tried += 1
        if tried == int(number):
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            Path(output).write_text(
                json.dumps(
                    {
                        "tried": tried,
                        **counts,
                        "foreign": foreign.total(),
                        "examples": dict(foreign.most_common(5)),
                        "slowest_s": slowest_s,
                        "memory_growth_mib": grown / MIB,
                        "kept_inputs": len(list(Path(corpus).iterdir())),
                    }
                ),
                encoding="utf-8",
            )
            os._exit(0)

    atheris.Setup([sys.argv[0], corpus, f"-seed={int(seed) + 1}", "-max_len=4096", "-timeout=60"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
