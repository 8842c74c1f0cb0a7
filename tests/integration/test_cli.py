"""The commands from end to end: what they write, and that every option of a run takes effect."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from parablock import __version__
from parablock.config.load import known_keys, load_config
from parablock.errors import ConfigError
from parablock.evaluation import side_by_side
from parablock.experiment import run as experiment_run
from parablock.experiment.first_config import write_first_config
from parablock.experiment.inputs import read_inputs
from parablock.methods.base import MethodModel
from parablock.model.save import model_sha256
from tiny_runs import (
    NUM_CLIENTS,
    NUM_LAYERS,
    Runs,
    Workshop,
    assert_refused,
    command,
    command_apart,
    done,
    metrics_of,
    sum_row,
    summary_of,
    write_rows,
)

SUMMARY_KEYS = {
    *("method", "delay", "num_rounds", "num_clients", "num_blocks", "seed", "clock", "initial_eval_loss"),
    *("final_eval_loss", "wall_time_s", "elapsed_s", "compute_s", "communication_s", "sequential_s"),
    *("overlap_fraction", "uplink_bytes", "downlink_bytes", "bytes_per_client_round", "peak_memory_bytes"),
    *("model_sha256", "status"),
}
METRICS_KEYS = {
    *("round_index", "block_index", "train_loss", "eval_loss", "compute_s", "communication_s", "round_s"),
    *("uplink_bytes", "downlink_bytes", "staleness", "participants"),
}
MANIFEST_KEYS = {"parablock", "commit", "python", "packages", "machine", "seed", "data_sha256", "base_sha256"}
BLOCK_PARAMETERS = 9280
COMMANDS = ("run", "resume", "blocks", "eval", "demo", "doctor")


@pytest.fixture(scope="module")
def finished(runs: Runs) -> Path:
    return runs()


def sha(run_dir: Path) -> str:
    value = summary_of(run_dir)["model_sha256"]
    assert isinstance(value, str)
    return value


def losses(run_dir: Path) -> list[float]:
    return [row["train_loss"] for row in metrics_of(run_dir)]


# -- what a run leaves ----------------------------------------------------------------------------------------


def test_a_run_leaves_all_files_and_nothing_half_made(finished: Path):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.yaml", "manifest.json", "metrics.jsonl", "trace.json", "summary.json"}
    assert {path.name for path in finished.iterdir() if path.is_dir()} == {"model", "checkpoints"}
    assert not [name for name in names if name.startswith(".")]
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["round-000002", "round-000004"]


def test_the_summary_has_every_key_and_they_agree_with_the_rows(finished: Path, workshop: Workshop):
    summary, rows = summary_of(finished), metrics_of(finished)
    assert set(summary) >= SUMMARY_KEYS
    assert summary["status"] == "completed"
    assert (summary["method"], summary["delay"], summary["seed"]) == ("parablock", 1, 0)
    assert (summary["num_rounds"], summary["num_clients"], summary["num_blocks"]) == (6, NUM_CLIENTS, NUM_LAYERS)
    assert summary["clock"] == "virtual"
    for key in ("compute_s", "communication_s", "sequential_s"):
        assert summary[key] == pytest.approx(sum(row[key] for row in rows))
    for key in ("uplink_bytes", "downlink_bytes"):
        assert summary[key] == sum(row[key] for row in rows)
    visits = sum(len(row["participants"]) for row in rows)
    total = summary["uplink_bytes"] + summary["downlink_bytes"]
    assert summary["bytes_per_client_round"] == pytest.approx(total / visits, abs=1)
    assert summary["final_eval_loss"] == rows[-1]["eval_loss"] < summary["initial_eval_loss"]
    assert 0 < summary["overlap_fraction"] <= 1
    assert summary["peak_memory_bytes"] > 0
    # K steps of 50 ms in each of 6 rounds; the exchange of all but the last rounds hides under them
    assert summary["compute_s"] == pytest.approx(6 * 2 * 0.05)
    assert summary["compute_s"] < summary["wall_time_s"] < summary["sequential_s"]
    assert summary["elapsed_s"] > 0


def test_the_metrics_have_every_key_and_every_round_once(finished: Path):
    rows = metrics_of(finished)
    assert [row["round_index"] for row in rows] == list(range(6))
    for row in rows:
        assert set(row) >= METRICS_KEYS
        assert math.isfinite(row["train_loss"])
        assert row["participants"] == list(range(NUM_CLIENTS))
        # an update is the block's fp32 delta, and little else
        assert 0 < row["uplink_bytes"] - NUM_CLIENTS * 4 * BLOCK_PARAMETERS < NUM_CLIENTS * 2000
    assert {row["block_index"] for row in rows} == set(range(NUM_LAYERS))
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1, 1, 1]
    assert [row["eval_loss"] is not None for row in rows] == [False, False, True, False, False, True]
    assert losses_fall(rows)


def losses_fall(rows: list[dict[str, Any]]) -> bool:
    return bool(rows[-1]["train_loss"] < rows[0]["train_loss"] - 0.05)


def test_the_written_configuration_is_the_resolved_one(finished: Path, workshop: Workshop):
    written = load_config(finished / "config.yaml")
    assert written == load_config(workshop.config)
    assert set(yaml.safe_load((finished / "config.yaml").read_text())) > set(
        yaml.safe_load(workshop.config.read_text())
    )


def test_what_the_machine_decides_is_written_down(runs: Runs):
    written = load_config(runs("engine.num_threads=null") / "config.yaml")
    assert isinstance(written.engine.num_threads, int)


def test_the_manifest_says_what_ran_on_what(finished: Path):
    manifest = json.loads((finished / "manifest.json").read_text())
    assert set(manifest) >= MANIFEST_KEYS
    assert manifest["parablock"] == __version__
    assert manifest["packages"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert len(manifest["data_sha256"]["train"]) == len(set(manifest["data_sha256"]["train"])) == NUM_CLIENTS


def test_the_model_loads_and_is_the_one_of_the_summary(finished: Path, workshop: Workshop):
    summary = summary_of(finished)
    assert model_sha256(finished / "model") == summary["model_sha256"] != model_sha256(workshop.model)
    model, base = (AutoModelForCausalLM.from_pretrained(path) for path in (finished / "model", workshop.model))
    changed = {name for name, value in model.named_parameters() if not value.equal(base.get_parameter(name))}
    layers = {name for name, _ in model.named_parameters() if name.startswith("model.layers.")}
    assert changed == layers  # embeddings, final norm and head stay as they are
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    prompt = tokenizer("2 plus 2?", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[0] == 1


def test_the_trace_is_made_of_chrome_events(finished: Path):
    events = json.loads((finished / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    rows = {(event["pid"], event["tid"]) for event in events if event["ph"] == "M"}
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {0: "server", **{i + 1: f"client {i}" for i in range(NUM_CLIENTS)}}
    assert all(e["ts"] >= 0 and e["dur"] >= 0 and (e["pid"], e["tid"]) in rows for e in spans)
    for client in range(1, NUM_CLIENTS + 1):
        own = [event for event in spans if event["pid"] == client]
        assert sum(event["name"] == "computing" for event in own) == 6
        assert {event["name"] for event in own} >= {"computing", "uploading", "downloading"}
        computing = {event["tid"] for event in own if event["name"] == "computing"}
        moving = {event["tid"] for event in own if event["name"] != "computing"}
        assert len(computing) == 1 and not computing & moving  # a row of its own


def test_a_run_tells_what_it_does(workshop: Workshop, tmp_path: Path):
    outcome = workshop.run(tmp_path / "out")
    assert outcome.stderr == ""
    for said in ("46,752 parameters", "4 blocks", "client  0", "base model: eval loss", "round 6/6", "done"):
        assert said in outcome.stdout
    summary = summary_of(tmp_path / "out")
    assert f"{summary['initial_eval_loss']:.4f} → {summary['final_eval_loss']:.4f}" in outcome.stdout
    assert f"model: {tmp_path / 'out/model'}" in outcome.stdout


def test_names_with_brackets_are_said_in_full(workshop: Workshop, tmp_path: Path):
    run_dir = tmp_path / "a[red]b"
    outcome = workshop.run(run_dir)
    assert f"model: {run_dir}/model" in outcome.stdout
    scored = command("eval", str(run_dir), "--data", str(workshop.test_file)).stdout
    assert str(run_dir / "model") in "".join(
        line.split("│")[4].strip() for line in scored.splitlines() if "│" in line
    )


def test_rows_that_train_nothing_are_reported_with_their_line(workshop: Workshop, tmp_path: Path):
    rows = [sum_row(1, k) for k in range(4)]
    silent = write_rows(tmp_path / "silent.jsonl", [*rows, {"prompt": "7 plus 1?", "completion": ""}, *rows])
    alone = ("federation.num_clients=1", f"data.train={silent}")
    outcome = workshop.run(tmp_path / "out", *alone)
    assert outcome.code == 0
    assert f"not trained on: {silent}, line 5: the completion is empty" in outcome.stdout
    assert "8 examples" in outcome.stdout


# -- the same, and not the same -------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_model_and_another_another(runs: Runs, workshop: Workshop, tmp_path: Path):
    assert workshop.run(tmp_path / "again").code == 0
    assert sha(tmp_path / "again") == sha(runs()) != sha(runs("seed=1"))
    assert losses(tmp_path / "again") == losses(runs()) != losses(runs("seed=1"))


@pytest.mark.parametrize("num_clients", [1, NUM_CLIENTS])
def test_a_delay_changes_the_model_exactly_where_there_is_more_than_one_client(
    num_clients: int, runs: Runs, workshop: Workshop
):
    files = ", ".join(str(workshop.client_file(i)) for i in range(num_clients))
    common = (f"federation.num_clients={num_clients}", f"data.train=[{files}]", "blocks.schedule=cyclic")
    without, with_delay, longer = (runs(*common, f"federation.delay={delay}") for delay in (0, 1, 2))
    assert summary_of(without)["method"] == "fl_bcd"
    assert summary_of(with_delay)["method"] == "parablock"
    shas = {sha(without), sha(with_delay), sha(longer)}
    assert len(shas) == (1 if num_clients == 1 else 3)
    if num_clients == 1:  # but not with naive staleness
        assert sha(runs(*common, "federation.in_flight=none")) not in shas


def test_both_clocks_give_the_same_numbers(runs: Runs):
    real = runs("engine={clock: real, num_threads: 1}", "link={}")
    assert summary_of(real)["clock"] == "real"
    assert sha(real) == sha(runs())
    keys = ("round_index", "block_index", "train_loss", "eval_loss", "rho", "participants", "staleness")
    for ours, theirs in zip(metrics_of(real), metrics_of(runs()), strict=True):
        assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}
    assert summary_of(real)["wall_time_s"] != summary_of(runs())["wall_time_s"]


INDIFFERENT = {
    "link.upload_mbps=1": lambda rows, before: sum_of(rows, "communication_s") > sum_of(before, "communication_s"),
    "link.download_mbps=1": lambda rows, before: (
        sum_of(rows, "communication_s") > sum_of(before, "communication_s")
    ),
    "link.latency_s=0.2": lambda rows, before: sum_of(rows, "communication_s") > sum_of(before, "communication_s"),
    "engine.step_time_s=0.5": lambda rows, before: sum_of(rows, "compute_s") == pytest.approx(6 * 2 * 0.5),
    "engine.step_time_s=null": lambda rows, before: sum_of(rows, "compute_s") != sum_of(before, "compute_s"),
    "evaluation.every_rounds=2": lambda rows, _: [r["eval_loss"] is not None for r in rows] == [False, True] * 3,
    "evaluation.every_rounds=0": lambda rows, _: [r["eval_loss"] is not None for r in rows] == [*[False] * 5, True],
    "federation.stall_timeout_s=60": lambda rows, before: True,
    "train.gradient_checkpointing=true": lambda rows, before: True,
    "evaluation.per_device_eval_batch_size=1": lambda rows, before: True,
}


@pytest.mark.parametrize("override", INDIFFERENT)
def test_what_concerns_time_and_records_changes_them_and_not_the_model(override: str, runs: Runs):
    assert sha(runs(override)) == sha(runs())
    assert losses(runs(override)) == losses(runs())
    assert INDIFFERENT[override](metrics_of(runs(override)), metrics_of(runs()))


def sum_of(rows: list[dict[str, Any]], key: str) -> float:
    return math.fsum(row[key] for row in rows)


@pytest.mark.parametrize(
    ("keep", "every", "kept"), [(1, 2, ["round-000004"]), (9, 3, ["round-000003"]), (2, 0, [])]
)
def test_checkpoints_are_written_as_asked_and_change_nothing(keep: int, every: int, kept: list[str], runs: Runs):
    run_dir = runs(f"checkpoint.keep={keep}", f"checkpoint.every_rounds={every}")
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == kept
    assert sha(run_dir) == sha(runs())


# -- every option takes effect --------------------------------------------------------------------------------

FEDAVG = "federation={method: fedavg, delay: 0, num_clients: 4, num_rounds: 6}"
SPARSE = [FEDAVG, "wire.format=sparse2"]
TAKES_EFFECT = [
    ["model.dtype=bfloat16"],
    ["model.init=random"],
    ["data.max_length=32"],
    ["data.test=[]"],
    ["data.partition.scheme=iid"],
    ["blocks.layers_per_block=2"],
    ["blocks.split=attention_mlp", "blocks.allow_unvisited=true"],
    ["blocks.include_embeddings=true"],
    ["blocks.include_head=true"],
    ["blocks.schedule=cyclic"],
    ["blocks.schedule=reversed"],
    ["blocks.schedule=random", "blocks.allow_unvisited=true"],
    ["blocks.schedule=importance", "blocks.allow_unvisited=true"],
    ["federation.num_rounds=5"],
    ["federation.participation=0.5"],
    ["federation.excluded_clients=[2]"],
    ["federation.delay=0"],
    ["federation.delay=2"],
    ["federation.in_flight=own"],
    ["federation.in_flight=none"],
    ["federation.server_optimizer.name=momentum"],
    ["federation.server_optimizer={name: momentum, momentum: 0.5}"],
    ["federation.server_optimizer={name: momentum, learning_rate: 0.5}"],
    ["federation.server_optimizer={name: adam, learning_rate: 0.01}"],
    ["federation.max_client_examples=1"],
    ["federation.aggregation=median"],
    ["federation.aggregation=trimmed_mean", "federation.trim_fraction=0.3"],
    ["federation.aggregation=krum", "federation.assumed_attackers=0"],
    ["train.num_local_steps=3"],
    ["train.num_local_steps=auto"],
    [FEDAVG],
    ["train.per_device_train_batch_size=2"],
    ["train.gradient_accumulation_steps=2"],
    ["train.learning_rate=0.005"],
    ["train.weight_decay=0.1"],
    ["train.max_grad_norm=0.01", "train.adam_epsilon=0.1"],
    ["train.adam_beta1=0.5"],
    ["train.adam_beta2=0.9"],
    ["train.adam_epsilon=0.1"],
    ["train.optimizer_state=keep"],
    ["train.optimizer=muon"],
    ["train.lr_scheduler_type=cosine"],
    ["train.lr_scheduler_type=linear"],
    ["train.warmup_ratio=0.5"],
    ["train.completion_only_loss=false"],
    ["wire.format=bfloat16"],
    ["wire.format=bfloat16", "wire.error_feedback=true"],
    ["wire.format=int8"],
    ["wire.format=int8", "wire.rounding=nearest"],
    ["wire.format=int4"],
    ["wire.format=int2"],
    SPARSE,
    [*SPARSE, "wire.density=0.005"],
    [*SPARSE, "wire.residual_decay=0.97"],
    ["seed=1"],
]


@pytest.mark.parametrize("overrides", TAKES_EFFECT, ids=lambda overrides: " ".join(overrides))
def test_every_option_of_training_takes_effect(overrides: list[str], runs: Runs):
    run_dir = runs(*overrides)
    assert summary_of(run_dir)["status"] == "completed"
    others = [runs(*other) for other in ([], *TAKES_EFFECT) if other != overrides and set(other) <= set(overrides)]
    for other in others:
        assert sha(run_dir) != sha(other)


ELSEWHERE_IN_THIS_FILE = {
    *("model.name_or_path", "data.train", "data.test_fraction", "federation.num_clients", "engine.clock"),
    *("train.min_local_steps", "train.max_local_steps", "evaluation.max_examples", "engine.num_threads"),
    *(
        "evaluation.num_answers",
        "checkpoint.every_rounds",
        "checkpoint.keep",
        "wire.streaming",
        "wire.chunk_bytes",
        "blocks.allow_unvisited",
    ),
}
IN_OTHER_TESTS = {
    *("privacy.clip_norm", "privacy.noise_multiplier", "privacy.mode", "privacy.delta"),  # test_privacy.py
    "privacy.secure_aggregation",
    *("federation.proximal_mu", "lora.rank", "lora.alpha", "lora.target_modules"),  # test_baselines.py
    "engine.name",  # test_flower.py
    *("faults", "federation.min_updates", "federation.deadline_factor"),  # test_faults.py
    *("data.columns", "data.date"),  # tests/unit/data/test_readers.py, tests/unit/experiment/test_inputs.py
    *("model.device", "data.format", "data.partition.field", "data.partition.alpha", "blocks.layers_path"),
}


def keys_of(override: str) -> set[str]:
    key, _, value = override.partition("=")
    below = yaml.safe_load(value)
    return {f"{key}.{name}" for name in below} if isinstance(below, dict) else {key}


def test_no_option_is_without_a_run_that_shows_its_effect():
    overrides = [*INDIFFERENT, *itertools.chain.from_iterable(TAKES_EFFECT)]
    shown = set().union(*(keys_of(override) for override in overrides)) | ELSEWHERE_IN_THIS_FILE | IN_OTHER_TESTS
    keys = list(known_keys())
    options = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    assert options - shown == {"report_to"}  # tests/unit/experiment/test_trackers.py
    assert shown <= options


def test_chunks_change_the_time_and_not_the_model(runs: Runs):
    slow = "link={upload_mbps: 1, download_mbps: 1}"
    whole, chunks = runs("wire.streaming=false", slow), runs("wire.chunk_bytes=4096", slow)
    assert sha(whole) == sha(chunks) == sha(runs())
    assert summary_of(chunks)["wall_time_s"] < 0.9 * summary_of(whole)["wall_time_s"]


def test_auto_fills_the_wait_for_the_link_with_steps_within_its_bounds(runs: Runs):
    def steps(*overrides: str, mbps: float = 1) -> list[int]:
        run_dir = runs(
            "train.num_local_steps=auto", f"link={{upload_mbps: {mbps}, download_mbps: {mbps}}}", *overrides
        )
        return [row["num_local_steps"] for row in metrics_of(run_dir)]

    # a step takes 50 ms; a block of 37 kB takes 300 ms up and 300 ms down
    assert 6 <= max(steps()) <= 14
    assert max(steps("train.max_local_steps=2")) == 2
    assert min(steps("train.min_local_steps=5")) >= 5 > min(steps(mbps=100))


def test_a_bfloat16_model_trains_and_is_saved_in_the_precision_of_its_base(runs: Runs):
    run_dir = runs("model.dtype=bfloat16")
    values = list(AutoModelForCausalLM.from_pretrained(run_dir / "model").parameters())
    assert {value.dtype for value in values} == {torch.float32}
    assert all(torch.equal(value, value.bfloat16().float()) for value in values)
    plain = AutoModelForCausalLM.from_pretrained(runs() / "model").parameters()
    assert not all(torch.equal(value, value.bfloat16().float()) for value in plain)
    assert losses_fall(metrics_of(run_dir))


def test_half_of_the_clients_take_part_in_turns(runs: Runs):
    rows = metrics_of(runs("federation.participation=0.5"))
    cohorts = [tuple(row["participants"]) for row in rows]
    assert {len(cohort) for cohort in cohorts} == {NUM_CLIENTS // 2}
    assert len(set(cohorts)) > 1
    assert {client for cohort in cohorts for client in cohort} == set(range(NUM_CLIENTS))
    half, whole = summary_of(runs("federation.participation=0.5")), summary_of(runs())
    assert half["uplink_bytes"] / whole["uplink_bytes"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("blocks.layers_per_block=3", ["layers.0-2", "layers.3"]),
        ("blocks.include_head=true", [*(f"layers.{i}" for i in range(4)), "head"]),
        (
            "blocks={split: attention_mlp, layers_per_block: 2}",
            [f"layers.{layers}.{half}" for layers in ("0-1", "2-3") for half in ("attention", "mlp")],
        ),
    ],
)
def test_the_blocks_are_as_asked(override: str, names: list[str], runs: Runs):
    run_dir = runs(override)
    assert summary_of(run_dir)["num_blocks"] == len(names)
    blocks = json.loads((run_dir / "manifest.json").read_text())["blocks"]
    assert [block["name"] for block in blocks] == names
    assert {row["block_index"] for row in metrics_of(run_dir)} == set(range(len(names)))


def test_blocks_are_as_large_as_the_link_lets_them_be_and_the_number_is_written_down(
    runs: Runs, workshop: Workshop
):
    def settings(mbps: float | str, rounds: int = 32) -> list[str]:
        return [
            "blocks={split: attention_mlp, layers_per_block: auto}",
            f"link={{upload_mbps: {mbps}, download_mbps: {mbps}}}",
            f"federation.num_rounds={rounds}",
        ]

    def blocks(mbps: float | str, rounds: int = 32) -> dict[str, Any]:
        chosen = read_inputs(load_config(workshop.config, settings(mbps, rounds))).config
        return chosen.model_dump()["blocks"]

    written = yaml.safe_load((runs(*settings(5, 8)) / "config.yaml").read_text())["blocks"]
    assert written["layers_per_block"] == blocks(5, 8)["layers_per_block"]
    # two steps of 50 ms; the MLPs of two layers are 50 kB: 80 ms up and down at 10 Mbit/s, 160 ms at 5
    assert blocks(10)["layers_per_block"] == 2
    assert blocks(5)["layers_per_block"] == 1
    # without a link, and where a few rounds would visit eight blocks only once each
    assert blocks("null")["layers_per_block"] == 1
    assert blocks(5, rounds=8)["layers_per_block"] == blocks("null", rounds=8)["layers_per_block"] == 2


def test_half_layers_end_alike_under_both_clocks_and_however_they_are_sent(runs: Runs):
    halves = "blocks={split: attention_mlp, layers_per_block: 2}"
    real = "engine={clock: real, num_threads: 1}"
    assert sha(runs(halves, real)) == sha(runs(halves)) == sha(runs(halves, "wire.chunk_bytes=4096"))
    assert sha(runs(halves)) != sha(runs("blocks.layers_per_block=2"))


def test_an_overlapped_run_is_faster_by_what_it_hides(runs: Runs):
    # 2 steps of 50 ms; a block of 37 kB at 20 Mbit/s takes 15 ms up, 15 ms down, and 10 ms of latency each way
    serial, overlapped = summary_of(runs("federation.delay=0")), summary_of(runs())
    assert serial["overlap_fraction"] < 0.1 < 0.6 < overlapped["overlap_fraction"]
    assert serial["wall_time_s"] == pytest.approx(serial["sequential_s"], rel=0.1)
    assert overlapped["wall_time_s"] < 0.85 * serial["wall_time_s"]


def test_a_random_model_needs_no_weights(runs: Runs, workshop: Workshop, tmp_path: Path):
    shutil.copytree(workshop.model, tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    bare = runs(f"model.name_or_path={tmp_path}", "model.init=random")
    assert sha(bare) == sha(runs("model.init=random"))


def test_without_test_files_a_part_of_each_client_is_held_out(runs: Runs):
    tenth, half = runs("data.test=[]"), runs("data.test=[]", "data.test_fraction=0.5")
    hashes = [json.loads((path / "manifest.json").read_text())["data_sha256"]["test"] for path in (tenth, half)]
    assert hashes[0] != hashes[1]
    assert sha(tenth) != sha(half)


def test_at_most_so_many_examples_are_scored(runs: Runs):
    few, all_of_them = runs("evaluation.max_examples=2"), runs()
    assert sha(few) == sha(all_of_them)
    assert summary_of(few)["initial_eval_loss"] != summary_of(all_of_them)["initial_eval_loss"]


# -- the other commands ---------------------------------------------------------------------------------------


def test_blocks_shows_the_partition(workshop: Workshop):
    outcome = done("blocks", str(workshop.model))
    for layer in range(NUM_LAYERS):
        assert re.search(rf"{layer}\W+layers\.{layer}\W+9,280\W+37\.1 kB\W+18\.6 kB\W", outcome.stdout)
    assert "37,120 of 46,752 parameters are in blocks; the other 9,632 stay as they are." in outcome.stdout
    larger = command("blocks", str(workshop.model), "--layers-per-block", "2", "--include-head")
    assert "layers.2-3" in larger.stdout
    assert "head" in larger.stdout
    assert "46,752 of 46,752 parameters" in larger.stdout


@pytest.mark.parametrize("columns", ["50", "80"])
def test_blocks_can_be_read_in_a_narrow_terminal(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, columns: str):
    monkeypatch.setenv("COLUMNS", columns)
    lines = done("blocks", str(workshop.model)).stdout.splitlines()
    assert max(map(len, lines)) <= max(int(columns), 80)
    if columns == "80":  # a row each
        assert sum("9,280" in line for line in lines) == NUM_LAYERS


@pytest.fixture(scope="module")
def choices_file(workshop: Workshop) -> Path:
    rows = [{**sum_row(k, k), "choices": [f"#### {2 * k}", f"#### {2 * k + 1}"]} for k in range(4)]
    return write_rows(workshop.path / "choices.jsonl", rows)


def scores(stdout: str) -> dict[str, tuple[float, int]]:
    """Read label → (score, examples) off the table."""
    found = re.findall(r"(base|tuned|model)\W+(\d+\.\d+)\W+(\d+)\W", stdout)
    return {label: (float(value), int(count)) for label, value, count in found}


def test_eval_scores_the_base_and_the_tuned_model_side_by_side(finished: Path, workshop: Workshop, tmp_path: Path):
    outcome = done("eval", str(finished), "--data", str(workshop.test_file))
    folder = tmp_path / "scores"
    for words in ("scores: ", "scores (in place of earlier ones): "):
        options = ("--data", str(workshop.test_file), "--max-examples", "2", "--output-dir", str(folder))
        assert words in done("eval", str(finished), *options).stdout
    summary = summary_of(finished)
    assert scores(outcome.stdout) == {
        "base": (pytest.approx(summary["initial_eval_loss"], abs=1e-4), 6),
        "tuned": (pytest.approx(summary["final_eval_loss"], abs=1e-4), 6),
    }


def test_eval_reads_rows_as_the_run_did_unless_it_is_told_otherwise(tmp_path: Path, workshop: Workshop):
    rows = [json.loads(line) for line in workshop.test_file.read_text(encoding="utf-8").splitlines()]
    both = tmp_path / "both.jsonl"
    both.write_text("".join(json.dumps({"text": json.dumps(row), **row}) + "\n" for row in rows), encoding="utf-8")
    changes = [f"data.train={both}", f"data.test={both}", "data.format=text", "data.max_length=40"]
    assert workshop.run(tmp_path / "run", *changes, "data.partition.scheme=iid").code == 0
    summary = summary_of(tmp_path / "run")
    as_the_run = scores(command("eval", str(tmp_path / "run"), "--data", str(both)).stdout)
    assert as_the_run["base"][0] == pytest.approx(summary["initial_eval_loss"], abs=1e-4)
    otherwise = command("eval", str(tmp_path / "run"), "--data", str(both), "--format", "prompt_completion")
    assert scores(otherwise.stdout)["base"][0] != as_the_run["base"][0]
    unknown = command("eval", str(tmp_path / "run"), "--data", str(both), "--format", "alpacca")
    assert unknown.code == 2 and "alpacca" in unknown.stderr + unknown.stdout


def test_eval_takes_the_rows_that_the_run_held_out(runs: Runs):
    run_dir = runs("data.test=[]")
    outcome = done("eval", str(run_dir))
    summary = summary_of(run_dir)
    held_out = json.loads((run_dir / "evaluation" / "loss.json").read_text())
    assert scores(outcome.stdout)["base"][0] == pytest.approx(summary["initial_eval_loss"], abs=1e-4)
    assert scores(outcome.stdout)["tuned"][0] == pytest.approx(summary["final_eval_loss"], abs=1e-4)
    assert "on rows that the run held out" in outcome.stdout and "warning" not in outcome.stdout
    assert held_out["rows_trained_on"] == 0
    few = runs("data.test=[]", "evaluation.max_examples=2", "data.test_fraction=0.5")
    assert scores(done("eval", str(few)).stdout)["tuned"] == (
        pytest.approx(summary_of(few)["final_eval_loss"], abs=1e-4),
        2,
    )


def test_eval_warns_of_rows_that_were_trained_on(finished: Path, workshop: Workshop, tmp_path: Path):
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(workshop.client_file(0).read_text() + workshop.test_file.read_text())
    outcome = done("eval", str(finished), "--data", str(mixed))
    trained = {line for n in range(NUM_CLIENTS) for line in workshop.client_file(n).read_text().splitlines()}
    rows = mixed.read_text().splitlines()
    count = sum(row in trained for row in rows)
    assert 8 <= count < len(rows)
    assert f"warning: {count} of {len(rows)} rows were trained on" in outcome.stdout


def test_eval_says_where_it_cannot_know_what_was_trained_on(runs: Runs, workshop: Workshop, tmp_path: Path):
    files = [shutil.copy(workshop.client_file(n), tmp_path) for n in range(NUM_CLIENTS)]
    assert workshop.run(tmp_path / "run", f"data.train=[{', '.join(files)}]", "data.test=[]").code == 0
    Path(files[0]).unlink()
    assert_refused(command("eval", str(tmp_path / "run")), "does not exist")
    outcome = done("eval", str(tmp_path / "run"), "--data", str(workshop.test_file))
    assert "whether rows were trained on is not known" in outcome.stdout
    write_rows(Path(files[0]), (sum_row(9, k) for k in range(8)))
    assert_refused(command("eval", str(tmp_path / "run")), "its held-out rows differ")


def test_eval_writes_every_row_with_prediction_and_score(finished: Path, workshop: Workshop, tmp_path: Path):
    arguments = ("eval", str(finished), "--data", str(workshop.test_file), "--task", "exact_match")
    outcome = done(*arguments, "--max-new-tokens", "4", "--output-dir", str(tmp_path / "scores"))
    written = json.loads((tmp_path / "scores" / "exact_match.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "scores" / "exact_match.jsonl").read_text().splitlines()]
    assert len(records) == 6
    assert records[1]["reference"] == "#### 2" and records[1]["row"].endswith("test.jsonl, line 2")
    for score in written["scores"]:
        mean = sum(record[f"{score['label']}_score"] for record in records) / 6
        assert (
            score["value"]
            == pytest.approx(mean)
            == pytest.approx(scores(outcome.stdout)[score["label"]][0], abs=1e-4)
        )
        assert all(isinstance(record[score["label"]], str) for record in records)
    alone = done("eval", str(finished / "model"), "--data", str(workshop.test_file))
    assert "scores:" not in alone.stdout  # a folder of a model is not written into


def test_eval_of_a_model_needs_rows(finished: Path):
    outcome = command("eval", str(finished / "model"))
    assert outcome.code == 2 and "whose held-out rows are scored" in " ".join(
        outcome.stderr.replace("│", "").split()
    )


# -- init -----------------------------------------------------------------------------------------------------


def test_init_writes_a_configuration_that_runs_as_it_stands(workshop: Workshop, tmp_path: Path):
    files = [str(workshop.client_file(n)) for n in (0, 1)]
    target = tmp_path / "config.yaml"
    outcome = done("init", *files, "--model", str(workshop.model), "--output", str(target))
    assert f"{files[0]}: 8 rows, prompt_completion: 8 examples" in outcome.stdout
    assert f"next: parablock plan {target}" in outcome.stdout
    text = target.read_text()
    assert text.count("#") > 15  # it says what each key is for
    written = yaml.safe_load(text)
    assert written["federation"]["num_clients"] == 2
    assert written["data"]["partition"] == {"scheme": "by_file"}
    assert (written["federation"]["method"], written["federation"]["delay"]) == ("fedit", 1)
    assert "adapters are configured" in outcome.stdout
    train = written["train"]
    assert train.pop("optimizer_state") == "auto"  # a delay costs less where moments are kept
    seen = written["federation"]["num_rounds"] * math.prod(train.values())
    advice = done("plan", str(target)).stdout
    assert "federation.delay: 1 (as configured)" in " ".join(advice.split()) and "1 block " in f"{advice} "
    assert "blocks.layers_per_block" not in advice
    assert seen == (80 if not torch.cuda.is_available() else 4096), "rows of a client: minutes of an LLM on a CPU"
    done("run", str(target), "--output-dir", str(tmp_path / "run"))
    assert summary_of(tmp_path / "run")["status"] == "completed"
    assert_refused(
        command("init", *files, "--model", str(workshop.model), "--output", str(target)), "is there already"
    )
    broken = str(tmp_path / "new\nline.yaml")
    assert_refused(
        command("init", *files, "--model", str(workshop.model), "--output", broken), "has a line break or another"
    )
    assert target.read_text() == text


def test_init_has_blocks_where_they_are_asked_for_or_adapters_would_not_hold_the_rows(
    workshop: Workshop, tmp_path: Path
):
    def blocks(rows: Path, *options: str) -> Any:
        target = tmp_path / f"{rows.stem}{len(options)}.yaml"
        outcome = done("init", str(rows), "--model", str(workshop.model), "--output", str(target), *options)
        written = yaml.safe_load(target.read_text())
        assert ("lora" in written) == (written["federation"]["method"] == "fedit")
        return written.get("blocks"), load_config(target).train.learning_rate, outcome.stdout

    few, much = workshop.client_file(0), tmp_path / "much.jsonl"
    assert blocks(few)[0] is None
    one_each = {"layers_per_block": 1}  # twenty rounds, four layers
    assert blocks(few, "--trains", "blocks")[:2] == (one_each, 5e-4)
    write_rows(much, [{"prompt": "?", "completion": "1 + 2 = 3 " * 200}] * 100)
    size, rate, said = blocks(much)
    assert (size, rate) == (one_each, 5e-4) and "blocks of all parameters are configured" in said
    parameters = AutoModelForCausalLM.from_pretrained(workshop.model).model.layers.named_parameters()
    held = sum(8 * sum(matrix.shape) for _, matrix in parameters if matrix.ndim == 2)
    assert f"adapters of rank 8 have {held:,} parameters, which hold about 1 bit each" in " ".join(said.split()), (
        "a bit of each parameter"
    )
    assert blocks(much, "--trains", "adapters")[0] is None


def test_init_has_blocks_where_the_package_of_adapters_is_missing(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "peft", None)
    said = write_first_config(str(workshop.model), [str(workshop.client_file(0))], tmp_path / "one.yaml")
    assert "parablock[lora]" in said[-1] and load_config(tmp_path / "one.yaml").federation.method == "parablock"
    asked = ("init", str(workshop.client_file(0)), "--model", str(workshop.model), "--trains", "adapters")
    assert_refused(command(*asked, "--output", str(tmp_path / "two.yaml")), "parablock[lora]")
    assert not (tmp_path / "two.yaml").exists()


def test_init_says_what_of_the_rows_is_not_used(workshop: Workshop, tmp_path: Path):
    def said(name: str, **more: int) -> list[str]:
        rows = [{"prompt": "a", "completion": "b", **more}, *[{"prompt": "c", "completion": "d"}] * 3]
        file = str(write_rows(tmp_path / f"{name}.jsonl", rows))
        return write_first_config(str(workshop.model), [file], tmp_path / f"{name}.yaml", trains="blocks")

    assert "not used: field score (1 row)" in said("more", score=1)
    assert not [line for line in said("plain") if "not used" in line]


def test_init_deals_the_rows_of_one_file_out(workshop: Workshop, tmp_path: Path):
    target = tmp_path / "one.yaml"
    file = str(workshop.client_file(0))
    done("init", file, "--clients", "3", "--model", str(workshop.model), "--output", str(target))
    written = yaml.safe_load(target.read_text())
    assert written["federation"]["num_clients"] == 3
    assert written["data"]["partition"] == {"scheme": "iid"}
    assert written["data"]["max_length"] == 32  # the rows have 31 tokens and fewer


def test_init_quotes_names_that_are_values_of_yaml(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    names = ["no", "0x10", "010", "1e5", "null", "a b", "a, b]", "a\x85b", "-", 'say "a"']
    for name in names:
        Path(name).symlink_to(workshop.model)
        target = tmp_path / f"{names.index(name)}.yaml"
        write_first_config(name, [str(workshop.client_file(0))], target)
        assert load_config(target).model.name_or_path == name
        assert yaml.safe_load(target.read_text())["model"]["name_or_path"] == name


def test_init_refuses_more_clients_than_the_rows_are_enough_for(workshop: Workshop, tmp_path: Path):
    target, file = tmp_path / "one.yaml", str(workshop.client_file(0))  # of eight rows
    for clients in (5, 10**8):
        with pytest.raises(ConfigError, match=f"8 rows are too few for {clients} clients.*fewer --clients"):
            write_first_config(str(workshop.model), [file], target, clients=clients)
        assert not target.exists()
    write_first_config(str(workshop.model), [file], target, clients=4)
    read_inputs(load_config(target))


def test_init_refuses_a_file_twice(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(workshop.path)
    files = [str(workshop.client_file(k).relative_to(workshop.path)) for k in range(2)]
    (tmp_path / "link.jsonl").symlink_to(workshop.client_file(0))
    target = str(tmp_path / "one.yaml")
    for again in (files[0], f"./{files[0]}", str(workshop.client_file(0)), str(tmp_path / "link.jsonl")):
        refused = command("init", files[0], files[1], again, "--model", "model", "--output", target)
        assert_refused(refused, "the same file twice", files[0])
    done("init", *files, "--model", "model", "--output", target)


def test_init_takes_the_columns_of_a_table(workshop: Workshop, tmp_path: Path):
    table, target = tmp_path / "rows.csv", tmp_path / "one.yaml"
    table.write_text("question,reply\n" + "".join(f"{n} + 1 =,{n + 1}\n" for n in range(8)))
    arguments = ("init", str(table), "--model", str(workshop.model), "--output", str(target))
    assert_refused(command(*arguments), "data.columns")
    done(*arguments, "--column", "prompt=question", "--column", "completion=reply")
    assert yaml.safe_load(target.read_text())["data"]["columns"] == {"prompt": "question", "completion": "reply"}


@pytest.mark.parametrize(
    ("change", "says"),
    [({"file": "gone.jsonl"}, "gone.jsonl"), ({"model": "no/such"}, "no/such"), ({"rows": "{}\n"}, "line 1")],
)
def test_init_refuses_what_a_run_would_refuse(
    change: dict[str, str], says: str, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(change.get("rows", json.dumps(sum_row(1, 2)) + "\n"))
    file, model = change.get("file", str(rows)), change.get("model", str(workshop.model))
    target = tmp_path / "config.yaml"
    assert_refused(command("init", file, "--model", model, "--output", str(target)), says)
    assert not target.exists()


def test_a_run_leaves_the_answers_of_both_models(workshop: Workshop, tmp_path: Path):
    changes = ("evaluation.num_answers=2", "train.learning_rate=0.05")
    assert workshop.run(tmp_path / "run", *changes).code == 0
    records = json.loads((tmp_path / "run" / "answers.json").read_text())
    assert [record["prompt"] for record in records] == ["0 plus 0?", "1 plus 1?"]
    assert [record["reference"] for record in records] == ["#### 0", "#### 2"]
    prompts = ("0 plus 0?", "1 plus 1?")
    arguments = ("generate", str(tmp_path / "run"), *prompts, "--format", "jsonl", "--max-new-tokens", "48")
    again = [json.loads(line) for line in done(*arguments).stdout.splitlines()]
    for record, generated in zip(records, again, strict=True):
        assert (record["base"], record["tuned"]) == (generated["base"], generated["tuned"])
        assert (
            record.get("base_cut_at") in (None, 48) and "base_cut_at" in records[0]
        )  # the base model knows no end
    assert workshop.run(tmp_path / "none", "evaluation.num_answers=0").code == 0
    assert not (tmp_path / "none" / "answers.json").exists()
    assert sha(tmp_path / "none") == sha(done_again(workshop, tmp_path / "with", "evaluation.num_answers=2"))


def done_again(workshop: Workshop, run_dir: Path, *changes: str) -> Path:
    assert workshop.run(run_dir, *changes).code == 0
    return run_dir


def test_eval_scores_a_model_alone(finished: Path, workshop: Workshop):
    outcome = command("eval", str(finished / "model"), "--data", str(workshop.test_file), "--max-examples", "3")
    assert list(scores(outcome.stdout)) == ["model"]
    assert scores(outcome.stdout)["model"][1] == 3


def test_eval_generates_answers(finished: Path, workshop: Workshop):
    arguments = ("eval", str(finished), "--data", str(workshop.test_file), "--task", "exact_match")
    outcome = done(*arguments, "--max-new-tokens", "4")
    assert set(scores(outcome.stdout)) == {"base", "tuned"}
    assert outcome.stdout.count("  right would be:\n    #### 0\n") == 2
    assert outcome.stdout.endswith(f"talk to it: parablock chat {finished}\n")
    silent = command(*arguments, "--max-new-tokens", "4", "--samples", "0")
    assert "would be:" not in silent.stdout


def test_eval_chooses_between_choices(finished: Path, choices_file: Path):
    outcome = done("eval", str(finished), "--data", str(choices_file), "--task", "multiple_choice")
    for value, count in scores(outcome.stdout).values():
        assert count == 4
        assert value in (0, 0.25, 0.5, 0.75, 1)
    assert set(scores(outcome.stdout)) == {"base", "tuned"}


def test_doctor_looks_at_this_machine():
    outcome = command("doctor")
    assert outcome.code == int("problem" in outcome.stdout)
    for said in ("python", torch.__version__.partition("+")[0], "memory", "disk", "compute probe"):
        assert said in outcome.stdout


def test_the_version_is_the_packages():
    assert command("--version").stdout == f"parablock {__version__}\n"


def test_without_a_command_the_help_is_shown():
    outcome = command()
    assert outcome.code == 2
    said = outcome.stdout + outcome.stderr  # Typer's releases differ in where they say it
    assert said.strip() == command("--help").stdout.strip()
    for name in COMMANDS:
        assert re.search(rf"^│ {name} ", said, flags=re.MULTILINE)


def test_every_command_has_help_with_an_example_of_itself():
    names = re.findall(r"^│ (\w+)  ", command("--help").stdout.partition(" Commands ")[2], flags=re.MULTILINE)
    assert set(names) >= set(COMMANDS)
    for name in set(names) - {"deploy"}:  # which has commands of its own, with examples
        outcome = done(name, "--help")
        assert f"Example: parablock {name}" in " ".join(outcome.stdout.split())


def test_a_run_as_a_process_of_its_own_is_the_same(runs: Runs, workshop: Workshop, tmp_path: Path):
    outcome = command_apart(*workshop.arguments(tmp_path / "out"))
    assert (outcome.code, outcome.stderr) == (0, "")
    assert sha(tmp_path / "out") == sha(runs())


def test_the_exported_model_stops_by_itself_where_training_ended_a_turn(workshop, tmp_path):
    workshop.run(tmp_path / "run", "federation.num_rounds=4")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    stops = model.generation_config.eos_token_id
    assert set(stops) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    base = AutoModelForCausalLM.from_pretrained(workshop.model)
    assert base.generation_config.eos_token_id != stops


@pytest.mark.parametrize(
    ("words", "of"),
    [
        (("run", "config.yaml", "--output-dir", ""), "of --output-dir "),
        (("run", "config.yaml", "--output-dir="), "of --output-dir "),
        (("data", ""), ""),
        (("generate", "runs/a", "Hi", "--output", ""), "of --output "),
    ],
)
def test_an_empty_word_is_no_folder(words: tuple[str, ...], of: str):
    assert_refused(command(*words), f"the value {of}is empty; a variable of the shell may not be set")


def test_a_text_may_be_empty(finished: Path):
    done("generate", str(finished), "2 plus 2?", "--max-new-tokens", "2", "--system", "")


def test_a_disk_without_room_for_the_model_is_told_of_at_the_start(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(experiment_run, "free_bytes", lambda folder: 1000)
    full = workshop.run(tmp_path / "full", "federation.num_rounds=4")
    assert "1.0 kB free, and the model alone takes about" in full.stdout
    monkeypatch.undo()
    assert "the model alone takes" not in workshop.run(tmp_path / "wide", "federation.num_rounds=4").stdout


def test_scores_that_cannot_be_written_are_refused_before_anything_is_scored(
    finished: Path, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(side_by_side, "score_models", lambda *_, **__: pytest.fail("it scores"))
    place = ("--output-dir", str(workshop.test_file / "scores"))
    assert_refused(command("eval", str(finished), *place), "cannot be a folder", "Give another --output-dir")


def test_the_time_of_the_rounds_has_no_part_of_what_the_base_model_did_before(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    answer, waited = MethodModel.answer, []

    def slow(model: MethodModel) -> list[dict[str, Any]]:
        time.sleep(1.5)
        waited.append(1)
        return answer(model)

    monkeypatch.setattr(MethodModel, "answer", slow)
    run_dir = tmp_path / "run"
    workshop.run(run_dir, "engine={clock: real, num_threads: 1}", "evaluation.num_answers=1")
    spans = json.loads((run_dir / "trace.json").read_text())["traceEvents"]
    first_s = min(span["ts"] for span in spans if span["ph"] == "X") / 1e6
    assert len(waited) == 2 and first_s < 1.5
    summary = summary_of(run_dir)
    assert summary["wall_time_s"] < summary["elapsed_s"] - 3


def test_a_run_says_how_often_each_example_is_learnt_from(workshop: Workshop, tmp_path: Path):
    said = " ".join(workshop.run(tmp_path / "run").stdout.split())
    (line,) = re.findall(r"a client learns from ([0-9,]+) examples, (\S+) times those that it has", said)
    config = load_config(tmp_path / "run" / "config.yaml")
    seen = config.federation.num_rounds * config.train.num_local_steps * config.train.per_device_train_batch_size
    assert int(line[0].replace(",", "")) == seen
    clients = json.loads((tmp_path / "run" / "manifest.json").read_text())["clients"]
    mean = sum(entry["examples"] for entry in clients) / len(clients)
    assert float(line[1]) == pytest.approx(seen / mean, rel=0.06)
