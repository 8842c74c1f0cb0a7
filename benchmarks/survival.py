"""What a run survives: kills, broken links, faults, clients that drop or attack, broken input, hidden updates.

.venv/bin/python benchmarks/survival.py kill_resume --kills 50 --toy
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from itertools import product
from operator import truediv
from pathlib import Path
from statistics import fmean, median
from typing import Any

import _record as kit
import numpy as np
import torch
from _record import Bar, Found, Options, benchmarks, main, record, section, spread, table, table_of
from deployed import PATIENCE_S, POLL_S, SITES, RealFederation
from torch import Tensor

from cuttable_proxy import CuttableProxy
from masked_wires import MaskedWires
from message_sequences import PLAYS
from parablock.algorithm.fixed_point import EXTRA_WORDS, FixedPointAggregation, FixedPointGrid
from parablock.algorithm.robust import Rule
from parablock.algorithm.sequential import OracleProblem, run_sequential
from parablock.config.keys import RunConfig
from parablock.config.load import load_config, parse_config
from parablock.config.section import KINDS_AT
from parablock.deploy.direct_local import HOST, LocalSites
from parablock.errors import CodecError, ConfigError
from parablock.experiment.inputs import read_inputs
from parablock.methods.choose import make_method_model
from parablock.seeding import generator_for
from parablock.storage.audit_log import AuditLog, verify
from parablock.storage.release_ledger import RELEASE, ReleaseLedger, fingerprint
from parablock.storage.run_directory import RunDirectory
from parablock.wire import messages
from parablock.wire.quantize import pack
from parablock.wire.transport import Parcel
from sealed_messages import every_message, forged, parts_of, sealed

ROUND_S = 1.0
SAME, BACK = "same model as one process", "{asked_s:.1f} + {load_s:.1f} + {rest_s:.1f}"


def same_as(expected: str) -> Callable[[Found], str]:
    """Return what says in a table whether a run ended with this model."""
    return lambda run: "yes" if run["model_sha256"] == expected else "**no**"


def sha256(directory: Path) -> str:
    return str(RunDirectory(directory).read_summary()["model_sha256"])


def rounds_recorded(directory: Path) -> int:
    metrics = RunDirectory(directory).metrics
    return metrics.read_text(encoding="utf-8").count("\n") if metrics.exists() else 0


# -- one process, killed and resumed
def kill_resume(options: Options) -> None:
    """Kill a run at random moments and resume it: the model must be that of the run that nobody disturbed."""
    folder = kit.fresh_folder(options)
    material = (
        kit.generated(folder / "material", num_clients=3)
        if options.toy
        else kit.material_of(options, "ag_news", "app_reviews", "glue_qqp", num_clients=3)
    )
    settings = kit.training(options) | {"engine.clock": None}
    config = kit.configured(material, settings)
    undisturbed_s = run_to_the_end(config, folder / "undisturbed")
    run_to_the_end(kit.configured(material, settings | {"seed": options.seed + 1}), folder / "another-seed")
    expected, other = sha256(folder / "undisturbed"), sha256(folder / "another-seed")
    draw, trials = generator_for(options.seed, "kill"), list[Found]()
    while sum(trial["was_running"] for trial in trials) < options.kills and len(trials) < 2 * options.kills:
        after_rounds, part = int(draw.integers(0, options.rounds)), float(draw.uniform())
        directory = folder / f"killed-{len(trials)}"
        trials.append(kill_and_resume(config, directory, after_rounds, part * undisturbed_s / options.rounds))
    equal = sum(trial["was_running"] and trial["model_sha256"] == expected for trial in trials)
    bars = [
        Bar("killed runs that end with the undisturbed model", equal, options.kills, at_most=False),
        Bar("runs of another seed that do", float(other == expected), 0),
    ]
    results = {"undisturbed": expected, "another_seed": other, "undisturbed_s": undisturbed_s, "trials": trials}
    record(options, results, bars, config)


def kill_resume_section(found: Found) -> Found:
    results = found["results"]
    trials = [trial for trial in results["trials"] if trial["was_running"]]
    kills = Counter(trial["resumed_from"] for trial in trials)
    same = Counter(t["resumed_from"] for t in trials if t["model_sha256"] == results["undisturbed"])
    rows = [
        [re.sub(r"round-0*", "the checkpoint of round ", origin), str(kills[origin]), str(same[origin])]
        for origin in sorted(kills, key=lambda origin: (origin != "the start", origin))
    ]
    made, num_trials = table(["resumed from", "kills", "same model as undisturbed"], rows), len(results["trials"])
    return section("kill_resume", found, made, ended=num_trials - len(trials), trials=num_trials)


def run_to_the_end(config: RunConfig, directory: Path) -> float:
    """Run undisturbed; return the seconds from its first file to its end."""
    process, began = start(config, directory), time.perf_counter()
    finish(process, directory)
    return time.perf_counter() - began


def kill_and_resume(config: RunConfig, directory: Path, after_rounds: int, after_s: float) -> Found:
    """Kill a run so many seconds after so many of its rounds, and resume it."""
    process, run = start(config, directory), RunDirectory(directory)
    while process.poll() is None and rounds_recorded(directory) < after_rounds:
        time.sleep(POLL_S / 10)
    time.sleep(after_s)
    process.kill()
    process.wait()
    complete = run.summary.exists() and run.read_summary()["status"] == "completed"
    rounds, checkpoints = rounds_recorded(directory), sorted(path.name for path in run.checkpoints.glob("round-*"))
    was_running = process.returncode != 0 and not complete
    if was_running:
        finish(parablock(directory, "resume", str(directory)), directory)
    origin = checkpoints[-1] if checkpoints else "the start"
    found = {"was_running": was_running, "rounds_recorded": rounds, "resumed_from": origin}
    print(directory.name, found)
    return found | {"model_sha256": sha256(directory)}


def start(config: RunConfig, directory: Path) -> subprocess.Popen[bytes]:
    """Start a run and wait until there is something of it to resume."""
    file = directory.with_suffix(".yaml")
    file.write_text(config.to_yaml(), encoding="utf-8")
    process = parablock(directory, "run", str(file), "--output-dir", str(directory))
    while process.poll() is None and not RunDirectory(directory).config.exists():
        time.sleep(POLL_S / 10)
    return process


def parablock(directory: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start the command line; what it says goes into a file beside the run."""
    with directory.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "parablock", *arguments], stdout=log, stderr=log)


def finish(process: subprocess.Popen[bytes], directory: Path) -> None:
    if process.wait():
        sys.exit(f"parablock ended with {process.returncode}:\n{directory.with_suffix('.log').read_text()}")


# -- a deployment of real processes, killed or cut off
def kill_sites(options: Options) -> None:
    """Kill sites and the server, and cut the network, at random moments, one of each in a run."""
    folder = kit.fresh_folder(options).resolve()
    config = deployed(kit.generated(folder / "material", num_clients=SITES), options)
    expected, other = in_one_process(config, folder / "one-process"), in_one_process(config, folder / "other", 1)
    draw, runs = generator_for(options.seed, "kill sites"), list[Found]()
    while num_kills(runs) < options.kills and len(runs) < options.kills:
        load = os.getloadavg()[0]
        with RealSites(folder / f"run-{len(runs)}", config, options.bytes_per_s) as town:
            runs.append(disturbed(town, draw, options, options.kills - num_kills(runs)) | {"load": load})
            note_returns(town, runs[-1]["kills"], options.outage_s)
        bars, kills = bars_of_kills(runs, options.kills, expected, other)
        if back := [kill["back_s"] for kill in kills if kill.get("alone")]:
            name = "seconds from the start of a killed site until it has trained, without the loading of its model"
            bars += [Bar(f"{name}: {word}", of(back), 5) for word, of in (("median", median), ("most", max))]
        record(options, {"undisturbed": expected, "another_seed": other, "runs": runs}, bars, config)


def num_kills(runs: list[Found]) -> int:
    return sum(len(run["kills"]) for run in runs)


def bars_of_kills(runs: list[Found], wanted: int, expected: str, other: str) -> tuple[list[Bar], list[Found]]:
    """Return what every kill has to come to, and the kills."""
    kills = [kill for run in runs for kill in run["kills"]]
    same = sum(len(run["kills"]) for run in runs if run["model_sha256"] == expected)
    bars = [
        Bar("kills and cuts of a running deployment", len(kills), wanted, at_most=False),
        Bar("of them in runs that end with the undisturbed model", same, len(kills), at_most=False),
        Bar("runs of another seed that do", float(other == expected), 0),
    ]
    return bars, kills


def told_kills(run: Found) -> str:
    return ", ".join(f"{kill['part']} after {kill['rounds_done']}" for kill in run["kills"])


def kill_sites_section(found: Found) -> Found:
    same = same_as(found["results"]["undisturbed"])
    rows = [
        [
            str(number),
            told_kills(run),
            ", ".join(
                BACK.format(**kill, rest_s=kill["back_s"] - kill["asked_s"])
                for kill in run["kills"]
                if "back_s" in kill
            ),
            *(f"{run[key]:.0f}" for key in ("seconds", "load")),
            same(run),
        ]
        for number, run in enumerate(found["results"]["runs"])
    ]
    columns = ["run", "what, after how many rounds", "site back: program + model + rest, s", "s", "load", SAME]
    return section("kill_sites", found, table(columns, rows))


class RealSites:
    """A server and sites, each a process of the command line, some of which come later; a bad link before each."""

    def __init__(self, directory: Path, config: RunConfig, bytes_per_s: float, later: Sequence[int] = ()) -> None:
        self.later = later
        with socket.create_server((HOST, 0)) as found:
            self.port = int(found.getsockname()[1])
        self.output_dir, self.sites = directory, LocalSites(directory, config)
        self.links = [CuttableProxy(self.port, bytes_per_s) for _ in range(self.sites.num_sites)]
        self.sites.prepare()
        self.file = directory.with_suffix(".yaml")
        self.file.write_text(config.to_yaml(), encoding="utf-8")

    def __enter__(self) -> RealSites:
        self.start_server()
        for client_id in range(self.sites.num_sites):
            if client_id not in self.later:
                self.start_site(client_id)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.kill()
        self.server.wait()
        self.sites.__exit__(None, None, None)
        for link in self.links:
            link.close()

    def has_ended(self) -> bool:
        return self.server.poll() is not None

    def wait(self) -> None:
        self.server.wait(PATIENCE_S)
        finish(self.server, self.output_dir)

    def strike(self, part: str, site: int, outage_s: float) -> None:
        """Kill a process, and start it again at once; or cut a site off for a while, which goes on meanwhile."""
        process = self.server if part == "server" else self.sites.processes[site]
        if part == "network":
            self.links[site].cut(outage_s)
        else:
            process.kill()
            process.wait()
            self.start_server() if part == "server" else self.start_site(site)

    def start_server(self) -> None:
        keys = ["--keys", str(self.sites.keys_of("server")), "--address", f"{HOST}:{self.port}"]
        keys += ["--sites", str(self.sites.num_sites - len(self.later))]
        arguments = ["deploy", "server", str(self.file), "--output-dir", str(self.output_dir), *keys]
        self.server = parablock(self.output_dir, *arguments)

    def start_site(self, client_id: int) -> None:
        self.sites.start(client_id, f"{HOST}:{self.links[client_id].port}")

    def lines_of(self, client_id: int) -> list[tuple[float, str]]:
        """Return what a site's log says, with the times in seconds since 1970."""
        lines = re.findall(r"(?m)^(\d{4}-\S+ [\d:]+),(\d{3}) (.*)$", self.sites.log(client_id).read_text())
        return [(datetime.fromisoformat(at).timestamp() + int(ms) / 1e3, said) for at, ms, said in lines]


def disturbed(town: RealSites | RealFederation, draw: np.random.Generator, options: Options, left: int) -> Found:
    """Kill and cut at moments drawn at random, as often as is `left` at most; go on until the run ends."""
    kills, began_s, last = list[Found](), time.time(), options.rounds - 2
    moments = sorted((int(draw.integers(1, last)), float(draw.uniform(0, ROUND_S))) for _ in options.parts)
    parts = list(map(str, draw.permutation(options.parts)))
    for part, (after_rounds, part_s) in list(zip(parts, moments, strict=True))[:left]:
        while not town.has_ended() and rounds_recorded(town.output_dir) < after_rounds:
            if time.time() - began_s > PATIENCE_S:
                raise TimeoutError(f"look at {town.output_dir}")
            time.sleep(POLL_S)
        time.sleep(part_s)
        if town.has_ended():
            break
        site, rounds_done = int(draw.integers(SITES)), rounds_recorded(town.output_dir)
        town.strike(part, site, options.outage_s)
        kills.append({"part": part, "site": site, "rounds_done": rounds_done, "at_s": time.time()})
    town.wait()
    return {"kills": kills, "seconds": time.time() - began_s, "model_sha256": sha256(town.output_dir)}


def note_returns(town: RealSites, kills: list[Found], outage_s: float) -> None:
    """Add to the kills of sites how long each took to be back, and whether it could: its network may be cut."""
    for kill in kills:
        if kill["part"] == "site":
            cut = [each["part"] == "network" and each["site"] == kill["site"] for each in kills]
            others = [
                (each["at_s"], each["at_s"] + outage_s * is_cut) for each, is_cut in zip(kills, cut, strict=True)
            ]
            kill.update(back_after(town.lines_of(kill["site"]), kill["at_s"], others))


def back_after(lines: list[tuple[float, str]], start_s: float, disturbed: list[tuple[float, float]]) -> Found:
    """Return how long a site took to train again after a start, and how long of it to load its model.

    It was alone where nothing else was disturbed from then on; what was is told with when it began and ended.
    """
    told = [(at_s, said) for at_s, said in lines if at_s >= start_s]
    trained = [at_s for at_s, said in told if "trained" in said]
    if not trained:  # the run ended before
        return {}
    asked, loaded = (
        max(at_s for at_s, said in told if what in said and at_s <= trained[0])
        for what in ("reads its rows", "the model is there")
    )
    alone = not any(start_s < end_s and at_s <= trained[0] for at_s, end_s in disturbed)
    load_s = loaded - asked
    return {"back_s": trained[0] - start_s - load_s, "load_s": load_s, "asked_s": asked - start_s, "alone": alone}


# -- sites that come and go
def moving_sites(options: Options) -> None:
    """Let sites join, leave and return, and one be removed whose labels are false; compare model and loss."""
    folder = kit.fresh_folder(options).resolve()
    if options.smoke:
        made = kit.generated(folder / "material", num_clients=options.sites, examples_per_client=options.examples)
    else:
        made = kit.pretrained("gsm8k", train="/train.jsonl", test="/test.jsonl")
    whole = folder / "rows.jsonl"
    rows = [line for path in made.train for line in Path(path).read_text(encoding="utf-8").splitlines()]
    whole.write_text("\n".join(rows[: options.sites * options.examples]) + "\n", encoding="utf-8")
    how: Found = {"engine.clock": None, "data.partition.scheme": "iid", "federation.num_clients": options.sites}
    config = kit.configured(replace(made, train=(str(whole),)), kit.training(options) | how)
    alone = config.engine.model_copy(update={"name": "inprocess"})
    undisturbed = kit.run_quietly(config.model_copy(update={"engine": alone}), folder / "undisturbed")

    joining, leaving, liar = options.joining, options.leaving, options.removed
    town = RealSites(folder / "moving", config, options.bytes_per_s, later=joining)
    falsify(whole, town.sites.site_file(liar))
    third, moved, began_s = options.rounds // 3, list[str](), time.time()

    def after(rounds: int, what: str) -> None:
        while not town.has_ended() and rounds_recorded(town.output_dir) < rounds:
            if time.time() - began_s > PATIENCE_S:
                raise TimeoutError(f"look at {town.output_dir}")
            time.sleep(POLL_S)
        moved.append(f"{what} after round {rounds_recorded(town.output_dir)}")

    with town:
        after(options.rounds // 8, f"{liar} is removed")
        finish(parablock(town.output_dir, "deploy", "remove", str(town.output_dir), str(liar)), town.output_dir)
        after(third, f"{' and '.join(map(str, joining))} join")
        for client_id in joining:
            town.start_site(client_id)
        for number, client_id in enumerate(leaving, 1):
            after(third + 4 * number, f"{client_id} leaves")
            town.sites.processes[client_id].terminate()
        after(2 * third, f"{leaving[0]} returns")
        town.start_site(leaving[0])
        town.wait()
    trained = {client_id: trained_by(town, client_id) for client_id in range(options.sites)}
    counted = [row["participants"] for row in kit.metrics_of(town.output_dir)]
    summary = json.loads((town.output_dir / "summary.json").read_text(encoding="utf-8"))
    found = {"moved": moved, "counted": counted, "trained": trained, "seconds": time.time() - began_s}
    oracle, other = (
        of_the_oracle(config, whole, liar, of, trained, folder / "oracle") for of in (counted, counted[::-1])
    )
    found |= {"oracle": oracle, "oracle_of_another_membership": other, "model_sha256": summary["model_sha256"]}
    losses = dict(
        zip(LOSSES, [undisturbed[key] for key in (LOSSES[0], LOSSES[2])] + [summary[LOSSES[2]]], strict=True)
    )
    bars = [
        Bar(
            "the model is the oracle's, told the same membership",
            float(oracle == summary["model_sha256"]),
            1,
            False,
        ),
        Bar("and that of an oracle told another", float(other == summary["model_sha256"]), 0),
        Bar("final loss / undisturbed", losses[LOSSES[2]] / losses[LOSSES[1]], 1.03),
    ]
    record(options, found | losses, bars, config)


def moving_sites_section(found: Found) -> Found:
    results = found["results"]
    same = results["oracle"] == results["model_sha256"] != results["oracle_of_another_membership"]
    rows = [
        ["model", "bitwise the oracle's, told the same" if same else "ANOTHER than the oracle's"],
        ["updates that counted in a round", spread_of_counts(results["counted"])],
        ["loss: base model, undisturbed, with moves", ", ".join(f"{results[key]:.4f}" for key in LOSSES)],
        ["loss / undisturbed", f"{results[LOSSES[2]] / results[LOSSES[1]]:.3f}"],
        ["seconds", f"{results['seconds']:.0f}"],
    ]
    moves = "; ".join(results["moved"])
    return section("moving_sites", found, table(["what", "found"], rows), moves=moves)


def spread_of_counts(counted: list[list[int]]) -> str:
    numbers = [len(clients) for clients in counted]
    return f"{min(numbers)} to {max(numbers)}, {fmean(numbers):.1f} in the mean"


def falsify(rows: Path, site_file: Path) -> None:
    """Give a site rows each of which has the answer of another."""
    told = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    answers = [row["answer"] for row in told]
    moved = zip(told, answers[len(answers) // 2 :] + answers[: len(answers) // 2], strict=True)
    lines = (json.dumps(row | {"answer": answer}) + "\n" for row, answer in moved)
    Path(false_rows(rows)).write_text("".join(lines), encoding="utf-8")
    site_file.write_text(
        site_file.read_text(encoding="utf-8").replace(str(rows), false_rows(rows)), encoding="utf-8"
    )


def of_the_oracle(
    config: RunConfig, rows: Path, liar: int, counted: list[list[int]], trained: Mapping[int, list[int]], to: Path
) -> str:
    """Return the model of the sequential oracle, told who trained each round, and whose update counted in it."""
    job = read_inputs(config)
    false = read_inputs(
        config.model_copy(update={"data": config.data.model_copy(update={"train": (false_rows(rows),)})})
    )
    parts = tuple((false if client_id == liar else job).train[client_id] for client_id in range(len(job.train)))
    model, steps, of_rounds = (
        make_method_model(replace(job, train=parts)),
        config.train.num_local_steps,
        range(len(counted)),
    )

    def solve(client_id: int, t: int, block: int, working: tuple[Tensor, ...]) -> Tensor:
        return model.trainers[client_id].train(t, block, steps, t * steps, working).trained.clone()

    took_part = [{*counted[t], *(i for i, of in trained.items() if t in of)} for t in of_rounds]
    problem = OracleProblem(
        [len(part) for part in parts],
        len(counted),
        config.federation.delay,
        schedule=config.blocks.schedule,
        seed=config.seed,
        trained=[sorted(they) for they in took_part],
        lost=frozenset((i, t) for t in of_rounds for i in took_part[t] - {*counted[t]}),
        min_updates=config.federation.min_updates,
    )
    model.finish_model(run_sequential(model.take_params(), problem, solve).server.params)
    return model.export(to)


def false_rows(rows: Path) -> str:
    return str(rows.with_name(f"false-{rows.name}"))


def trained_by(town: RealSites, client_id: int) -> list[int]:
    """Return the rounds that a site has trained, by its own log."""
    return [int(t) for _, said in town.lines_of(client_id) for t in re.findall(r"^round (\d+): block", said)]


# -- the same in a Flower federation
def kill_flower(options: Options) -> None:
    """Kill every process of a Flower run, and cut the network, at random moments, one of each in a run.

    Runs of this configuration that are on record stay.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # take everything down
    folder, output = kit.fresh_folder(options).resolve(), Path(options.output)
    config = deployed(kit.generated(folder / "material", num_clients=SITES), options)
    expected, other = in_one_process(config, folder / "one-process"), in_one_process(config, folder / "other", 1)
    before = json.loads(output.read_text(encoding="utf-8"))["results"] if output.exists() else Found()
    runs: list[Found] = before["runs"] if before.get("undisturbed") == expected else []
    while num_kills(runs) < options.kills and len(runs) < options.kills:
        load, draw = os.getloadavg()[0], generator_for(options.seed, f"kill flower {len(runs)}")
        with RealFederation(folder / f"run-{len(runs)}", config, options.mbps) as town:
            found = disturbed(town, draw, options, options.kills - num_kills(runs))
            runs.append(found | {"load": load, "flwr_runs": town.submitted})
        bars, _ = bars_of_kills(runs, options.kills, expected, other)
        record(options, {"undisturbed": expected, "another_seed": other, "runs": runs}, bars, config)


def kill_flower_section(found: Found) -> Found:
    same = same_as(found["results"]["undisturbed"])
    rows = [
        [str(number), told_kills(run), *(f"{run[key]:.0f}" for key in ("flwr_runs", "seconds", "load")), same(run)]
        for number, run in enumerate(found["results"]["runs"])
    ]
    columns = ["run", "what, after how many rounds", "`flwr run`s", "s", "load", SAME]
    return section("kill_flower", found, table(columns, rows))


def deployed(material: kit.Material, options: Options) -> RunConfig:
    sites = replace(material, train=material.train[:SITES])
    return kit.configured(sites, kit.training(options) | {"engine.clock": None})


def in_one_process(config: RunConfig, directory: Path, other_seed: int = 0) -> str:
    """Return the model that the same configuration ends with in one process, which is nobody's to kill or cut."""
    engine = config.engine.model_copy(update={"name": "inprocess"})
    changes = {"engine": engine, "seed": config.seed + other_seed}
    return str(kit.run_quietly(config.model_copy(update=changes), directory)["model_sha256"])


# -- faults and clients that drop
def soak(options: Options) -> None:
    """Run long while something goes wrong every few rounds, and while many clients drop in each round."""
    material = (
        kit.pretrained() if options.real else kit.generated(Path(options.work_dir) / "material", num_clients=8)
    )
    found, bars, rounds = Found(), list[Bar](), options.drop_rounds
    if "soak" in options.only:
        faults = random_faults(options.rounds, options.seeds[0])
        run = found["soak"] = compared(options, material, "soak", options.rounds, faults, options.seeds[0])
        bars += [
            Bar("rounds of the soak that ended", run["rounds_done"], options.rounds, at_most=False),
            Bar("final loss of the soak / undisturbed", run["loss_ratio"], 1.03),
            Bar("updates that counted twice, or without having been asked for", run["not_accounted_for"], 0),
        ]
    if "drops" in options.only:
        found["drops"] = runs = [
            compared(options, material, "drops", rounds, dropping(rounds, seed), seed) for seed in options.seeds
        ]
        losses = (fmean(run[key] for run in runs) for key in reversed(LOSSES[1:]))
        ended = sum(run["rounds_done"] for run in runs)
        bars += [
            Bar("rounds with 30 % dropping that ended", ended, rounds * len(runs), at_most=False),
            Bar("final loss with 30 % dropping / undisturbed, means", truediv(*losses), 1.03),
        ]
    record(options, found, bars, soak_config(options, material, options.rounds, [], options.seeds[0]))


LOSSES = ("initial_eval_loss", "final_eval_loss_undisturbed", "final_eval_loss")


def soak_section(found: Found) -> Found:
    options, results = found["options"], found["results"]
    if "soak" in results:
        run = results["soak"]
        rows = [
            [what, ", ".join(f"{count} × {kind}" for kind, count in sorted(run[key].items()))]
            for what, key in (("faults", "faults"), ("refused", "refused_updates"))
        ]
        seconds = (run[key] for key in ("wall_time_undisturbed_s", "wall_time_s"))
        rows += [
            ["loss: base model, undisturbed, with faults", ", ".join(f"{run[key]:.4f}" for key in LOSSES)],
            ["simulated s: undisturbed, with faults", ", ".join(f"{value:.0f}" for value in seconds)],
        ]
        return section("soak", found, table(["what", "how much"], rows))
    runs, keys = results["drops"], (*LOSSES, "loss_ratio")
    rows = [[str(run["seed"]), *(f"{run[key]:.4f}" for key in keys)] for run in runs]
    rows.append(["mean", *(spread([run[key] for run in runs]) for key in keys)])
    given_up = sum(run["faults_injected"] for run in runs) / (8 * options["drop_rounds"] * len(runs))
    made = table(["seed", "base model", "nobody drops", "30% drop", "ratio"], rows)
    return section("soak_drops", found, made, given_up=given_up)


def soak_config(options: Options, material: kit.Material, rounds: int, faults: list[Found], seed: int) -> RunConfig:
    settings = {"federation.num_rounds": rounds, "train.lr_scheduler_type": options.schedule, "faults": faults}
    return kit.configured(material, kit.training(options) | settings | {"seed": seed})


def random_faults(rounds: int, seed: int) -> list[Found]:
    """Draw a fault for two rounds in five, of any kind at any point; two of the machines never come back."""
    draw = generator_for(seed, "soak")
    points = [(at, kind) for at, kinds in KINDS_AT.items() for kind in kinds]
    faults: list[Found] = []
    for t in range(1, rounds):
        if draw.random() >= 0.4:
            continue
        at, kind = points[int(draw.integers(len(points)))]
        faults.append({"client": int(draw.integers(8)), "round": t, "at": at, "kind": kind})
        if kind == "scale":
            faults[-1]["value"] = float(draw.choice([-1.0, 3.0, 1e6]))
        elif kind in ("kill", "delay") or (kind == "drop" and at in ("upload", "download")):
            faults[-1]["value"] = round(float(draw.uniform(0.5, 60.0)), 1)
    for client_id, t in ((6, rounds // 2), (7, 3 * rounds // 4)):
        faults.append({"client": client_id, "round": t, "at": "train", "kind": "kill"})
    return faults


def dropping(rounds: int, seed: int) -> list[Found]:
    draws = generator_for(seed, "drops").random(size=(rounds, 8))
    return [
        {"client": int(client_id), "round": int(t), "at": "train", "kind": "drop"}
        for t, client_id in np.argwhere(draws < 0.3)
    ]


def compared(
    options: Options, material: kit.Material, name: str, rounds: int, faults: list[Found], seed: int
) -> Found:
    """Run with and without the faults; say what happened."""
    runs = [
        kit.Kept(soak_config(options, material, rounds, injected, seed), options, f"{name}{kind}-{seed}")
        for kind, injected in (("", faults), ("-undisturbed", []))
    ]
    disturbed, undisturbed = (run.summary for run in runs)
    participants = [row["participants"] for row in runs[0].rows]
    kept = ("rounds_done", "status", "faults", "refused_updates", "wall_time_s", *LOSSES[::2])
    return {key: disturbed[key] for key in kept} | {
        "seed": seed,
        "faults_injected": len(faults),
        "not_accounted_for": sum(len(row) - len(set(row) & set(range(8))) for row in participants),
        "wall_time_undisturbed_s": undisturbed["wall_time_s"],
        "final_eval_loss_undisturbed": undisturbed["final_eval_loss"],
        "loss_ratio": disturbed["final_eval_loss"] / undisturbed["final_eval_loss"],
    }


# -- hostile clients
ATTACKS, RULES = kit.ABOUT["robust"]["attacks"], kit.ABOUT["robust"]["rules_of"]
"""What an attacker multiplies its update by; the settings of each rule."""


def robust(options: Options) -> None:
    """Measure what hostile clients do to each aggregation rule: held-out loss, beside that of nobody's attack."""
    material = kit.material_of(options, num_clients=options.clients)
    own = {"federation.num_clients": options.clients, "data.partition.scheme": None}
    settings, found = kit.training(options) | own, []
    hostile = list(product(range(options.rounds), range(options.clients - options.attackers, options.clients)))
    for attack in options.attacks:
        scaled = {"at": "train", "kind": "scale", "value": ATTACKS[attack]}
        faults = [scaled | {"round": t, "client": client} for t, client in hostile if attack != "none"]
        for name in options.rules if attack != "none" else ["mean"]:
            expected = {"federation.assumed_attackers": options.attackers} if name == "krum" else {}
            config = kit.configured(material, settings | RULES[name] | expected | {"faults": faults})
            run = kit.Kept(config, options, f"{attack}-{name}".replace(" ", "-"))
            found.append({"attack": attack, "factor": ATTACKS[attack], "rule": name} | run.told())
    bars = [
        Bar(f"{row['attack']}, {row['rule']}: loss / clean loss", row["final_eval_loss"] / clean_loss(found), 1.05)
        for row in found
        if row["attack"] != "none" and row["rule"] in ("median", "trimmed mean")
    ]
    record(options, found, bars, kit.configured(material, settings))


def clean_loss(rows: list[Found]) -> float:
    return next(float(row["final_eval_loss"]) for row in rows if row["attack"] == "none")


def robust_section(found: Found) -> Found:
    clean = clean_loss(found["results"])
    rows = [row | {"ratio": row["final_eval_loss"] / clean} for row in found["results"]]
    return section("robust", found, table_of(rows, kit.ABOUT["robust"]["columns"]))


# -- secure aggregation
CLIENTS, DROPPING = 8, (2, 5)
DEVIATIONS = ("deviations_of_masked_from_uniform", "deviations_of_plain_from_uniform")
GRIDS = kit.ABOUT["secure_aggregation"]["runs"]


def secure_aggregation(options: Options) -> None:
    """Measure what secure aggregation costs and keeps: bytes and seconds of the protocol, and the loss."""
    torch.set_num_threads(1)
    protocol, runs = measure_protocol(options.size, options.num_rounds), dict[str, Found]()
    same, *away = (protocol[key] for key in ("is_bitwise_the_plain_sum", *DEVIATIONS))
    bars = [
        Bar("masked sum is bitwise the plain one, two of eight drop", same, 1, False),
        Bar("masked update against uniform, deviations", away[0], 4),
        Bar("plain grid against uniform, deviations", away[1], 100, False),
    ]
    material = kit.material_of(options, num_clients=CLIENTS)
    settings = kit.training(options)
    drops = [(t, client) for t in range(2, options.rounds, 4) for client in DROPPING]
    secure = {
        "privacy.clip_norm": 10.0,
        "faults": [{"client": client, "round": t, "at": "train", "kind": "drop"} for t, client in drops],
    }
    for grid in options.grids:
        own = {} if grid == "none" else secure | {"privacy.secure_aggregation": grid}
        runs[grid] = kit.Kept(kit.configured(material, settings | own), options, grid).told("uplink_bytes")
    if set(runs) == set(GRIDS):
        alike = int(runs["masked"]["model_sha256"] == runs["plain"]["model_sha256"])
        ratio = runs["masked"]["final_eval_loss"] / runs["none"]["final_eval_loss"]
        bars.append(Bar("masked run is bitwise the plain one", alike, 1, False))
        bars.append(Bar("loss masked, with drops / float32", ratio, 1.02))
    config = kit.configured(material, settings | secure | {"privacy.secure_aggregation": "masked"})
    results = {"protocol": protocol, "runs": runs}
    record(options, results, bars, config)


def secure_aggregation_section(found: Found) -> Found:
    protocol = found["results"]["protocol"]
    told = {what: protocol[f"{what}_bytes_per_client"] / 1e3 for what in ("setup", "reveal")}
    told |= {"elements": protocol["elements"], "seconds": protocol["seconds"]}
    told |= {"megabytes": protocol["update_bytes"] / 1e6}
    rows = [
        run | {"run": GRIDS[grid], "model": run["model_sha256"][:12], "megabytes": run["uplink_bytes"] / 1e6}
        for grid, run in found["results"]["runs"].items()
    ]
    made = table_of(rows, kit.ABOUT["secure_aggregation"]["columns"])
    return section("secure_aggregation", found, made, **told)


def measure_protocol(size: int, num_rounds: int) -> Found:
    """Let eight clients agree, six of them send, and the server take the masks off."""
    everybody, generator = tuple(range(CLIENTS)), torch.Generator().manual_seed(0)
    grid = FixedPointGrid(1.0, CLIENTS)
    sending = [i for i in everybody if i not in DROPPING]
    deltas = {i: torch.randn(size, generator=generator) / math.sqrt(4 * size) for i in sending}
    seconds = dict[str, float]()

    def timed(what: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        done = work()
        seconds[what] = time.perf_counter() - began
        return done

    wires = MaskedWires(CLIENTS, dict.fromkeys(range(num_rounds), everybody))
    wires.collector.send(0, Parcel(messages.to_bytes(messages.Mark(0, False)), 0))
    setup_bytes = wires.wire_bytes
    words = timed("encode", lambda: {i: (grid.encode(delta), 1) for i, delta in deltas.items()})
    updates = {
        i: messages.to_bytes(messages.Update(0, 0, i, 1, -1, 0.0, 1, 0.0, 0, 1, pack(word, "word32")))
        for i, (word, _) in words.items()
    }
    timed("mask", lambda: [wires.upload(i, raw) for i, raw in updates.items()])
    came = {}
    for _ in updates:
        client_id, raw = wires.collector.receive(1.0, "the updates")
        update = messages.from_bytes(raw)
        assert isinstance(update, messages.Update)
        came[client_id] = update.delta.values, 1
    before, masked_fold = wires.wire_bytes, FixedPointAggregation(grid, Rule())
    masked_fold.masks = timed("unmask", lambda: wires.collector.masks_of(0, sorted(came), size + EXTRA_WORDS))
    masked, plain = masked_fold.fold(came), FixedPointAggregation(grid, Rule()).fold(words)
    first = min(came)
    return {
        "elements": size,
        "seconds": seconds,
        "setup_bytes_per_client": setup_bytes / CLIENTS,
        "reveal_bytes_per_client": (wires.wire_bytes - before) / CLIENTS,
        "update_bytes": len(updates[first]),
        "is_bitwise_the_plain_sum": bool(torch.equal(masked, plain)),
        **dict(zip(DEVIATIONS, (deviations(came[first][0]), deviations(words[first][0])), strict=True)),
    }


def masking_overhead(options: Options) -> None:
    """Measure what masks and the ledger add to a round: processor seconds of a client and of the server."""
    torch.set_num_threads(1)
    everybody, grid, size = tuple(range(CLIENTS)), FixedPointGrid(1.0, CLIENTS), options.size
    delta = torch.randn(size, generator=torch.Generator().manual_seed(0)) / math.sqrt(4 * size)
    rows: list[Found] = []

    def timed(what: str, work: Callable[[], Any], *, added: bool, clock: Any = time.process_time) -> Any:
        began = clock()
        done = work()
        rows.append({"what": what, "seconds": clock() - began, "added": "yes" if added else ""})
        return done

    def update(client_id: int, words: Tensor) -> bytes:
        header = messages.Update(0, 0, client_id, 1, -1, 0.0, 1, 0.0, 0, 1, pack(words, "word32"))
        return messages.to_bytes(header)

    words = timed("a client: Δ to the grid", lambda: grid.encode(delta), added=False)
    updates = dict.fromkeys(everybody, (words, 1))
    timed("the server: the sum", lambda: FixedPointAggregation(grid, Rule()).fold(updates), added=False)
    releases = ReleaseLedger(AuditLog(kit.fresh_folder(options) / "audit.jsonl"))
    digest = timed("a client: hash for the ledger", lambda: fingerprint([pack(words, "word32")]), added=True)
    write = partial(releases.record, RELEASE, 0, sha256=digest)
    timed("a client: line of the ledger, on the disk (wall clock)", write, added=True, clock=time.perf_counter)
    wires, raw = MaskedWires(CLIENTS, {0: everybody}), update(0, words)
    assert wires.collector.members == everybody  # keys and letters, once a session
    timed("a client: masks", lambda: wires.upload(0, raw), added=True)
    for client_id in everybody[1:]:  # the server knows the masks of any length
        wires.upload(client_id, update(client_id, words[:1]))
    while wires.collector.receive_until(0.0) is not None:
        pass
    unmask = partial(wires.collector.masks_of, 0, everybody, size + EXTRA_WORDS)
    timed("the server: masks of the sum", unmask, added=True)
    added_s, plain_s = (
        sum(row["seconds"] for row in rows if bool(row["added"]) == is_added) for is_added in (1, 0)
    )
    name = "masks and ledger / a round without training, over {:g} Mbit/s"
    bars = [Bar(name.format(mbps), added_s / (plain_s + 64e-6 * size / mbps), 0.1) for mbps in options.mbps]
    record(options, rows, bars)


def deviations(words: Tensor) -> float:
    """Return how many standard deviations chi-square of all four bytes lies above an even spread's."""
    found, degrees = words.numpy().view(np.uint8).reshape(-1, 4), 4 * 255
    counts = np.stack([np.bincount(column, minlength=256) for column in found.T])
    expected = len(found) / 256
    return (float(((counts - expected) ** 2 / expected).sum()) - degrees) / math.sqrt(2 * degrees)


# -- sequences of messages
def sequences(options: Options) -> None:
    """Send messages in any order, repeated, forged and for other rounds, to every end: no leak, no ended run."""
    before, rows = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for end, play in PLAYS.items():
        number, began, found = (
            round(options.sequences * kit.ABOUT["sequences"]["shares"][end]),
            time.perf_counter(),
            Counter[str](),
        )
        for seed in range(options.seed, options.seed + number):
            found += play(generator_for(seed, f"sequence against {end}"))
        kinds = {kind: sum(n for what, n in found.items() if what.startswith(kind)) for kind in (*PROBLEMS, "void")}
        seconds = (time.perf_counter() - began) / max(1, number)
        rows.append({"end": end, "sequences": number, **kinds, "milliseconds": 1e3 * seconds, "found": dict(found)})
    growth_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    bars = [
        Bar(f"{kind} in {options.sequences:,} sequences", sum(row[kind] for row in rows), 0) for kind in PROBLEMS
    ]
    record(options, rows, [*bars, Bar("growth of memory, MiB", growth_mib, 256)])


def sequences_section(found: Found) -> Found:
    return section("sequences", found, table_of(found["results"], kit.ABOUT["sequences"]["columns"]))


PROBLEMS = ("leak", "foreign", "ended")
"""What must not come of a sequence: something is seen, an exception that is not ours, the end of a run."""


# -- audit logs
def audit_logs(options: Options) -> None:
    """Change a line of an audit log in one of three ways, by the ten thousand: each change is found in its line."""
    folder = kit.fresh_folder(options)
    log, path = AuditLog(folder / "audit.jsonl"), folder / "audit.jsonl"
    for t in range(options.lines):
        log.append("release", run="a", round=t, clients=[0, 1, 2], sha256=f"{t:064x}")
    lines, draw = path.read_bytes().splitlines(keepends=True), generator_for(options.seed, "audit logs")
    assert verify(path).bad_line is None
    rows = {change: {"change": change, "logs": 0, "found": 0, "in_its_line": 0} for change in TAMPERINGS}
    began = time.perf_counter()
    for number in range(options.logs):
        change = list(TAMPERINGS)[number % len(TAMPERINGS)]
        changed, expected = TAMPERINGS[change](list(lines), draw)
        path.write_bytes(b"".join(changed))
        found = verify(path).bad_line
        rows[change]["logs"] += 1
        rows[change]["found"] += found is not None
        rows[change]["in_its_line"] += found == expected
    seconds = (time.perf_counter() - began) / options.logs
    path.write_bytes(b"".join(lines))
    bars = [
        Bar("changes found", sum(row["found"] for row in rows.values()), options.logs, at_most=False),
        Bar("unchanged logs refused", verify(path).bad_line is not None, 0),
    ]
    record(options, [row | {"seconds": seconds} for row in rows.values()], bars)


def flipped(lines: list[bytes], draw: np.random.Generator) -> tuple[list[bytes], int]:
    """Flip a bit of a line; return the lines, and the number of the first that is wrong, from 1."""
    k = int(draw.integers(len(lines)))
    line, at = bytearray(lines[k]), int(draw.integers(len(lines[k])))
    line[at] ^= 1 << int(draw.integers(8))
    return [*lines[:k], bytes(line), *lines[k + 1 :]], k + 1


def removed(lines: list[bytes], draw: np.random.Generator) -> tuple[list[bytes], int]:
    """Remove a line."""
    k = int(draw.integers(len(lines)))
    return lines[:k] + lines[k + 1 :], k + 1


def reordered(lines: list[bytes], draw: np.random.Generator) -> tuple[list[bytes], int]:
    """Exchange two lines."""
    first, second = sorted(int(k) for k in draw.choice(len(lines), 2, replace=False))
    lines[first], lines[second] = lines[second], lines[first]
    return lines, first + 1


TAMPERINGS = {"a bit flipped": flipped, "a line removed": removed, "two lines exchanged": reordered}
"""What somebody does to a log: its lines → the changed lines, and where that is found."""


# -- broken input
WORDS: list[Any] = [None, True, -1, 0, 1, 7, 2**31, 2**63, -(2**70), 10**400, 0.5, -1e308, "", "int4", "Update"]
WORDS += [[], {}, [1], [[]], [-1], [2**62], {"shape": [3]}, [{"format": "int2", "shape": [10**9]}]]
WORDS += [math.nan, math.inf]
SCRAPS = kit.ABOUT["fuzz"]["scraps"]


def fuzz(options: Options) -> None:
    """Read mutated messages and configurations by the million: no foreign error, no hang, no growing memory."""
    folder = kit.fresh_folder(options)
    if options.engine not in ("drawn", "atheris"):
        sys.exit(f"--engine {options.engine}: mutations are drawn, or chosen by atheris")
    mutate = guided if options.engine == "atheris" else drawn
    numbers = {"messages": options.messages, "configurations": options.configs}
    found = {name: mutate(name, number, options.seed, folder) for name, number in numbers.items()}
    bars = [Bar(name, found[name]["tried"], number, at_most=False) for name, number in numbers.items()]
    bars += [
        Bar("foreign exceptions", sum(part["foreign"] for part in found.values()), 0),
        Bar("slowest of all, seconds", max(part["slowest_s"] for part in found.values()), 5.0),
        Bar("growth of memory, MiB", max(part["memory_growth_mib"] for part in found.values()), 256),
    ]
    record(options, found, bars)


def fuzz_section(found: Found) -> Found:
    how, who = "", "kinds of mutation, drawn at random"
    if found["options"].get("engine") == "atheris":
        how, who = ", guided", "atheris, guided by what they reach in the decoders"
    rows = [{"what": name, "refused": 0, "read": 0} | part for name, part in found["results"].items()]
    return section("fuzz", found, table_of(rows, kit.ABOUT["fuzz"]["columns"]), how=how, who=who)


class Tally:
    """Reads inputs, and counts what came of them: read, refused with an error of ours, a foreign exception."""

    def __init__(self, what: str, place: Path) -> None:
        self._place = None if what == "messages" else place  # a configuration is read from a file
        self._counts, self._foreign, self._slowest_s = Counter[str](), Counter[str](), 0.0
        self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @property
    def tried(self) -> int:
        return self._counts.total()

    def read(self, raw: bytes) -> None:
        """Read one input."""
        began, what = time.perf_counter(), "read"
        try:
            if self._place is None:
                messages.from_bytes(raw)
            else:
                self._place.write_bytes(raw)
                load_config(self._place)
        except (CodecError, ConfigError):
            what = "refused"
        except Exception as error:
            what = "foreign"
            self._foreign[repr(error)[:80]] += 1
        self._counts[what] += 1
        self._slowest_s = max(self._slowest_s, time.perf_counter() - began)

    def result(self) -> Found:
        """Return what was counted, the slowest input and how much the process has grown."""
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._before) / 1024
        found = {"tried": self.tried, "foreign": 0, **self._counts, "examples": dict(self._foreign.most_common(5))}
        return found | {"slowest_s": self._slowest_s, "memory_growth_mib": grown}


def drawn(what: str, number: int, seed: int, folder: Path) -> Found:
    """Draw so many mutations at random; return what was counted."""
    (valid, mutated), draw, tally = (
        INPUTS[what],
        generator_for(seed, f"fuzz {what}"),
        Tally(what, folder / "run.yaml"),
    )
    seeds = list(valid())
    for _ in range(number):
        tally.read(mutated(one_of(seeds, draw), draw))
    return tally.result()


def guided(what: str, number: int, seed: int, folder: Path) -> Found:
    """Let atheris choose so many mutations, in a process of its own; return what it counted."""
    if find_spec("atheris") is None:
        sys.exit("--engine atheris needs atheris, which is no part of the extras: pip install atheris")
    corpus, output = folder / what, folder / f"{what}.json"
    corpus.mkdir()
    for place, raw in enumerate(INPUTS[what][0]()):
        (corpus / f"valid-{place}").write_bytes(raw)
    arguments = map(str, (what, corpus, number, seed, output))
    command = [sys.executable, "-c", kit.ABOUT["fuzz"]["guided"], *arguments]
    with output.with_suffix(".log").open("wb") as log:
        done = subprocess.run(command, stdout=log, stderr=log, check=False, cwd=Path(__file__).parent)
    if done.returncode != 0:
        sys.exit(f"atheris ended with {done.returncode}:\n{output.with_suffix('.log').read_text()[-3000:]}")
    return json.loads(output.read_text(encoding="utf-8"))


def be_guided(atheris: Any, what: str, corpus: str, number: str, seed: str, output: str) -> None:
    """Be the process in which atheris mutates inputs; it ends the process itself, so the counts go into a file."""
    tally = Tally(what, Path(output).with_suffix(".yaml"))

    def one(raw: bytes) -> None:
        # mutations hardly ever leave the checksum right: every other message gets a right one
        tally.read(sealed(raw[:-4]) if what == "messages" and tally.tried % 2 and len(raw) > 8 else raw)
        if tally.tried == int(number):
            found = {**tally.result(), "kept_inputs": len(list(Path(corpus).iterdir()))}
            Path(output).write_text(json.dumps(found), encoding="utf-8")
            os._exit(0)

    atheris.Setup(["fuzz", corpus, f"-seed={int(seed) + 1}", "-max_len=4096", "-timeout=60"], one)
    atheris.Fuzz()


def one_of(choices: Sequence[Any], draw: np.random.Generator) -> Any:
    return choices[int(draw.integers(len(choices)))]


def mutated_message(raw: bytes, draw: np.random.Generator) -> bytes:
    """Flip bytes, cut, double, splice, or replace fields of the header or the payload under a right checksum."""
    first, second = sorted(draw.integers(len(raw), size=2).tolist())
    match int(draw.integers(7)):
        case 0:
            changed = bytearray(raw)
            for place in draw.integers(len(raw), size=int(draw.integers(1, 5))):
                changed[place] ^= int(draw.integers(1, 256))
            return sealed(bytes(changed[:-4])) if draw.random() < 0.5 else bytes(changed)
        case 1:
            return raw[:first]
        case 2:
            return raw + raw[:first]
        case 3:
            return sealed((raw[:first] + raw[second:] + draw.bytes(second - first))[:-4])
    header, payload = parts_of(raw)
    if draw.random() < 0.3:
        payload = draw.bytes(len(payload) if draw.random() < 0.5 else int(draw.integers(0, 4000)))
    else:
        for _ in range(int(draw.integers(1, 4))):
            key, word = one_of([*header, "extra"], draw), one_of(WORDS, draw)
            if isinstance(header.get(key), list) and header[key] and draw.random() < 0.5:
                word = [*header[key][:-1], word]
            header[key] = word
    return forged(header, payload)


def mutated_text(raw: bytes, draw: np.random.Generator) -> bytes:
    """Change lines: their values, their characters, their places."""
    lines = raw.decode().splitlines()
    for _ in range(int(draw.integers(1, 4))):
        place, other = draw.integers(len(lines), size=2).tolist()
        line = lines[place]
        key, colon, _ = line.partition(":")
        match int(draw.integers(5)):
            case 0:
                lines[place] = f"{key}{colon} {one_of(SCRAPS, draw)}"
            case 1:
                lines[place], lines[other] = lines[other], line
            case 2:
                lines.insert(other, line)
            case 3:
                lines[place] = " " * int(draw.integers(6)) + line
            case _:
                middle = int(draw.integers(len(line) + 1))
                lines[place] = line[:middle] + chr(int(draw.integers(1, 0x2FF))) + line[middle:]
    return "\n".join(lines).encode()


def valid_texts() -> Iterator[bytes]:
    yield parse_config({"model": {"name_or_path": "m"}, "data": {"train": ["a.jsonl"]}}).to_yaml().encode()
    yield from (path.read_bytes() for path in sorted((kit.REPOSITORY / "configs").glob("*.yaml")))


INPUTS = {"messages": (partial(every_message, 300), mutated_message), "configurations": (valid_texts, mutated_text)}
"""What is valid of each kind, and what changes it."""

BENCHMARKS = benchmarks(globals())

if __name__ == "__main__":
    main(__doc__, BENCHMARKS)
