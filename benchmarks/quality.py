"""What overlap, methods, settings and few bits on the wire do to the loss, at equal rounds, seconds and bytes.

Runs are under the virtual clock, so losses, bytes and seconds are the same in every run. A run that is complete is
not run again and one that was stopped is resumed, as long as its configuration is the same; remove the work folder
to begin anew.

    .venv/bin/python benchmarks/quality.py rate
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate, pairwise, product
from math import inf, sqrt
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import torch
from _record import (
    HELP,
    Bar,
    Found,
    Idle,
    Material,
    Options,
    balanced_link,
    benchmark,
    configured,
    curve_of,
    ended_with,
    generated,
    gsm8k,
    kept_run,
    link,
    main,
    material_of,
    metrics_of,
    record,
    run_engine,
    section,
    spread,
    t0,
    table,
    training,
)
from rich.console import Console
from torch import Tensor

from parablock.algorithm.aggregate import ServerOptimizer
from parablock.algorithm.sequential import OracleProblem, Solve, run_sequential
from parablock.algorithm.stacking import Factors
from parablock.clock import VirtualClock
from parablock.config.keys import RunConfig
from parablock.config.load import overridden, parse_config
from parablock.config.methods import METHODS as ROWS
from parablock.demo.material import TEST_FILE_NAME, make_word_problems
from parablock.engine.update_form import StackedAdapters
from parablock.evaluation.choices import MAX_GROUP_CHOICES
from parablock.evaluation.side_by_side import score_models
from parablock.experiment.engines import server_plan, update_form
from parablock.experiment.inputs import read_inputs
from parablock.methods.blocks import trained_blocks
from parablock.methods.choose import make_method_model
from parablock.methods.flora import factors_of
from parablock.model.adapters import matrices_block
from parablock.model.blocks import Block
from parablock.model.load import load_model
from parablock.plan.forecast import make_plan
from parablock.report.reading import read_runs
from parablock.report.tables import ablation_table
from parablock.seeding import generator_for
from parablock.storage.run_directory import RunDirectory
from parablock.training.flops import FlopModel, Tokens
from parablock.training.step_time import ASSUMED_FLOPS
from parablock.wire.quantize import Encoding, pack
from parablock.wire.transport import Link

STEP_S = 0.25


def grouped(rows: Sequence[Found], *keys: str) -> dict[Any, list[Found]]:
    """Sort rows by what they have under some keys."""
    groups: dict[Any, list[Found]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys) if keys[1:] else row[keys[0]]].append(row)
    return groups


def balanced(material: Material, options: Options) -> Found:
    """Return the settings of runs in which an exchange takes as long as the computation of a round."""
    return (
        training(options) | balanced_link(material.model, STEP_S * options.steps) | {"engine.step_time_s": STEP_S}
    )


def first_time(curve: list[list[float]], loss: float) -> float | None:
    """Tell after how many seconds a run is first scored no worse than a loss."""
    return next((s for s, value in curve if value <= loss), None)


# -- a problem without a model: how fast the gradient vanishes, and what each knob does ------------------------

BLOCKS, SIZE, CLIENTS, EXAMPLES, BATCH, STEPS = 5, 8, 6, 60, 12, 2
REGULARISATION, CONSTANT_STEP = 0.1, 0.3
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""Of the 95% interval, by the number of seeds."""
VARIANTS: dict[str, Found] = {
    "FL-BCD": {"delay": 0},
    "ParaBlock": {"delay": 1},
    "naive": {"delay": 1, "in_flight": "none"},
    "correction off": {"delay": 1},
}


def gradient(a: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """∇f on some rows: log(1 + exp(−y a·x)) + λ Σ x² / (1 + x²)."""
    weights = -y * torch.sigmoid(-y * (a @ x)) / len(y)
    return a.T @ weights + 2 * REGULARISATION * x / (1 + x.square()).square()


def make_clients(seed: int, apart: float) -> tuple[Tensor, Tensor]:
    """Draw features (M × n × D) and labels ±1 (M × n).

    Each client's centre and rule for its labels are its own, `apart` from the common ones.
    """
    draw = generator_for(seed, "rate data")
    common, own = draw.normal(size=BLOCKS * SIZE), draw.normal(size=(CLIENTS, BLOCKS * SIZE))
    centres = draw.normal(size=(CLIENTS, 1, BLOCKS * SIZE))
    mixing = draw.normal(size=(BLOCKS * SIZE, BLOCKS * SIZE)) / sqrt(BLOCKS * SIZE)  # blocks act on each other
    features = (draw.normal(size=(CLIENTS, EXAMPLES, BLOCKS * SIZE)) + 0.5 * apart * centres) @ mixing
    scores = (features * (common + apart * own)[:, None]).sum(axis=2) + draw.normal(size=(CLIENTS, EXAMPLES))
    return torch.tensor(features).float(), torch.tensor(scores).sign().float()


@torch.no_grad()
def squared_norms(num_rounds: int, seed: int, step: float, **how: Any) -> list[float]:
    """Run the functions of the method alone, and return ‖∇f(x_t)‖² of each round, of all clients and rows.

    Args:
        num_rounds: T.
        seed: Of data, batches and start.
        step: Of the K stochastic gradient steps on a block.
        how: `apart`, `blocks`, `steps`, `corrected`, the `wire` that rounds updates, fields of `OracleProblem`.
    """
    features, labels = make_clients(seed, how.pop("apart", 1.0))
    num_steps, corrected, wire = how.pop("steps", STEPS), how.pop("corrected", True), how.pop("wire", None)
    drawn = torch.tensor(generator_for(seed, "rate start").normal(size=BLOCKS * SIZE)).float()
    start = list(drawn.chunk(how.pop("blocks", BLOCKS)))

    def solve(client_id: int, t: int, block: int, working: tuple[Tensor, ...]) -> Tensor:
        size = working[block].numel()
        x, part = torch.cat(working), slice(block * size, (block + 1) * size)
        draw = generator_for(seed, "rate batches", t, client_id)
        for rows in torch.from_numpy(draw.integers(EXAMPLES, size=(num_steps, BATCH))):
            x[part] -= step * gradient(features[client_id, rows], labels[client_id, rows], x)[part]
        return x[part].clone()

    how |= {"encode": rounded(wire)} if wire else {}
    problem = OracleProblem([EXAMPLES] * CLIENTS, num_rounds, seed=seed, **how)
    found = run_sequential(start, problem, solve if corrected else never_corrected(solve, start))
    a, y = features.flatten(0, 1), labels.flatten()
    return [float(gradient(a, y, torch.cat(params)).square().sum()) for params in found.trajectory]


def never_corrected(solve: Solve, start: Sequence[Tensor]) -> Solve:
    """Let every client train on from its own copies for ever."""
    kept = [list(start) for _ in range(CLIENTS)]

    def uncorrected(client_id: int, t: int, block: int, working: tuple[Tensor, ...]) -> Tensor:
        own = kept[client_id]
        trained = solve(client_id, t, block, tuple(own))
        delta, own[block] = trained - own[block], trained
        return working[block] + delta

    return uncorrected


def rounded(wire: Encoding) -> Callable[[Tensor, int, int, int], Tensor]:
    """Round updates as a client does, with or without carrying over what was kept back."""
    kept: dict[tuple[int, int], Tensor] = {}

    def encode(delta: Tensor, block: int, t: int, client_id: int) -> Tensor:
        wanted = delta + kept.get((client_id, block), 0.0) if wire.error_feedback else delta
        sent = pack(wanted, wire.format, wire.noise(t, client_id)).values.float()
        kept[client_id, block] = wanted - sent
        return sent

    return encode


def rate(options: Options, console: Console) -> None:
    """Fit the slope of the squared norm of the gradient against T, without a model; theory bounds it by −1/2.

    The norm is averaged over T rounds with a step ∝ 1/√T; the slope is that of its logarithm against log T.
    """
    found: Found = {}
    for name, how in VARIANTS.items():
        corrected = name != "correction off"
        means = [
            [fmean(squared_norms(T, seed, 4 / sqrt(T), corrected=corrected, **how)) for T in options.rounds]
            for seed in options.seeds
        ]
        slopes = [slope(options.rounds, row) for row in means]
        deviation = stdev(slopes) / sqrt(len(slopes)) if len(slopes) in STUDENT_T else 0.0
        found[name] = {"squared_gradient": means, "slopes": slopes, "slope": fmean(slopes)}
        found[name]["half_interval"] = STUDENT_T.get(len(slopes), 0.0) * deviation
    serial, overlapped = found["FL-BCD"]["slope"], found["ParaBlock"]["slope"]
    bars = [Bar("slope of FL-BCD", serial, -0.45), Bar("slope of ParaBlock", overlapped, -0.45)]
    bars.append(Bar("|slope of ParaBlock − slope of FL-BCD|", abs(overlapped - serial), 0.05))
    facts: Found = {"blocks": BLOCKS, "block_size": SIZE, "clients": CLIENTS, "examples": EXAMPLES, "batch": BATCH}
    facts |= {"local_steps": STEPS, "regularisation": REGULARISATION}
    record(options, found, bars, config={"variants": VARIANTS, "problem": facts}, console=console)


def slope(rounds: list[int], values: list[float]) -> float:
    """Fit log value = a + slope · log T."""
    x, y = (torch.tensor(numbers).double().log() for numbers in (rounds, values))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def rate_section(found: Found) -> Found:
    rounds, seeds = found["options"]["rounds"], len(found["options"]["seeds"])
    rows = [
        [name, f"{row['slope']:.3f} ± {row['half_interval']:.3f}", f"{last:.4g}"]
        for name, row in found["results"].items()
        for last in [fmean(values[-1] for values in row["squared_gradient"])]
    ]
    return section(
        "The same rate",
        f"""Logistic regression with a non-convex regulariser, on clients whose data differ: the squared norm of
the gradient, averaged over T rounds, for T from {rounds[0]} to {rounds[-1]} with a step ∝ 1/√T. The
slope is that of its logarithm against log T; ± is its 95% confidence interval over {seeds} seeds.
`naive` leaves updates in flight out of the working parameters; `correction off` never takes an
aggregate over.""",
        table(["variant", "slope", f"mean squared gradient at T = {rounds[-1]}"], rows),
    )


KNOBS: dict[str, dict[str, Found]] = {
    "delay": {str(delay): {"delays": [delay]} for delay in (0, 1, 2, 4)},
    "in_flight": {rule: {"in_flight": rule, "delays": [1]} for rule in ("aligned", "own", "none")},
    "local steps": {str(steps): {"steps": steps} for steps in (1, 2, 4, 8)},
    "block order": {name: {"schedule": name} for name in ("cyclic", "reversed", "shuffled", "random")},
    "number of blocks": {str(blocks): {"blocks": blocks} for blocks in (2, 5, 10)},
    "participation": {str(part): {"participation": part} for part in (1.0, 0.5, 0.25)},
    "how much clients differ": {str(apart): {"apart": apart} for apart in (0.0, 1.0, 3.0)},
    "server momentum": {
        str(beta): {"server_optimizer": ServerOptimizer("momentum", 1 - beta, beta)} for beta in (0.0, 0.5, 0.9)
    },
    "wire": {
        "float32": {},
        "int4": {"wire": Encoding("int4", "stochastic")},
        "int2": {"wire": Encoding("int2", "stochastic")},
        "int2, error feedback": {"wire": Encoding("int2", "stochastic", error_feedback=True)},
    },
}
"""Arguments of `squared_norms` at each place of each knob, and the delays that are run: both when left out."""


def ablations(options: Options, console: Console) -> None:
    """Turn one knob at a time, on the problem of the rate: the gradient in the last quarter of the rounds."""

    def squared_gradient(delay: int, seed: int, how: Found) -> float:
        values = squared_norms(options.rounds, seed, CONSTANT_STEP, **{"delay": delay} | how)
        return fmean(values[-options.rounds // 4 :])

    found: Found = {}
    for knob, place in ((knob, place) for knob, places in KNOBS.items() for place in places):
        how = dict(KNOBS[knob][place])
        delays = how.pop("delays", [0, 1])
        made = {str(delay): [squared_gradient(delay, seed, how) for seed in options.seeds] for delay in delays}
        found.setdefault(knob, {})[place] = made
    facts = {"step": CONSTANT_STEP, "blocks": BLOCKS, "local_steps": STEPS, "clients": CLIENTS}
    record(options, found, [], config=facts | {"rounds": options.rounds}, console=console)


def ablations_section(found: Found) -> Found:
    tables = []
    for knob, places in found["results"].items():
        delays = sorted({delay for values in places.values() for delay in values})
        rows = [[place, *(spread(v[d]) if d in v else "" for d in delays)] for place, v in places.items()]
        tables.append(table([knob, *(f"delay {delay}" for delay in delays)], rows))
    return section(
        "One knob at a time",
        f"""The problem of the rate, without a model: the squared norm of the gradient, averaged over the last
quarter of {found["options"]["rounds"]} rounds, with a constant step; {len(found["options"]["seeds"])} seeds.
Small is good.""",
        *tables,
    )


# -- ParaBlock (delay 1) beside FL-BCD (delay 0) on T0 and GSM8K ----------------------------------------------

DELAYS = (0, 1)
RIVALS = ("FL-BCD", "ParaBlock")
LONGER_ONE_IN, LONGER_ONE_IN_OF_A_DECAY = 4, 12
"""One round more for so many, in the run that tells how soon the loss is reached."""
SAME_S = 0.01
"""Seeds differ in the seconds of a round by what their headers have in digits; more than this is another round."""
ABOUT_T0 = (
    ("The same quality: T0", "Eight instruction families, one a client."),
    (
        "T0 again: how soon, and each family",
        "The seeds of the table above on one thread instead of two, which changes the losses by about 1e-5.",
    ),
    ("T0 for twice as long", "The longer the run, the less a round of lag weighs in its last loss."),
    (
        "T0 where the learning rate decays",
        "The learning rate decays to nothing over the rounds of a run (cosine), as is usual in fine-tuning, so "
        "that a run's last loss is that of a model that has settled.",
    ),
)


def quality(options: Options, console: Console) -> None:
    """Compare the last loss of delay 1 with that of delay 0 on T0 and GSM8K: how soon, and the right answers."""
    found: list[Found] = []
    for schedule, name, seed in product(options.schedules, options.only, options.seeds):
        found.append(rivals(name, schedule, seed, options, console))
        example = quality_config(name, schedule, DELAYS[1], seed, options)
        record(options, found, quality_bars(found), config=example, console=console)  # the rest may not be reached


def quality_config(
    name: str, schedule: str, delay: int, seed: int, options: Options, *, longer: bool = False
) -> RunConfig:
    num_clients = 2 if options.smoke else {"t0": 8, "gsm8k": 4}[name]
    material = gsm8k() if name == "gsm8k" and not options.smoke else material_of(options, num_clients=num_clients)
    one_in = LONGER_ONE_IN if options.lr_scheduler_type == "constant" else LONGER_ONE_IN_OF_A_DECAY
    settings = {
        "data.partition.scheme": "by_file" if name == "t0" else "iid",
        "blocks.schedule": schedule,
        "federation.num_clients": num_clients,
        "federation.num_rounds": options.rounds + (max(1, options.rounds // one_in) if longer else 0),
        "federation.delay": delay,
        "train.lr_scheduler_type": options.lr_scheduler_type,
        "evaluation.every_rounds": 2 if longer else 4,
        "checkpoint.every_rounds": max(1, options.rounds // 4),
        "checkpoint.keep": 1,
        "seed": seed,
    }
    return configured(material, balanced(material, options) | settings)


def rivals(name: str, schedule: str, seed: int, options: Options, console: Console) -> Found:
    """Run both, and ParaBlock for longer where it needs it, and put its curve beside FL-BCD's end.

    With a constant learning rate the longer run goes on from the last checkpoint of the shorter one.
    """

    def ended(config: RunConfig, shorter: RunDirectory | None = None) -> tuple[RunDirectory, Found]:
        told = f"delay-{config.federation.delay}-rounds-{config.federation.num_rounds}-seed-{seed}"
        decay = "" if constant else f"-{options.lr_scheduler_type}"
        directory = kept_run(config, options.work_dir, f"{name}-{schedule}-{told}{decay}", shorter)
        curve = curve_of(directory, shorter)
        return directory, ended_with(directory, console) | {"seconds": curve[-1][0], "curve": curve}

    constant = options.lr_scheduler_type == "constant"
    directories, runs = zip(
        *(ended(quality_config(name, schedule, delay, seed, options)) for delay in DELAYS), strict=True
    )
    found: Found = {"data": name, "schedule": schedule, "seed": seed, "runs": list(runs)}
    reached = first_time(runs[1]["curve"], runs[0]["final_eval_loss"])
    if reached is None:
        config = quality_config(name, schedule, DELAYS[1], seed, options, longer=True)
        _, found["longer"] = ended(config, directories[1] if constant else None)
        reached = first_time(found["longer"]["curve"], runs[0]["final_eval_loss"])
    found["time_ratio"] = None if reached is None else reached / runs[0]["seconds"]
    if name == "t0" and options.task_examples and not options.smoke:
        for run, directory in zip(runs, directories, strict=True):
            run["scores"] = family_scores(str(directory.model), options, directory.path.name)
        found["base_scores"] = family_scores(t0().model, options, "base")
    return found


def quality_bars(found: list[Found]) -> list[Bar]:
    bars = []
    for names, rows in grouped(found, "data", "schedule").items():
        name = ", ".join(names)
        serial, overlapped = (fmean(row["runs"][delay]["final_eval_loss"] for row in rows) for delay in DELAYS)
        base = fmean(row["runs"][0]["initial_eval_loss"] for row in rows)
        times = [9.99 if row["time_ratio"] is None else row["time_ratio"] for row in rows]
        bars += [
            Bar(f"{name}: loss of ParaBlock / FL-BCD, means", overlapped / serial, 1.02),
            Bar(f"{name}: loss of the worse of both / base model", max(serial, overlapped) / base, 0.9),
            Bar(f"{name}: seconds to FL-BCD's last loss, mean ratio", fmean(times), 0.55),
        ]
    return bars


def quality_section(found: Found) -> Found:
    results, options = found["results"], found["options"]
    rows = []
    for row in results:
        serial, overlapped = row["runs"]
        losses = [serial["initial_eval_loss"], serial["final_eval_loss"], overlapped["final_eval_loss"]]
        rows.append([str(row["seed"]), *(f"{loss:.4f}" for loss in losses), f"{losses[2] / losses[1]:.4f}"])
    columns = zip(*((float(cell) for cell in row[1:]) for row in rows), strict=True)
    rows.append(["mean", *(spread(column) for column in columns)])
    title, said = "The same quality: GSM8K", "Four clients alike; the loss of the solutions."
    if results[0]["data"] == "t0":
        decays = options.get("lr_scheduler_type", "constant") != "constant"
        kind = 3 if decays else 2 if options["rounds"] > 32 else "base_scores" in results[0]
        title, said = ABOUT_T0[kind]
    parts = [
        f"{said} {options['rounds']} rounds of {options['steps']} local steps of {options['batch_size']} examples.",
        table(["seed", "base model", *RIVALS, "ratio"], rows),
        *(how_soon(results) if "time_ratio" in results[0] else []),
    ]
    if "base_scores" in results[0]:
        scored = {name: [row["runs"][delay]["scores"] for row in results] for delay, name in enumerate(RIVALS)}
        parts += family_table(results[0]["base_scores"], scored)
    return section(title, *parts)


def how_soon(results: Sequence[Found]) -> list[str | Found]:
    """Put the curves of both beside each other, in seconds, with the time to FL-BCD's last loss."""
    rows, longest = [], [row.get("longer", row["runs"][1]) for row in results]
    for row, run in zip(results, longest, strict=True):
        serial, time = row["runs"][0], row["time_ratio"]
        reached = ["never", ""] if time is None else [f"{time * serial['seconds']:.1f}", f"{time:.3f}"]
        rows.append([str(row["seed"]), f"{serial['final_eval_loss']:.4f}", f"{serial['seconds']:.1f}", *reached])
        rows[-1] += [f"{min(loss for _, loss in run['curve']):.4f} ({run['num_rounds']})"]
    known = [row["time_ratio"] for row in results if row["time_ratio"] is not None]
    rows += [["mean", "", "", "", spread(known, 3), ""]] if known else []
    curves = [[row["runs"][0]["curve"] for row in results], [run["curve"] for run in longest]]
    losses = []
    for at, _ in curves[0][0]:
        seen = [[[loss for s, loss in curve if s <= at + SAME_S] for curve in group] for group in curves]
        if all(values for group in seen for values in group) and at <= min(c[-1][0] for c in curves[1]) + 1:
            losses.append([f"{at:.1f}", *(spread([values[-1] for values in group]) for group in seen)])
    head = ["FL-BCD's last loss", "its seconds", "ParaBlock's seconds to it", "ratio", "its lowest (rounds)"]
    return [
        """### How soon

An exchange takes as long as the computation of a round (virtual clock). Seconds until ParaBlock is
first scored no worse than FL-BCD at its end; where equal rounds are too few, in a longer run (its
rounds are in the last column), which is looked at every two rounds.""",
        table(["seed", *head], rows),
        "The last loss by then, of those that were computed (in the first rounds, after every fourth):",
        table(["seconds", *RIVALS], losses),
    ]


# -- each T0 family apart -------------------------------------------------------------------------------------


def family_scores(model: str, options: Options, name: str) -> Found:
    """Score a model on the first held-out rows of each family: its loss, and its share of right answers.

    A family with templates whose training rows have few different completions is scored by multiple choice between
    these, on their rows. Any other has to write its answers, and they are compared with the references. Scores that
    are kept under the name are not made again.
    """
    folder = Path(options.work_dir) / "scores"
    kept, scores = folder / f"{name}-{options.task_examples}.json", {}
    if kept.exists():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    score = partial(score_models, model, max_examples=options.task_examples, max_new_tokens=32, device="cpu")
    material = t0()
    for train, test in zip(map(Path, material.train), map(Path, material.test), strict=True):
        rows, task = folder / "choices" / test.name, "multiple_choice"
        if not write_choices(train, test, rows):
            rows, task = test, "exact_match"
        made = {"loss": score([str(test)]), task: score([str(rows)], task=task)}
        scores[test.name.removesuffix(".test.jsonl")] = {
            task: {"value": one.value, "rows": one.count} for task, (one,) in made.items()
        }
    kept.write_text(json.dumps(scores), encoding="utf-8")
    return scores


def write_choices(train: Path, test: Path, path: Path) -> int:
    """Write the held-out rows that have a few answers to choose from, and tell how many they are."""

    def rows_of(file: Path) -> list[Found]:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    answers: dict[str, set[str]] = defaultdict(set)
    for row in rows_of(train):
        answers[row["template"]].add(row["completion"].strip())
    chosen = [
        row | {"choices": sorted(answers[row["template"]])}
        for row in rows_of(test)
        if 2 <= len(answers[row["template"]]) <= MAX_GROUP_CHOICES
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in chosen), encoding="utf-8")
    return len(chosen)


def family_table(base: Found, scored: Mapping[str, Sequence[Found]]) -> list[str | Found]:
    """Write two rows for each family: its loss, and its share of right answers."""
    rows = []
    for family, tasks in base.items():
        for task, score in tasks.items():
            digits = 3 if task == "loss" else 2
            cells = [spread([run[family][task]["value"] for run in group], digits) for group in scored.values()]
            label = f"{task.replace('_', ' ')}, {score['rows']} rows"
            rows.append([family, label, f"{score['value']:.{digits}f}", *cells])
    said = """### Each family apart

Multiple choice is between the answers that the training rows of a template have, where these are a
few; exact match wants the words of the reference. `dbpedia_14` and `rotten_tomatoes` hold one label
only, so a model is right there once it has learnt to say it, and the held-out rows of `ag_news` hold
one of the two answers, so that a base model which prefers it by habit is right and its share may fall
while the loss falls too. Shares of so few rows tell little apart."""
    return [said, table(["family", "score", "base model", *scored], rows)]


# -- word problems, by how much clients differ ----------------------------------------------------------------

WORD_RUNS = {"fl_bcd": 0, "parablock": 1, "parablock, more rounds": 1}
"""The delay of each run."""


def words(options: Options, console: Console) -> None:
    """Compare losses at equal rounds and times to the same loss on word problems, by how much clients differ.

    The problems, which a small model can learn, are dealt by topic; a small α gives each client few topics. The
    learning rate decays, so that runs of equal rounds are compared where they have settled: one round of lag is a
    fixed number of rounds, which a run whose loss still falls at its end would show as a worse loss.
    """
    found: list[Found] = []
    folder = Path(options.work_dir) / "material"
    train = make_word_problems(folder / "problems", num_clients=4, examples_per_client=250, seed=0)
    test = str(folder / "problems" / TEST_FILE_NAME)
    material = Material(material_of(options).model, tuple(map(str, train)), (test,))
    for alpha, seed in product(options.alphas, options.seeds):
        row: Found = {"alpha": alpha, "seed": seed, "time_ratio": None}
        for name, delay in WORD_RUNS.items():
            more = max(1, options.rounds // LONGER_ONE_IN_OF_A_DECAY) if "more" in name else 0
            settings = {
                "data.max_length": 96,
                "data.partition": {"scheme": "dirichlet", "alpha": alpha, "field": "template"},
                "federation.num_rounds": options.rounds + more,
                "federation.delay": delay,
                "train.lr_scheduler_type": options.schedule,
                "evaluation.every_rounds": 8,
                "seed": seed,
            }
            config = configured(material, balanced(material, options) | settings)
            directory = kept_run(config, options.work_dir, f"alpha-{alpha:g}-delay-{delay}-{more}-seed-{seed}")
            ended, curve = ended_with(directory, console), curve_of(directory)
            row[name] = {"rounds": ended["num_rounds"], "initial": ended["initial_eval_loss"]}
            row[name] |= {"loss": ended["final_eval_loss"], "seconds": curve[-1][0], "curve": curve}
            row[name] |= {key: ended[key] for key in ("model_sha256", "commit")}
            if not options.smoke:
                how: Found = {"task": "exact_match", "max_examples": 32, "max_new_tokens": 48, "device": "cpu"}
                (score,) = score_models(str(directory.model), [test], **how)
                row[name]["exact_match"] = score.value
            reached = first_time(curve, row["fl_bcd"]["loss"])
            if delay and reached is not None:
                row["time_ratio"] = reached / row["fl_bcd"]["seconds"]
                break
        row["ratio"] = row["parablock"]["loss"] / row["fl_bcd"]["loss"]
        found.append(row)
        record(options, found, words_bars(found), config=config, console=console)


def words_bars(found: list[Found]) -> list[Bar]:
    bars = []
    for alpha, rows in grouped(found, "alpha").items():
        ratio = fmean(row["parablock"]["loss"] for row in rows) / fmean(row["fl_bcd"]["loss"] for row in rows)
        times = [inf if row["time_ratio"] is None else row["time_ratio"] for row in rows]
        if alpha >= 0.3:
            bars.append(Bar(f"α {alpha:g}: loss of ParaBlock / FL-BCD at equal rounds, means", ratio, 1.02))
        bars.append(Bar(f"α {alpha:g}: seconds to FL-BCD's last loss, mean ratio", min(9.99, fmean(times)), 0.55))
    return bars


def words_section(found: Found) -> Found:
    rows, options = [], found["options"]
    for alpha, group in grouped(found["results"], "alpha").items():
        columns = (("fl_bcd", "initial"), ("fl_bcd", "loss"), ("parablock", "loss"))
        losses = [spread(row[run][key] for row in group) for run, key in columns]
        right = [spread((row[name].get("exact_match", 0.0) for row in group), 2) for name, _ in columns[1:]]
        times = ["never" if row["time_ratio"] is None else f"{row['time_ratio']:.2f}" for row in group]
        ratio = spread(row["ratio"] for row in group)
        rows.append([f"{alpha:g}", str(len(group)), *losses, ratio, *right, ", ".join(times)])
    head = ["α", "seeds", "base model", "FL-BCD", "ParaBlock", "ratio", "exact match, FL-BCD", "ParaBlock"]
    made = table([*head, "time to FL-BCD's loss / its time"], rows)
    if max(options["alphas"]) < 0.3:
        said = "The same where each client has few topics. This is shown, and nothing is promised of it."
        return section("Word problems, clients far apart", said, made)
    return section(
        "Word problems, by how much clients differ, and how soon",
        f"""Generated word problems, dealt to four clients by topic with a Dirichlet distribution. Losses at
equal rounds: {options["rounds"]} of {options["steps"]} local steps of {options["batch_size"]}
examples, learning rate {options["learning_rate"]:g}, {options["schedule"]}. An exchange takes as
long as the computation of a round. The last column is the time after which ParaBlock has reached
FL-BCD's last loss, over FL-BCD's time, for each seed; where equal rounds are too few, in a run with
one more for every twelve; `never` is: not within these. Answers are those at the end of each run.
Longer rounds do worse: 48 rounds of 4 local steps of 8 examples had a ratio of 1.053 on seed 7,
so this setting has more and smaller ones (`--seeds 7 --alphas 0.3 --rounds 48 --steps 4
--batch-size 8 --max-examples 125`); 16 rounds at a constant rate had 1.095 on seed 0.""",
        made,
    )


# -- every method on T0 ---------------------------------------------------------------------------------------

NAMES = {name: row.title for name, row in ROWS.items()}
KINDS = {
    kind: tuple(name for name, row in ROWS.items() if row.trains == trains)
    for kind, trains in (("blocks", "blocks"), ("all parameters", "everything"), ("adapters", "adapters"))
}
LORA = KINDS["adapters"]
GRID = {"blocks": (1e-3, 3e-3, 1e-2), "all parameters": (3e-4, 1e-3, 3e-3), "adapters": (3e-3, 1e-2)}
TUNED_ON = {"blocks": "fl_bcd", "all parameters": "fedavg", "adapters": "fedit"}
TUNING_SEED = 9
ROUNDS = {"blocks": 1.0, "all parameters": 0.5, "adapters": 1.0, "fedcybgd": 8.0}
"""Of those of a block method; FedCyBGD trains on one of eight clients in a round."""
SCORED = ("parablock", "fl_bcd", "fedavg", "fedit")
"""The methods that are scored on each family apart."""
SILENT = tuple(name for name, row in ROWS.items() if not row.sends)
"""The methods that send nothing."""


def methods(options: Options, console: Console) -> None:
    """Compare all methods on T0, one family a client, at equal rounds, seconds and bytes.

    All run through the same clients, wire, data order and evaluation. The learning rate of each kind of method is
    the best of a grid, on a seed that is not used afterwards. A local step takes as long as its operations do on an
    assumed core. A loss does not depend on the link, so each method is run once; how long its rounds take over a
    link of another speed, the same engine tells without training.
    """
    rates = dict(zip(KINDS, options.rates, strict=True)) if options.rates else tuned_rates(options, console)
    example = method_config("parablock", rates["blocks"], 0, options)
    skipped = options.smoke or not options.task_examples
    base = {} if skipped else family_scores(material_of(options).model, options, "base")
    found: Found = {"learning_rates": rates, "runs": [], "base": base}
    for seed in options.seeds:
        for kind, of_kind in KINDS.items():
            wanted = [method for method in of_kind if method in options.only]
            found["runs"] += [method_run(method, rates[kind], seed, options, console) for method in wanted]
        runs = grouped(found["runs"], "method")
        found["round_s"] = {name: {str(u): round_s(name, u, options) for u in options.links} for name in runs}
        found |= {"equal_seconds": equal_seconds(found, options), "equal_bytes": equal_bytes(found)}
        bars = []
        if {"parablock", "fl_bcd"} <= set(runs):
            ends = [fmean(run["curve"][-1][2] for run in runs[name]) for name in ("parablock", "fl_bcd")]
            bars = [Bar("T0: final loss of ParaBlock / FL-BCD, means", ends[0] / ends[1], 1.02)]
        record(options, found, bars, config=example, console=console)  # in case the rest is not reached


def method_config(method: str, learning_rate: float, seed: int, options: Options) -> RunConfig:
    kind = kind_of(method)
    rounds = round(options.rounds * ROUNDS.get(method, ROUNDS[kind]))
    full = kind == "all parameters"  # a round of these sends many bytes: look at each
    settings = {
        "federation.method": method,
        "federation.num_rounds": rounds,
        "federation.delay": int(method == "parablock"),
        "train.learning_rate": learning_rate,
        "engine.step_time_s": step_s(kind, options),
        "evaluation.every_rounds": 1 if full else max(1, rounds // 4),
        "seed": seed,
    }
    return configured(material_of(options, num_clients=2), training(options) | settings)


def kind_of(method: str) -> str:
    return next(kind for kind, of_kind in KINDS.items() if method in of_kind)


def tuned_rates(options: Options, console: Console) -> dict[str, float]:
    """Find the learning rate of each kind of method: the best of its grid after half of the rounds."""
    short = Options(**vars(options) | {"rounds": max(8, options.rounds // 2)})
    rates = {}
    for kind, grid in GRID.items():
        losses = {}
        for learning_rate in grid[: 1 if options.smoke else None]:
            config = method_config(TUNED_ON[kind], learning_rate, TUNING_SEED, short)
            directory = kept_run(config, options.work_dir, f"tuning-{TUNED_ON[kind]}")
            losses[learning_rate] = directory.read_summary()["final_eval_loss"]
        rates[kind] = min(losses, key=lambda learning_rate: losses[learning_rate])
        console.print(f"learning rate of {kind}: {rates[kind]:g} of {losses}")
    return rates


def method_run(method: str, learning_rate: float, seed: int, options: Options, console: Console) -> Found:
    """Return the curve and the scores of a run."""
    config = method_config(method, learning_rate, seed, options)
    directory = kept_run(config, options.work_dir, f"{method}-seed-{seed}")
    ended, rows = ended_with(directory, console), metrics_of(directory)
    clients = 1 if method == "central" else config.federation.num_clients
    spent = accumulate((row["uplink_bytes"] + row["downlink_bytes"]) / clients for row in rows)
    curve = [
        [k, num_bytes, row["eval_loss"]]
        for k, (num_bytes, row) in enumerate(zip(spent, rows, strict=True), 1)
        if row["eval_loss"] is not None
    ]
    scored = method in SCORED and options.task_examples and not options.smoke
    return {
        "method": method,
        "seed": seed,
        "learning_rate": learning_rate,
        "num_rounds": ended["num_rounds"],
        "curve": [[0, 0.0, ended["initial_eval_loss"]], *curve],
        "scores": family_scores(str(directory.model), options, directory.path.name) if scored else {},
    } | {key: ended[key] for key in ("model_sha256", "directory", "commit")}


@cache
def trained_of(method: str, model: str) -> tuple[tuple[Block, ...], FlopModel, Factors | None]:
    """Return what a method trains, the operations of the model, and for FLoRA what is stacked."""
    loaded = load_model(model, dtype="float32", device="cpu", init="pretrained", seed=0)
    config = configured(
        Material(model, ("-",), ()), {"federation.method": method, "federation.delay": int(method == "parablock")}
    )
    flops, blocks = FlopModel(loaded.model), trained_blocks(loaded.model, config)
    if method != "flora":
        return blocks, flops, None
    matrices = matrices_block(loaded.model, layers_path=config.blocks.layers_path)
    return (matrices,), flops, factors_of(loaded.model, config)


def step_s(kind: str, options: Options) -> float:
    """Return the seconds of a local step on one assumed core, by its operations; for blocks their mean."""
    blocks, flops, _ = trained_of(TUNED_ON[kind], material_of(options).model)
    if kind == "adapters":  # the matrices themselves need no gradient
        blocks = tuple(replace(block, layers=()) for block in blocks)
    tokens = Tokens.at_most(num_examples=options.batch_size, max_length=options.max_length)
    return round(fmean(flops.step(block, tokens) for block in blocks) / ASSUMED_FLOPS["cpu", "float32"], 4)


def round_s(method: str, mbps: float, options: Options) -> float:
    """Let the engine tell how long a round takes over a link, on average over some rounds."""
    config = method_config(method, 1e-3, 0, options)
    blocks, _, factors = trained_of("fedavg" if method in SILENT else method, material_of(options).model)
    rounds = (4 if method == "fedcybgd" else 2) * len(blocks)
    form = StackedAdapters(factors) if factors else update_form(config)
    plan = replace(server_plan(config, form), num_rounds=rounds)
    clock, sends = VirtualClock(), factors.num_elements if factors else None
    params = [torch.zeros(0 if method in SILENT else block.num_parameters) for block in blocks]
    idle = [Idle(config.engine.step_time_s, sends) for _ in range(plan.num_clients)]
    run_engine(params, idle, plan, clock, link=Link(mbps, mbps))
    return clock.now() / rounds


def loss_at(curve: list[list[float]], place: float, axis: int) -> float | None:
    """Read a curve off at so many rounds (axis 0) or bytes (axis 1); None beyond its end."""
    for left, right in pairwise(curve):
        if left[axis] <= place <= right[axis] * (1 + 1e-9):
            share = (place - left[axis]) / (right[axis] - left[axis])
            return left[2] + share * (right[2] - left[2])
    return None


def losses_at(found: Found, place: Callable[[str], float], axis: int) -> Found:
    """Read the curves of each method that sends anything off at its place."""
    sending = {name: runs for name, runs in grouped(found["runs"], "method").items() if name not in SILENT}
    return {name: [loss_at(run["curve"], place(name), axis) for run in runs] for name, runs in sending.items()}


def equal_seconds(found: Found, options: Options) -> Found:
    """Return each method's losses when ParaBlock has done a part and all of its rounds, for each link."""

    def losses(mbps: str, seconds: float) -> Found:
        return losses_at(found, lambda name: seconds / found["round_s"][name][mbps], 0)

    links = found["round_s"]["parablock"].items()
    wholes = {mbps: [share * seconds * options.rounds for share in (0.25, 0.5, 1.0)] for mbps, seconds in links}
    return {mbps: {f"{at:.1f}": losses(mbps, at) for at in times} for mbps, times in wholes.items()}


def equal_bytes(found: Found) -> Found:
    """Return each method's losses when so many bytes have crossed a client's link."""
    few = (*LORA, "parablock")
    whole = max(run["curve"][-1][1] for run in found["runs"] if run["method"] in few)

    def losses(num_bytes: float) -> Found:
        return losses_at(found, lambda _: num_bytes, 1)

    return {f"{at / 1e6:.1f}": losses(at) for at in (share * whole for share in (0.125, 0.25, 0.5, 1.0))}


def methods_section(found: Found) -> Found:
    results, options = found["results"], found["options"]
    runs = grouped(results["runs"], "method")
    ends = {name: [run["curve"][-1][2] for run in group] for name, group in runs.items()}
    base = spread([run["curve"][0][2] for run in next(iter(runs.values()))])
    rows = [["base model", "", base, "", *[""] * len(options["links"])]]
    for name, (run, *_) in runs.items():
        sent = run["curve"][-1][1] / run["num_rounds"] / 1e6
        seconds = [f"{value:.2f}" for value in results["round_s"][name].values()]
        rows.append([NAMES[name], str(run["num_rounds"]), spread(ends[name]), f"{sent:.2f}", *seconds])
    speeds = [f"s a round, {mbps:g} Mbit/s" for mbps in options["links"]]
    rates = ", ".join(f"{kind} {value:g}" for kind, value in results["learning_rates"].items())
    by_seconds = {
        f"{float(mbps):g} Mbit/s, {float(seconds):g} s": losses
        for mbps, times in results["equal_seconds"].items()
        for seconds, losses in times.items()
    }
    by_bytes = {f"{megabytes} MB": losses for megabytes, losses in results["equal_bytes"].items()}
    scored = {NAMES[name]: [run["scores"] for run in group] for name, group in runs.items() if group[0]["scores"]}
    return section(
        "All methods on T0",
        f"""Eight instruction families, one a client; {options["steps"]} local steps of {options["batch_size"]}
examples a round; seeds {", ".join(map(str, options["seeds"]))}; the loss of
{options["max_examples"]} held-out rows. Learning rates, each the best of a grid on another seed,
for FL-BCD, FedAvg and FedIT: {rates}. The others of a kind have the same;
FedCyBGD, where one client trains in a round and nothing is averaged, may want a smaller one.
`local` and `central` send nothing.""",
        table(["method", "rounds", "eval loss", "MB a client and round", *speeds], rows),
        "### At equal seconds\n\nThe last time of each link is when ParaBlock has done all of its rounds. " + ENDED,
        *losses_table(by_seconds, ends),
        f"### At equal bytes\n\nBytes that have crossed a client's link, both directions together. {ENDED}",
        *losses_table(by_bytes, ends),
        *(family_table(results["base"], scored) if results["base"] else []),
    )


ENDED = "†: the last loss of a run that ended before."


def losses_table(columns: Mapping[str, Found], ends: Mapping[str, Sequence[float]]) -> list[str | Found]:
    """Write the means over seeds, the lowest of each column in bold, and name whose they are."""
    rows: dict[str, list[str]] = {}
    wins = []
    for column in columns.values():
        means = {name: fmean(ends[name] if None in losses else losses) for name, losses in column.items()}
        wins.append(min(means, key=lambda name: means[name]))
        for name, mean in means.items():
            bold = "**" * (mean == means[wins[-1]])
            cell = f"{bold}{mean:.4f}{bold}{'†' * (None in column[name])}"
            rows.setdefault(name, [NAMES[name]]).append(cell)
    by_lora = sum(name in LORA for name in wins)
    return [
        table(["method", *columns], rows.values()),
        f"Lowest loss, column by column: {', '.join(NAMES[name] for name in wins)}.\n"
        f"A LoRA method wins {by_lora} of {len(wins)} columns.",
    ]


# -- one setting at a time, on a model ------------------------------------------------------------------------

MOMENTUM = "federation.server_optimizer"
SETTINGS: dict[str, Sequence[tuple[str, ...]]] = {
    "delay": [(f"federation.delay={delay}",) for delay in (0, 1, 2, 4)],
    "in_flight": [(f"federation.in_flight={rule}",) for rule in ("aligned", "own", "none")],
    "local_steps": [(f"train.num_local_steps={steps}",) for steps in (1, 2, 4)],
    "block_order": [(f"blocks.schedule={name}",) for name in ("cyclic", "reversed", "shuffled", "random")],
    "layers_per_block": [(f"blocks.layers_per_block={layers}",) for layers in (1, 2, 4)],
    "participation": [(f"federation.participation={part}",) for part in (1.0, 0.5, 0.25)],
    "dirichlet": [(f"data.partition.alpha={alpha}",) for alpha in (100.0, 1.0, 0.1)],
    "server_momentum": [
        (),
        (f"{MOMENTUM}={{name: momentum, learning_rate: 0.5, momentum: 0.5}}",),
        (f"{MOMENTUM}={{name: momentum, learning_rate: 0.1, momentum: 0.9}}",),
    ],
    "error_feedback": [
        (),
        ("wire.format=int4",),
        ("wire.format=int4", "wire.error_feedback=true"),
        ("wire.format=int2",),
        ("wire.format=int2", "wire.error_feedback=true"),
    ],
}
"""What is run for each setting; what is not named is as in `model_ablations`."""


def model_ablations(options: Options, console: Console) -> None:
    """Change one setting at a time on a small random Llama, for the tables of `parablock report`.

    A folder for each setting points at the runs that differ in it.
    """
    folder, found = Path(options.work_dir), Found()
    material = generated(folder / "material", num_clients=options.clients, examples_per_client=120, num_layers=4)
    settings = balanced(material, options) | {
        "federation.delay": 1,
        "data.max_length": 160,
        "data.partition": {"scheme": "dirichlet", "alpha": 1.0, "field": "template"},
        "train.per_device_train_batch_size": 4,
        "train.lr_scheduler_type": "cosine",
        "evaluation.every_rounds": 0,
        "evaluation.max_examples": 120,
    }
    for name in options.only:
        (folder / name).mkdir(parents=True, exist_ok=True)
        pointers = []
        for number, (overrides, seed) in enumerate(product(SETTINGS[name], options.seeds)):
            tree = configured(material, settings | {"seed": seed}).model_dump(mode="json")
            del tree["federation"]["method"]  # it follows the delay
            run = kept_run(parse_config(overridden(tree, overrides)), str(folder / "all"), f"seed-{seed}").path
            pointer = folder / name / f"{number:02d}"
            pointer.unlink(missing_ok=True)
            pointer.symlink_to(run.resolve())
            pointers.append(pointer)
        made = ablation_table(read_runs(pointers))
        found[name] = {"header": made.header, "rows": made.rows, "command": f"parablock report {folder / name}"}
        base = configured(material, settings | {"seed": options.seeds[0]})
        record(options, found, [], config=base, console=console)  # after each, in case the rest is not reached


def model_ablations_section(found: Found) -> Found:
    options, parts = found["options"], list[str | Found]()
    for setting, made in found["results"].items():
        parts += [f"### {setting.replace('_', ' ').capitalize()}", table(made["header"], made["rows"])]
        parts.append(f"`{made['command']}`")
    return section(
        "One setting at a time, on a model",
        f"""A small random Llama of four layers on generated word problems, dealt to {options["clients"]} clients
by topic (Dirichlet, α = 1); {options["rounds"]} rounds of {options["steps"]} local steps, ParaBlock
unless a row says otherwise; seed {", ".join(map(str, options["seeds"]))}. An exchange takes as long as
the computation of a round. Each table is what `parablock report` makes of the run directories.""",
        *parts,
    )


# -- few bits on the wire -------------------------------------------------------------------------------------

WAYS = [
    {"format": name, "rounding": rounding, "error_feedback": feedback}
    for name, rounding, feedback in product(("int8", "int4", "int2"), ("nearest", "stochastic"), (False, True))
]


def formats(options: Options, console: Console) -> None:
    """Compare the last loss with few bits on the wire, on T0; every way of rounding for the first seed."""

    def config_of(wire: Found, seed: int) -> RunConfig:
        settings = {f"wire.{key}": value for key, value in wire.items()}
        settings |= {"evaluation.every_rounds": 0, "seed": seed}
        return configured(material_of(options), training(options) | settings)

    def ended(wire: Found, seed: int) -> Found:
        way = [wire["format"], wire.get("rounding", "stochastic"), "feedback" * wire.get("error_feedback", False)]
        config = config_of(wire, seed)
        return ended_with(kept_run(config, options.work_dir, f"{'-'.join(way)}-seed-{seed}"), console)

    seeds = [
        {"seed": seed} | {name: ended({"format": name}, seed) for name in ("float32", "int4")}
        for seed in options.seeds
    ]
    chosen = WAYS[4:6] if options.smoke else [] if options.no_table else WAYS
    cells = [wire | ended(wire, options.seeds[0]) for wire in chosen]
    exact, few = (fmean(row[name]["final_eval_loss"] for row in seeds) for name in ("float32", "int4"))
    bars = [Bar(f"final loss of int4 / float32, means of {len(seeds)} seeds", few / exact, 1.01)]
    example = config_of({"format": "int4"}, options.seeds[0])
    record(options, {"seeds": seeds, "cells": cells}, bars, config=example, console=console)


def formats_section(found: Found) -> Found:
    (first, *_), cells = (seeds := found["results"]["seeds"]), found["results"]["cells"]
    rows = [
        [name, spread(row[name]["final_eval_loss"] for row in seeds), f"{first[name]['uplink_bytes'] / 1e6:.1f}"]
        for name in ("float32", "int4")
    ]
    by_way = [
        [f"{one['format']}, {one['rounding']}"]
        + [f"{cell['final_eval_loss'] / first['float32']['final_eval_loss']:.4f}" for cell in (one, other)]
        for one, other in zip(cells[::2], cells[1::2], strict=True)
    ]
    ways: list[str | Found] = [
        f"Loss over that with float32, seed {first['seed']}:",
        table(["format, rounding", "no error feedback", "error feedback"], by_way),
    ]
    return section(
        "Few bits on the wire",
        "ParaBlock on T0 with quantised updates, at equal rounds.",
        table(["format", "eval loss", "MB up, all clients"], rows),
        *(ways if cells else []),
    )


# -- Flower's own FedAvg on the same link ---------------------------------------------------------------------

FAMILIES = ("ag_news", "rotten_tomatoes", "dbpedia_14", "glue_qqp")
PEERS: dict[str, Found] = {
    "ParaBlock, int4": {"federation.method": "parablock", "federation.delay": 1, "wire.format": "int4"},
    "ParaBlock, bf16": {"federation.method": "parablock", "federation.delay": 1, "wire.format": "bfloat16"},
    "FL-BCD, bf16": {"federation.method": "fl_bcd", "federation.delay": 0, "wire.format": "bfloat16"},
    "Flower's FedAvg": {"federation.method": "fedavg", "federation.delay": 0},
    "Flower's FedAvg of LoRA, r = 32": {
        "federation.method": "fedit",
        "federation.delay": 0,
        "lora": {"rank": 32, "alpha": 64},
    },
}
OURS, STOCK = "ParaBlock, int4", "Flower's FedAvg"


def peers(options: Options, console: Console) -> None:
    """Measure seconds and bytes to a loss on a slow link: ParaBlock, FL-BCD, and Flower's FedAvg.

    A method has reached the loss at the first evaluation that is not above it. A local step takes the same time in
    all of them, which favours those that train everything.
    """
    found = [peer(name, options, console) for name in options.only]
    ours, stock = (next(row for row in found if row["peer"] == name)["to_loss"] for name in (OURS, STOCK))
    bars = [
        Bar(f"{key} to the loss, ParaBlock int4 / FedAvg", ours[key] / stock[key], 0.25)
        for key in (("seconds", "bytes") if ours and stock else ())
    ]
    record(options, found, bars, config=peer_config(OURS, options), console=console)


def peer_config(name: str, options: Options) -> RunConfig:
    by_block = not name.startswith("Flower")
    settings = training(options) | link(options.mbps) | PEERS[name]
    settings["federation.num_rounds"] = options.rounds if by_block else options.full_rounds
    settings["evaluation.every_rounds"] = 2 if by_block else 1
    return configured(material_of(options, *FAMILIES), settings)


def peer(name: str, options: Options, console: Console) -> Found:
    """Run one of them, and follow seconds, bytes and loss over its rounds."""
    config = peer_config(name, options)
    if name.startswith("Flower"):
        before, points = run_fedavg(config)
        console.print(f"{name}: {before:.4f} → {points[-1]['loss']:.4f}")
    else:
        label = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
        directory = kept_run(config, options.work_dir, label)
        rows = metrics_of(directory)
        seconds = accumulate(row["round_s"] for row in rows)
        moved = accumulate(row["uplink_bytes"] + row["downlink_bytes"] for row in rows)
        points = [
            {"round": row["round_index"] + 1, "seconds": second, "bytes": num_bytes, "loss": row["eval_loss"]}
            for row, second, num_bytes in zip(rows, seconds, moved, strict=True)
            if row["eval_loss"] is not None
        ]
        before = ended_with(directory, console)["initial_eval_loss"]
    way = {"fedavg": "full", "fedit": "lora"}.get(config.federation.method, "block")
    return {
        "peer": name,
        "initial_eval_loss": before,
        "to_loss": next((point for point in points if point["loss"] <= options.loss), None),
        "points": points,
        "memory_bytes": make_plan(peer_config(OURS, options)).memory_bytes[way],
    }


def run_fedavg(config: RunConfig) -> tuple[float, list[Found]]:
    """Run a configuration whose method sends everything that it trains, through Flower's own FedAvg strategy.

    What federates is Flower's: array records of every tensor, its weighted mean of the replies, all clients in
    every round. What trains and scores is ParaBlock's, so that a comparison differs in the federation alone. A
    round takes the download, the local steps and the upload one after the other, at the link's speed, without
    whatever Flower's own messages and polling add.

    Returns:
        The loss before, and for each round the seconds and bytes so far and the loss after it.
    """
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg

    def to_flat(arrays: ArrayRecord) -> Tensor:
        return torch.cat([torch.from_numpy(array.numpy()).reshape(-1) for array in arrays.values()])

    def to_arrays(flat: Tensor) -> ArrayRecord:
        parameters = {name: job.loaded.model.get_parameter(name) for name in job.blocks[0].parameter_names}
        pieces = torch.split(flat, [each.numel() for each in parameters.values()])
        cut = zip(parameters.items(), pieces, strict=True)
        return ArrayRecord({name: Array(piece.view(like.shape).numpy()) for (name, like), piece in cut})

    logging.getLogger("flwr").setLevel(logging.ERROR)
    job = read_inputs(config)
    fleet, strategy, shaped = make_method_model(job), FedAvg(), Link(**config.link.model_dump())
    (flat,) = fleet.params
    before, arrays = fleet.evaluate((flat,)), to_arrays(flat)
    seconds, moved, points = 0.0, 0, []
    steps, step_time_s = config.train.num_local_steps, config.engine.step_time_s
    assert isinstance(steps, int) and step_time_s is not None
    for t in range(config.federation.num_rounds):
        replies = []
        for trainer in fleet.trainers:
            trained = trainer.train(t, 0, steps, t * steps, (to_flat(arrays),)).trained[:]
            metrics = MetricRecord({"num-examples": trainer.num_examples})
            content = RecordDict({"arrays": to_arrays(trained), "metrics": metrics})
            replies.append(SimpleNamespace(content=content, has_error=lambda: False))
        one_way = arrays.count_bytes()
        arrays, _ = strategy.aggregate_train(t + 1, replies)  # type: ignore[arg-type,assignment]
        seconds += shaped.download_s(one_way) + steps * step_time_s + shaped.upload_s(one_way)
        moved += 2 * one_way * len(replies)
        loss = fleet.evaluate((to_flat(arrays),))
        points.append({"round": t + 1, "seconds": seconds, "bytes": moved, "loss": loss})
    return before, points


def peers_section(found: Found) -> Found:
    rows, options = [], found["options"]
    for row in found["results"]:
        reached, last = row["to_loss"], row["points"][-1]
        when = [f"{reached['seconds']:.1f}", f"{reached['bytes'] / 1e6:.1f}"] if reached else ["never", ""]
        last_loss, memory = f"{last['loss']:.4f} ({last['round']})", f"{row['memory_bytes'] / 1e6:.0f}"
        rows.append([row["peer"], *when, last_loss, memory])
    return section(
        f"To a loss of {options['loss']:g} at {options['mbps']:g} Mbit/s",
        "Four T0 clients. FedAvg is Flower's own strategy on the same simulated link, float32, sent whole.",
        table(["method", "seconds", "MB, all clients", "last loss (rounds)", "MB of memory"], rows),
    )


# -- subcommands ----------------------------------------------------------------------------------------------


def several(choices: Iterable[str]) -> tuple[Any, ...]:
    """Make an option that takes some of the choices."""
    return (list(choices), "which of them", {"choices": list(choices)})


SEEDS: Found = {"seeds": [0, 1, 2]}
DECAY = "how the learning rate goes on: constant, linear or cosine"
SMOKE = {"seeds": [0], "rounds": 8, "steps": 1, "max_examples": 16}
TRAINED: Found = {"rounds": 24, "steps": 2, "batch_size": 4, "learning_rate": 1e-3, "max_length": 96}
RATE = {"seeds": ([0, 1, 2, 3, 4], "2 to 6, 8 or 10 of them"), "rounds": ([80, 160, 320, 640], "T")}
FAMILY = "held-out examples of a family; 0: do not score families"
QUALITY = TRAINED | SEEDS | {"rounds": 32, "steps": 4, "max_length": 128, "max_examples": 384}
QUALITY |= {"lr_scheduler_type": ("constant", DECAY), "only": several(("t0", "gsm8k"))}
QUALITY |= {"schedules": (["shuffled"], "orders of the blocks"), "task_examples": (48, FAMILY)}
WORDS = SEEDS | {"rounds": 96, "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "max_examples": 64}
WORDS |= {"alphas": ([0.3, 0.1], "Dirichlet α"), "schedule": ("cosine", DECAY)}
WORDS_SMOKE = {"seeds": [0], "alphas": [0.3], "rounds": 8, "steps": 1}
METHODS = SEEDS | {"rounds": 16, "steps": 2, "batch_size": 2, "max_length": 128, "max_examples": 96}
METHODS |= {"links": ([10.0, 30.0, 100.0], HELP["mbps"]), "task_examples": (24, FAMILY), "only": several(NAMES)}
METHODS |= {"rates": (None, f"of {', '.join(KINDS)}; left out: tuned first", {"type": float, "nargs": len(KINDS)})}
MODEL = SEEDS | {"only": several(SETTINGS), "rounds": 32, "clients": 8, "steps": 2, "learning_rate": 3e-3}
MODEL_SMOKE = {"only": ["delay"], "seeds": [0, 1], "rounds": 6, "clients": 2, "steps": 1}
FORMATS = TRAINED | SEEDS | {"max_examples": 192, "no_table": (False, "int4 against float32 only")}
PEER = TRAINED | {"only": several(PEERS), "mbps": 10.0, "step_time_s": 0.1, "max_examples": 96, "seed": 0}
PEER |= {"loss": (3.0, "held-out loss that is to be reached"), "full_rounds": (8, "rounds of Flower's methods")}
PEER_SMOKE = {"only": [OURS, STOCK], "rounds": 8, "full_rounds": 2, "steps": 1, "max_examples": 8, "loss": 8.0}
BENCHMARKS = (
    benchmark(rate, rate_section, RATE, {"seeds": [0, 1], "rounds": [10, 20, 40]}, "--seeds 0 1"),
    benchmark(
        ablations, ablations_section, SEEDS | {"rounds": (150, "T")}, {"seeds": [0], "rounds": 12}, "--seeds 0"
    ),
    benchmark(quality, quality_section, QUALITY, SMOKE, "--only t0 --seeds 0 --rounds 16"),
    benchmark(words, words_section, WORDS, WORDS_SMOKE, "--alphas 0.3 --seeds 0"),
    benchmark(
        methods, methods_section, METHODS, SMOKE | {"max_examples": 8, "links": [10.0]}, "--only parablock fl_bcd"
    ),
    benchmark(model_ablations, model_ablations_section, MODEL, MODEL_SMOKE, "--only delay --seeds 0"),
    benchmark(formats, formats_section, FORMATS, SMOKE, "--seeds 0 --no-table"),
    benchmark(peers, peers_section, PEER, PEER_SMOKE, "--loss 2.5 --mbps 30"),
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(__doc__, BENCHMARKS)
