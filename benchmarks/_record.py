"""What the benchmarks share: subcommands, material, runs that are kept, bars, records, sections.

A bar is a value that the project wants to reach; a benchmark says whether it did, and never fails for it. A record
is a JSON file with what was found, how and where, and with its section of docs/results.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial, reduce
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import parablock
from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.demo.material import TEST_FILE_NAME, make_tiny_llama, make_word_problems
from parablock.experiment.progress import PlainProgress
from parablock.experiment.run import resume, run
from parablock.model.blocks import partition_blocks
from parablock.model.pretrained import outline_model
from parablock.storage.run_directory import RunDirectory

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
RESULTS = REPOSITORY / "benchmarks" / "results"
sys.path.append(str(REPOSITORY / "tests" / "support"))
"""Benchmarks use toys, messages of each kind, the clients of masked sums and the slow proxy that tests have too."""

QUIET = PlainProgress(console=Console(quiet=True))

Found = dict[str, Any]
Options = argparse.Namespace

ABOUT: Found = tomllib.loads((REPOSITORY / "benchmarks" / "benchmarks.toml").read_text(encoding="utf-8"))
"""What `benchmarks.toml` says of every subcommand."""


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


# -- subcommands
@dataclass(frozen=True)
class Benchmark:
    """A subcommand: what measures, what makes the section of a record, an example, the defaults of its options."""

    name: str
    measure: Callable[[Options], None]
    section: Callable[[Found], Found]
    example: str
    options: Mapping[str, Any]


def benchmarks(names: Mapping[str, Any], **options: Found) -> list[Benchmark]:
    """Make the subcommands of a file; a section is made by `NAME_section`, or is a table of the results."""

    def of_rows(name: str, found: Found) -> Found:
        where, columns = ABOUT[name].get("rows"), ABOUT[name]["columns"]
        return section(name, found, table_of(found["results"][where] if where else found["results"], columns))

    made = []
    for name, said in ABOUT.items():
        if "example" in said and callable(measure := names.get(name)):
            makes_section = names.get(f"{name}_section", partial(of_rows, name))
            defaults = said["options"] | options.get(name, {})
            made.append(Benchmark(name, measure, makes_section, said["example"], defaults))
    return made


def main(description: str | None, benchmarks: Sequence[Benchmark]) -> None:
    options = make_parser(description, benchmarks).parse_args()
    chosen = next(each for each in benchmarks if each.name == options.benchmark)
    if options.smoke:
        options = make_parser(description, benchmarks, smoke=True).parse_args()
    options.section = chosen.section
    if options.section_only:
        found = json.loads(Path(options.output).read_text(encoding="utf-8"))
        write(Path(options.output), found | {"section": chosen.section(found)})
    else:
        chosen.measure(options)


def make_parser(
    description: str | None, benchmarks: Sequence[Benchmark], *, smoke: bool = False
) -> argparse.ArgumentParser:
    """Make a parser with a subcommand for each benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = " ".join(each.name for each in benchmarks)
    parser.add_argument("--names", action="version", version=names, help="list the benchmarks")
    subcommands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for each in benchmarks:
        example = f"example: python benchmarks/{Path(sys.argv[0]).name} {each.name} {each.example}"
        said = each.measure.__doc__
        made = subcommands.add_parser(each.name, help=said, description=said, epilog=example)
        for name, default in each.options.items():
            first = (default or [0.0])[0] if isinstance(default, list) else default
            how: Found = {"action": "store_true"} if default is False else {"type": type(first)}
            if isinstance(default, list):
                how |= {"nargs": "*", "choices": default if isinstance(first, str) else None}
            shown = f"default: {default}".replace("%", "%%")
            made.add_argument(f"--{name.replace('_', '-')}", default=default, help=shown, **how)
        made.add_argument("--output", default=str(RESULTS / f"{each.name}.json"), help="the JSON record")
        made.add_argument("--work-dir", default=str(REPOSITORY / "runs" / each.name), help="keeps the runs")
        made.add_argument("--smoke", action="store_true", help="smallest sizes, on a generated model and text")
        made.add_argument("--section-only", action="store_true", help="measure nothing; renew the record's section")
        made.set_defaults(**(ABOUT[each.name]["smoke"] if smoke else {}))
    return parser


# -- records and their sections
def record(options: Options, results: Any, bars: Sequence[Bar], config: Any = None) -> None:
    """Show the section of what was found, say which bars are met, and write what was found, how and where."""
    content = facts(options) | {
        "config": config.model_dump(mode="json") if isinstance(config, RunConfig) else config,
        "bars": [asdict(bar) | {"is_met": bar.is_met} for bar in bars],
        "results": results,
    }
    text = json.dumps(content).replace(f"{REPOSITORY}/", "").replace(f"{REPOSITORY.parent}/", "../")
    content = json.loads(text)
    made = options.section(content)
    for part in made["parts"]:
        is_table = not isinstance(part, str) and "columns" in part
        lines = [" | ".join(line) for line in (part["columns"], *part["rows"])] if is_table else [str(part)[:400]]
        print(*lines, sep="\n")
    print(*bars, f"written to {options.output}", sep="\n")
    write(Path(options.output), content | {"section": made})


def write(path: Path, content: Found) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def section(name: str, found: Found, *parts: str | Found, more: str = "", **facts: Any) -> Found:
    """Make a section: title and text of `benchmarks.toml`, then paragraphs (`### ` for headings), tables, figures.

    The text begins with what is a toy: a section's own `toy`, or that of the model in the record's configuration.
    """
    title, text = (ABOUT[name][key].format(**found, **facts) for key in ("title", "text"))
    model = ((found.get("config") or {}).get("model") or {}).get("name_or_path", "")
    toys = (said for ending, said in ABOUT["toys"].items() if model.endswith(ending))
    all_parts = (ABOUT[name].get("toy", next(toys, "")) + text.removeprefix("\n") + more, *parts)
    return {"title": title, "parts": [part.strip() if isinstance(part, str) else part for part in all_parts]}


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Found:
    return {"columns": list(columns), "rows": [list(row) for row in rows]}


def table_of(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> Found:
    """Make a table of a section from rows, and from a template for the cells of each column."""
    return table(list(columns), ([template.format(**row) for template in columns.values()] for row in rows))


def spread(values: Iterable[float], digits: int = 4) -> str:
    """Write a mean and, of several values, their standard deviation."""
    values = list(values)
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def grouped(rows: Sequence[Found], key: str) -> dict[Any, list[Found]]:
    """Sort rows by what they have under a key."""
    groups: dict[Any, list[Found]] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return groups


def facts(options: Options) -> Found:
    told = {name: value for name, value in vars(options).items() if name not in ("section", "section_only")}
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    processor = names[0] if names else platform.processor()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "options": told,
        "commit": commit(),
        "machine": {"platform": platform.platform(), "processor": processor, "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **versions},
    }


def commit() -> str:
    """Return the commit of the package that ran; `-dirty` when its files differ from it."""
    git = ["git", "-C", str(Path(parablock.__file__).parent)]
    head, changed = (
        subprocess.run([*git, *rest], capture_output=True, text=True, check=False).stdout.strip()
        for rest in (("rev-parse", "HEAD"), ("status", "--porcelain", "."))
    )
    return f"{head}{'-dirty' * bool(changed)}" or "unknown"


# -- material
@dataclass(frozen=True)
class Material:
    """A model and its texts: one training file a client, where the files are the clients."""

    model: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def pretrained(*stems: str, train: str = ".train.jsonl", test: str = ".test.jsonl") -> Material:
    """Return the small pretrained model and these T0 families, all of them when none is named."""
    model, data = SHARED / "models" / "tiny-base", SHARED / "data"
    found = sorted(f"t0/{path.name.removesuffix(train)}" for path in (data / "t0").glob(f"*{train}"))
    trains = [str(data / f"{stem}{train}") for stem in stems or found]
    missing = [path for path in (str(model), *trains) if not Path(path).exists()]
    if missing or not trains:
        sys.exit(f"{', '.join(missing) or data} is missing; --smoke runs on a generated model and text")
    return Material(str(model), tuple(trains), tuple(path.removesuffix(train) + test for path in trains))


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
    if options.smoke:
        return generated(Path(options.work_dir).resolve() / "material", num_clients=num_clients)
    return pretrained(*(f"t0/{family}" for family in families))


# -- runs
KEYS = {"rounds": "federation.num_rounds", "steps": "train.num_local_steps", "max_length": "data.max_length"}
KEYS |= {"batch_size": "train.per_device_train_batch_size", "learning_rate": "train.learning_rate"}
KEYS |= {"max_examples": "evaluation.max_examples", "step_time_s": "engine.step_time_s", "seed": "seed"}
"""The keys that options of these names set."""


def configured(material: Material, settings: Mapping[str, Any]) -> RunConfig:
    """Make a configuration from dotted keys, by default one client a file and a virtual clock; None: left out."""
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
        if value is not None:
            reduce(lambda branch, each: branch.setdefault(each, {}), sections, tree)[name] = value
    return parse_config(tree)


def training(options: Options) -> Found:
    """Return the settings that `benchmarks.toml` has for this subcommand, and those of options that set a key."""
    of_options = {key: getattr(options, name) for name, key in KEYS.items() if hasattr(options, name)}
    return ABOUT[options.benchmark].get("settings", {}) | of_options


def link(mbps: float) -> Found:
    """Return the settings of a link that is as fast up as down."""
    return {"link.upload_mbps": mbps, "link.download_mbps": mbps}


def balanced_link(model: str, round_s: float) -> Found:
    """Return the settings of a link over which a block goes up and comes down in so many seconds."""
    blocks = partition_blocks(outline_model(model, dtype="float32"), layers_per_block=1)
    block_bytes = 4 * max(block.num_parameters for block in blocks)
    return link(2 * (block_bytes + 600) * 8e-6 / round_s)


def fresh_folder(options: Options) -> Path:
    """Make a new folder for this benchmark's run directories, which stay there to be looked at."""
    folder = Path(options.work_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="", dir=folder))


def run_quietly(config: RunConfig, directory: Path) -> Found:
    return run(config, directory, progress=QUIET)


def digest(text: str) -> str:
    """Return the part of a name by which what is kept for one configuration is told from that for another."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


class Kept:
    """A complete run of a configuration: one that is there, or one that is run or resumed now."""

    def __init__(self, config: RunConfig, options: Options, name: str) -> None:
        self.config = config
        self.directory = RunDirectory(Path(options.work_dir) / f"{name}-{digest(config.to_yaml())}")
        directory, self.name = self.directory, self.directory.path.name
        complete = directory.summary.exists() and directory.read_summary().get("status") == "completed"
        if not complete and directory.config.exists():
            resume(directory.path, progress=QUIET)
        elif not complete:
            run_quietly(config, directory.path)
        self.summary, self.rows = directory.read_summary(), metrics_of(directory.path)
        self.loss: float = self.summary["final_eval_loss"]
        seconds = accumulate(row["round_s"] for row in self.rows)
        moved = accumulate(row["uplink_bytes"] + row["downlink_bytes"] for row in self.rows)
        self.points = [
            {"round": row["round_index"] + 1, "bytes": num_bytes, "seconds": s, "loss": row["eval_loss"]}
            for row, num_bytes, s in zip(self.rows, moved, seconds, strict=True)
            if row["eval_loss"] is not None
        ]
        self.curve = [[point["seconds"], point["loss"]] for point in self.points]
        print(f"{self.name}: {self.summary['initial_eval_loss']:.4f} → {self.loss:.4f}")

    def told(self, *keys: str) -> Found:
        """Return parts of the summary, where the run lies, and the commit that made it."""
        made_by = str(json.loads(self.directory.manifest.read_text(encoding="utf-8"))["commit"])
        keys = (*keys, "initial_eval_loss", "final_eval_loss", "model_sha256", "elapsed_s")
        return {key: self.summary[key] for key in keys} | {"directory": self.name, "commit": made_by}


def metrics_of(directory: Path) -> list[Found]:
    return [json.loads(line) for line in RunDirectory(directory).metrics.read_text(encoding="utf-8").splitlines()]
