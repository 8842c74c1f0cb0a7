"""On a real LLM, SmolLM2-135M-Instruct: the settings of each method, and the methods beside each other.

The model is made by `../shared/tools/make_smollm2.py` where it is not there yet. Its weights are dequantised from
4 bits, so every figure is of that rounded model. Runs are kept and resumed as those of quality.py; a record grows
run by run.

    .venv/bin/python benchmarks/llm.py llm_search --only "fedit, 1e-3"
"""

from __future__ import annotations

import gzip
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean

import _record as kit
import numpy as np
import torch
from _record import Bar, Found, Options, benchmarks, grouped, main, record, section, spread, table

from parablock.config.keys import RunConfig
from parablock.data.batches import round_batches
from parablock.evaluation.scoring import evaluate_loss
from parablock.evaluation.side_by_side import score_models, score_records
from parablock.experiment.inputs import read_inputs
from parablock.model.adapters import add_adapters
from parablock.model.loss import count_label_tokens, sum_loss
from parablock.model.params import Replica
from parablock.model.pretrained import load_tokenizer
from parablock.plan.forecast import make_plan
from parablock.seeding import generator_for
from parablock.training.local import learning_rate_at
from parablock.training.trainer import LocalTrainer, local_arguments

TEXT_CHARS = 600
STEPS_TIMED = 3
MODEL = kit.REPOSITORY / "runs" / "SmolLM2-135M-Instruct"


def smollm2() -> str:
    """Return the folder of the model; make it where it is missing."""
    if not (MODEL / "model.safetensors").exists():
        made = subprocess.run(
            [sys.executable, str(kit.SHARED / "tools" / "make_smollm2.py"), str(MODEL)], check=False
        )
        if made.returncode:
            sys.exit(f"{MODEL} cannot be made; --smoke runs on a generated model and text")
    return str(MODEL)


def material_of(options: Options) -> kit.Material:
    """Return the model and short rows of GSM8K or of T0 families, or what is generated for a smoke test."""
    folder, families = Path(options.work_dir).resolve() / "material", getattr(options, "families", [])
    if options.smoke:
        return kit.generated(folder, num_clients=len(families) or 2)
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, list[str]] = {"train": [], "test": []}
    for name, part in product(families or [""], made):
        source = kit.SHARED / "data" / (f"t0/{name}.{part}.jsonl" if name else f"gsm8k/{part}.jsonl")
        rows = source.read_text(encoding="utf-8").splitlines()
        short = [row for row in rows if num_chars(json.loads(row)) <= options.max_chars]
        path = folder / f"{name}{'-' * bool(name)}{part}-{options.max_chars}.jsonl"
        path.write_text("\n".join(short) + "\n", encoding="utf-8")
        made[part].append(str(path))
    return kit.Material(getattr(options, "model", "") or smollm2(), tuple(made["train"]), tuple(made["test"]))


def num_chars(row: Found) -> int:
    """Count the characters of what a row asks and of its answer."""
    return sum(len(row[field]) for field in ("question", "answer", "prompt", "completion") if field in row)


def config_of(options: Options, settings: Found) -> RunConfig:
    """Make the configuration of one setting."""
    usual: Found = {"evaluation.num_answers": 0}
    if not hasattr(options, "families"):  # a family is a client
        usual |= {"data.partition.scheme": "iid", "federation.num_clients": 2}
    return kit.configured(material_of(options), kit.training(options) | usual | settings)


def run_of(options: Options, name: str, settings: Found) -> kit.Kept:
    """Run one setting, unless it is there."""
    return kit.Kept(config_of(options, settings), options, "".join(c if c.isalnum() else "-" for c in name))


# -- the settings of each method
def llm_search(options: Options) -> None:
    """Try block sizes, optimizers and learning rates of each method on GSM8K; one row for each run."""
    about, found = kit.ABOUT["llm_search"], list[Found]()
    for name in options.only:
        run = run_of(options, name, about["tried"][name])
        shutil.rmtree(run.directory.model, ignore_errors=True)  # half a GB each
        sent = run.summary["uplink_bytes"] / run.config.federation.num_clients / run.config.federation.num_rounds
        told = run.told("method", "delay", "num_rounds", "uplink_bytes") | {"megabytes": sent / 1e6}
        found.append({"run": name, "ratio": run.loss / run.summary["initial_eval_loss"]} | told)
        record(options, found, [], run.config)  # the rest may not be reached


# -- the methods beside each other: at equal rounds, seconds and bytes, and what is forgotten
def llm_methods(options: Options) -> None:
    """Compare methods and delays on GSM8K, with the losses on rows of T0 and on a text that nobody trained on."""
    compare(options, math.inf)


def llm_more(options: Options) -> None:
    """Compare more methods, ranks and forms of updates, and a delay that nothing corrects."""
    compare(options, math.inf)


def llm_longer(options: Options) -> None:
    """Compare FedIT with and without overlap in twice as many rounds, and in three more."""
    compare(options, math.inf)


def llm_t0(options: Options) -> None:
    """Compare methods and delays on T0, a family a client, with the losses on GSM8K and on a text as above."""
    compare(options, math.inf)


def compare(options: Options, until_s: float) -> None:
    """Run every method on every seed, one at least; no more are begun at `until_s` of `time.monotonic()`."""
    about, others = kit.ABOUT["llm_methods"], forgotten_rows(options)
    model = material_of(options).model
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "one core"
    found: Found = {"device": device, "base": losses_of(model, others, options, f"base-{kit.digest(model)}")}
    found |= {"step_s": {}, "runs": [], "not_run": []}
    for seed, way in product(options.seeds, options.only):
        if found["runs"] and time.monotonic() > until_s:
            found["not_run"].append(f"{way}, seed {seed}")
            continue
        kind, settings = about["kind_of"][way], about["ways"][way]
        if kind not in found["step_s"]:
            found["step_s"][kind] = step_s(options, kind, settings)
        score = {"seed": seed, "evaluation.every_rounds": max(1, options.rounds // 2)}
        run = run_of(options, f"{way}-seed-{seed}", settings | score)
        clients, curve = run.config.federation.num_clients, [[0, 0.0, run.summary["initial_eval_loss"]]]
        curve += [[point["round"], point["bytes"] / clients, point["loss"]] for point in run.points]
        row = {"way": way, "seed": seed, "curve": curve} | run.told("method", "delay", "num_rounds")
        row["round_s"] = {f"{mbps:g}": round_s(run.config, found["step_s"][kind], mbps) for mbps in options.links}
        row["forgotten"] = losses_of(str(run.directory.model), others, options, run.name)
        shutil.rmtree(run.directory.model, ignore_errors=True)
        found["runs"].append(row)
        record(options, found, method_bars(options, found), run.config)  # the rest may not be reached
    if found["not_run"]:
        record(options, found, method_bars(options, found), run.config)


def forgotten_rows(options: Options) -> dict[str, str]:
    """Write rows that no run is trained on: of each T0 family or of GSM8K, and of the documentation of Python."""
    folder = Path(options.work_dir).resolve() / "material"
    folder.mkdir(parents=True, exist_ok=True)
    texts = [text for _, text in sorted(topics.items()) if len(text) > TEXT_CHARS]
    rows = {"text": [{"text": text[:TEXT_CHARS]} for text in texts[: options.others]]}
    if not options.smoke and hasattr(options, "families"):
        lines = (kit.SHARED / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
        rows["GSM8K"] = [json.loads(line) for line in lines[: options.others]]
    elif not options.smoke:
        tests = [Path(path).read_text(encoding="utf-8").splitlines() for path in kit.pretrained().test]
        rows["T0"] = [json.loads(line) for lines in tests for line in lines[: max(1, options.others // len(tests))]]
    files = {name: folder / f"{name}-{options.others}.jsonl" for name in rows}
    for name, path in files.items():
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows[name]), encoding="utf-8")
    return {name: str(path) for name, path in files.items()}


def losses_of(model: str, files: Mapping[str, str], options: Options, name: str) -> Found:
    """Return the loss of a model on each file; what was scored once is kept, as the model is not."""
    kept = Path(options.work_dir) / f"{name}-others-{options.others}.json"
    losses = dict(json.loads(kept.read_text(encoding="utf-8"))) if kept.exists() else {}
    if lacking := [key for key in files if key not in losses]:
        losses |= {key: score_models(model, [files[key]])[0].value for key in lacking}
        kept.write_text(json.dumps(losses), encoding="utf-8")
    return {key: losses[key] for key in files}


def step_s(options: Options, kind: str, settings: Found) -> float:
    """Measure a step, of blocks the first, a middle and the last: processor seconds of a thread, or of a GPU."""
    config = config_of(options, settings)
    kept = Path(options.work_dir) / f"step {kind}-{kit.digest(config.to_yaml())}.json"
    if not kept.exists():
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        job, medians = read_inputs(config), list[float]()
        replica = Replica(job.loaded.model, job.blocks)
        working = tuple(replica.read(block.index) for block in job.blocks)
        how: Found = {"train": job.config.train, "arguments": local_arguments(job.config), "num_rounds": 8}
        how |= {"seed": 0, "pad_token_id": job.loaded.tokenizer.pad_token_id, "step_time_s": None}
        trainer = LocalTrainer(0, job.train[0], replica, **how)
        for block in sorted({0, len(job.blocks) // 2, len(job.blocks) - 1}):
            seconds = []
            for place in range(STEPS_TIMED):
                began = clock()
                trainer.train(place, block, 1, place, working).trained[:]
                seconds.append(clock() - began)
            medians.append(statistics.median(seconds))
        kept.write_text(json.dumps(fmean(medians)), encoding="utf-8")
    return float(json.loads(kept.read_text(encoding="utf-8")))


def round_s(config: RunConfig, step: float, mbps: float) -> float:
    """Return the seconds of a round over a link, as the plan has them."""
    engine = config.engine.model_copy(update={"step_time_s": step})
    link = config.link.model_copy(update={"upload_mbps": mbps, "download_mbps": mbps})
    return make_plan(config.model_copy(update={"engine": engine, "link": link})).round_s


def method_bars(options: Options, found: Found) -> list[Bar]:
    data = "T0" if hasattr(options, "families") else "GSM8K"
    ends = {way: [run["curve"][-1][2] for run in runs] for way, runs in grouped(found["runs"], "way").items()}
    bars = [
        Bar(f"{data}: final loss, {overlapped} / {serial}", fmean(ends[overlapped]) / fmean(ends[serial]), 1.01)
        for overlapped, serial in kit.ABOUT["llm_methods"]["pairs"]
        if {overlapped, serial} <= set(ends)
    ]
    for overlapped, serial in kit.ABOUT["llm_methods"]["pairs"]:
        longer = [way for way in ends if way.startswith(f"{overlapped}, ") and way.endswith(" more")]
        if longer and serial in ends:
            soon = fmean(times_as_soon(found["runs"], serial, overlapped, *longer))
            bars.append(
                Bar(f"{data}: seconds of {overlapped} to the last loss of {serial}, wire as long", soon, 0.6)
            )
    base = fmean(run["curve"][0][2] for run in found["runs"])
    return bars + [Bar(f"{data}: loss of {way} / base model", fmean(end) / base, 0.9) for way, end in ends.items()]


def times_as_soon(runs: list[Found], serial: str, *overlapped: str) -> list[float]:
    """Return for each seed how soon an overlapped run is first scored as low as the serial one at its end.

    An exchange is taken to last as long as the computation c of a round: T serial rounds are 2 T c, and T
    overlapped ones (T + 1) c. 9.99: no run is as low.
    """
    soon = []
    for of_seed in grouped(runs, "seed").values():
        ends = {run["way"]: (run["curve"][-1][2], run["num_rounds"]) for run in of_seed}
        if serial in ends:
            loss, rounds = ends[serial]
            points = [point for run in of_seed if run["way"] in overlapped for point in run["curve"]]
            reached = [point[0] for point in points if point[2] <= loss]
            soon.append((min(reached) + 1) / (2 * rounds) if reached else 9.99)
    return soon


def llm_methods_section(found: Found) -> Found:
    results, links = found["results"], [f"{mbps:g}" for mbps in found["options"]["links"]]
    runs, base, said = grouped(results["runs"], "way"), results["base"], kit.ABOUT["llm_methods"]

    def mean(way: str, of: Callable[[Found], float]) -> float:
        return fmean(of(run) for run in runs[way])

    def at(run: Found, place: float, axis: int) -> float:
        places, losses = ([point[which] for point in run["curve"]] for which in (axis, 2))
        return float(np.interp(place, places, losses))

    def bold(rows: list[list[str]], columns: range) -> list[list[str]]:
        for column in columns:
            best = min(rows, key=lambda row: float(row[column].split()[0].strip("†")))
            best[column] = f"**{best[column]}**"
        return rows

    starts = spread({run["seed"]: run["curve"][0][2] for run in results["runs"]}.values())
    first = []
    for way, group in runs.items():
        megabytes = mean(way, lambda run: run["curve"][-1][1] / run["num_rounds"] / 1e6)
        cells = [way, f"{group[0]['num_rounds']}", f"{megabytes:.1f}"]
        cells += [f"{mean(way, lambda run, mbps=mbps: run['round_s'][mbps]):.1f}" for mbps in links]
        cells.append(spread(run["curve"][-1][2] for run in group))
        first.append(cells + [f"{mean(way, lambda run, key=key: run['forgotten'][key]):.3f}" for key in base])
    first = bold(first, range(3 + len(links), len(first[0])))
    first.insert(0, ["base model", *[""] * (2 + len(links)), starts, *(f"{loss:.3f}" for loss in base.values())])
    head = ["method", "rounds", "MB a client and round", *(f"s a round, {mbps} Mbit/s" for mbps in links)]
    parts: list[str | Found] = [table([*head, "loss", *base], first)]
    whole = {way: mean(way, lambda run: run["curve"][-1][1]) for way in runs}
    budgets = sorted({whole[way] for way in said["budgets"] if way in whole})
    places: list[tuple[str, Callable[[str], tuple[float, int]]]] = [
        (f"{budget / 1e6:.0f} MB", lambda _, budget=budget: (budget, 1)) for budget in budgets
    ]
    last = next((way for way in said["budgets"] if way in runs), None)
    for mbps in links if last else ():
        seconds = mean(last, lambda run, mbps=mbps: run["round_s"][mbps] * run["num_rounds"])

        def in_rounds(way: str, mbps: str = mbps, seconds: float = seconds) -> tuple[float, int]:
            return seconds / mean(way, lambda run: run["round_s"][mbps]), 0

        places.append((f"{mbps} Mbit/s, {seconds:.0f} s", in_rounds))
    rows = []
    for way in runs:
        cells = [way]
        for _, place in places:
            where, axis = place(way)
            ended = "†" * (where > 1.001 * mean(way, lambda run, axis=axis: run["curve"][-1][axis]))
            cells.append(f"{mean(way, lambda run, where=where, axis=axis: at(run, where, axis)):.4f}{ended}")
        rows.append(cells)
    if places:
        made = table(["method", *(name for name, _ in places)], bold(rows, range(1, len(places) + 1)))
        scored = [f"{place}" for place, *_ in results["runs"][0]["curve"]]
        parts += [said["equal"].format(scored=f"{', '.join(scored[:-1])} and {scored[-1]}"), made]
    parts += [f"Not run, since the time was over: {', '.join(results['not_run'])}."] if results["not_run"] else []
    steps = ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in results["step_s"].items())
    seeds = found["options"]["seeds"]
    families = ", ".join(found["options"].get("families", []))
    facts: Found = {
        "families": families,
        "seeds": f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
        "steps": steps,
    }
    return section(found["options"]["benchmark"], found, *parts, device=results["device"], **facts)


# -- what the answers are worth: right numbers, and rules that are followed
def llm_answers(options: Options) -> None:
    """Tune on GSM8K as above, and score answers of the base model and of the tuned ones: numbers, and rules."""
    model, asked = material_of(options).model, questions(options)
    found: list[Found] = [{"way": "base model"} | answers_of(model, asked, options, f"base-{kit.digest(model)}")]
    for way in options.only:
        run = run_of(options, way, kit.ABOUT["llm_methods"]["ways"][way])
        found[0]["loss"] = base = run.summary["initial_eval_loss"]
        told = run.told("method", "delay", "num_rounds") | {"way": way, "loss": run.loss}
        found.append(told | answers_of(str(run.directory.model), asked, options, run.name))
        bars = [Bar(f"GSM8K: loss of {row['way']} / base model", row["loss"] / base, 0.9) for row in found[1:]]
        record(options, found, bars, run.config)  # the rest may not be reached


def questions(options: Options) -> dict[str, Path]:
    """Write what the models are asked: held-out rows, and for short texts that keep a rule each; task → file."""
    said, tests = kit.ABOUT["llm_answers"], material_of(options).test
    held_out = [line for path in tests for line in Path(path).read_text(encoding="utf-8").splitlines()]
    rules: list[Found] = [
        {"prompt": said["request"].format(topic=topic, ask=rule["ask"]), "instruction_id_list": [rule["id"]]}
        | {"kwargs": [rule.get("kwargs", {})]}
        for topic, rule in product(said["topics"][: options.topics], said["rules"])
    ]
    files = {}
    for task, lines in {"exact_match": held_out[: options.answers], "ifeval": map(json.dumps, rules)}.items():
        text = "".join(f"{line}\n" for line in lines)
        files[task] = Path(options.work_dir).resolve() / "material" / f"{task}-{kit.digest(text)}.jsonl"
        files[task].write_text(text, encoding="utf-8")
    return files


def answers_of(model: str, asked: Mapping[str, Path], options: Options, name: str) -> Found:
    """Return by score which answers of a model are right, as letters 1 and 0; answers are kept, as losses are."""
    right: Found = {}
    for task, path in asked.items():
        limit = options.new_tokens if task == "exact_match" else options.rule_tokens
        kept = Path(options.work_dir) / f"{name}-{path.stem}-{limit}.json"
        if not kept.exists():
            scores = score_models(model, [str(path)], task=task, max_new_tokens=limit)
            kept.write_text(json.dumps(score_records(scores), indent=1), encoding="utf-8")
        rows = json.loads(kept.read_text(encoding="utf-8"))
        right[task] = "".join(f"{row['model_score']:.0f}" for row in rows)
        if task == "exact_match":
            tokenize = load_tokenizer(model).tokenize
            right["endless"] = sum(len(tokenize(row["model"])) >= limit for row in rows)
            right["last_number"] = "".join(f"{last(row['model']) == last(row['reference']):d}" for row in rows)
    return right


def last(text: str) -> float | None:
    """Return the last number of an answer, wherever it stands."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share by Wilson's score."""
    middle, half = right + z * z / 2, z * math.sqrt(right * (count - right) / count + z * z / 4)
    return (middle - half) / (count + z * z), (middle + half) / (count + z * z)


def mcnemar(gained: int, lost: int) -> float:
    """Return the p of pairs that part so: McNemar's test, exact and two-sided."""
    tail = sum(math.comb(gained + lost, fewer) for fewer in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (gained + lost))


def llm_answers_section(found: Found) -> Found:
    said, rows, (base, *_) = kit.ABOUT["llm_answers"], [], found["results"]
    for (score, name), row in product(said["scores"].items(), found["results"]):
        right, count = row[score].count("1"), len(row[score])
        cells = [name, row["way"], f"{row['loss']:.4f}", f"{right} of {count}", f"{right / count:.1%}"]
        cells.append("{:.1%} to {:.1%}".format(*wilson(right, count)))
        pairs = list(zip(row[score], base[score], strict=True))
        gained, lost = pairs.count(("1", "0")), pairs.count(("0", "1"))
        cells += [f"+{gained} −{lost}", f"{mcnemar(gained, lost):.2g}"] if row is not base else ["", ""]
        rows.append(cells)
    endless = ", ".join(f"{row['endless']} of {row['way']}" for row in found["results"])
    return section("llm_answers", found, table(said["head"], rows), num_rules=len(said["rules"]), endless=endless)


# -- text of a language that the model hardly knows
def llm_text(options: Options) -> None:
    """Train on with plain text of another language: bits per byte, and what is forgotten."""
    material, model = pages(options), material_of(options).model if options.smoke else smollm2()
    others = forgotten_rows(options)
    found: Found = {"base": losses_of(model, others, options, f"base-{kit.digest(model)}"), "runs": []}
    a_round = 2 * options.steps * options.batch_size * options.row_bytes  # of two clients
    rounds = math.ceil(options.kilobytes * 1000 / a_round)
    for way in options.only:
        settings: Found = {"data.partition.scheme": "iid", "federation.num_clients": 2, "evaluation.num_answers": 0}
        settings |= {"federation.num_rounds": rounds, "evaluation.every_rounds": max(1, rounds // 4)}
        settings |= kit.training(options) | kit.ABOUT["llm_methods"]["ways"][way]
        config = kit.configured(kit.Material(model, *material), settings)
        run = kit.Kept(config, options, f"text {way}".replace(" ", "-"))
        tested = read_inputs(config).test
        bits = sum(label >= 0 for row in tested for label in row.labels) / (
            len(tested) * options.row_bytes * math.log(2)
        )
        curve = [[0, 0.0, run.summary["initial_eval_loss"] * bits]]
        curve += [[p["round"] * a_round / 1e3, p["bytes"] / 2e6, p["loss"] * bits] for p in run.points]
        row = {"way": way, "curve": curve} | run.told("method", "delay", "num_rounds")
        found["runs"].append(row | {"forgotten": losses_of(str(run.directory.model), others, options, run.name)})
        shutil.rmtree(run.directory.model, ignore_errors=True)
        record(options, found, [], config)  # the rest may not be reached


def pages(options: Options) -> tuple[tuple[str], tuple[str]]:
    """Write rows of German manual pages, one page in ten held out: training and test file."""
    folder = Path(options.work_dir).resolve() / "pages"
    folder.mkdir(parents=True, exist_ok=True)
    train, test = (folder / f"{name}-{options.row_bytes}.jsonl" for name in ("train", "test"))
    if not test.exists():
        texts = [text for _, text in sorted(topics.items())] if options.smoke else german(folder)
        kept: dict[Path, list[str]] = {train: [], test: []}
        for number, text in enumerate(texts):
            data, size = text.encode(), options.row_bytes
            cuts = [data[at : at + size].decode(errors="ignore") for at in range(0, len(data) - size, size)]
            kept[test if number % 10 == 0 else train] += cuts
        for path, rows in kept.items():
            path.write_text("".join(f"{json.dumps({'text': row})}\n" for row in rows), encoding="utf-8")
    return (str(train),), (str(test),)


def german(folder: Path) -> list[str]:
    """Return the manual pages of a package of Debian's, which apt loads."""
    package = kit.ABOUT["llm_text"]["package"]
    subprocess.run(["apt-get", "-qq", "download", package], cwd=folder, check=False)
    loaded = sorted(folder.glob(f"{package}_*.deb"))
    if not loaded:
        sys.exit(f"{package} is not to be had from apt; --smoke runs on other text")
    subprocess.run(["dpkg-deb", "-x", loaded[0], "."], cwd=folder, check=True)
    found = [path for path in sorted(folder.glob("usr/share/man/de/man*/*.gz")) if not path.is_symlink()]
    return [plain(gzip.decompress(path.read_bytes()).decode("utf-8")) for path in found]


def plain(page: str) -> str:
    """Return the words of a manual page without the marks of its format."""
    lines = [line for line in page.splitlines() if not line.startswith((".", "'", '\\"'))]
    words = re.sub(r"\\f(?:[A-Z]|\(..|\[\w*\])|\\[&%:/,]|\\s[-+]?\d", "", " ".join(lines))
    for mark, letter in {"\\-": "-", "\\(bu": "•", "\\(aq": "'", "\\e": "\\", "\\~": " ", "\\(co": "©"}.items():
        words = words.replace(mark, letter)
    return re.sub(r"\s+", " ", words)


def llm_text_section(found: Found) -> Found:
    results, panels = found["results"], {"kB of text": Found(), "MB over a client's link": Found()}
    rows, places = [], [round(point[0]) for point in results["runs"][0]["curve"]]
    for run in results["runs"]:
        for axis, curves in enumerate(panels.values()):
            curves[run["way"]] = [[point[axis], point[2]] for point in run["curve"]]
        sent = run["curve"][-1][1] / run["num_rounds"]
        cells = [run["way"], f"{sent:.1f}", *(f"{point[2]:.4f}" for point in run["curve"])]
        rows.append(cells + [f"{loss:.3f}" for loss in run["forgotten"].values()])
    rows.insert(
        0,
        ["base model", "", rows[0][2], *[""] * (len(places) - 1), *(f"{x:.3f}" for x in results["base"].values())],
    )
    leads = [
        min(results["runs"], key=lambda run, at=at: run["curve"][at][2])["way"] for at in range(1, len(places))
    ]
    told = "; ".join(f"after {kilobytes} kB {way}" for kilobytes, way in zip(places[1:], leads, strict=True))
    head = ["trained", "MB a client and round", *(f"bits a byte, {at} kB" for at in places), *results["base"]]
    figure = {"figure": "llm_text.svg", "y": "bits per byte", "linear": ["kB of text"], "panels": panels}
    parts = [table(head, rows), f"Fewest bits a byte: {told}.", figure]
    rounds, package = results["runs"][0]["num_rounds"], kit.ABOUT["llm_text"]["package"]
    return section("llm_text", found, *parts, rounds=rounds, package=package)


# -- adapters on the layers that are not the active block: by hand, as the product does not have it
def beside_blocks(options: Options) -> None:
    """Train a block, adapters, or a block and the adapters of all other layers in a round, after BREAD."""
    found = list[Found]()
    for data, way in product(options.data, options.only):
        config, rates = beside_config(data, way, options), kit.ABOUT["beside_blocks"]["of"][data]["rates"][way]
        kept = Path(options.work_dir) / f"beside {data} {way} {kit.digest(f'{config.to_yaml()}{rates}')}.json"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(train_beside(config, rates, "Muon" in way)), encoding="utf-8")
        found.append({"data": data, "way": way, "rates": rates} | json.loads(kept.read_text(encoding="utf-8")))
        record(options, found, [], config)  # the rest may not be reached


def beside_config(data: str, way: str, options: Options) -> RunConfig:
    """Make the configuration of rows, blocks and steps; nothing of the product trains by it."""
    about = kit.ABOUT["beside_blocks"]["of"][data]
    if data == "t0" and not options.smoke:
        material = kit.pretrained(
            *(f"t0/{family}" for family in ("ag_news", "rotten_tomatoes", "dbpedia_14", "glue_qqp"))
        )
    else:
        material = material_of(options)
    rounds = max(4, round(about["rounds"] * options.part))
    settings = about["settings"] | {"federation.num_rounds": rounds, "seed": options.seed}
    settings |= {"blocks.layers_per_block": about["layers"], "train.learning_rate": max(about["rates"][way])}
    return kit.configured(material, settings | {"blocks.allow_unvisited": True})


def train_beside(config: RunConfig, rates: list[float], by_muon: bool) -> Found:
    """Average what clients train from one state, round after round; return scored rounds and bytes."""
    job, (block_rate, adapter_rate) = read_inputs(config), rates
    model, arguments, pad = job.loaded.model, local_arguments(config), job.loaded.tokenizer.pad_token_id
    add_adapters(model, rank=8, alpha=16.0, seed=config.seed)
    every = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    layered = [block for block in job.blocks if block.layers]
    order = generator_for(config.seed, "beside blocks").permuted(
        [[*range(len(layered))]] * config.federation.num_rounds, axis=1
    )
    visits = order.reshape(-1)  # every block once, in another order each time
    evaluate = partial(evaluate_loss, model, job.test, pad_token_id=pad)
    curve, sent, steps = [[0, 0.0, evaluate()]], 0.0, int(config.train.num_local_steps)
    total = config.federation.num_rounds * steps
    for t in range(config.federation.num_rounds):
        block = layered[visits[t]]
        of_block = [every[name] for name in block.parameter_names if block_rate]
        active = tuple(f"{block.layers_path}.{layer}." for layer in block.layers) if block_rate else ()
        of_adapters = [
            p
            for name, p in every.items()
            if "lora_" in name and adapter_rate and not name.startswith(active or ("-",))
        ]
        trained = [*of_block, *of_adapters]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        start, mean = [p.detach().clone() for p in trained], [torch.zeros_like(p) for p in trained]
        rows = sum(map(len, job.train))
        for client_id, examples in enumerate(job.train):
            restore(trained, start)
            optimizers = [torch.optim.AdamW(of_adapters, weight_decay=0.0)] if of_adapters else []
            matrices = [p for p in of_block if by_muon and p.ndim == 2]
            others = [p for p in of_block if not by_muon or p.ndim != 2]
            optimizers_of_block = [torch.optim.AdamW(others, weight_decay=0.0)] if others else []
            if matrices:
                optimizers_of_block.append(
                    torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
                )
            batches = round_batches(
                examples,
                seed=config.seed,
                client_id=client_id,
                first_step=t * steps,
                num_local_steps=steps,
                per_device_train_batch_size=config.train.per_device_train_batch_size,
                gradient_accumulation_steps=1,
                pad_token_id=pad,
            )
            for step, (batch,) in enumerate(batches, t * steps):
                share = learning_rate_at(arguments, step, total) / arguments.learning_rate
                loss = sum_loss(
                    model,
                    input_ids_BT=batch.input_ids_BT,
                    attention_mask_BT=batch.attention_mask_BT,
                    labels_BT=batch.labels_BT,
                )
                (loss / count_label_tokens(batch.labels_BT)).backward()
                for rate, group, of_group in (
                    (block_rate, of_block, optimizers_of_block),
                    (adapter_rate, of_adapters, optimizers),
                ):
                    torch.nn.utils.clip_grad_norm_(group, arguments.max_grad_norm)
                    for optimizer in of_group:
                        optimizer.param_groups[0]["lr"] = rate * share
                        optimizer.step()
                        optimizer.zero_grad()
            for total_of, parameter, before in zip(mean, trained, start, strict=True):
                total_of += (parameter.detach() - before) * (len(examples) / rows)
        restore(trained, [before + change for before, change in zip(start, mean, strict=True)])
        sent += 4 * sum(parameter.numel() for parameter in trained)
        if (t + 1) % max(1, config.federation.num_rounds // 4) == 0:
            curve.append([t + 1, sent, evaluate()])
    return {"curve": curve, "rounds": config.federation.num_rounds}


def restore(parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    """Give parameters their values."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def beside_blocks_section(found: Found) -> Found:
    said, rows = kit.ABOUT["beside_blocks"], list[list[str]]()
    for data, runs in grouped(found["results"], "data").items():
        budgets = [run["curve"][-1][1] for way in ("adapters", "a block") for run in runs if run["way"] == way]
        for run in runs:
            losses, moved = [point[2] for point in run["curve"]], [point[1] for point in run["curve"]]
            rates = ", ".join(f"{rate:g}" for rate in run["rates"] if rate)
            cells = [data, run["way"], rates, f"{moved[-1] / run['rounds'] / 1e6:.2f}"]
            cells += [f"{losses[at]:.4f}" for at in (0, len(losses) // 4, len(losses) // 2, -1)]
            cells += [f"{float(np.interp(b, moved, losses)):.4f}{'†' * (b > 1.001 * moved[-1])}" for b in budgets]
            rows.append(cells + [""] * (2 - len(budgets)))
    return section("beside_blocks", found, table([*said["head"], "bytes of adapters", "bytes of blocks"], rows))


llm_more_section = llm_t0_section = llm_longer_section = llm_methods_section
TRIED = [*kit.ABOUT["llm_search"]["tried"]]
WAYS = [*kit.ABOUT["llm_methods"]["ways"]]
BENCHMARKS = benchmarks(
    globals(),
    llm_search={"only": TRIED},
    llm_methods={"only": WAYS},
    llm_more={"only": WAYS},
    llm_t0={"only": WAYS},
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(__doc__, BENCHMARKS)
