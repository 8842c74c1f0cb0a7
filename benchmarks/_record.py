"""What the benchmarks share: subcommands, real or generated material, runs that are kept, bars, records, sections.

A bar is a value that the project wants to reach. A benchmark says whether it did; it never fails for it. A record
is a JSON file with what was found, how and where, and with its section of docs/results.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

import parablock
from parablock.clock import Clock
from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.demo.material import TEST_FILE_NAME, make_tiny_llama, make_word_problems
from parablock.engine.contract import EngineInput, EngineResult
from parablock.engine.inprocess import run_in_process
from parablock.engine.plans import ClientPlan, Hooks, ServerPlan
from parablock.experiment.progress import PlainProgress
from parablock.experiment.run import resume, run
from parablock.model.blocks import partition_blocks
from parablock.model.load import outline_model
from parablock.storage.run_directory import RunDirectory
from parablock.trace import Trace
from parablock.training.trainer import Trained, Trainer
from parablock.wire.transport import Link

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
RESULTS = REPOSITORY / "benchmarks" / "results"

Found = dict[str, Any]
Options = argparse.Namespace


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
        verdict = "met" if self.is_met else "MISSED"
        return f"{self.name}: {self.value:.4g} ({'≤' if self.at_most else '≥'} {self.limit:g}: {verdict})"


# -- subcommands ----------------------------------------------------------------------------------------------

HELP = {
    "seed": "seed",
    "seeds": "seeds",
    "clients": "clients of a run",
    "rounds": "rounds of a run; at least one for each block",
    "steps": "local steps of a round, K",
    "batch_size": "examples of a step",
    "learning_rate": "of AdamW",
    "max_length": "tokens of an example",
    "max_examples": "held-out examples that the loss is of",
    "step_time_s": "simulated seconds of a local step",
    "mbps": "10^6 bit/s, each way",
    "repeats": "repeats",
}
"""What options that several benchmarks have are for."""


@dataclass(frozen=True)
class Benchmark:
    """A subcommand, which makes one kind of record.

    Attributes:
        name: Of the subcommand, and of the record unless `--output` says otherwise.
        about: What it measures.
        measure: Measures with the options, and calls `record`, more than once where it takes long.
        section: Makes the section of a record, from the record alone.
        options: By name, with `_` for `-`: a default whose help is in `HELP`, or (default, help), or (default,
            help, more arguments of `add_argument`). A list takes several values, False is a switch, and the type
            is that of the default.
        smoke: What `--smoke` has as defaults instead.
        example: Options of an example, for the help.
    """

    name: str
    about: str
    measure: Callable[[Options, Console], None]
    section: Callable[[Found], Found]
    options: Mapping[str, Any] = field(default_factory=dict)
    smoke: Mapping[str, Any] = field(default_factory=dict)
    example: str = ""


def benchmark(
    measure: Callable[[Options, Console], None], section: Callable[[Found], Found], *rest: Any
) -> Benchmark:
    """Make a subcommand whose name and help are those of the function that measures; the rest is as there."""
    about = (measure.__doc__ or "").partition("\n")[0].rstrip(".")
    return Benchmark(measure.__name__, about, measure, section, *rest)


def main(description: str | None, benchmarks: Sequence[Benchmark]) -> None:
    """Read the command line, and run the benchmark that it names."""
    options = make_parser(description, benchmarks).parse_args()
    benchmark = next(each for each in benchmarks if each.name == options.benchmark)
    if options.smoke:
        options = make_parser(description, benchmarks, smoke=True).parse_args()
    options.section = benchmark.section
    if options.section_only:
        path = Path(options.output)
        found = json.loads(path.read_text(encoding="utf-8"))
        write(path, found | {"section": benchmark.section(found)})
    else:
        benchmark.measure(options, make_console())


def make_parser(
    description: str | None, benchmarks: Sequence[Benchmark], *, smoke: bool = False
) -> argparse.ArgumentParser:
    """Make a parser with a subcommand for each benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = " ".join(each.name for each in benchmarks)
    parser.add_argument("--names", action="version", version=names, help="list the benchmarks")
    subcommands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for benchmark in benchmarks:
        made = subcommands.add_parser(
            benchmark.name,
            help=benchmark.about,
            description=benchmark.about,
            epilog=f"example: python benchmarks/{Path(sys.argv[0]).name} {benchmark.name} {benchmark.example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        for name, option in benchmark.options.items():
            default, said, *more = option if isinstance(option, tuple) else (option, HELP[name])
            flag, first = f"--{name.replace('_', '-')}", default[0] if isinstance(default, list) else default
            how: dict[str, Any] = {"type": type(first)} if first is not None else {}
            how |= {"nargs": "+"} if isinstance(default, list) else {}
            how = {"action": "store_true"} if default is False else how
            made.add_argument(flag, default=default, help=said, **(how | dict(*more)))
        made.add_argument("--output", default=str(RESULTS / f"{benchmark.name}.json"), help="the JSON record")
        made.add_argument("--work-dir", default=str(REPOSITORY / "runs" / benchmark.name), help="keeps the runs")
        made.add_argument("--smoke", action="store_true", help="smallest sizes, on a generated model and text")
        made.add_argument("--section-only", action="store_true", help="measure nothing; renew the record's section")
        made.set_defaults(**(benchmark.smoke if smoke else {}))
    return parser


# -- records and their sections -------------------------------------------------------------------------------


def record(options: Options, results: Any, bars: Sequence[Bar], *, config: Any, console: Console) -> None:
    """Show the section of what was found, say which bars are met, and write what was found, how and where."""
    content = facts(options) | {
        "config": config.model_dump(mode="json") if isinstance(config, RunConfig) else config,
        "bars": [asdict(bar) | {"is_met": bar.is_met} for bar in bars],
        "results": results,
    }
    content = json.loads(without_this_machine(json.dumps(content)))
    made = options.section(content)
    for part in made["parts"]:
        console.print(part if isinstance(part, str) else _shown(part), markup=False)
    for bar in bars:
        console.print(str(bar), style="green" if bar.is_met else "bold red")
    write(Path(options.output), content | {"section": made})
    console.print(f"written to {options.output}")


def write(path: Path, content: Found) -> None:
    """Write a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def section(title: str, *parts: str | Found) -> Found:
    """Make a section of docs/results.md from paragraphs in Markdown (`### ` for headings) and tables."""
    return {"title": title, "parts": [part.strip() if isinstance(part, str) else part for part in parts]}


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Found:
    """Make a table of a section."""
    return {"columns": list(columns), "rows": [list(row) for row in rows]}


def table_of(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> Found:
    """Make a table of a section from rows, and from a template for the cells of each column."""
    return table(list(columns), ([template.format(**row) for template in columns.values()] for row in rows))


def spread(values: Iterable[float], digits: int = 4) -> str:
    """Write a mean and, of several values, their standard deviation."""
    values = list(values)
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def facts(options: Options) -> Found:
    """Tell what ran where."""
    told = {name: value for name, value in vars(options).items() if name not in ("section", "section_only")}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "options": told,
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
    """Return the commit of the package that ran; `-dirty` when its files differ from it."""
    git = ["git", "-C", str(Path(parablock.__file__).parent)]
    head, changed = (
        subprocess.run([*git, *rest], capture_output=True, text=True, check=False).stdout.strip()
        for rest in (("rev-parse", "HEAD"), ("status", "--porcelain", "."))
    )
    return f"{head}{'-dirty' * bool(changed)}" or "unknown"


def processor() -> str:
    """Return the processor's name."""
    facts_file = Path("/proc/cpuinfo")
    lines = facts_file.read_text(encoding="utf-8").splitlines() if facts_file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def make_console() -> Console:
    """Make a console that does not squeeze tables into 80 columns where no terminal asks for it."""
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=120)


def _shown(part: Found) -> Table:
    shown = Table()
    for number, column in enumerate(part["columns"]):
        shown.add_column(column, justify="right" if number else "left")
    for row in part["rows"]:
        shown.add_row(*row)
    return shown


# -- material -------------------------------------------------------------------------------------------------


def t0(*families: str) -> Material:
    """Return the small pretrained model and the T0 families, all of them when none is named."""
    folder = SHARED / "data" / "t0"
    found = sorted(path.name.removesuffix(".train.jsonl") for path in folder.glob("*.train.jsonl"))
    return _real([f"t0/{family}" for family in families or found], ".train.jsonl", ".test.jsonl")


def gsm8k() -> Material:
    """Return the small pretrained model and GSM8K."""
    return _real(["gsm8k"], "/train.jsonl", "/test.jsonl")


@cache
def generated(
    folder: Path, *, num_clients: int, examples_per_client: int = 32, num_layers: int | None = None
) -> Material:
    """Make a tiny random model and word problems, once in a process."""
    train = make_word_problems(folder, num_clients=num_clients, examples_per_client=examples_per_client, seed=0)
    texts = [line for path in train[:8] for line in path.read_text(encoding="utf-8").splitlines()]
    layers = {} if num_layers is None else {"num_layers": num_layers}
    model = make_tiny_llama(folder / "model", texts, seed=0, **layers)
    return Material(str(model), tuple(map(str, train)), (str(folder / TEST_FILE_NAME),))


def material_of(options: Options, *families: str, num_clients: int = 2) -> Material:
    """Return T0, or what is generated in the work folder for a smoke test."""
    return (
        generated(Path(options.work_dir) / "material", num_clients=num_clients) if options.smoke else t0(*families)
    )


def _real(stems: Sequence[str], train: str, test: str) -> Material:
    model, data = SHARED / "models" / "tiny-base", SHARED / "data"
    trains = tuple(str(data / f"{stem}{train}") for stem in stems)
    missing = [path for path in (str(model), *trains) if not Path(path).exists()]
    if missing or not stems:
        sys.exit(f"{', '.join(missing) or data} is missing; --smoke runs on a generated model and text")
    return Material(str(model), trains, tuple(str(data / f"{stem}{test}") for stem in stems))


# -- runs -----------------------------------------------------------------------------------------------------


def configured(material: Material, settings: Mapping[str, Any]) -> RunConfig:
    """Make a configuration from dotted keys: one client a file, the virtual clock, one thread, no checkpoints, ….

    Args:
        material: The model and the texts.
        settings: Say what is not so; None: the default of the package.
    """
    usual = {
        "model.name_or_path": material.model,
        "data.train": material.train,
        "data.test": material.test,
        "data.partition.scheme": "by_file",
        "federation.num_clients": len(material.train),
        "engine.clock": "virtual",
        "engine.num_threads": 1,
        "checkpoint.every_rounds": 0,
    }
    tree: Found = {}
    for key, value in (usual | dict(settings)).items():
        *sections, name = key.split(".")
        branch = tree
        for each in sections:
            branch = branch.setdefault(each, {})
        if value is not None:
            branch[name] = value
    return parse_config(tree)


def training(options: Options) -> Found:
    """Return the settings, as `configured` wants them, that options of these names are about."""
    keys = {
        "rounds": "federation.num_rounds",
        "steps": "train.num_local_steps",
        "batch_size": "train.per_device_train_batch_size",
        "learning_rate": "train.learning_rate",
        "max_length": "data.max_length",
        "max_examples": "evaluation.max_examples",
        "step_time_s": "engine.step_time_s",
        "seed": "seed",
    }
    return {key: getattr(options, name) for name, key in keys.items() if hasattr(options, name)}


def link(mbps: float) -> Found:
    """Return the settings of a link that is as fast up as down."""
    return {"link.upload_mbps": mbps, "link.download_mbps": mbps}


def balanced_link(model: str, round_s: float) -> Found:
    """Return the settings of a link over which a block goes up and comes down in so many seconds."""
    blocks = partition_blocks(outline_model(model, dtype="float32"), layers_per_block=1)
    block_bytes = 4 * max(block.num_parameters for block in blocks)
    return link(2 * (block_bytes + 600) * 8e-6 / round_s)


class Idle:
    """A trainer whose steps take simulated time only.

    Args:
        step_time_s: Of a step.
        sends: Elements that it sends; None: those of the block.
    """

    num_examples = 1

    def __init__(self, step_time_s: float | None = None, sends: int | None = None) -> None:
        self.step_time_s, self._sends = step_time_s, sends

    def train(self, round_index: int, block_index: int, *rest: Any) -> Trained:
        block = rest[-1][block_index].float() if self._sends is None else torch.zeros(self._sends)
        return Trained(block + 0.001 * (1 + round_index), 1.0)

    def memory(self) -> dict[str, Tensor]:
        return {}

    def remember(self, memory: dict[str, Tensor]) -> None:
        assert not memory


def run_engine(
    params: Sequence[Tensor],
    trainers: Sequence[Trainer],
    plan: ServerPlan,
    clock: Clock,
    *,
    link: Link = Link(),  # noqa: B008  (it is frozen)
    in_flight: str = "aligned",
    on_commit: Callable[..., None] = lambda *_: None,
) -> EngineResult:
    """Run the engine of one process, without a run directory."""
    client, hooks = ClientPlan(in_flight, plan.form), Hooks(on_commit, lambda _: None)
    return run_in_process(EngineInput(plan, client, lambda: params, trainers, Trace(clock), hooks, link))


def fresh_folder(options: Options) -> Path:
    """Make a new folder for this benchmark's run directories, which stay there to be looked at."""
    work_dir = Path(options.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="", dir=work_dir))


def run_quietly(config: RunConfig, directory: Path) -> Found:
    """Run without a word and return the summary."""
    return run(config, directory, progress=PlainProgress(console=Console(quiet=True)))


def kept_run(config: RunConfig, work_dir: str, name: str, shorter: RunDirectory | None = None) -> RunDirectory:
    """Return a complete run of this configuration: the one that is there, or one that is run or resumed now.

    One that is lengthened goes on where the last checkpoint of a shorter run was. The two may differ in the number
    of rounds and in what does not change the model, and their learning rate must not depend on how many they are.
    """
    digest = hashlib.sha256(config.to_yaml().encode()).hexdigest()[:10]
    directory = RunDirectory(Path(work_dir) / f"{name}-{digest}")
    if shorter and not directory.config.exists():
        assert config.train.lr_scheduler_type == "constant" and not config.train.warmup_ratio
        directory.create(config.to_yaml(), shorter.read_manifest())
        shutil.copyfile(shorter.metrics, directory.metrics)
        shutil.copytree(shorter.checkpoints, directory.checkpoints, dirs_exist_ok=True)
    complete = directory.summary.exists() and directory.read_summary().get("status") == "completed"
    if not complete and directory.config.exists():
        resume(directory.path, progress=PlainProgress(console=Console(quiet=True)))
    elif not complete:
        run_quietly(config, directory.path)
    return directory


def ended_with(directory: RunDirectory, console: Console) -> Found:
    """Tell, and return, what a run ended with: what is kept of its summary, and where it lies."""
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


def curve_of(directory: RunDirectory, shorter: RunDirectory | None = None) -> list[list[float]]:
    """Read off [seconds, loss] of the committed model, at each round after which it was scored.

    A run that went on where a shorter one was had to make the exchange in flight again, so the rounds that both
    have count for what they took in the shorter one.
    """
    rows = metrics_of(directory)
    taken = [row["round_s"] for row in (metrics_of(shorter) if shorter else [])]
    seconds = accumulate(taken + [row["round_s"] for row in rows[len(taken) :]])
    return [[s, row["eval_loss"]] for s, row in zip(seconds, rows, strict=True) if row["eval_loss"] is not None]


def metrics_of(directory: RunDirectory) -> list[Found]:
    """Read the rounds of a run."""
    return [json.loads(line) for line in directory.metrics.read_text(encoding="utf-8").splitlines()]


def commit_of(directory: RunDirectory) -> str:
    """Return the commit of the package that made a run."""
    return str(json.loads(directory.manifest.read_text(encoding="utf-8"))["commit"])
