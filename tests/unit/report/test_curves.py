"""The picture of a comparison: every curve is told from every other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from made_runs import a_run
from parablock.report.curves import COLORS, curves_svg

SVG = "{http://www.w3.org/2000/svg}"
Look = tuple[str | None, str | None]


def looks(picture: str, tag: str) -> list[Look]:
    """List color and dashes of the lines of a kind, in order."""
    found = ElementTree.fromstring(picture).iter(f"{SVG}{tag}")
    return [(line.get("stroke"), line.get("stroke-dasharray")) for line in found]


@pytest.mark.parametrize("num_runs", [3, 25])
def test_no_two_curves_look_alike_and_the_legend_shows_them_as_they_are(tmp_path: Path, num_runs: int):
    run = a_run(tmp_path, num_rounds=4, num_clients=2)
    picture = curves_svg([replace(run, name=f"run {number}") for number in range(num_runs)])
    legend, curves = looks(picture, "line"), looks(picture, "polyline")
    assert len(set(legend)) == num_runs and curves == 3 * legend
    first = len(COLORS)
    assert all(dashes is None for _, dashes in legend[:first]), "few curves are whole lines"
    assert all(dashes is not None for _, dashes in legend[first:])
