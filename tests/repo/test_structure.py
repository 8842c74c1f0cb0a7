"""The shape of the source tree: what import-linter and ruff cannot see.

Each rule is a function of a folder, so that beside every test of the real tree one breaks the rule on purpose.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "parablock"
MAX_LINES = 400
NAMES_THAT_SAY_NOTHING = {"util", "utils", "helper", "helpers", "misc", "common", "manager", "managers"}


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def too_long(folder: Path) -> list[str]:
    return [path.name for path in modules(folder) if len(path.read_text().splitlines()) > MAX_LINES]


def without_docstring(folder: Path) -> list[str]:
    return [str(path) for path in modules(folder) if not ast.get_docstring(ast.parse(path.read_text()))]


def badly_named(folder: Path) -> list[str]:
    inside = [path.relative_to(folder) for path in folder.rglob("*")]
    return [str(path) for path in inside if NAMES_THAT_SAY_NOTHING & set(path.stem.lower().split("_"))]


def imported_packages(path: Path) -> Iterator[str]:
    """Yield the top-level package of every absolute import, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


def importers(folder: Path, package: str) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in modules(folder) if package in imported_packages(path)]


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_source_tree_is_where_these_tests_look() -> None:
    assert len(modules(SOURCE)) > 10


def test_no_module_is_longer_than_a_reader_can_hold() -> None:
    assert too_long(SOURCE) == []


@pytest.mark.parametrize(("lines", "found"), [(MAX_LINES, []), (MAX_LINES + 1, ["long.py"])])
def test_the_length_rule_counts_to_its_limit(tmp_path: Path, lines: int, found: list[str]) -> None:
    write(tmp_path, "room/long.py", "x = 1\n" * lines)
    assert too_long(tmp_path) == found


def test_every_module_says_what_it_is_for() -> None:
    assert without_docstring(SOURCE) == []


def test_a_module_that_starts_with_code_has_no_docstring(tmp_path: Path) -> None:
    write(tmp_path, "silent.py", 'x = 1\n"""Too late."""\n')
    write(tmp_path, "spoken.py", '"""In time."""\nx = 1\n')
    assert without_docstring(tmp_path) == [str(tmp_path / "silent.py")]


def test_no_file_or_folder_has_a_name_that_says_nothing() -> None:
    assert badly_named(SOURCE) == []


def test_the_name_rule_sees_files_folders_and_compound_names(tmp_path: Path) -> None:
    for name in ("utils.py", "helpers/load.py", "tensor_utils.py", "loader.py", "communication.py"):
        write(tmp_path, name, "")
    assert sorted(badly_named(tmp_path)) == ["helpers", "tensor_utils.py", "utils.py"]


def test_flower_is_imported_in_its_own_folder_alone() -> None:
    assert [path for path in importers(SOURCE, "flwr") if not path.startswith("engine/flower/")] == []


def test_the_import_rule_sees_every_form_and_no_namesake(tmp_path: Path) -> None:
    write(tmp_path, "plain.py", "import flwr\n")
    write(tmp_path, "inner.py", "def f():\n    from flwr.app import Context\n    return Context\n")
    write(tmp_path, "namesake.py", "import flwr_datasets\nfrom . import flwr\nfrom .flwr import x\n")
    write(tmp_path, "engine/flower/app.py", "import flwr.serverapp as s\n")
    assert importers(tmp_path, "flwr") == ["engine/flower/app.py", "inner.py", "plain.py"]
