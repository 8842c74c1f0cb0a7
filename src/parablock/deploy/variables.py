"""How the SuperLink's environment tells the ServerApp what to run. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path

CONFIG_VARIABLE, OUTPUT_VARIABLE = "PARABLOCK_CONFIG", "PARABLOCK_OUTPUT_DIR"


def failure_file(output_dir: Path) -> Path:
    """Give the file in which a run that cannot go on says why, beside its run directory."""
    return output_dir.with_name(f"{output_dir.name}.failure.json")


def stop_file(output_dir: Path) -> Path:
    """Give the file that asks a run to save and stop at the next round."""
    return output_dir / "stop"
