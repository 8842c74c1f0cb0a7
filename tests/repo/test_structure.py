"""The shape of the source tree: what import-linter and ruff cannot see.

Each rule is a function of a folder, so that beside every test of the real tree one breaks the rule on purpose.
"""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parablock.engine.client import Client
from parablock.engine.inprocess import run_in_process
from parablock.engine.server import Server

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "parablock"
MAX_LINES = 400
MAX_LAYERS = 12
TOP = {"__init__", "__main__", "errors", "seeding", "clock", "trace", "hub", "printable", "compare"}
NAMES_THAT_SAY_NOTHING = {"util", "utils", "helper", "helpers", "misc", "common", "manager", "managers"}


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def too_long(folder: Path) -> list[str]:
    return [path.name for path in modules(folder) if len(path.read_text().splitlines()) > MAX_LINES]


def speakers(folder: Path) -> list[str]:
    """List files that write to the terminal by themselves, past `say` and `SafeConsole` of cli/output.py."""
    speaks = {"print", "typer.echo", "typer.secho", "click.echo", "Console", "sys.stdout.write", "sys.stderr.write"}
    found = []
    for path in modules(folder):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        aloud = [call for call in calls if "quiet=True" not in map(ast.unparse, call.keywords)]
        if path.name != "output.py" and any(ast.unparse(call.func) in speaks for call in aloud):
            found.append(path.name)
    return found


def without_docstring(folder: Path) -> list[str]:
    return [str(path) for path in modules(folder) if not ast.get_docstring(ast.parse(path.read_text()))]


def badly_named(folder: Path) -> list[str]:
    inside = [path.relative_to(folder) for path in folder.rglob("*")]
    return [str(path) for path in inside if NAMES_THAT_SAY_NOTHING & set(path.stem.lower().split("_"))]


def imported_packages(path: Path) -> Iterator[str]:
    """Yield the top-level package of every absolute import, also inside functions and by `import_module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield ast.unparse(node.args[0]).strip("'").split(".")[0]
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


def importers(folder: Path, package: str) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in modules(folder) if package in imported_packages(path)]


def names_that_stand_twice(folder: Path) -> set[str]:
    """Return file names and names of public classes that are not unique in the tree."""
    names = Counter(path.name for path in modules(folder) if path.name != "__init__.py")
    for path in modules(folder):
        tree = ast.parse(path.read_text())
        names.update(n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name[0] != "_")
    return {name for name, count in names.items() if count > 1}


def without_a_source(tests: Path, folder: Path) -> list[str]:
    """List files of unit tests that test no file of the same room."""
    tested = {path.relative_to(folder).with_name(f"test_{path.stem.strip('_')}.py") for path in modules(folder)}
    found = {path.relative_to(tests) for path in tests.rglob("test_*.py")}
    return sorted(path.as_posix() for path in found - tested)


def unnamed_in_their_room(folder: Path) -> list[str]:
    """List files that the first docstring of their room does not name."""
    rooms = {
        path.parent: ast.get_docstring(ast.parse(path.read_text())) or ""
        for path in [*folder.glob("*/__init__.py"), *folder.glob("*/*/__init__.py")]
    }
    return sorted(
        f"{room.name}/{path.name}"
        for room, told in rooms.items()
        for path in room.glob("*.py")
        if path.stem != "__init__" and not re.search(rf"\b{path.stem}\b  ", told)
    )


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_source_tree_is_where_these_tests_look():
    assert len(modules(SOURCE)) > 10


def test_no_module_is_longer_than_a_reader_can_hold():
    assert too_long(SOURCE) == []


@pytest.mark.parametrize(("lines", "found"), [(MAX_LINES, []), (MAX_LINES + 1, ["long.py"])])
def test_the_length_rule_counts_to_its_limit(tmp_path: Path, lines: int, found: list[str]):
    write(tmp_path, "room/long.py", "x = 1\n" * lines)
    assert too_long(tmp_path) == found


def test_all_that_is_said_goes_through_one_place():
    assert speakers(SOURCE) == []


def test_the_rule_of_what_is_said_sees_each_way_past_it(tmp_path: Path):
    ways = ["print(1)", "typer.echo(1)", "Console()", "sys.stderr.write(1)"]
    for number, way in enumerate(ways):
        write(tmp_path, f"loud_{number}.py", way)
    write(tmp_path, "quiet.py", "Console(quiet=True)\nconsole.print(1)\n")
    assert speakers(tmp_path) == [f"loud_{number}.py" for number in range(len(ways))]


def test_every_module_says_what_it_is_for():
    assert without_docstring(SOURCE) == []


def test_a_module_that_starts_with_code_has_no_docstring(tmp_path: Path):
    write(tmp_path, "silent.py", 'x = 1\n"""Too late."""\n')
    write(tmp_path, "spoken.py", '"""In time."""\nx = 1\n')
    assert without_docstring(tmp_path) == [str(tmp_path / "silent.py")]


def test_no_file_or_folder_has_a_name_that_says_nothing():
    assert badly_named(SOURCE) == []


def test_the_name_rule_sees_files_folders_and_compound_names(tmp_path: Path):
    for name in ("utils.py", "helpers/load.py", "tensor_utils.py", "loader.py", "communication.py"):
        write(tmp_path, name, "")
    assert sorted(badly_named(tmp_path)) == ["helpers", "tensor_utils.py", "utils.py"]


def test_only_what_everybody_shares_lies_outside_the_rooms():
    assert {path.stem for path in SOURCE.glob("*.py")} == TOP


def test_no_file_and_no_public_class_has_the_name_of_another():
    assert names_that_stand_twice(SOURCE) == set()


def test_the_rule_of_names_sees_files_and_classes_and_no_private_ones(tmp_path: Path):
    write(tmp_path, "a/run.py", "class Run: ...\nclass _Lane: ...\n")
    write(tmp_path, "b/run.py", "class Lane: ...\nclass _Lane: ...\n")
    write(tmp_path, "b/__init__.py", "")
    write(tmp_path, "a/__init__.py", "class Lane: ...\n")
    assert names_that_stand_twice(tmp_path) == {"run.py", "Lane"}


def without_init(folder: Path) -> list[str]:
    """List folders of source that are no package, which no rule of imports would see."""
    return sorted({path.parent.name for path in modules(folder) if not (path.parent / "__init__.py").exists()})


def test_every_folder_is_a_package(tmp_path: Path) -> None:
    assert without_init(SOURCE) == []
    write(tmp_path, "__init__.py", "")
    write(tmp_path, "tools/anything.py", "x = 1\n")
    assert without_init(tmp_path) == ["tools"]


PURE = {
    *(
        "__future__",
        "abc",
        "array",
        "bisect",
        "collections",
        "dataclasses",
        "functools",
        "itertools",
        "math",
        "numpy",
    ),
    *("parablock", "statistics", "torch", "typing"),
}
"""All that the arithmetic of the method may import."""


def impure(folder: Path) -> list[str]:
    """List imports beyond `PURE`, and files opened, in a folder."""
    found = []
    for path in modules(folder):
        tree = ast.parse(path.read_text())
        found += [f"{path.name}: {package}" for package in imported_packages(path) if package not in PURE]
        names = [
            ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute | ast.alias)
        ]
        found += [f"{path.name}: {name}" for name in names if name in ("open", "torch.distributed")]
    return found


def test_the_arithmetic_of_the_method_imports_arithmetic_alone(tmp_path: Path) -> None:
    assert impure(SOURCE / "algorithm") == []
    write(tmp_path, "mean.py", "import socket, torch.distributed\nfrom math import fsum\nopen('x')\n")
    assert impure(tmp_path) == ["mean.py: socket", "mean.py: torch.distributed", "mean.py: open"]


def test_every_room_says_what_each_of_its_files_is_for(tmp_path: Path) -> None:
    assert unnamed_in_their_room(SOURCE) == []
    write(tmp_path, "room/__init__.py", '"""A room.\n\ntold   a file\n"""')
    for name in ("told", "untold"):
        write(tmp_path, f"room/{name}.py", "")
    assert unnamed_in_their_room(tmp_path) == ["room/untold.py"]


def test_there_are_no_more_layers_than_a_reader_can_hold():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert 1 < len(layers) <= MAX_LAYERS
    named = {module for layer in layers for module in layer.replace("parablock.", "").split(" | ")}
    rooms = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert named == rooms | TOP - {"__init__"}, "every room has its place"


@pytest.mark.parametrize(("made", "limit"), [(Client, 9), (Server, 8), (run_in_process, 4)])
def test_what_an_engine_is_made_of_has_few_parameters(made: Callable[..., object], limit: int):
    assert len(inspect.signature(made).parameters) <= limit


def test_unit_tests_stand_in_the_room_of_what_they_test():
    assert without_a_source(ROOT / "tests" / "unit", SOURCE) == []


def test_a_unit_test_of_another_room_is_found(tmp_path: Path):
    for name in (
        "src/a/run.py",
        "src/__init__.py",
        *(f"tests/{n}.py" for n in ("a/test_run", "test_init", "test_run")),
    ):
        write(tmp_path, name, "")
    assert without_a_source(tmp_path / "tests", tmp_path / "src") == ["test_run.py"]


def strangers(package: str, room: str) -> list[str]:
    return [path for path in importers(SOURCE, package) if room not in Path(path).parent.parts]


def test_flower_is_imported_in_its_own_folder_alone():
    assert strangers("flwr", "flower") == []
    assert len(importers(SOURCE, "flwr")) > 1


def names_of_flower(folder: Path) -> set[str]:
    """Return the modules of Flower that are imported; what is not in this list may change in any release."""
    trees = [ast.parse(path.read_text()) for path in modules(folder)]
    found = [node.module or "" for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    found += [
        alias.name for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
    ]
    return {name for name in found if name.split(".")[0] == "flwr"}


def test_flower_is_used_by_its_public_names_alone(tmp_path: Path):
    assert names_of_flower(SOURCE) == {"flwr.app", "flwr.clientapp", "flwr.serverapp"}
    assert not [path for path in modules(SOURCE) if "FLWR_PRIVATE" in path.read_text()]
    write(tmp_path, "deep.py", "import flwr.supercore\nfrom flwr.superlink.grid import http_grid\n")
    assert names_of_flower(tmp_path) == {"flwr.supercore", "flwr.superlink.grid"}


def test_the_import_rule_sees_every_form_and_no_namesake(tmp_path: Path):
    write(tmp_path, "plain.py", "import flwr\n")
    write(tmp_path, "inner.py", "def f():\n    from flwr.app import Context\n    return Context\n")
    write(tmp_path, "called.py", "importlib.import_module('flwr.app')\n")
    write(tmp_path, "namesake.py", "import flwr_datasets\nfrom . import flwr\nfrom .flwr import x\n")
    write(tmp_path, "engine/flower/app.py", "import flwr.serverapp as s\n")
    assert importers(tmp_path, "flwr") == ["called.py", "engine/flower/app.py", "inner.py", "plain.py"]


def calls_in(folder: Path, pattern: str) -> set[str]:
    """Return the files of a folder with a line that matches."""
    return {path.name for path in folder.rglob("*.py") if re.search(pattern, path.read_text())}


def test_only_the_servers_port_and_the_metrics_accept_connections(tmp_path: Path):
    accepting = r"grpc\.server\(|create_server\(|start_http_server\(|\w*(HTTP|TCP|Socket)Server\(|\.listen\(\d*\)"
    assert calls_in(SOURCE, accepting) == {"listener.py", "metrics_endpoint.py"}
    assert 'addr="127.0.0.1"' in (SOURCE / "deploy" / "metrics_endpoint.py").read_text()
    (tmp_path / "other.py").write_text("server = socket.create_server(('', 80))")
    assert calls_in(tmp_path, accepting) == {"other.py"}


def test_nothing_is_pickled(tmp_path: Path):
    pickling = r"(?m)^\s*(import|from) (pickle|dill|cloudpickle|shelve|joblib)\b|torch\.(load|save)\(|_pickle=T"
    assert calls_in(SOURCE, pickling) == set()
    for number, line in enumerate(("import pickle", "    from dill import loads", "torch.load(path)")):
        (tmp_path / f"{number}.py").write_text(line)
    assert len(calls_in(tmp_path, pickling)) == 3
