"""A plan as text."""

from __future__ import annotations

import io

from rich.console import Console

from parablock.config.load import load_config
from parablock.plan.forecast import make_plan
from parablock.plan.view import show_plan
from tiny_runs import Workshop


def shown(workshop: Workshop, *overrides: str) -> str:
    config = load_config(workshop.config, overrides)
    written = io.StringIO()
    console = Console(width=100, file=written)
    for part in show_plan(make_plan(config), config):
        console.print(part, markup=False, soft_wrap=isinstance(part, str))
    return written.getvalue()


def test_the_text_is_short_and_says_what_to_do(workshop: Workshop) -> None:
    text = shown(workshop)
    assert len(text.splitlines()) < 60
    assert "layers.0 … layers.3" in text and "float32 (configured)" in text and "LoRA, r = 16" in text
    assert "6 rounds of 4 clients" in text and "Recommended: blocks.layers_per_block: 1" in text
    assert "wire.format: float32, as configured." in text
    assert "as configured." not in shown(workshop, "link.upload_mbps=1", "link.download_mbps=1")
    assert "Never trained" not in text
    assert "Never trained in 2 rounds: layers.2, layers.3" in shown(
        workshop, "federation.num_rounds=2", "blocks.schedule=cyclic"
    )


def test_blocks_of_another_size_have_a_line_of_their_own(workshop: Workshop) -> None:
    text = shown(workshop, "blocks.include_embeddings=true", "blocks.layers_per_block=3")
    for name in ("embeddings", "layers.0-2", "layers.3"):
        assert name in text
