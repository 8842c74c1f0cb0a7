"""What overlap, methods, settings and few bits on the wire do to the loss, at equal rounds, seconds and bytes.

Runs are under the virtual clock, so losses, bytes and seconds are the same in every run. A run that is complete is
not run again and one that was stopped is resumed, as long as its configuration is the same; remove the work folder
to begin anew.

    .venv/bin/python benchmarks/quality.py rate
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from math import log, log2, sqrt
from pathlib import Path
from statistics import fmean, stdev
from string import ascii_uppercase, digits
from types import SimpleNamespace
from typing import Any

import _record as kit
import numpy as np
import torch
from _record import Bar, Found, Options, benchmarks, grouped, main, record, section, spread, table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from engines import run_here
from parablock.algorithm.aggregate import ServerOptimizer
from parablock.algorithm.sequential import OracleProblem, Solve, run_sequential
from parablock.algorithm.stacking import Factors
from parablock.clock import VirtualClock
from parablock.config.keys import RunConfig
from parablock.config.load import overridden, parse_config
from parablock.config.methods import METHODS as ROWS
from parablock.demo.material import TEST_FILE_NAME, make_tiny_llama, make_word_problems
from parablock.engine.update_form import StackedAdapters
from parablock.evaluation.choices import MAX_GROUP_CHOICES
from parablock.evaluation.side_by_side import score_models
from parablock.experiment.engines import server_plan, update_form
from parablock.experiment.inputs import read_inputs
from parablock.methods.choose import make_method_model
from parablock.methods.flora import factors_of
from parablock.methods.trained_blocks import trained_blocks
from parablock.model.adapters import matrices_block
from parablock.model.blocks import Block
from parablock.model.pretrained import load_model, outline_model
from parablock.plan.forecast import make_plan
from parablock.report.reading import read_runs
from parablock.report.tables import ablation_table
from parablock.seeding import generator_for
from parablock.trace import Trace
from parablock.training.flops import FlopModel, Tokens
from parablock.training.step_time import ASSUMED_FLOPS
from parablock.wire.quantize import Encoding, pack
from parablock.wire.transport import Link
from toy import Idle

STEP_S = 0.25


def data_of(name: str, options: Options) -> tuple[kit.Material, Found]:
    """Return material and settings of T0 (a family a client), GSM8K (clients alike) or word problems (either)."""
    num_clients = 2 if options.smoke else {"t0": 8}.get(name, 4)
    if name.startswith("words"):
        folder = Path(options.work_dir).resolve() / "material"
        material = kit.generated(folder, num_clients=num_clients, examples_per_client=120, num_layers=4)
    elif name == "gsm8k" and not options.smoke:
        material = kit.pretrained("gsm8k", train="/train.jsonl", test="/test.jsonl")
    else:
        material = kit.material_of(options, *FAMILIES * (name == "four families"), num_clients=num_clients)
    scheme = "iid" if name == "gsm8k" or name.endswith("iid") else "by_file"
    return material, {"data.partition.scheme": scheme, "federation.num_clients": num_clients}


def balanced(material: kit.Material, options: Options) -> Found:
    """Return the settings of runs in which an exchange takes as long as the computation of a round."""
    return (
        kit.training(options)
        | kit.balanced_link(material.model, STEP_S * options.steps)
        | {"engine.step_time_s": STEP_S}
    )


def first_time(curve: list[list[float]], loss: float) -> float | None:
    """Tell after how many seconds a run is first scored no worse than a loss."""
    return next((s for s, value in curve if value <= loss), None)


# -- a problem without a model: how fast the gradient vanishes, and what each knob does
PROBLEM = kit.ABOUT["rate"]["problem"]
BLOCKS, SIZE, CLIENTS, EXAMPLES, BATCH, STEPS, REGULARISATION = PROBLEM.values()
CONSTANT_STEP = 0.3
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""Of the 95% interval, by the number of seeds."""
VARIANTS, KNOBS = kit.ABOUT["rate"]["variants"], kit.ABOUT["ablations"]["knobs"]


def gradient(a: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """∇f on some rows: log(1 + exp(−y a·x)) + λ Σ x² / (1 + x²)."""
    weights = -y * torch.sigmoid(-y * (a @ x)) / len(y)
    return a.T @ weights + 2 * REGULARISATION * x / (1 + x.square()).square()


def make_clients(seed: int, apart: float) -> tuple[Tensor, Tensor]:
    """Draw features (M × n × D) and labels ±1 (M × n)."""
    draw = generator_for(seed, "rate data")
    common, own = draw.normal(size=BLOCKS * SIZE), draw.normal(size=(CLIENTS, BLOCKS * SIZE))
    centres = draw.normal(size=(CLIENTS, 1, BLOCKS * SIZE))
    mixing = draw.normal(size=(BLOCKS * SIZE, BLOCKS * SIZE)) / sqrt(BLOCKS * SIZE)  # blocks act on each other
    features = (draw.normal(size=(CLIENTS, EXAMPLES, BLOCKS * SIZE)) + 0.5 * apart * centres) @ mixing
    scores = (features * (common + apart * own)[:, None]).sum(axis=2) + draw.normal(size=(CLIENTS, EXAMPLES))
    return torch.tensor(features).float(), torch.tensor(scores).sign().float()


@torch.no_grad()
def squared_norms(num_rounds: int, seed: int, step: float, **how: Any) -> list[float]:
    """Run the functions of the method alone, and return ‖∇f(x_t)‖² of each round, of all clients and rows."""
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

    how |= {"encode": rounded(Encoding(**wire))} if wire else {}
    if "momentum" in how:
        beta = how.pop("momentum")
        how["server_optimizer"] = ServerOptimizer("momentum", 1 - beta, beta)
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


def rate(options: Options) -> None:
    """Fit the slope of the squared norm of the gradient against T, without a model; theory bounds it by −1/2."""
    found: Found = {}
    for name, how in VARIANTS.items():
        means = [
            [fmean(squared_norms(T, seed, 4 / sqrt(T), **how)) for T in options.rounds] for seed in options.seeds
        ]
        slopes = [slope(options.rounds, row) for row in means]
        deviation = stdev(slopes) / sqrt(len(slopes)) if len(slopes) in STUDENT_T else 0.0
        found[name] = {"squared_gradient": means, "slopes": slopes, "slope": fmean(slopes)}
        found[name]["half_interval"] = STUDENT_T.get(len(slopes), 0.0) * deviation
    serial, overlapped = found["FL-BCD"]["slope"], found["ParaBlock"]["slope"]
    bars = [Bar("slope of FL-BCD", serial, -0.45), Bar("slope of ParaBlock", overlapped, -0.45)]
    bars.append(Bar("|slope of ParaBlock − slope of FL-BCD|", abs(overlapped - serial), 0.05))
    record(options, found, bars, {"variants": VARIANTS, "problem": PROBLEM})


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
    head = ["variant", "slope", f"mean squared gradient at T = {rounds[-1]}"]
    return section("rate", found, table(head, rows), first=rounds[0], last=rounds[-1], seeds=seeds)


def ablations(options: Options) -> None:
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
    record(options, found, [], facts | {"rounds": options.rounds})


def ablations_section(found: Found) -> Found:
    tables = []
    for knob, places in found["results"].items():
        delays = sorted({delay for values in places.values() for delay in values})
        rows = [[place, *(spread(v[d]) if d in v else "" for d in delays)] for place, v in places.items()]
        tables.append(table([knob, *(f"delay {delay}" for delay in delays)], rows))
    return section("ablations", found, *tables, seeds=len(found["options"]["seeds"]))


# -- ParaBlock (delay 1) beside FL-BCD (delay 0) on T0 and GSM8K
RIVALS = ("FL-BCD", "ParaBlock")
LONGER_ONE_IN, LONGER_ONE_IN_OF_A_DECAY = 4, 12
"""One round more for so many, in the run that tells how soon the loss is reached."""
SAME_S = 0.01
"""Seeds differ in the seconds of a round by what their headers have in digits; more than this is another round."""


def duel(
    material: kit.Material, settings: Found, options: Options, name: str, *, one_in: int, longer: Found
) -> tuple[list[kit.Kept], kit.Kept | None, float | None]:
    """Run FL-BCD, ParaBlock, and ParaBlock for longer where it is not as low; return also the ratio of times.

    The longer run has a round more for `one_in`, and settings of its own.
    """

    def run(delay: int, rounds: int, which: str, **own: Any) -> kit.Kept:
        own |= {"federation.delay": delay, "federation.num_rounds": rounds}
        config = kit.configured(material, balanced(material, options) | settings | own)
        return kit.Kept(config, options, f"{name}-{which}")

    runs = [run(delay, options.rounds, f"delay-{delay}") for delay in (0, 1)]
    longest, reached = None, first_time(runs[1].curve, runs[0].loss)
    if reached is None:
        longest = run(1, options.rounds + max(1, options.rounds // one_in), "longer", **longer)
        reached = first_time(longest.curve, runs[0].loss)
    return runs, longest, None if reached is None else reached / runs[0].curve[-1][0]


def quality(options: Options) -> None:
    """Compare the last loss of delay 1 with that of delay 0 on T0 and GSM8K: how soon, and the right answers."""
    found: list[Found] = []
    one_in = LONGER_ONE_IN if options.lr_scheduler_type == "constant" else LONGER_ONE_IN_OF_A_DECAY
    for name, seed in product(options.only, options.seeds):
        material, of_data = data_of(name, options)
        settings = of_data | {
            "train.lr_scheduler_type": options.lr_scheduler_type,
            "evaluation.every_rounds": 4,
            "checkpoint.every_rounds": max(1, options.rounds // 4),
            "seed": seed,
        }
        more = {"one_in": one_in, "longer": {"evaluation.every_rounds": 2}}
        runs, longer, ratio = duel(material, settings, options, f"{name}-seed-{seed}", **more)
        told = [
            run.told("delay", "num_rounds", "uplink_bytes") | {"seconds": run.curve[-1][0], "curve": run.curve}
            for run in (*runs, *([longer] if longer else []))
        ]
        row: Found = {"data": name, "seed": seed, "runs": told[:2], "time_ratio": ratio}
        row |= {"longer": told[2]} if longer else {}
        if name == "t0" and options.task_examples and not options.smoke:
            for run, out in zip(runs, row["runs"], strict=True):
                out["scores"] = family_scores(str(run.directory.model), options, run.name)
            row["base_scores"] = family_scores(kit.pretrained().model, options, "base")
        found.append(row)
        record(options, found, quality_bars(found), runs[1].config)  # the rest may not be reached


def duel_bars(name: str, serial: float, overlapped: float, rows: list[Found]) -> list[Bar]:
    """Return the bars of the mean last losses of both, and of how soon ParaBlock reaches FL-BCD's."""
    soon = fmean(9.99 if row["time_ratio"] is None else row["time_ratio"] for row in rows)
    return [
        Bar(f"{name}: loss of ParaBlock / FL-BCD, means", overlapped / serial, 1.02),
        Bar(f"{name}: seconds to FL-BCD's last loss, mean ratio", soon, 0.55),
    ]


def quality_bars(found: list[Found]) -> list[Bar]:
    bars = []
    for data, rows in grouped(found, "data").items():
        losses = [fmean(row["runs"][delay]["final_eval_loss"] for row in rows) for delay in (0, 1)]
        base = fmean(row["runs"][0]["initial_eval_loss"] for row in rows)
        bars += duel_bars(f"{data}, shuffled", *losses, rows)
        bars.append(Bar(f"{data}, shuffled: loss of the worse of both / base model", max(losses) / base, 0.9))
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
    name = "quality_gsm8k"
    if results[0]["data"] == "t0":
        decays = options.get("lr_scheduler_type", "constant") != "constant"
        name = "quality_t0_cosine" if decays else "quality_t0_long" if options["rounds"] > 32 else "quality_t0"
        name += "_families" if name == "quality_t0" and "base_scores" in results[0] else ""
    parts = [table(["seed", "base model", *RIVALS, "ratio"], rows)]
    parts += how_soon(results) if "time_ratio" in results[0] else []
    if "base_scores" in results[0]:
        scored = {name: [row["runs"][delay]["scores"] for row in results] for delay, name in enumerate(RIVALS)}
        parts += family_table(results[0]["base_scores"], scored)
    return section(name, found, *parts, more=kit.ABOUT["quality"]["rounds"].format(**found))


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
    said = kit.ABOUT["quality"]
    made = table(["seed", *head], rows)
    return [said["how_soon"], made, said["by_then"], table(["seconds", *RIVALS], losses)]


# -- each T0 family apart
def family_scores(model: str, options: Options, name: str) -> Found:
    """Score a model on the first held-out rows of each family: its loss, and its share of right answers."""
    folder = Path(options.work_dir) / "scores"
    kept, scores = folder / f"{name}-{options.task_examples}.json", {}
    if kept.exists():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    score = partial(score_models, model, max_examples=options.task_examples, max_new_tokens=32, device="cpu")
    material = kit.pretrained()
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
    return [kit.ABOUT["quality"]["families"], table(["family", "score", "base model", *scored], rows)]


# -- word problems, by how much clients differ
def words(options: Options) -> None:
    """Compare losses at equal rounds and times to the same loss on word problems, by how much clients differ."""
    found: list[Found] = []
    folder = Path(options.work_dir) / "material"
    train = make_word_problems(folder / "problems", num_clients=4, examples_per_client=250, seed=0)
    test = str(folder / "problems" / TEST_FILE_NAME)
    material = kit.Material(kit.material_of(options).model, tuple(map(str, train)), (test,))
    for alpha, seed in product(options.alphas, options.seeds):
        partition = {"scheme": "dirichlet", "alpha": alpha, "field": "template"}
        settings, name = {"data.partition": partition, "seed": seed}, f"alpha-{alpha:g}-seed-{seed}"
        how = {"one_in": LONGER_ONE_IN_OF_A_DECAY, "longer": {}}
        runs, longer, ratio = duel(material, settings, options, name, **how)
        row: Found = {"alpha": alpha, "seed": seed, "time_ratio": ratio, "ratio": runs[1].loss / runs[0].loss}
        for name, run in zip(("fl_bcd", "parablock", "parablock, more rounds"), (*runs, longer), strict=True):
            if run is not None:
                row[name] = {"rounds": run.summary["num_rounds"], "initial": run.summary["initial_eval_loss"]}
                row[name] |= {"loss": run.loss, "seconds": run.curve[-1][0], "curve": run.curve} | run.told()
            if run is not None and not options.smoke:
                how: Found = {"task": "exact_match", "max_examples": 32, "max_new_tokens": 48, "device": "cpu"}
                row[name]["exact_match"] = score_models(str(run.directory.model), [test], **how)[0].value
        found.append(row)
        record(options, found, words_bars(found), runs[1].config)


def words_bars(found: list[Found]) -> list[Bar]:
    bars = list[Bar]()
    for alpha, rows in grouped(found, "alpha").items():
        losses = [fmean(row[name]["loss"] for row in rows) for name in ("fl_bcd", "parablock")]
        bars += duel_bars(f"α {alpha:g}", *losses, rows)[0 if alpha >= 0.3 else 1 :]
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
    return section("words_alpha01" if max(options["alphas"]) < 0.3 else "words", found, made)


# -- every method on T0
NAMES = {name: row.title for name, row in ROWS.items()}
KINDS = kit.ABOUT["methods"]["kinds"]
KIND_OF = {name: kind for kind, of in KINDS.items() for name, row in ROWS.items() if row.trains == of["trains"]}
LORA = tuple(name for name, kind in KIND_OF.items() if kind == "adapters")
TUNING_SEED = 9
SCORED = ("parablock", "fl_bcd", "fedavg", "fedit")
"""The methods that are scored on each family apart."""
SILENT = tuple(name for name, row in ROWS.items() if not row.sends)
"""The methods that send nothing."""


def methods(options: Options) -> None:
    """Compare all methods on T0, one family a client, at equal rounds, seconds and bytes."""
    rates = dict(zip(KINDS, options.rates, strict=True)) if options.rates else tuned_rates(options)
    is_scored = options.task_examples and not options.smoke
    base = family_scores(kit.material_of(options).model, options, "base") if is_scored else {}
    found: Found = {"learning_rates": rates, "runs": [], "base": base, "round_s": {}}
    for seed, method in product(options.seeds, [name for name in KIND_OF if name in options.only]):
        learning_rate = rates[KIND_OF[method]]
        run = kit.Kept(method_config(method, learning_rate, seed, options), options, f"{method}-seed-{seed}")
        clients = 1 if method == "central" else run.config.federation.num_clients
        curve = [[point["round"], point["bytes"] / clients, point["loss"]] for point in run.points]
        row = {"method": method, "seed": seed, "learning_rate": learning_rate} | run.told("num_rounds")
        row["curve"] = [[0, 0.0, run.summary["initial_eval_loss"]], *curve]
        scored = is_scored and method in SCORED
        row["scores"] = family_scores(str(run.directory.model), options, run.name) if scored else {}
        found["runs"].append(row)
        if method not in found["round_s"]:
            found["round_s"][method] = {str(u): round_s(method, u, options) for u in options.links}
        runs, bars = grouped(found["runs"], "method"), []
        if "parablock" in runs:  # the yardstick of seconds and bytes
            found |= {"equal_seconds": equal_seconds(found, options), "equal_bytes": equal_bytes(found)}
        if {"parablock", "fl_bcd"} <= set(runs):
            ends = [fmean(run["curve"][-1][2] for run in runs[name]) for name in ("parablock", "fl_bcd")]
            bars = [Bar("T0: final loss of ParaBlock / FL-BCD, means", ends[0] / ends[1], 1.02)]
        record(
            options, found, bars, method_config("parablock", rates["blocks"], 0, options)
        )  # or no more is reached


def method_config(method: str, learning_rate: float, seed: int, options: Options) -> RunConfig:
    kind = KIND_OF[method]
    rounds = round(options.rounds * kit.ABOUT["methods"]["rounds_of"].get(method, KINDS[kind]["rounds"]))
    full = kind == "all parameters"  # a round of these sends many bytes: look more often
    settings = {
        "federation.method": method,
        "federation.num_rounds": rounds,
        "federation.delay": int(method == "parablock"),
        "train.learning_rate": learning_rate,
        "engine.step_time_s": step_s(kind, options),
        "evaluation.every_rounds": max(1, rounds // (16 if full else 4)),
        "seed": seed,
    }
    return kit.configured(kit.material_of(options, num_clients=2), kit.training(options) | settings)


def tuned_rates(options: Options) -> dict[str, float]:
    """Find the learning rate of each kind of method: the best of its grid after half of the rounds."""
    short = Options(**vars(options) | {"rounds": max(8, options.rounds // 2)})
    rates = {}
    for kind, tuned in KINDS.items():
        losses = {}
        for rate in tuned["grid"][: 1 if options.smoke else None]:
            config = method_config(tuned["on"], rate, TUNING_SEED, short)
            losses[rate] = kit.Kept(config, options, "tuning").loss
        rates[kind] = min(losses, key=lambda rate: losses[rate])
    return rates


@cache
def trained_of(method: str, model: str) -> tuple[tuple[Block, ...], FlopModel, Factors | None]:
    """Return what a method trains, the operations of the model, and for FLoRA what is stacked."""
    loaded = load_model(model, dtype="float32", device="cpu", init="pretrained", seed=0)
    config = kit.configured(
        kit.Material(model, ("-",), ()),
        {"federation.method": method, "federation.delay": int(method == "parablock")},
    )
    flops, blocks = FlopModel(loaded.model), trained_blocks(loaded.model, config)
    if method != "flora":
        return blocks, flops, None
    matrices = matrices_block(loaded.model, layers_path=config.blocks.layers_path)
    return (matrices,), flops, factors_of(loaded.model, config)


def step_s(kind: str, options: Options) -> float:
    """Return the seconds of a local step on one assumed core, by its operations; for blocks their mean."""
    blocks, flops, _ = trained_of(KINDS[kind]["on"], kit.material_of(options).model)
    if kind == "adapters":  # the matrices themselves need no gradient
        blocks = tuple(replace(block, layers=()) for block in blocks)
    tokens = Tokens.at_most(num_examples=options.batch_size, max_length=options.max_length)
    return round(fmean(flops.step(block, tokens) for block in blocks) / ASSUMED_FLOPS["cpu", "float32"], 4)


def round_s(method: str, mbps: float, options: Options) -> float:
    """Let the engine tell how long a round takes over a link, on average over some rounds."""
    config = method_config(method, 1e-3, 0, options)
    blocks, _, factors = trained_of("fedavg" if method in SILENT else method, kit.material_of(options).model)
    rounds = (4 if method == "fedcybgd" else 2) * len(blocks)
    form = StackedAdapters(factors) if factors else update_form(config)
    plan = replace(server_plan(config, form), num_rounds=rounds)
    clock, sends = VirtualClock(), factors.num_elements if factors else None
    params = [torch.zeros(0 if method in SILENT else block.num_parameters) for block in blocks]
    idle = [Idle(config.engine.step_time_s, sends) for _ in range(plan.num_clients)]
    run_here(params, idle, plan, Trace(clock), link=Link(mbps, mbps))
    return clock.now() / rounds


def losses_at(found: Found, place: Callable[[str], float], axis: int) -> Found:
    """Read the curves of each method that sends anything off, at so many rounds (axis 0) or bytes (axis 1).

    A loss is None beyond the end of its curve.
    """

    def loss_at(curve: list[list[float]], at: float) -> float | None:
        places, losses = [point[axis] for point in curve], [point[2] for point in curve]
        return float(np.interp(at, places, losses)) if at <= places[-1] * (1 + 1e-9) else None

    sending = {name: runs for name, runs in grouped(found["runs"], "method").items() if name not in SILENT}
    return {name: [loss_at(run["curve"], place(name)) for run in runs] for name, runs in sending.items()}


def equal_seconds(found: Found, options: Options) -> Found:
    """Return each method's losses when ParaBlock has done a part and all of its rounds, for each link."""
    losses: Found = {}
    for mbps, round_seconds in found["round_s"]["parablock"].items():
        for share in (0.25, 0.5, 1.0):
            at = share * round_seconds * options.rounds
            read = losses_at(found, lambda name, at=at, mbps=mbps: at / found["round_s"][name][mbps], 0)
            losses.setdefault(mbps, {})[f"{at:.1f}"] = read
    return losses


def equal_bytes(found: Found) -> Found:
    """Return each method's losses when so many bytes have crossed a client's link."""
    whole = max(run["curve"][-1][1] for run in found["runs"] if run["method"] in (*LORA, "parablock"))
    places = [share * whole for share in (0.125, 0.25, 0.5, 1.0)]
    return {f"{at / 1e6:.1f}": losses_at(found, lambda _, at=at: at, 1) for at in places}


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
        for mbps, times in results.get("equal_seconds", {}).items()
        for seconds, losses in times.items()
    }
    by_bytes = {f"{megabytes} MB": losses for megabytes, losses in results.get("equal_bytes", {}).items()}
    scored = {NAMES[name]: [run["scores"] for run in group] for name, group in runs.items() if group[0]["scores"]}
    said, seeds = kit.ABOUT["methods"], ", ".join(map(str, options["seeds"]))
    parts = [
        table(["method", "rounds", "eval loss", "MB a client and round", *speeds], rows),
        *([said["at_seconds"], *losses_table(by_seconds, ends)] if by_seconds else []),
        *([said["at_bytes"], *losses_table(by_bytes, ends)] if by_bytes else []),
        *(family_table(results["base"], scored) if results["base"] else []),
    ]
    return section("methods", found, *parts, seeds=seeds, rates=rates)


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


# -- one setting at a time, on a model
def model_ablations(options: Options) -> None:
    """Change one setting at a time on a small random Llama, for the tables of `parablock report`."""
    folder, found = Path(options.work_dir), Found()
    material = kit.generated(
        folder / "material", num_clients=options.clients, examples_per_client=120, num_layers=4
    )
    settings = balanced(material, options)
    for name in options.only:
        (folder / name).mkdir(parents=True, exist_ok=True)
        pointers = []
        changes = kit.ABOUT["model_ablations"]["changes"][name]
        for number, (overrides, seed) in enumerate(product(changes, options.seeds)):
            tree = kit.configured(material, settings | {"seed": seed}).model_dump(mode="json")
            del tree["federation"]["method"]  # it follows the delay
            run = kit.Kept(parse_config(overridden(tree, overrides)), options, f"all-seed-{seed}").directory.path
            pointer = folder / name / f"{number:02d}"
            pointer.unlink(missing_ok=True)
            pointer.symlink_to(run.resolve())
            pointers.append(pointer)
        made = ablation_table(read_runs(pointers))
        found[name] = {"header": made.header, "rows": made.rows, "command": f"parablock report {folder / name}"}
        base = kit.configured(material, settings | {"seed": options.seeds[0]})
        record(options, found, [], base)  # after each, in case the rest is not reached


def model_ablations_section(found: Found) -> Found:
    options, parts = found["options"], list[str | Found]()
    for setting, made in found["results"].items():
        parts += [f"### {setting.replace('_', ' ').capitalize()}", table(made["header"], made["rows"])]
        parts.append(f"`{made['command']}`")
    return section("model_ablations", found, *parts, seeds=", ".join(map(str, options["seeds"])))


# -- few bits on the wire
WAYS = [
    {"format": name, "rounding": rounding, "error_feedback": feedback}
    for name, rounding, feedback in product(("int8", "int4", "int2"), ("nearest", "stochastic"), (False, True))
]


def formats(options: Options) -> None:
    """Compare the last loss with few bits on the wire, on T0; every way of rounding for the first seed."""

    def ended(wire: Found, seed: int) -> Found:
        settings = {f"wire.{key}": value for key, value in wire.items()}
        settings |= {"evaluation.every_rounds": 0, "seed": seed}
        config = kit.configured(kit.material_of(options), kit.training(options) | settings)
        return kit.Kept(config, options, f"{wire['format']}-seed-{seed}").told("uplink_bytes")

    names = ("float32", "int4")
    seeds = [{"seed": seed} | {name: ended({"format": name}, seed) for name in names} for seed in options.seeds]
    chosen = WAYS[4:6] if options.smoke else [] if options.no_table else WAYS
    cells = [wire | ended(wire, options.seeds[0]) for wire in chosen]
    exact, few = (fmean(row[name]["final_eval_loss"] for row in seeds) for name in names)
    bars = [Bar(f"final loss of int4 / float32, means of {len(seeds)} seeds", few / exact, 1.01)]
    record(options, {"seeds": seeds, "cells": cells}, bars)


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
        "formats", found, table(["format", "eval loss", "MB up, all clients"], rows), *(ways if cells else [])
    )


# -- Flower's own FedAvg on the same link
FAMILIES = ("ag_news", "rotten_tomatoes", "dbpedia_14", "glue_qqp")
OURS, STOCK = "ParaBlock, int4", "Flower's FedAvg"


def peers(options: Options) -> None:
    """Measure seconds and bytes to a loss on a slow link: ParaBlock, FL-BCD, and Flower's FedAvg."""
    found = [peer(name, options) for name in options.only]
    ours, stock = (next(row for row in found if row["peer"] == name)["to_loss"] for name in (OURS, STOCK))
    bars = [
        Bar(f"{key} to the loss, ParaBlock int4 / FedAvg", ours[key] / stock[key], 0.25)
        for key in (("seconds", "bytes") if ours and stock else ())
    ]
    record(options, found, bars, peer_config(OURS, options))


def peer_config(name: str, options: Options) -> RunConfig:
    by_block = not name.startswith("Flower")
    settings = kit.training(options) | kit.link(options.mbps) | kit.ABOUT["peers"]["settings_of"][name]
    settings["federation.num_rounds"] = options.rounds if by_block else options.full_rounds
    settings["evaluation.every_rounds"] = 2 if by_block else 1
    return kit.configured(kit.material_of(options, *FAMILIES), settings)


def peer(name: str, options: Options) -> Found:
    """Run one of them, and follow seconds, bytes and loss over its rounds."""
    config = peer_config(name, options)
    if name.startswith("Flower"):
        before, points = run_fedavg(config)
    else:
        run = kit.Kept(config, options, "".join(letter if letter.isalnum() else "-" for letter in name.lower()))
        before, points = run.summary["initial_eval_loss"], run.points
    way = {"everything": "full", "adapters": "lora"}.get(config.federation.traits.trains, "block")
    memory_bytes = make_plan(peer_config(OURS, options)).memory_bytes[way]
    reached = next((point for point in points if point["loss"] <= options.loss), None)
    return {"peer": name, "initial_eval_loss": before, "to_loss": reached, "points": points} | {
        "memory_bytes": memory_bytes
    }


def run_fedavg(config: RunConfig) -> tuple[float, list[Found]]:
    """Run a configuration whose method sends everything that it trains, through Flower's own FedAvg strategy."""
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
    rows = []
    for row in found["results"]:
        reached, last = row["to_loss"], row["points"][-1]
        when = [f"{reached['seconds']:.1f}", f"{reached['bytes'] / 1e6:.1f}"] if reached else ["never", ""]
        last_loss, memory = f"{last['loss']:.4f} ({last['round']})", f"{row['memory_bytes'] / 1e6:.0f}"
        rows.append([row["peer"], *when, last_loss, memory])
    head = ["method", "seconds", "MB, all clients", "last loss (rounds)", "MB of memory"]
    return section("peers", found, table(head, rows))


# -- what others ship, and ours: seconds to a loss
def rivals(options: Options) -> None:
    """Compare the seconds to a loss with those of what others ship, by link, on a core and on a GPU."""
    about, found = kit.ABOUT["rivals"], Found(runs=[])
    for seed, way in product(options.seeds, options.only):
        settings = about["ways"][way]
        tried = try_rates(settings, options)
        settings = settings | {"seed": seed, "train.learning_rate": min(tried, key=lambda each: tried[each])}
        config = way_config(settings, options.data[0], options)
        run = kit.Kept(config, options, "-".join(re.findall(r"\w+", f"{way} seed {seed}")))
        row = {"way": way, "seed": seed, "learning_rate": config.train.learning_rate, "tried": tried}
        row |= run.told("delay", "num_rounds", "uplink_bytes", "downlink_bytes")
        row["curve"] = [[point["round"], point["loss"]] for point in run.points]
        row["round_s"] = {
            device: {
                f"{mbps:g}": link_round_s(config, device, mbps, way in about["others"], options)
                for mbps in options.links
            }
            for device in DEVICES
        }
        found["runs"].append(row)
        record(options, found, rival_bars(found["runs"], options.links), config)


DEVICES = {"core": ASSUMED_FLOPS["cpu", "float32"], "GPU": ASSUMED_FLOPS["cuda", "float32"]}


def link_round_s(config: RunConfig, device: str, mbps: float, one_by_one: bool, options: Options) -> float:
    """Return the planned seconds of a round: computation, upload, download one by one, or as ours go."""
    step = step_s(KIND_OF[config.federation.method], options) * DEVICES["core"] / DEVICES[device]
    engine = config.engine.model_copy(update={"step_time_s": step})
    link = config.link.model_copy(update={"upload_mbps": mbps, "download_mbps": mbps})
    plan = make_plan(config.model_copy(update={"engine": engine, "link": link}))
    return plan.sequential_s if one_by_one else plan.round_s


def rounds_to(runs: Sequence[Found]) -> dict[tuple[str, int], tuple[int, bool]]:
    """Return for each way and seed the rounds to the loss, with those of its lag, and whether it is reached."""
    others, found = kit.ABOUT["rivals"]["others"], dict[tuple[str, int], tuple[int, bool]]()
    for seed, of_seed in grouped(runs, "seed").items():
        loss = max((run["curve"][-1][1] for run in of_seed if run["way"] in others), default=0.0)
        for run in of_seed:
            at = next((number for number, scored in run["curve"] if scored <= loss), None)
            found[run["way"], seed] = ((at or run["num_rounds"]) + run["delay"], at is not None)
    return found


def rival_seconds(runs: Sequence[Found], device: str, mbps: str) -> dict[str, tuple[float, bool]]:
    """Return for each way the mean seconds to the loss, and whether every run reaches it."""
    rounds, found = rounds_to(runs), dict[str, tuple[float, bool]]()
    for way, of_way in grouped(runs, "way").items():
        taken = [(run["round_s"][device][mbps] * rounds[way, run["seed"]][0]) for run in of_way]
        found[way] = fmean(taken), all(rounds[way, run["seed"]][1] for run in of_way)
    return found


def rival_bars(runs: Sequence[Found], links: Sequence[float]) -> list[Bar]:
    """Return the bars of each link: the best of ours over the best of the others."""
    about, bars = kit.ABOUT["rivals"], list[Bar]()
    for device, mbps in product(DEVICES, links):
        seconds = rival_seconds(runs, device, f"{mbps:g}")
        reached = {way: s for way, (s, is_reached) in seconds.items() if is_reached}
        ours, others = (
            [s for way, s in reached.items() if (way in about["others"]) is of_others]
            for of_others in (False, True)
        )
        if ours and others:
            name = f"{mbps:g} Mbit/s, a {device}: seconds to the loss, the best of ours / the best of the others"
            bars.append(Bar(name, min(ours) / min(others), about["limits"].get(f"{mbps:g}", 0.8)))
    return bars


def rivals_section(found: Found) -> Found:
    runs = found["results"]["runs"]
    links = [f"{mbps:g}" for mbps in found["options"]["links"]]
    head, rows = ["way", "rate", "MB up, a client and round", "last loss"], list[list[str]]()
    columns = list(product(DEVICES, links))
    seconds = {column: rival_seconds(runs, *column) for column in columns}
    for way, of_way in grouped(runs, "way").items():
        sent = fmean(run["uplink_bytes"] for run in of_way) / of_way[0]["num_rounds"] / len(FAMILIES) / 1e6
        cells = [
            way,
            f"{of_way[0]['learning_rate']:g}",
            f"{sent:.3f}",
            spread(run["curve"][-1][1] for run in of_way),
        ]
        for column in columns:
            taken, is_reached = seconds[column][way]
            cells.append(f"{taken:.1f}" if is_reached else f"not in {taken:.1f}")
        rows.append(cells)
    head += [f"{device}, {mbps} Mbit/s: s" for device, mbps in columns]
    return section("rivals", found, table(head, rows), core=DEVICES["core"], gpu=DEVICES["GPU"])


# -- ways to run a method, beside each other at equal rounds
SERIAL, LONGER = "delay 0", "delay 1, longer"
"""Ways of `delays`; the second is run where delay 1 has not reached the last loss of delay 0."""


def delays(options: Options) -> None:
    """Compare delay 1 with delay 0 for each method, with and without own updates in flight, on T0 and GSM8K."""
    run_ways(options, soon_bars)


def sparse(options: Options) -> None:
    """Compare sparse2 with float32 for all parameters, in last losses and bytes, by the local steps of a round."""
    run_ways(options)


def optimizers(options: Options) -> None:
    """Compare Muon with AdamW on blocks, each at its own best rate, on T0 and GSM8K."""
    run_ways(options)


def in_flight(options: Options) -> None:
    """Compare the rules for updates in flight, by local steps and by how much clients differ."""
    run_ways(options)


def run_ways(options: Options, more_bars: Callable[[Sequence[Found]], list[Bar]] = lambda _: []) -> None:
    """Run each way of each group that `benchmarks.toml` has for a subcommand; record what there is after each."""
    about, found = kit.ABOUT[options.benchmark], list[Found]()
    for seed, data, name in product(options.seeds, options.data, options.only):
        row: Found = {"group": name, "data": data, "seed": seed}
        for way, changes in about["ways"].items():
            if way == LONGER and (name not in about["soon"] or share_of_serial(row) is not None):
                continue
            settings = about["of"][name] | changes
            tried = try_rates(settings if "grid" in changes else about["of"][name], options)
            settings |= {"train.learning_rate": min(tried, key=lambda each: tried[each]), "seed": seed}
            settings |= {"federation.num_rounds": options.rounds * 9 // 8} if way == LONGER else {}
            config = way_config(settings, data, options)
            run = kit.Kept(config, options, "-".join(re.findall(r"\w+", f"{name} {way} {data} seed {seed}")))
            row[way] = run.told("delay", "num_rounds", "uplink_bytes", "downlink_bytes")
            row[way] |= {"learning_rate": config.train.learning_rate, "tried": tried, "curve": run.curve}
            row[way]["rho"] = [rho for rho in (line["rho"] for line in run.rows) if rho is not None]
        found.append(row)
        record(options, found, [*way_bars(found, about), *more_bars(found)], config)


def try_rates(settings: Found, options: Options) -> dict[float, float]:
    """Return the last loss of each of several rates: after half of the rounds on the first data, another seed."""
    grid, losses = settings["grid"], dict[float, float]()
    for rate in () if options.smoke or len(grid) == 1 else grid:
        short = {"federation.num_rounds": max(8, options.rounds // 2), "evaluation.every_rounds": 0}
        short |= {"train.learning_rate": rate, "seed": TUNING_SEED}
        losses[rate] = kit.Kept(way_config(settings | short, options.data[0], options), options, "tuning").loss
    return losses or {grid[0]: 0.0}


def way_config(settings: Found, data: str, options: Options) -> RunConfig:
    """Return a run over a link on which the exchange of what the method trains takes as long as its steps."""
    material, of_data = data_of(data, options)
    settings = {"engine.step_time_s": STEP_S} | kit.training(options) | of_data | settings
    del settings["grid"]
    compute_s = settings["train.num_local_steps"] * settings["engine.step_time_s"]
    blocks, _, _ = trained_of(settings["federation.method"], material.model)
    payload_bytes = 4 * max(block.num_parameters for block in blocks) + 600
    return kit.configured(material, kit.link(2 * payload_bytes * 8e-6 / compute_s) | settings)


def share_of_serial(row: Found) -> float | None:
    """Return after which part of the seconds of delay 0 a delay of 1 reaches its last loss; None: it does not."""
    curves = [row[way]["curve"] for way in ("delay 1", LONGER) if way in row]
    times = [first_time(curve, row[SERIAL]["final_eval_loss"]) for curve in curves]
    return min((s / row[SERIAL]["curve"][-1][0] for s in times if s is not None), default=None)


def by_group(found: Sequence[Found]) -> dict[tuple[str, str], list[Found]]:
    """Sort rows by data and group."""
    return {
        (data, name): rows
        for data, of in grouped(found, "data").items()
        for name, rows in grouped(of, "group").items()
    }


def way_bars(found: Sequence[Found], about: Found) -> list[Bar]:
    """Return the bars that `benchmarks.toml` has: one way over another, in means over the seeds."""
    bars = []
    for ((data, name), rows), bar in product(by_group(found).items(), about.get("bars", ())):
        if name in bar.get("only", [name]):
            key, ways = bar.get("of", "final_eval_loss"), (bar["way"], bar["over"])
            value, beside = (fmean(row[way][key] for row in rows) for way in ways)
            text = f"{data}, {name}: {bar.get('what', 'last loss')}, {' / '.join(ways)}"
            bars.append(Bar(text, value / beside, bar["limit"], at_most=bar.get("at_most", True)))
    return bars


def soon_bars(found: Sequence[Found]) -> list[Bar]:
    """Return the bars of how soon delay 1 has the last loss of delay 0."""
    bars = []
    for (data, name), rows in by_group(found).items():
        if name in kit.ABOUT["delays"]["soon"]:
            shares = [share_of_serial(row) for row in rows]
            soon = fmean(9.99 if share is None else share for share in shares)
            bars.append(Bar(f"{data}, {name}: seconds to the last loss of delay 0, mean ratio", soon, 0.6))
    return bars


def ways_section(name: str, found: Found) -> Found:
    """Write the last loss of each way, with that over the first, and the rates."""
    about, rows, rates = kit.ABOUT[name], list[list[str]](), dict[str, None]()
    for (data, group), of_group in by_group(found["results"]).items():
        ways = [way for way in about["ways"] if all(way in row for row in of_group)]
        means = {way: fmean(row[way]["final_eval_loss"] for row in of_group) for way in ways}
        cells = {way: spread(row[way]["final_eval_loss"] for row in of_group) for way in ways}
        cells |= {way: f"{cells[way]} ({means[way] / means[ways[0]]:.4f})" for way in ways[1:]}
        rows.append([data, group, str(len(of_group)), *(cells.get(way, "") for way in about["ways"])])
        of_ways = dict.fromkeys(f"{of_group[0][way]['learning_rate']:g}" for way in ways)
        rates[f"{group} {', '.join(of_ways)}"] = None
        if "soon" in about:
            shares = [share_of_serial(row) for row in of_group]
            rows[-1].append(", ".join("never" if share is None else f"{share:.2f}" for share in shares))
    head = ["data", "", "seeds", *about["ways"], *(["seconds to the loss of delay 0"] if "soon" in about else [])]
    return section(name, found, table(head, rows), rates="; ".join(rates))


delays_section, sparse_section = (partial(ways_section, name) for name in ("delays", "sparse"))
optimizers_section = partial(ways_section, "optimizers")


def in_flight_section(found: Found) -> Found:
    """Show beside the losses which rule is best on the whole, and the loss against its α."""
    made, rules = ways_section("in_flight", found), list(kit.ABOUT["in_flight"]["ways"])
    panels, ratios = dict[str, Found](), {rule: list[float]() for rule in rules}
    for (data, group), rows in by_group(found["results"]).items():
        losses = {rule: fmean(row[rule]["final_eval_loss"] for row in rows) for rule in rules}
        curve = [[fmean(weight(rule, row[rule]) for row in rows), losses[rule] / losses["none"]] for rule in rules]
        panels.setdefault(f"α, {data}", {})[group] = sorted(curve)
        for rule, (_, ratio) in zip(rules, curve, strict=True):
            ratios[rule].append(ratio)
    lowest = [min(of_group) for of_group in zip(*ratios.values(), strict=True)]
    rows = [
        [f"`{rule}`", f"{fmean(of):.4f}", f"{max(of):.4f}", str(sum(map(float.__eq__, of, lowest)))]
        for rule, of in sorted(ratios.items(), key=lambda each: fmean(each[1]))
    ]
    figure = {"figure": "in_flight.svg", "y": "last loss over that of α = 0", "linear": [*panels]}
    figure["panels"] = panels
    head = ["rule", "loss / `none`, mean of the rows", "the worst row", "rows that it wins"]
    made["parts"] += [table(head, rows), figure]
    return made


def weight(rule: str, run: Found) -> float:
    """Return the mean of α over the rounds of a run of four clients."""
    exact = {"none": 0.0, "share": 0.25, "own": 1.0}
    power = 0.5 if rule == "aligned" else 1.0
    return exact[rule] if rule in exact else fmean(rho**power for rho in run["rho"])


# -- random facts: what nothing but memory holds, and where adapters are full
FACTS = kit.ABOUT["facts"]
DIGITS, HALF = 5, 26**3 // 2
"""Of a code; of the keys of three letters, the base has learnt some of one half, and clients learn the other."""


def facts(options: Options) -> None:
    """Count the bits of random facts that blocks, adapters and all parameters recall, by bytes and seconds."""
    base = facts_base(options)
    found: Found = {"tuning": {}, "runs": []}
    size = outline_model(str(base.directory.model), dtype="float32").num_parameters()
    found["base"] = base.told() | {"parameters": size, "bits": bits_recalled(base.config, base.loss)}
    for number, seed, way in product(options.facts, options.seeds, options.only):
        grid = found["tuning"].setdefault(f"{(like := FACTS['ways'][way]['rate_of'])}, {number}", [])
        for rate in FACTS["grids"][like][len(grid) : 1 if options.smoke else None]:
            grid.append(
                [rate, facts_run(like, rate, TUNING_SEED, number, base, options, part=0.25)["curve"][-1][2]]
            )
        rate = max(grid, key=lambda tried: tried[1])[0]
        found["runs"].append(facts_run(way, rate, seed, number, base, options))
        record(options, found, [], base.config)  # the rest may not be reached


def facts_base(options: Options) -> kit.Kept:
    """Train a small model on facts of its own."""
    folder = Path(options.work_dir).resolve() / "base"
    model = make_tiny_llama(folder / "model", [*ascii_uppercase, *digits], seed=0, num_layers=4)
    (model / "chat_template.jinja").unlink()  # a fact is its letters and digits alone
    smaller = LlamaForCausalLM(LlamaConfig.from_pretrained(model, **FACTS["shape"]))
    draw = generator_for(0, "facts model")
    with torch.no_grad():
        for matrix in (parameter for parameter in smaller.parameters() if parameter.ndim == 2):
            matrix.copy_(torch.from_numpy(draw.normal(scale=matrix.shape[1] ** -0.5, size=matrix.shape)))
    smaller.save_pretrained(model)
    file = str(write_facts(folder / "facts.jsonl", range(HALF), options.base_facts, seed=0))
    settings = kit.training(options) | FACTS["base"]
    settings |= {"federation.num_rounds": options.base_rounds, "evaluation.max_examples": options.base_facts}
    return kit.Kept(kit.configured(kit.Material(str(model), (file,), (file,)), settings), options, "base")


def facts_run(
    way: str, rate: float, seed: int, number: int, base: kit.Kept, options: Options, part: float = 1.0
) -> Found:
    """Train on facts for a part of the rounds, and count what is recalled of them, and of those of the base."""
    about, num_rounds = FACTS["ways"][way], max(8, round(options.rounds * part))
    folder, name = Path(options.work_dir).resolve() / f"{number}-{seed}", re.sub(r"\W+", "-", way)
    everything = write_facts(folder / "all.jsonl", range(HALF, 2 * HALF), number, seed)
    lines = everything.read_text(encoding="utf-8").splitlines(keepends=True)
    train = [folder / f"client_{k}.jsonl" for k in range(4)]
    for k, path in enumerate(train):
        path.write_text("".join(lines[k::4]), encoding="utf-8")
    material = kit.Material(str(base.directory.model), tuple(map(str, train)), (str(everything),))
    settings = kit.training(options) | kit.link(options.mbps) | about["settings"]
    settings |= {
        "federation.num_rounds": num_rounds,
        "train.num_local_steps": max(1, options.passes * number // (4 * options.batch_size)),
        "train.learning_rate": rate,
        "evaluation.max_examples": number,
        "evaluation.every_rounds": max(1, num_rounds // 10),
        "checkpoint.every_rounds": max(1, num_rounds // 5),
        "seed": seed,
    }
    run = kit.Kept(kit.configured(material, settings), options, f"{name}-{number}-{seed}")
    (of_base,) = score_models(str(run.directory.model), [*base.config.data.test], device="cpu")
    row = {"way": way, "facts": number, "seed": seed, "learning_rate": rate} | run.told("num_rounds")
    row["curve"] = [[p["bytes"] / 4, p["seconds"], bits_recalled(run.config, p["loss"])] for p in run.points]
    return row | {"bits_of_base": bits_recalled(base.config, of_base.value)}


def write_facts(path: Path, keys: range, number: int, seed: int) -> Path:
    """Write facts as `KXQ 48213`."""
    draw = generator_for(seed, "facts")
    rows = zip(draw.choice(keys, number, replace=False), draw.integers(10**DIGITS, size=number), strict=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for key, code in rows:
            letters = "".join(ascii_uppercase[key // place % 26] for place in (676, 26, 1))
            print(json.dumps({"prompt": letters, "completion": f" {code:05d}"}), file=file)
    return path


def bits_recalled(config: RunConfig, loss: float) -> float:
    """Return the bits of all codes that a model needs no more, by its mean loss of a learnt token."""
    number, tokens = learnt_of(config.model.name_or_path, *config.data.test)
    return max(0.0, number * DIGITS * log2(10) - tokens * loss / log(2))


@cache
def learnt_of(model: str, file: str) -> tuple[int, int]:
    """Count rows and the tokens that are learnt of them."""
    everything = {"data.max_length": 32, "evaluation.max_examples": 10**6}
    examples = read_inputs(kit.configured(kit.Material(model, (file,), (file,)), everything)).test
    return len(examples), sum(label >= 0 for example in examples for label in example.labels)


def facts_section(found: Found) -> Found:
    parts, base = list[str | Found](), found["results"]["base"]
    for number, of_number in grouped(found["results"]["runs"], "facts").items():
        whole, panels = number * DIGITS * log2(10), {unit: Found() for unit in FACTS["units"]}
        rows, half = [], {way: [] for way in grouped(of_number, "way")}
        for way, runs in grouped(of_number, "way").items():
            for axis, curves in enumerate(panels.values()):
                curves[way] = [[point[axis] / 1e6 ** (1 - axis), point[2]] for point in runs[0]["curve"]]
                half[way].append([first_at(run["curve"], axis, whole / 2) for run in runs])
            sent = runs[0]["curve"][-1][0] / runs[0]["num_rounds"] / 1e6
            ends = [spread((run["curve"][-1][2] / whole for run in runs), 3)]
            ends += [f"{fmean(at):,.4g}" if None not in at else "not reached" for at in half[way]]
            kept = spread((run["bits_of_base"] / base["bits"] for run in runs), 3)
            rows.append([way, f"{runs[0]['learning_rate']:g}", f"{sent:.3f}", *ends, kept])
        head = [
            "trained",
            "rate",
            "MB a client and round",
            "share recalled",
            "MB to a half",
            "s to a half",
            "of the base",
        ]
        figure = {"figure": f"facts_{number}.svg", "y": f"bits recalled of {whole:,.0f}", "panels": panels}
        parts += [f"### {number:,} facts", table(head, rows), figure]
        parts += filter(None, [crossing(grouped(of_number, "way"))])
    return section("facts", found, *parts, base_bits=base["bits"])


def first_at(curve: list[list[float]], axis: int, bits: float) -> float | None:
    """Tell after how many bytes or seconds so many bits are recalled first, in millions of bytes."""
    reached = next((point for point in curve if point[2] >= bits), None)
    return None if reached is None else reached[axis] / (1e6 if axis == 0 else 1)


def crossing(of_number: Mapping[str, list[Found]]) -> str:
    """Say of which adapters blocks are ahead at the end of all rounds, at equal bytes, and where curves cross."""
    ends = {way: fmean(run["curve"][-1][2] for run in runs) for way, runs in of_number.items()}
    block = max((way for way in ends if way.startswith("block")), key=lambda way: ends[way], default=None)
    if block is None:
        return ""
    ranks = [way for way in ends if way.startswith("rank")]
    below = [way for way in ranks if ends[way] < ends[block]]
    above = [way for way in ranks if way not in below]
    moved = of_number[block][0]["curve"][-1][0]
    at_bytes = [way for way in ranks if bits_at(of_number[way], moved) < ends[block]]
    crossed = [way for way in at_bytes if is_ever_ahead(of_number[way], of_number[block])]
    told = f"At the end of all rounds `{block}` recalls more than {', '.join(below) or 'no adapters'}"
    told += (
        f"{', and not more than ' * bool(above)}{', '.join(above)}; when as many bytes have moved as it moves in "
    )
    told += f"all, more than {', '.join(at_bytes) or 'no adapters'}. "
    return f"{told}Over bytes its curve overtakes that of {', '.join(crossed) or 'no adapters'}."


def is_ever_ahead(runs: Sequence[Found], of: Sequence[Found]) -> bool:
    """Tell whether runs are ahead of others, by a hundredth of what these recall at last, before these end."""
    last, _, least = of[0]["curve"][-1]
    points = [(moved, bits) for moved, _, bits in runs[0]["curve"] if moved <= last]
    return any(bits > bits_at(of, moved) + least / 100 for moved, bits in points)


def bits_at(runs: Sequence[Found], num_bytes: float) -> float:
    """Read from curves how many bits are recalled once so many bytes have moved."""
    curves = [list(zip(*[[0.0, 0.0, 0.0], *run["curve"]], strict=True)) for run in runs]
    return fmean(float(np.interp(num_bytes, moved, bits)) for moved, _, bits in curves)


BENCHMARKS = benchmarks(globals(), methods={"only": list(NAMES)})

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(__doc__, BENCHMARKS)
