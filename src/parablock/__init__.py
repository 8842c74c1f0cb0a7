"""ParaBlock: federated fine-tuning of LLMs by block coordinate descent in two parallel threads.

`from parablock import RunConfig, run, resume` is the interface for Python; the names are looked up when they
are first used, so that `import parablock` itself loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parablock.config.keys import RunConfig
    from parablock.config.load import load_config, parse_config
    from parablock.experiment.run import resume, run

__version__ = "0.1.0"

__all__ = ["RunConfig", "__version__", "load_config", "parse_config", "resume", "run"]

_HOMES = {
    "RunConfig": "parablock.config.load",
    "load_config": "parablock.config.load",
    "parse_config": "parablock.config.load",
    "resume": "parablock.experiment.run",
    "run": "parablock.experiment.run",
}

if not TYPE_CHECKING:  # a type checker would take this function to mean that every name exists

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
