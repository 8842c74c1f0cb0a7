"""The project around the code: what its pages, build files and configurations say is true.

Each rule is a function of a text or a folder, so that beside every test of the real files one breaks the rule
on purpose.
"""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.deploy.site import SiteConfig
from parablock.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = set(RunConfig.model_fields)
BUILT = {"build", "_build", "dist", "runs", "__pycache__"}
HIDDEN_BUT_OURS = {".ci", ".github", ".gitignore", ".pre-commit-config.yaml"}
MACHINE_PATH = re.compile(r"(?<![\w./-])/(?:work|root|home/\w+|tmp/\w+_jobs)\b")


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# -- commands named in the pages ------------------------------------------------------------------------------


def fences(text: str) -> Iterator[tuple[str, str]]:
    """Yield (language, content) of every fenced block."""
    yield from re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every shell command in the fenced blocks of a page."""
    for language, content in fences(text):
        if language in {"", "sh", "bash", "shell", "console"}:
            for line in content.replace("\\\n", " ").splitlines():
                words = shlex.split(line.strip().removeprefix("$ "), comments=True)
                yield from split_words(words, {"&&", ";", "|", "||"})


def split_words(words: list[str], separators: set[str]) -> Iterator[list[str]]:
    command: list[str] = []
    for word in [*words, "&&"]:
        if word not in separators:
            command.append(word)
        elif command:
            yield command
            command = []


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))


def wrong_commands(text: str, targets: set[str], program: Any) -> list[str]:
    """List what the page's commands name and neither the Makefile nor the program has."""
    wrong = []
    for program_name, *arguments in commands(text):
        if program_name == "make":
            named = {word for word in arguments if not word.startswith("-") and "=" not in word}
            wrong += [f"make {word}" for word in sorted(named - targets)]
        elif Path(program_name).name == "parablock":
            wrong += [f"parablock {' '.join(arguments)}: {word}" for word in wrong_words(arguments, program)]
    return wrong


def wrong_words(arguments: list[str], program: Any) -> list[str]:
    """Walk down the command tree; return the first unknown command or all unknown options."""
    command, rest = program, list(arguments)
    while getattr(command, "commands", None) and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return [rest[0]]
        command = command.commands[rest.pop(0)]
    known = {"--help"}.union(*(parameter.opts for parameter in command.params))
    return [word for word in rest if word.startswith("--") and word.split("=")[0] not in known]


@pytest.fixture(scope="module")
def program() -> Any:
    from typer.main import get_command

    from parablock.cli.main import app

    return get_command(app)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_the_pages_name_only_commands_that_exist(page: Path, program: Any):
    targets = make_targets((ROOT / "Makefile").read_text())
    assert wrong_commands(page.read_text(), targets, program) == []


def test_a_command_that_does_not_exist_is_found(program: Any):
    page = "\n".join(
        [
            "`make prose` is not looked at",
            "```bash",
            "make setup fly PYTHON=python3.12  # make comment",
            "cd x && .venv/bin/parablock jump a.yaml",
            "parablock run a.yaml \\",
            "  --output-dir d --fast",
            "```",
            "```python",
            "make = nothing",
            "```",
        ]
    )
    found = wrong_commands(page, {"setup"}, program)
    assert found == [
        "make fly",
        "parablock jump a.yaml: jump",
        "parablock run a.yaml --output-dir d --fast: --fast",
    ]


def steps_of(script: str) -> list[str]:
    """List what a CI script runs, without comments and the lines that prepare the shell."""
    return [line for line in script.splitlines() if line and not line.startswith(("#", "set ", "cd "))]


def test_ci_runs_targets_and_nothing_else():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert steps_of(script.read_text()) == ["make browser proxies other-transformers check test test-flower"]


def test_a_step_that_is_no_target_is_seen():
    assert steps_of("#!/bin/sh\nset -e\ncd ..\nmake check test\npip list\n") == ["make check test", "pip list"]


# -- links ----------------------------------------------------------------------------------------------------


def broken_links(text: str, folder: Path) -> list[str]:
    """List relative links and pictures that lead nowhere, seen from the folder of the page."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    local = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    return [target for target in local if not (folder / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_between_the_pages_lead_somewhere(page: Path):
    assert broken_links(page.read_text(), page.parent) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path):
    (tmp_path / "here.md").touch()
    text = '[a](here.md#part) [b](https://example.org) [c](gone.md) <img src="gone.svg"> [d](#below)'
    assert broken_links(text, tmp_path) == ["gone.md", "gone.svg"]


# -- version, pins --------------------------------------------------------------------------------------------


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def newest_version(changelog: str) -> str | None:
    """Return the version of the first heading that carries one."""
    match = re.search(r"^## \[(\d+\.\d+\.\d+)\]", changelog, flags=re.MULTILINE)
    return match.group(1) if match else None


def test_the_changelog_starts_with_the_version_that_is_built():
    assert newest_version((ROOT / "CHANGELOG.md").read_text()) == pyproject()["project"]["version"]


def test_the_newest_version_is_the_first_and_not_the_largest():
    assert newest_version("## [Unreleased]\n## [0.2.0] - x\n## [0.10.0] - y\n") == "0.2.0"
    assert newest_version("# Changelog\n") is None


def outside_venv(hooks: dict[str, Any]) -> list[str]:
    """List hooks that would bring their own version of a tool."""
    every = [(repo["repo"], hook) for repo in hooks["repos"] for hook in repo["hooks"]]
    return [hook["id"] for repo, hook in every if repo != "local" or not hook["entry"].startswith(".venv/bin/")]


def test_commit_hooks_use_the_tools_that_the_dev_extra_pins():
    assert outside_venv(yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())) == []
    pins = {requirement.split("==")[0] for requirement in dev_extra() if "==" in requirement}
    assert {"ruff", "mypy", "import-linter"} <= pins


def dev_extra() -> list[str]:
    return pyproject()["project"]["optional-dependencies"]["dev"]


def test_a_hook_with_its_own_version_is_found():
    foreign = {"repo": "https://example.org/ruff", "hooks": [{"id": "a", "entry": ".venv/bin/ruff"}]}
    local = {"repo": "local", "hooks": [{"id": "b", "entry": "ruff"}, {"id": "c", "entry": ".venv/bin/ruff"}]}
    assert outside_venv({"repos": [foreign, local]}) == ["a", "b"]


# -- configurations -------------------------------------------------------------------------------------------


def unknown_sections(text: str) -> list[str]:
    """List top-level keys of a configuration, or of a site's file, that are none; broken YAML raises."""
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        return ["not a mapping"]
    return sorted(set(content) - (set(SiteConfig.model_fields) if "client_id" in content else SECTIONS))


def configurations() -> list[tuple[str, str]]:
    """List (name, text) of the files in configs/ and of the examples in the pages."""
    files = [(page_id(path), path.read_text()) for path in sorted((ROOT / "configs").glob("*.yaml"))]
    blocks = [
        (page_id(page), content)
        for page in PAGES
        for kind, content in fences(page.read_text())
        if kind == "yaml"
        and not content.startswith("apiVersion:")  # of Kubernetes: tests/integration/test_deploy.py
    ]
    return files + blocks


@pytest.mark.parametrize(("name", "text"), configurations(), ids=lambda value: value[:40].split("\n")[0])
def test_configurations_have_known_sections(name: str, text: str):
    assert unknown_sections(text) == []


README = (ROOT / "README.md").read_text()


def test_the_configuration_of_the_readme_is_valid_as_it_stands():
    (example,) = (content for kind, content in fences(README) if kind == "yaml")
    assert parse_config(yaml.safe_load(example)).federation.num_rounds == 48
    with pytest.raises(ConfigError, match="num_rounds"):
        parse_config(yaml.safe_load(example.replace("num_rounds", "num_round")))


def test_an_unknown_section_is_found():
    assert unknown_sections("model: {}\nmodell: {}\nseed: 1") == ["modell"]
    assert unknown_sections("- model") == ["not a mapping"]
    with pytest.raises(yaml.YAMLError):
        unknown_sections("model: {")


# -- paths of one machine -------------------------------------------------------------------------------------


def our_files(folder: Path) -> Iterator[Path]:
    """Yield the files that people wrote: not hidden ones, caches, or output."""
    for path in sorted(folder.iterdir()):
        if path.name in BUILT or (path.name.startswith(".") and path.name not in HIDDEN_BUT_OURS):
            continue
        if path.is_dir():
            yield from our_files(path)
        else:
            yield path


def machine_paths(folder: Path) -> list[str]:
    """List files that name a folder of somebody's machine."""
    texts = ((path, path.read_bytes().decode(errors="replace")) for path in our_files(folder))
    return [path.relative_to(folder).as_posix() for path, text in texts if MACHINE_PATH.search(text)]


def test_no_file_names_a_folder_of_one_machine():
    assert machine_paths(ROOT) == []


def test_a_folder_of_one_machine_is_found_and_a_namesake_is_not(tmp_path: Path):
    for place in ("work", "root", "home/ann", "tmp/bash_jobs"):
        folder = tmp_path / place.replace("/", "_")
        folder.mkdir()
        (folder / "a.md").write_text(f"see /{place}/file")
        (folder / "b.md").write_text(f"see ../{place}, https://example.org/{place}, home{place}, {place}/x")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "c.md").write_text("/" + "work/x")
    assert machine_paths(tmp_path) == ["home_ann/a.md", "root/a.md", "tmp_bash_jobs/a.md", "work/a.md"]
