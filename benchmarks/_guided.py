"""The process in which atheris mutates inputs, guided by what they reach in the decoders; started by fuzz.py.

libFuzzer, which does the work, ends the process when it is done, so what was counted goes into a file.

    python _guided.py messages|configurations CORPUS NUMBER SEED OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["parablock.wire", "parablock.config.load", "parablock.config.section"]):
    from parablock.config.load import load_config
    from parablock.errors import CodecError, ConfigError
    from parablock.wire.messages import from_bytes

from fuzz import Tally, sealed_anew


def main() -> None:
    what, corpus, number, seed, output = sys.argv[1:]
    place = Path(output).with_suffix(".yaml")

    def read_message(raw: bytes) -> None:
        # mutations hardly ever leave the checksum right: every other input gets a right one
        from_bytes(sealed_anew(raw) if tally.tried % 2 and len(raw) > 8 else raw)

    def read_configuration(raw: bytes) -> None:
        place.write_bytes(raw)
        load_config(place)

    tally = {
        "messages": Tally(read_message, CodecError),
        "configurations": Tally(read_configuration, ConfigError),
    }[what]

    def one(raw: bytes) -> None:
        tally.read(raw)
        if tally.tried == int(number):
            found = {**tally.result(), "kept_inputs": len(list(Path(corpus).iterdir()))}
            Path(output).write_text(json.dumps(found), encoding="utf-8")
            os._exit(0)

    atheris.Setup([sys.argv[0], corpus, f"-seed={int(seed) + 1}", "-max_len=4096", "-timeout=60"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
