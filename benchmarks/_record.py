"""What the benchmarks share: common options, real or generated material, bars, and a JSON record of a run.

A bar is a value that the project wants to reach. A benchmark says whether it did; it never fails for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import parablock
from parablock.config.keys import RunConfig
from parablock.demo.material import TEST_FILE_NAME, make_tiny_llama, make_word_problems
from parablock.experiment.progress import PlainProgress
from parablock.experiment.run import resume, run
from parablock.model.blocks import partition_blocks
from parablock.model.load import outline_model
from parablock.storage.run_directory import RunDirectory

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
RESULTS = REPOSITORY / "benchmarks" / "results"


@dataclass(frozen=True)
class Material:
    """A model and its texts: one training file a client, where the files are the clients."""

    model: str
    train: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Bar:
    """A value beside what it should be."""

    name: str
    value: float
    limit: float
    at_most: bool = True

    @property
    def is_met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        verdict, sign = ("met", "≤≥") if self.is_met else ("MISSED", "≤≥")
        return f"{self.name}: {self.value:.4g} ({sign[not self.at_most]} {self.limit:g}: {verdict})"


def make_parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    """Make a parser with the options that every benchmark of runs has."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"example: python benchmarks/{name}.py {example}".rstrip(),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", default=str(RESULTS / f"{name}.json"), help="the JSON record")
    parser.add_argument("--work-dir", default=str(REPOSITORY / "runs" / name), help="where the runs are kept")
    parser.add_argument("--smoke", action="store_true", help="smallest sizes, on a generated model and text")
    return parser


def t0(*families: str) -> Material:
    """Give the small pretrained model and the T0 families, all of them when none is named."""
    folder = SHARED / "data" / "t0"
    found = sorted(path.name.removesuffix(".train.jsonl") for path in folder.glob("*.train.jsonl"))
    return _real([f"t0/{family}" for family in families or found], ".train.jsonl", ".test.jsonl")


def gsm8k() -> Material:
    """Give the small pretrained model and GSM8K."""
    return _real(["gsm8k"], "/train.jsonl", "/test.jsonl")


@cache
def generated(folder: Path, *, num_clients: int, examples_per_client: int = 32) -> Material:
    """Make a tiny random model and word problems, once in a process."""
    train = make_word_problems(folder, num_clients=num_clients, examples_per_client=examples_per_client, seed=0)
    texts = [line for path in train[:8] for line in path.read_text(encoding="utf-8").splitlines()]
    model = make_tiny_llama(folder / "model", texts, seed=0)
    return Material(str(model), tuple(map(str, train)), (str(folder / TEST_FILE_NAME),))


def record(
    options: argparse.Namespace, results: Any, bars: Sequence[Bar], *, config: Any, console: Console
) -> None:
    """Say which bars are met, and write what was found, how and where."""
    for bar in bars:
        console.print(str(bar), style="green" if bar.is_met else "bold red")
    content = facts(options) | {
        "config": config,
        "bars": [asdict(bar) | {"is_met": bar.is_met} for bar in bars],
        "results": results,
    }
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(without_this_machine(json.dumps(content, indent=1)) + "\n", encoding="utf-8")
    console.print(f"written to {path}")


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """Tell what ran where."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "options": vars(options),
        "commit": commit(),
        "machine": {"platform": platform.platform(), "processor": processor(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def without_this_machine(text: str) -> str:
    """Write paths as seen from the repository, wherever it lies."""
    return text.replace(f"{REPOSITORY}/", "").replace(f"{REPOSITORY.parent}/", "../")


def commit() -> str:
    """Give the commit of the package that ran; `-dirty` when its files differ from it."""
    git = ["git", "-C", str(Path(parablock.__file__).parent)]
    head, changed = (
        subprocess.run([*git, *rest], capture_output=True, text=True, check=False).stdout.strip()
        for rest in (("rev-parse", "HEAD"), ("status", "--porcelain", "."))
    )
    return f"{head}{'-dirty' * bool(changed)}" or "unknown"


def processor() -> str:
    """Give the processor's name."""
    facts_file = Path("/proc/cpuinfo")
    lines = facts_file.read_text(encoding="utf-8").splitlines() if facts_file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def make_console() -> Console:
    """Make a console that does not squeeze tables into 80 columns where no terminal asks for it."""
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=120)


def fresh_folder(options: argparse.Namespace) -> Path:
    """Make a new folder for this benchmark's run directories, which stay there to be looked at."""
    work_dir = Path(options.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="", dir=work_dir))


def kept_run(config: RunConfig, work_dir: str, name: str) -> RunDirectory:
    """Give a complete run of this configuration: the one that is there, or one that is run or resumed now."""
    directory = place_of(config, work_dir, name)
    complete = directory.summary.exists() and directory.read_summary().get("status") == "completed"
    if not complete and directory.config.exists():
        resume(directory.path, progress=PlainProgress(console=Console(quiet=True)))
    elif not complete:
        run_quietly(config, directory.path)
    return directory


def ended_with(directory: RunDirectory, console: Console) -> dict[str, Any]:
    """Tell, and give, what a run ended with: what is kept of its summary, and where it lies."""
    summary = directory.read_summary()
    first, last = summary["initial_eval_loss"], summary["final_eval_loss"]
    console.print(f"{directory.path.name}: {first:.4f} → {last:.4f} in {summary['elapsed_s']:.0f} s")
    kept = (
        "delay",
        "num_rounds",
        "initial_eval_loss",
        "final_eval_loss",
        "uplink_bytes",
        "model_sha256",
        "elapsed_s",
    )
    return {key: summary[key] for key in kept} | {"directory": directory.path.name, "commit": commit_of(directory)}


def place_of(config: RunConfig, work_dir: str, name: str) -> RunDirectory:
    """Tell where a run of this configuration lies."""
    digest = hashlib.sha256(config.to_yaml().encode()).hexdigest()[:10]
    return RunDirectory(Path(work_dir) / f"{name}-{digest}")


def lengthened_run(config: RunConfig, shorter: RunDirectory, work_dir: str, name: str) -> RunDirectory:
    """Give a complete run of a configuration that goes on where the last checkpoint of a shorter run was.

    The two may differ in the number of rounds and in what does not change the model, and their learning rate must
    not depend on the number of rounds.
    """
    assert config.train.lr_scheduler_type == "constant" and not config.train.warmup_ratio
    directory = place_of(config, work_dir, name)
    if not directory.config.exists():
        directory.create(config.to_yaml(), shorter.read_manifest())
        shutil.copyfile(shorter.metrics, directory.metrics)
        shutil.copytree(shorter.checkpoints, directory.checkpoints, dirs_exist_ok=True)
    return kept_run(config, work_dir, name)


def curve_of(directory: RunDirectory, shorter: RunDirectory | None = None) -> list[list[float]]:
    """Read off [seconds, loss] of the committed model, at each round after which it was scored.

    A run that went on where a shorter one was had to make the exchange in flight again, so the rounds that both
    have count for what they took in the shorter one.
    """
    rows = metrics_of(directory)
    taken = [row["round_s"] for row in (metrics_of(shorter) if shorter else [])]
    seconds = accumulate(taken + [row["round_s"] for row in rows[len(taken) :]])
    return [[s, row["eval_loss"]] for s, row in zip(seconds, rows, strict=True) if row["eval_loss"] is not None]


def metrics_of(directory: RunDirectory) -> list[dict[str, Any]]:
    """Read the rounds of a run."""
    return [json.loads(line) for line in directory.metrics.read_text(encoding="utf-8").splitlines()]


def commit_of(directory: RunDirectory) -> str:
    """Give the commit of the package that made a run."""
    return str(json.loads(directory.manifest.read_text(encoding="utf-8"))["commit"])


def balanced_mbps(model: str, round_s: float) -> float:
    """Find the speed at which a block goes up and comes down in so many seconds."""
    blocks = partition_blocks(outline_model(model, dtype="float32"), layers_per_block=1)
    block_bytes = 4 * max(block.num_parameters for block in blocks)
    return 2 * (block_bytes + 600) * 8e-6 / round_s


def mean_and_deviation(values: Sequence[float], digits: int = 4) -> str:
    """Write a mean and, of several values, their standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def run_quietly(config: RunConfig, directory: Path) -> dict[str, Any]:
    """Run without a word and give the summary."""
    return run(config, directory, progress=PlainProgress(console=Console(quiet=True)))


def table(title: str, *columns: str) -> Table:
    """Make a table whose first column is text and whose others are numbers."""
    made = Table(title=title)
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    return made


def _real(stems: Sequence[str], train: str, test: str) -> Material:
    model, data = SHARED / "models" / "tiny-base", SHARED / "data"
    trains = tuple(str(data / f"{stem}{train}") for stem in stems)
    missing = [path for path in (str(model), *trains) if not Path(path).exists()]
    if missing or not stems:
        sys.exit(f"{', '.join(missing) or data} is missing; --smoke runs on a generated model and text")
    return Material(str(model), trains, tuple(str(data / f"{stem}{test}") for stem in stems))
