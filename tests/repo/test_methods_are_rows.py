"""No source file asks which method runs: it reads the method's traits in `config/methods.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from parablock.config.methods import METHODS

SOURCE = Path(__file__).resolve().parents[2] / "src" / "parablock"
ROWS = "config/methods.py"
NAMESAKES = (".mode", "['mode']", "__version__")
"""Ends of what means something else: the noise of `privacy.mode` is local or central, the package is parablock."""
WORDS = {"parablock", "local", "central"}
"""Names that are words with other meanings, so that a list of texts may hold them."""


def names_in(node: ast.AST) -> Iterator[str]:
    """Yield the method names that a text or a display of texts holds."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and inner.value in METHODS:
            yield inner.value


def asked_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, what) for every comparison, match case, key or constant that tells methods apart by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if not any(ast.unparse(side).endswith(NAMESAKES) for side in sides):
                yield from ((node.lineno, name) for side in sides for name in names_in(side))
        elif isinstance(node, ast.MatchValue):
            yield from ((node.lineno, name) for name in names_in(node.value))
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if (
                    isinstance(key, ast.Constant)
                    and key.value in METHODS
                    and not ast.unparse(value).endswith(NAMESAKES)
                ):
                    yield node.lineno, str(key.value)
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            yield from ((node.lineno, name) for name in names_in(node) if name not in WORDS)
        elif isinstance(node, ast.Name) and node.id.endswith("_METHODS"):
            yield node.lineno, node.id


def found_in(text: str) -> list[str]:
    return sorted({what for _, what in asked_of(ast.parse(text))})


def test_no_file_but_the_rows_tells_methods_apart_by_name() -> None:
    files = {path.relative_to(SOURCE).as_posix(): path for path in SOURCE.rglob("*.py")}
    assert found_in(files.pop(ROWS).read_text()), "the rows are looked at by the same eyes"
    found = [
        f"{name}:{line}: {what}"
        for name, path in files.items()
        for line, what in asked_of(ast.parse(path.read_text()))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('stacks = config.federation.method == "flora"', ["flora"]),
        ('if "fedprox" != method: pass', ["fedprox"]),
        ('x = method in ("local", "central")', ["central", "local"]),
        ('x = method in (*OTHERS, "fedcybgd")', ["fedcybgd"]),
        ('match method:\n    case "fedit" | "ffa_lora": pass', ["fedit", "ffa_lora"]),
        ('KINDS = {"fedavg": 1}', ["fedavg"]),
        ('KINDS = {"parablock": "block", "local": "full"}', ["local", "parablock"]),
        ('KINDS = dict.fromkeys(["fedavg"])', ["fedavg"]),
        ("x = method in LORA_METHODS", ["LORA_METHODS"]),
        ('x = config.privacy.mode == "local"', []),
        ('x = privacy["mode"] == "central"', []),
        ('versions = {"parablock": __version__}', []),
        ('command = ["parablock", "deploy", "local"]', []),
        ('x = method == "gossip"', []),
        ('x = method.combines == "stack"', []),
        ('"""With flora the stack goes down."""', []),
    ],
)
def test_the_rule_finds_every_way_of_asking(text: str, found: list[str]) -> None:
    assert found_in(text) == found
