"""`parablock` where torch has a second device, `other`, on which the model lies as it does on a GPU.

python tests/support/other_device.py LIBRARY run CONFIG --output-dir FOLDER
"""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from parablock.cli.main import main
from parablock.model import device_copy
from parablock.model import pretrained as load


def build(folder: Path) -> Path:
    """Compile the device; needs a C++ compiler."""
    source, library = Path(__file__).with_suffix(".cpp"), folder / "other_device.so"
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    command = ["g++", "-shared", "-fPIC", "-std=c++20", "-w", *include, str(source), "-o", str(library), *link]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def make_known(library: str) -> None:
    """Make the device known to torch, and let models be loaded onto it."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend("other")
    module: Any = types.ModuleType("torch.other")
    module.is_available = module._is_in_bad_fork = lambda: False
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch._register_device_module("other", module)
    device_copy.PART = 1000  # several of them, also of a tiny block
    load._device = lambda _: torch.device("other")  # type: ignore[assignment]
    to = PreTrainedModel.to

    def to_and_tied(self: PreTrainedModel, *arguments: Any) -> PreTrainedModel:
        moved: PreTrainedModel = to(self, *arguments)
        moved.tie_weights()  # torch keeps ties where a model moves to a GPU, and not where it moves here
        return moved

    PreTrainedModel.to = to_and_tied  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    make_known(sys.argv.pop(1))
    main()
