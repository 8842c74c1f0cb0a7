"""`parablock compare`: run several methods on the same data, seed and link, and compare them in one report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from statistics import fmean
from typing import Any

from parablock.config.keys import RunConfig
from parablock.config.load import flatten, load_config, parse_config, tree_of_method
from parablock.config.methods import METHODS
from parablock.errors import ConfigError, StoppedByUserError, StorageError
from parablock.evaluation.side_by_side import check_task, score_models
from parablock.experiment.progress import Progress
from parablock.experiment.recorder import Summary
from parablock.experiment.run import resume, run
from parablock.plan.scenario import Scenario
from parablock.report.curves import curves_svg
from parablock.report.reading import LEAST_COMMUNICATION, read_runs
from parablock.report.tables import Table, spread, to_markdown
from parablock.report.write import write_report
from parablock.storage import FIGURES_NAME, PLAN_NAME
from parablock.storage.files import storage, write_atomically
from parablock.storage.run_directory import RunDirectory
from parablock.training.memory import WAYS, memory_per_client

SCORED_TASKS = ("exact_match", "rouge_l", "multiple_choice")
NO_LINK = (
    "note: no link speed is given, so communication takes no time, and the times of the methods tell what else "
    "this machine did; give link, and engine.clock: virtual"
)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison: its folder and its whole configuration."""

    name: str
    config: RunConfig


def plan_comparison(
    config: RunConfig, methods: Sequence[str], seeds: str = "", particular: Sequence[str] = (), delays: str = ""
) -> list[PlannedRun]:
    """Make the configuration of every method, delay and seed, before any of them runs.

    Without `delays`, the configured method keeps its delay, and the others have their own default. The section
    `blocks` holds for the methods that train blocks.

    Args:
        config: The settings that all have in common.
        methods: Their names.
        seeds: Comma-separated; empty for the configured seed.
        particular: `method:key=value` settings of one method, such as `fedit:train.learning_rate=0.003`.
        delays: Comma-separated; every method that may lag runs with each of them, the others once, with 0.

    Raises:
        ConfigError: A method is unknown, not built or named twice, a seed or a delay is not a number, or a setting
            is for a method that is not compared.
    """
    names = [name.strip() for name in methods if name.strip()]
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        problem = f"there is no method {', '.join(unknown)}; there are {', '.join(METHODS)}"
        raise ConfigError([problem], source="--methods")
    if not names or len(set(names)) < len(names):
        raise ConfigError([f"{', '.join(names) or 'nothing'}: give each method once"], source="--methods")
    numbers, all_delays = _numbers(seeds, "--seeds") or [config.seed], _numbers(delays, "--delays")
    own = _by_method(particular, names)
    planned = []
    for seed in numbers:
        for name in names:
            for delay in all_delays if all_delays and METHODS[name].may_lag else [_delay_of(name, config)]:
                tree = tree_of_method(config, name, delay, [f"seed={seed}", *own[name]])
                named = {"--methods": name, "--delays": delay, "--seeds": seed}
                for option, value in _named_by(tree).items():
                    if value != named[option]:
                        problem = f"{value!r} for {name}: runs are named by what {option} says, for every method"
                        raise ConfigError([problem], source="--for")
                folder = f"{name}-delay{delay}" if len(all_delays) > 1 else name
                folder = f"{folder}-seed{seed}" if len(numbers) > 1 else folder
                planned.append(PlannedRun(folder, parse_config(tree, source=f"method {name}")))
    return planned


def _named_by(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by which the runs of a comparison are named, by the option that sets them."""
    federation = tree["federation"] if isinstance(tree["federation"], Mapping) else {}
    return {"--methods": federation.get("method"), "--delays": federation.get("delay"), "--seeds": tree.get("seed")}


def _numbers(text: str, option: str) -> list[int]:
    """Read whole numbers, each once, separated by commas; none of an empty text."""
    try:
        numbers = [int(number) for number in text.split(",")] if text.strip() else []
    except ValueError:
        raise ConfigError([f"{text!r}: give whole numbers such as 0,1,2"], source=option) from None
    if len(set(numbers)) < len(numbers):
        raise ConfigError([f"{text}: give each number once"], source=option)
    return numbers


def _delay_of(name: str, config: RunConfig) -> int:
    """Return the delay of a method in a comparison that names none."""
    usual, configured = METHODS[name].delay, config.federation.delay
    return configured if name == config.federation.method else max(usual, configured) if usual else 0


def _by_method(particular: Sequence[str], methods: Sequence[str]) -> dict[str, list[str]]:
    """Sort `method:key=value` by method."""
    own: dict[str, list[str]] = {method: [] for method in methods}
    for entry in particular:
        method, colon, override = entry.partition(":")
        if not colon or method.strip() not in own:
            problem = f"{entry!r} is not method:key=value for one of {', '.join(methods)}"
            raise ConfigError([problem], source="--for")
        own[method.strip()].append(override)
    return own


def compare_methods(
    runs: Sequence[PlannedRun],
    output_dir: Path,
    *,
    progress: Progress,
    tasks: Sequence[str] = (),
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> list[Summary]:
    """Run one after the other, and write `compare.json`, `compare.md`, `compare.svg` and a report page.

    Args:
        runs: The runs that `plan_comparison` made.
        output_dir: A folder that holds no run, or what an earlier start of this comparison has left, perhaps with
            fewer runs; it goes on.
        progress: As in `run`.
        tasks: Some of `SCORED_TASKS`; they are scored on the test rows of the configuration.
        asked_to_stop: As in `run`.

    Raises:
        InputError: There is no such task, no file of test rows to score it on, or it lacks a package.
        StorageError: The folder holds a run or another comparison, or cannot be written.
        ParaBlockError: A run failed, or was stopped (`StoppedByUserError`); the finished ones stay.
    """
    _check_tasks(tasks, runs[0].config)
    directories = [RunDirectory(output_dir / planned.name) for planned in runs]
    memory = [predicted_memory_bytes(planned.config) for planned in runs]
    _begin(runs, output_dir, tasks, progress)
    common = runs[0].config
    if common.engine.clock == "real" and common.link.upload_mbps is None and common.link.download_mbps is None:
        progress.message(NO_LINK)
    summaries, base = list[Summary](), dict[str, float]()
    for planned, directory, num_bytes in zip(runs, directories, memory, strict=True):
        progress.message(f"── {planned.name} ──")
        summary = _summary_of(planned, directory, progress, asked_to_stop)
        if summary["status"] != "completed":
            raise StoppedByUserError(
                f"the comparison stopped in {planned.name}; {len(summaries)} of {len(runs)} runs are complete",
                remedy="Go on with the same command.",
            )
        models = sorted(directory.model.glob("client_*")) or [directory.model]
        asked = partial(
            _scores,
            config=load_config(directory.config),
            tasks=tasks,
            progress=progress,
            tokenizer_of=str(models[0]),
        )
        base = base or asked([planned.config.model.name_or_path])
        scored = {"initial_scores": base, "final_scores": asked([str(model) for model in models])}
        summaries.append({"name": planned.name, **summary, **scored, "predicted_memory_bytes": num_bytes})
    write_atomically(output_dir / FIGURES_NAME, json.dumps(summaries, indent=2) + "\n")
    write_atomically(output_dir / "compare.md", to_markdown(comparison_table(summaries)) + "\n")
    write_atomically(output_dir / "compare.svg", curves_svg(read_runs([entry.path for entry in directories])))
    write_report([output_dir])
    return summaries


def _begin(runs: Sequence[PlannedRun], output_dir: Path, tasks: Sequence[str], progress: Progress) -> None:
    """Write down what is compared, or see that it is what an earlier start has written down."""
    plan = {planned.name: planned.config.model_dump(mode="json") for planned in runs}
    configs = [planned.config for planned in runs]
    places = (p for each in configs for p in (each.model.name_or_path, *each.data.train, *each.data.test))
    sources = {place: _sha256(place) for place in dict.fromkeys(places)}
    written, begun = output_dir / PLAN_NAME, list[str]()
    if written.exists():
        with storage(written):
            before = _read(written.read_bytes())
        begun = [name for name in before["runs"] if RunDirectory(output_dir / name).config.exists()]
        if others := [name for name in begun if plan.get(name) != before["runs"][name]]:
            raise StorageError(
                f"{output_dir} holds another comparison, of which {', '.join(others)} has begun",
                cause=f"{PLAN_NAME} has settings for it that are not among those that are given now.",
                remedy="Choose another --output-dir. The same command goes on with it, and may name more methods.",
            )
        changed = [place for place, digest in sources.items() if before["sources"].get(place, digest) != digest]
        if begun and changed:
            raise StorageError(
                f"{changed[0]} is not what it was when the comparison in {output_dir} began",
                cause="Its runs would be of different data or models.",
                remedy="Put back what changed, or choose another --output-dir.",
            )
        if begun:  # runs that another start has planned stay
            plan, sources = before["runs"] | plan, before["sources"] | sources
            _tell_of_lost_scores(output_dir, tasks, progress)
    if not begun:
        RunDirectory(output_dir).check_unused()  # a run's own folder has a report already
    for planned in runs:
        if planned.name not in begun:
            RunDirectory(output_dir / planned.name).check_unused()
    with storage(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(written, json.dumps({"runs": plan, "sources": sources}, indent=2) + "\n")


def _tell_of_lost_scores(output_dir: Path, tasks: Sequence[str], progress: Progress) -> None:
    """Warn of scores of a comparison that is over, which a start without their tasks does not have."""
    figures = output_dir / FIGURES_NAME
    with suppress(OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged: it is written anew
        scored = {task for summary in json.loads(figures.read_bytes()) for task in summary.get("final_scores", ())}
        if lost := sorted(scored.difference(tasks)):
            progress.message(f"note: the scores of {', '.join(lost)} go, since --tasks does not name them")


def _read(content: bytes) -> dict[str, Any]:
    """Return what a file says of its comparison; nothing of one that is damaged."""
    try:
        found = json.loads(content)
        return {"runs": dict(found["runs"]), "sources": dict(found["sources"])}
    except (ValueError, LookupError, TypeError):
        return {"runs": {}, "sources": {}}


def _sha256(place: str) -> str:
    """Hash the files of a path or a pattern; "" of what is not on this machine."""
    path = Path(place).expanduser()
    if path.is_dir():
        found = list(path.rglob("*"))
    else:
        found = [path] if path.exists() else list(map(Path, glob(str(path), recursive=True)))  # noqa: PTH207
    files = sorted(file for file in found if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        with storage(file), file.open("rb") as content:
            digest.update(f"{file}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest() if files else ""


def _summary_of(
    planned: PlannedRun, directory: RunDirectory, progress: Progress, asked_to_stop: Callable[[], bool]
) -> Summary:
    """Do one run of a comparison, as far as it is not done."""
    if not directory.config.exists():
        return run(planned.config, directory.path, progress=progress, asked_to_stop=asked_to_stop)
    before, after = (
        flatten(config.model_dump(mode="json")) for config in (planned.config, load_config(directory.config))
    )
    open_or_path = (None, "auto", planned.config.model.name_or_path, before["data.train"], before["data.test"])
    if others := [key for key in after if after[key] != before[key] and before[key] not in open_or_path]:
        raise StorageError(
            f"the run in {directory.path} is not that of this comparison: {', '.join(others)} differ",
            remedy="Move it away, or choose another --output-dir.",
        )
    if directory.summary.exists() and directory.read_summary().get("status") == "completed":
        progress.message("is complete")
        return directory.read_summary()
    return resume(directory.path, progress=progress, asked_to_stop=asked_to_stop)


def comparison_table(summaries: Sequence[Summary]) -> Table:
    """Make the table of a comparison; the base model's scores come first.

    Where there are several seeds, the means and standard deviations of each method come last.
    """
    first = summaries[0]
    tasks = list(first["initial_scores"])
    base_scores = (f"{first['initial_scores'][task]:.3f}" for task in tasks)
    rows = [("base model", f"{first['initial_eval_loss']:.4f}", *base_scores, *[""] * 6)]
    rows += [_results(summary["name"], [summary], tasks) for summary in summaries]
    if len({summary["seed"] for summary in summaries}) > 1:
        groups: dict[str, list[Summary]] = {}
        for summary in summaries:
            groups.setdefault(summary["name"].rpartition("-seed")[0], []).append(summary)
        rows += [_results(f"{name}, {len(group)} seeds", group, tasks) for name, group in groups.items()]
    spent = ("time, s", "in turn, s", "hidden", "MB up", "MB down", "MB of memory, foretold")
    return Table(("run", "final eval loss", *tasks, *spent), tuple(rows))


def _results(label: str, group: Sequence[Summary], tasks: Sequence[str]) -> tuple[str, ...]:
    def mean(key: str) -> float:
        return fmean(summary[key] for summary in group)

    return (
        label,
        spread([summary["final_eval_loss"] for summary in group]),
        *(spread([summary["final_scores"][task] for summary in group], 3) for task in tasks),
        f"{mean('wall_time_s'):.1f}",
        f"{mean('sequential_s'):.1f}",
        # where next to nothing is sent, a share of it says nothing
        f"{mean('overlap_fraction'):.0%}"
        if mean("communication_s") >= LEAST_COMMUNICATION * mean("wall_time_s")
        else "–",
        *(f"{mean(key) / 1e6:.1f}" for key in ("uplink_bytes", "downlink_bytes", "predicted_memory_bytes")),
    )


def predicted_memory_bytes(config: RunConfig) -> int:
    """Return the memory of a client while it trains, counted from shapes; see `parablock plan`."""
    scenario = Scenario(config, probe=False)
    memory = memory_per_client(scenario.outline, scenario.partition(scenario.layers_per_block), config)
    return memory[WAYS[config.federation.traits.trains]].total


def _check_tasks(tasks: Sequence[str], config: RunConfig) -> None:
    unknown = [task for task in tasks if task not in SCORED_TASKS]
    if unknown:
        problem = f"there is no task {', '.join(unknown)}; there are {', '.join(SCORED_TASKS)}"
        raise ConfigError([problem], source="--tasks")
    if tasks and (not config.data.test or config.model.init == "random"):
        problem = "tasks are scored on the files of data.test, for a model that has weights; give both"
        raise ConfigError([problem], source="--tasks")
    for task in tasks:
        check_task(task)


def _scores(
    models: Sequence[str], *, config: RunConfig, tasks: Sequence[str], progress: Progress, tokenizer_of: str
) -> dict[str, float]:
    """Score models on the first test rows, as one tokenizer writes them; of several models the mean."""

    def score(task: str, model: str) -> float:
        (scored,) = score_models(
            model,
            config.data.test,
            task=task,
            max_examples=config.evaluation.max_examples,
            config=config,
            device=config.model.device,
            tokenizer_of=tokenizer_of,
            stage=progress.stage,
            on_done=progress.done,
        )
        return scored.value

    return {task: fmean(score(task, model) for model in models) for task in tasks}
