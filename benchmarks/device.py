"""The methods on a real LLM where a GPU is at hand: more rounds and seeds, no network, and an end in ten minutes.

It is llm.py's comparison with its own defaults. Begin it with a folder of the model, made beforehand by
`../shared/tools/make_smollm2.py`; a run that is begun within the minutes is finished, and the record names those
that were not begun.

    .venv/bin/python benchmarks/device.py device --model runs/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import time

import llm
import torch
from _record import Options, benchmarks, main


def device(options: Options) -> None:
    """Compare methods and delays on the GPU of this machine, or on a core where there is none."""
    llm.compare(options, time.monotonic() + 60 * options.minutes)


device_section = llm.llm_methods_section
BENCHMARKS = benchmarks(globals(), device={"only": llm.WAYS})

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(__doc__, BENCHMARKS)
