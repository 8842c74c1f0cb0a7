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
"""Names that are words with other meanings, so that a text may be one; the others stand nowhere but in the rows."""
TEXT_METHODS = {"startswith", "endswith", "removeprefix", "removesuffix", "upper", "lower", "casefold", "find"}
"""Ways to look into a name."""


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
        elif isinstance(node, ast.Constant) and node.value in set(METHODS) - WORDS:
            yield node.lineno, str(node.value)
        elif isinstance(node, ast.Name) and node.id.endswith("_METHODS"):
            yield node.lineno, node.id
        elif isinstance(node, ast.Call) and is_look_into(node):
            yield node.lineno, ast.unparse(node.func)
        if isinstance(node, ast.Compare) and any(is_name(side) for side in node.comparators):
            yield from ((node.lineno, "in a name") for op in node.ops if isinstance(op, ast.In | ast.NotIn))
        if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith((".title", ".source", ".own_keys")):
            yield from ((node.lineno, ast.unparse(node.left)) for _ in [0] if "traits" in ast.unparse(node.left))


def is_name(node: ast.AST) -> bool:
    """Whether an expression is a method's name, as far as its own name tells."""
    return isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node).split(".")[-1] == "method"


def is_look_into(call: ast.Call) -> bool:
    """Whether a call looks into a method's name, or finds something by it."""
    if isinstance(call.func, ast.Attribute) and call.func.attr in TEXT_METHODS:
        return is_name(call.func.value)
    by_name = isinstance(call.func, ast.Name) and call.func.id in ("getattr", "globals", "isinstance")
    return by_name and any("method" in ast.unparse(a).split("_") or is_name(a) for a in call.args[1:])


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
        ('FLORA = "flora"', ["flora"]),
        ('def of(name="fedit"): ...', ["fedit"]),
        ('x = METHODS["flora"]', ["flora"]),
        ('x = method.startswith("fed")', ["method.startswith"]),
        ('x = config.federation.method.endswith("lora")', ["config.federation.method.endswith"]),
        ('x = "lora" in federation.method', ["in a name"]),
        ("x = getattr(self, method)", ["getattr"]),
        ('x = traits.title == "FLoRA"', ["traits.title"]),
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
