"""How fast: a local step, the wire, overlap in real time, slow links, many clients, an earlier commit, a picture.

.venv/bin/python benchmarks/speed.py step
"""

from __future__ import annotations

import copy
import ctypes
import json
import multiprocessing
import os
import pty
import re
import resource
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory, TemporaryFile, mkdtemp
from typing import Any

import _record as kit
import psutil
import torch
from _record import Bar, Found, Options, benchmarks, main, record, section, table, table_of
from llm import smollm2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from engines import QUIET, run_here
from parablock.algorithm.aggregate import fold, join
from parablock.clock import RealClock, VirtualClock
from parablock.config.keys import RunConfig
from parablock.data.batches import Batch
from parablock.engine.local_steps import FixedSteps
from parablock.engine.plans import ServerPlan
from parablock.engine.round_fold import RoundFold
from parablock.engine.update_form import Differences, SparseDifferences
from parablock.experiment.engines import server_plan, update_form
from parablock.model.adapters import adapter_block, add_adapters
from parablock.model.blocks import partition_blocks
from parablock.model.params import Replica
from parablock.model.pretrained import load_model, outline_model
from parablock.plan.itinerary import walk
from parablock.plan.timing import time_rounds
from parablock.plan.traffic import Sizes
from parablock.seeding import generator_for
from parablock.trace import Trace
from parablock.training.flops import FlopModel, Tokens
from parablock.training.local import LocalArguments, train_block
from parablock.training.step_time import ASSUMED_FLOPS
from parablock.wire.messages import Update
from parablock.wire.quantize import (
    CHUNK_PIECE,
    FORMATS,
    Encoding,
    Vector,
    bytes_per_element,
    pack,
    payload_bytes,
    payload_format,
)
from parablock.wire.transport import Link
from toy import Idle

CHUNK_BYTES = 4_194_304
DENSITY = 0.02
ARGUMENTS = LocalArguments(learning_rate=1e-4)
LORA_RANK = 16
ORDERS, WIRE_FORMATS = ("in turns", "one client late"), ("float32", "int8", "int4")
"""Of updates that arrive, and what they are aggregated in."""

FORMATS_AND_DELAYS = (("int4", 1), ("int8", 1), ("bfloat16", 1), ("float32", 1), ("int4", 0))
SHAPES, WAYS = kit.ABOUT["scale"]["shapes"], kit.ABOUT["scale"]["ways"]
UTILISATIONS = (0.5, 0.8, 0.9, 0.95, 0.99)
NUM_BLOCKS, CHUNKS = 2, 4


# -- step
def step(options: Options) -> None:
    """Time a block's step beside a loop by hand, full fine-tuning, and LoRA, with the same batches and AdamW."""
    torch.set_num_threads(1)
    rows = [{"model": name} | measure_steps(make(), options) for name, make in models(options).items()]
    bars = [
        Bar(f"block / {words}, {row['model']}", row["ratios"][way], limit)
        for row in rows
        for words, way, limit in (("loop by hand", "by hand", 1.05), ("full step", "full", 0.65))
    ]
    record(options, rows, bars)


def step_section(found: Found) -> Found:
    rows = [
        [
            f"{row['model']}, {name}",
            f"{1e3 * seconds:.1f}",
            f"{row['ratios'][name]:.3f}" if name in row["ratios"] else "",
            f"{row['peak_bytes_beside_the_model'][name] / 1e6:.0f}",
        ]
        for row in found["results"]
        for name, seconds in row["step_s"].items()
    ]
    return section("step", found, table(["model", "ms", "block / this", "peak MB beside the model"], rows))


def models(options: Options) -> dict[str, Callable[[], PreTrainedModel]]:
    layers = 2 if options.smoke else 12
    shape = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": layers}
    config = LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True)
    found: dict[str, Callable[[], PreTrainedModel]] = {}
    if (folder := kit.SHARED / "models" / options.model).is_dir():
        arguments = {"dtype": "float32", "device": "cpu", "init": "pretrained", "seed": 0}
        found[folder.name] = lambda: load_model(str(folder), **arguments).model
    found[f"llama-{layers}x512"] = lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return found


def measure_steps(model: PreTrainedModel, options: Options) -> Found:
    batches = [make_batch(k, model.config.vocab_size, options) for k in range(options.steps)]
    adapted = copy.deepcopy(model)
    add_adapters(adapted, rank=LORA_RANK, alpha=2 * LORA_RANK, seed=0)
    replica, plain = Replica(copy.deepcopy(model), partition_blocks(model, layers_per_block=1)), model
    last = len(replica.blocks) - 1
    chosen = sorted({round(last * k / max(1, options.blocks - 1)) for k in range(options.blocks)})
    starts = {b: replica.read(b) for b in chosen}
    adapters = adapter_block(adapted).parameter_names
    everything = [name for name, _ in plain.named_parameters()]

    def visit(b: int) -> Tensor:
        steps = [[batch] for batch in batches]
        return train_block(replica, b, starts[b], steps, ARGUMENTS, first_step=0, total_steps=len(steps)).trained[:]

    ways: dict[str, Callable[[int], Any]] = {
        "block": visit,
        "by hand": lambda b: train_by_hand(plain, replica.blocks[b].parameter_names, batches),
        "full": lambda _: train_by_hand(plain, everything, batches),
        "lora": lambda _: train_by_hand(adapted, adapters, batches),
    }
    peaks = {name: peak_bytes(lambda way=way: way(chosen[0])) for name, way in ways.items()}  # nothing is left over
    ways["by hand"](chosen[-1])
    found = torch.cat([plain.get_parameter(name).data.view(-1) for name in replica.blocks[last].parameter_names])
    same = torch.allclose(visit(chosen[-1]), found.float(), rtol=1e-4, atol=1e-6)
    seconds = take_turns(ways, chosen, options)

    def of_blocks(name: str) -> float:  # a block's step over that of another way, both in the same turn
        turns = [zip(seconds["block"][b], seconds[name][b], strict=True) for b in chosen]
        return fmean(median(own / other for own, other in pairs) for pairs in turns)

    return {
        "by_hand_ends_with_the_same_block": same,
        "step_s": {name: fmean(map(median, of_way.values())) for name, of_way in seconds.items()},
        "ratios": {name: of_blocks(name) for name in ways if name != "block"},
        "peak_bytes_beside_the_model": peaks,
        "samples_s": seconds,
    }


def make_batch(seed: int, vocabulary: int, options: Options) -> Batch:
    """Draw tokens without padding, the first half of each row a prompt without labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (options.batch_size, options.length), generator=generator)
    labels = ids.clone()
    labels[:, : options.length // 2] = -100
    return Batch(ids, torch.ones_like(ids), labels)


def train_by_hand(model: PreTrainedModel, names: Sequence[str], batches: list[Batch]) -> None:
    """Train some parameters of a model as one would by hand, with logits only where a label is predicted."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = [model.get_parameter(name).requires_grad_(True) for name in names]
    optimizer = torch.optim.AdamW(trained, lr=ARGUMENTS.learning_rate, weight_decay=0.0, fused=True)
    model.train()
    for batch in batches:
        next_BT = batch.labels_BT[:, 1:]
        predicts_BT = next_BT != -100
        hidden_BTD = model.get_decoder()(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
        ).last_hidden_state
        logits_NV = model.get_output_embeddings()(hidden_BTD[:, :-1][predicts_BT])
        cross_entropy(logits_NV.float(), next_BT[predicts_BT]).backward()
        nn.utils.clip_grad_norm_(trained, ARGUMENTS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def take_turns(
    ways: dict[str, Callable[[int], object]], chosen: list[int], options: Options
) -> dict[str, dict[int, list[float]]]:
    """Time every way on every block `repeats` times, one after the other; all in seconds per step."""
    seconds: dict[str, dict[int, list[float]]] = {name: {b: [] for b in chosen} for name in ways}
    for repeat, b, (name, way) in product(range(options.repeats + 1), chosen, ways.items()):
        began = time.process_time()
        way(b)
        if repeat or options.smoke:  # the first turn warms up
            seconds[name][b].append((time.process_time() - began) / options.steps)
    return seconds


def peak_bytes(way: Callable[[], object]) -> int:
    """Run in a forked process; return how much its resident memory grew at the most."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        with PeakMemory() as memory:
            way()
        sender.send(memory.peak_bytes)

    process = context.Process(target=child)
    process.start()
    grown: int = receiver.recv()
    process.join()
    return grown


class PeakMemory:
    """The most memory of this process while the block lasts, above what it had before."""

    peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there to be used unseen
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = psutil.Process().memory_info().rss
        return self

    def __exit__(self, *error: object) -> None:
        peaks = [1024 * int(peak) for peak in re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())]
        self.peak_bytes = max(psutil.Process().memory_info().rss, *peaks) - self._before


# -- wire
def wire(options: Options) -> None:
    """Measure bytes and speed of every format, what streaming saves, what aggregation of many updates needs."""
    torch.set_num_threads(1)
    formats, streaming = measure_formats(options), measure_streaming(options)
    aggregation = measure_aggregation(options, WIRE_FORMATS)
    alone, *folds = aggregation["rows"]
    slowest = min(row["megabytes_per_s"] for row in formats)
    bars = [
        Bar("int4 bytes / float32 bytes", payload_bytes(10**6, "int4") / payload_bytes(10**6, "float32"), 0.14),
        Bar("encode and decode of the slowest quantised format, MB/s of float32", slowest, 400, at_most=False),
        Bar("streamed exchange / (upload + download)", streaming["ratio"], 0.58),
        Bar("peak memory of aggregation, blocks", max(row["peak_blocks"] for row in folds), 3),
    ]
    bars += [
        Bar(f"aggregation / plain add_, throughput: {row['what']}", row["relative_throughput"], 0.5, at_most=False)
        for row in (alone, *(row for row in folds if row["order"] == ORDERS[0]))
    ]
    found = {"formats": formats, "streaming": streaming, "aggregation": aggregation}
    record(options, found, bars)


def wire_section(found: Found) -> Found:
    formats = [row for row in found["results"]["formats"] if row["format"].startswith("int")]
    aggregation = found["results"]["aggregation"]
    said, millions = kit.ABOUT["wire"], aggregation["parameters"] / 1e6
    fold = said["fold"].format(updates=aggregation["updates"], millions=millions)
    return section("wire", found, table_of(formats, said["columns"]), fold, fold_table(aggregation))


def fold_table(aggregation: Found) -> Found:
    rows = [
        row | {"disk": f"{row['disk_gigabytes_per_s']:.2f}" if row["file_gigabytes"] else ""}
        for row in aggregation["rows"]
    ]
    return table_of(rows, kit.ABOUT["wire"]["fold_columns"])


# -- the fold of sparse updates
def sparse_fold(options: Options) -> None:
    """Measure the server's fold of sparse updates beside that of float32, in seconds and memory."""
    torch.set_num_threads(1)
    found = measure_aggregation(options, ("float32", "sparse2"), ORDERS[:1])
    alone, dense, sparse = found["rows"]
    ratio, beside = (median(sparse["seconds"]) / median(row["seconds"]) for row in (dense, alone))
    bars = [
        Bar("fold of sparse2 / of float32, seconds", ratio, 0.25),
        Bar("peak memory of the fold of sparse2, blocks", sparse["peak_blocks"], 2.2),
    ]
    record(options, found | {"beside_the_arithmetic": beside}, bars)


def sparse_fold_section(found: Found) -> Found:
    seconds = ", ".join(f"{row['what']} {median(row['seconds']):.1f} s" for row in found["results"]["rows"])
    return section("sparse_fold", found, fold_table(found["results"]), seconds=seconds)


def measure_formats(options: Options) -> list[Found]:
    values = torch.from_numpy(generator_for(0, "benchmark").normal(size=options.elements)).float() * 1e-3
    rows = []
    roundings = [(name, how) for name in FORMATS if name.startswith("int") for how in ("stochastic", "nearest")]
    for name, rounding in roundings:
        encoding, seconds = Encoding(name, rounding), []
        for t in range(options.repeats + 1):
            began = time.perf_counter()
            pack(values, name, encoding.noise(t, 0)).values.float()
            seconds.append(time.perf_counter() - began)
        ratio = payload_bytes(options.elements, name) / (4 * options.elements)
        speed = 4e-6 * options.elements / median(seconds[1:])
        rows.append({"format": name, "rounding": rounding, "bytes_ratio": ratio, "megabytes_per_s": speed})
    return rows


def measure_streaming(options: Options) -> Found:
    """Exchange one block of 24 chunks between two clients and the server, whole and streamed, in real time."""
    chunks, link = 24, Link(upload_mbps=40.0, download_mbps=40.0)
    params = [torch.zeros(chunks * CHUNK_PIECE) for _ in range(2)]
    seconds: dict[str, list[float]] = {"whole": [], "streamed": []}
    for _ in range(max(1, options.repeats // 2)):
        for name, chunk in (("whole", {}), ("streamed", {"chunk_bytes": 4 * CHUNK_PIECE})):
            encoding = Encoding("float32", **chunk)
            plan = ServerPlan(2, 2, 0, "cyclic", 1.0, 0, Differences(encoding), FixedSteps(1), 60.0, 0)
            clock = RealClock()
            run_here(params, [Idle(), Idle()], plan, Trace(clock), link=link, in_flight="own")
            seconds[name].append(clock.now() / 2)
    up_and_down = 2 * link.upload_s(4 * chunks * CHUNK_PIECE)
    found = {name: median(values) for name, values in seconds.items()}
    return {"up_and_down_s": up_and_down, **found, "ratio": found["streamed"] / up_and_down}


def measure_aggregation(options: Options, formats: Sequence[str], orders: Sequence[str] = ORDERS) -> Found:
    """Fold all updates in formats and orders, and the arithmetic alone, each in turns with a plain `add_`."""
    sources = [torch.randn(options.block) for _ in range(3)]  # no update is in the cache when its turn comes
    folder = kit.fresh_folder(options)
    alone = in_turns(lambda: arithmetic(sources, options), sources, options, options.repeats)
    rows = [{"what": "the arithmetic alone", **alone}]
    for name in formats:
        payload = payload_format(name, DENSITY)
        form = (SparseDifferences if name == "sparse2" else Differences)(Encoding(payload, chunk_bytes=CHUNK_BYTES))
        cuts = form.cuts(options.block)
        chunks = [[pack(source[cut], payload) for cut in cuts] for source in sources]
        for order in orders:
            fold_all = partial(one_round, chunks, form, order, folder, options)
            found = in_turns(fold_all, sources, options, 1)
            found["disk_gigabytes_per_s"] = disk_speed(folder, round(1e9 * found["file_gigabytes"]))
            rows.append({"what": f"{name}, {order}", "format": name, "order": order, **found})
    return {"updates": options.updates, "parameters": options.block, "rows": rows}


def in_turns(way: Callable[[], tuple[int, float]], sources: list[Tensor], options: Options, repeats: int) -> Found:
    """Repeat a way, which returns its bytes in a file and its seconds, beside a plain `add_`."""
    seconds, plain_s, peaks, file_bytes = [], [], [], 0
    for _ in range(repeats):
        total, began = torch.zeros(options.block), time.perf_counter()
        for k in range(options.updates):
            total.add_(sources[k % len(sources)])
        plain_s.append(time.perf_counter() - began)
        del total
        with PeakMemory() as memory:
            file_bytes, way_s = way()
        seconds.append(way_s)
        peaks.append(memory.peak_bytes)
    gigabytes = 4e-9 * options.block * options.updates
    return {
        "gigabytes_per_s": gigabytes / median(seconds),
        "relative_throughput": median(p / s for p, s in zip(plain_s, seconds, strict=True)),
        "seconds": seconds,
        "plain_s": plain_s,
        "peak_blocks": max(peaks) / (4 * options.block),
        "file_gigabytes": 1e-9 * file_bytes,
    }


def arithmetic(sources: list[Tensor], options: Options) -> tuple[int, float]:
    """Fold vectors that lie in memory; nothing comes, nothing is kept."""
    began = time.perf_counter()
    cuts = Encoding("float32", chunk_bytes=CHUNK_BYTES).cut(options.block)
    join([fold({k: (sources[k % 3][cut], 1) for k in range(options.updates)}) for cut in cuts])
    return 0, time.perf_counter() - began


def one_round(
    chunks: list[list[Vector]], form: Differences, order: str, folder: Path, options: Options
) -> tuple[int, float]:
    """Take and fold a round's updates; return bytes that were kept in the file, and seconds of the server."""
    num_updates, cuts = options.updates, form.cuts(options.block)
    folding = RoundFold(0, 0, dict.fromkeys(range(num_updates), 1), options.block, form, folder)
    first, seconds = Update(0, 0, 0, 1, -1, 1.0, 1, 1.0, 0, len(cuts), chunks[0][0]), 0.0
    late = num_updates - 1 if order == ORDERS[1] else num_updates
    arrivals = [(client_id, index) for index in range(len(cuts)) for client_id in range(late)]
    arrivals += [(client_id, index) for client_id in range(late, num_updates) for index in range(len(cuts))]
    for client_id, index in arrivals:
        delta = chunks[client_id % len(chunks)][index]
        delta = replace(delta, raw=delta.raw.clone())
        update = replace(first, client_id=client_id, chunk_index=index, delta=delta)
        began = time.perf_counter()
        problem = folding.take(client_id, update)
        if folding.is_next_ready:
            folding.fold_next()
        seconds += time.perf_counter() - began
        assert problem is None, problem
    assert folding.is_complete
    file_bytes, began = folding.file_bytes, time.perf_counter()
    aggregate = folding.aggregate()
    seconds += time.perf_counter() - began
    assert 0.2 < aggregate.rho < 0.5
    return file_bytes, seconds


def disk_speed(folder: Path, num_bytes: int) -> float:
    """Write so many bytes into a file of the same folder, and no more; return GB/s."""
    if not num_bytes:
        return 0.0
    content, began = os.urandom(CHUNK_BYTES), time.perf_counter()
    with TemporaryFile(buffering=0, dir=folder) as file:
        for _ in range(-(-num_bytes // CHUNK_BYTES)):
            file.write(content)
        return 1e-9 * num_bytes / (time.perf_counter() - began)


# -- overlap
def overlap(options: Options) -> None:
    """Measure how much of the communication is hidden on the real clock, with threads that really run at once."""
    folder, found = kit.fresh_folder(options), []
    settings = kit.training(options) | {"data.partition.scheme": None}
    material = kit.material_of(options, "ag_news", "rotten_tomatoes")

    for repeat in range(options.repeats):
        serial = kit.configured(material, settings | {"federation.delay": 0})
        calibration = kit.run_quietly(serial, folder / f"{repeat}-calibration")
        compute_s, num_bytes = calibration["compute_s"] / options.rounds, calibration["bytes_per_client_round"]
        for load in options.loads:
            mbps = num_bytes * 8e-6 / (load * compute_s)
            shaped = settings | kit.link(mbps)
            configs = [kit.configured(material, shaped | {"federation.delay": delay}) for delay in (0, 1)]
            zero, one = (
                kit.run_quietly(config, folder / f"{repeat}-load-{load:g}-delay-{delay}")
                for delay, config in enumerate(configs)
            )
            row = {"load": load, "ratio": one["wall_time_s"] / zero["wall_time_s"], "delay_0": zero, "delay_1": one}
            facts = {"compute_s": compute_s, "bytes": num_bytes, "mbps": mbps}
            found.append(row | {"link": facts, "calibration": calibration})
    bars = []
    for load, same in kit.grouped(found, "load").items():
        hidden = median(row["delay_1"]["overlap_fraction"] for row in same)
        ratio = median(row["ratio"] for row in same)
        bars.append(Bar(f"load {load:g}: wall time of delay 1 / delay 0, median", ratio, 0.60))
        bars.append(Bar(f"load {load:g}: overlap_fraction of delay 1, median", hidden, 0.90, at_most=False))
    record(options, found, bars, configs[1])


# -- slow link
def slow_link(options: Options) -> None:
    """Measure what a round on a hospital's link takes, over what it computes, for every wire format."""
    folder, runs = kit.fresh_folder(options), []
    material = kit.material_of(options, "ag_news", "rotten_tomatoes")
    full = first_block(outline("8B"))
    small = first_block(outline_model(material.model, dtype="float32"))
    settings = kit.training(options) | kit.link(options.mbps * small / full)
    settings |= {"engine.step_time_s": options.compute_s, "data.partition.scheme": None}
    settings |= {} if options.smoke else {"data.max_length": 32}
    for wire_format, delay in FORMATS_AND_DELAYS[::3] if options.smoke else FORMATS_AND_DELAYS:
        chunk_bytes = round(CHUNK_PIECE * bytes_per_element(wire_format))
        case = {"wire.format": wire_format, "wire.chunk_bytes": chunk_bytes, "federation.delay": delay}
        config, directory = kit.configured(material, settings | case), folder / f"{wire_format}-delay-{delay}"
        summary = kit.run_quietly(config, directory)
        rounds = kit.metrics_of(directory)[1:-1]  # the first waits for nobody, the last has the drain
        found = {key: median(row[key] for row in rounds) for key in ("round_s", "communication_s")}
        found |= {key: summary[key] for key in ("overlap_fraction", "final_eval_loss")}
        found |= {"compute_s": options.compute_s, "ratio": found["round_s"] / options.compute_s}
        runs.append({"format": wire_format, "delay": delay, **found})
    bars = [Bar("round / compute with int4", runs[0]["ratio"], 1.05)]
    results = {"layer_parameters": full, "block_parameters": small, "runs": runs}
    record(options, results, bars, config)


def first_block(model: PreTrainedModel) -> int:
    return partition_blocks(model, layers_per_block=1)[0].num_parameters


def outline(size: str) -> PreTrainedModel:
    """Make a Llama of these shapes without values."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shape = dict(zip(keys, SHAPES[size], strict=True))
    config = LlamaConfig(**shape, vocab_size=128_256, tie_word_embeddings=size == "1B")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


# -- scale
def scale(options: Options) -> None:
    """Simulate a thousand clients with blocks of Llama-3-8B; compute what bandwidth keeps a client busy."""
    torch.set_num_threads(1)
    full_size = first_block(outline("8B"))
    settings = kit.training(options) | kit.link(options.mbps * CHUNKS * CHUNK_PIECE / full_size)
    settings |= {"federation.num_clients": options.clients, "engine.step_time_s": options.compute_s / options.steps}
    settings |= {"wire.chunk_bytes": CHUNK_PIECE // 2, "data.partition.scheme": None}
    cohorts, material = [], kit.Material("none", ("none",), ())
    for cohort in options.cohorts:
        config = kit.configured(material, settings | {"federation.participation": cohort / options.clients})
        cohorts.append(simulate(config, cohort, full_size, options))
    few, many = cohorts[0], cohorts[-1]
    growth = many["real_s_per_client"] / few["real_s_per_client"]
    worst = max(abs(row["simulated_s"] / row["planned_s"] - 1) for row in cohorts)
    copies = max(row["grown_bytes"] / (row["clients"] * row["full_size_bytes"]) for row in cohorts)
    bars = [
        Bar(f"cost of a client's round, cohort {many['cohort']} / cohort {few['cohort']}", growth, 1.5),
        Bar("simulated / planned time, largest deviation", worst, 0.02),
        Bar("memory of the largest / one full-size copy a client", copies, 0.01),
    ]
    results = {"cohorts": cohorts, "bandwidths": [row for size in SHAPES for row in bandwidths(size, options)]}
    record(options, results, bars, config)


def scale_section(found: Found) -> Found:
    cohorts, speeds = found["results"]["cohorts"], found["results"]["bandwidths"]
    parts = {part: f"{{mbps[{part}]:,.1f}}" for part in speeds[0]["mbps"]}
    said, rows = kit.ABOUT["scale"], [row | {"gigabytes": row["grown_bytes"] / 1e9} for row in cohorts]
    by_part = table_of(speeds, {"model, method": "{model}, {way}", **parts})
    text = said["cohorts"].format(clients=cohorts[0]["clients"])
    return section("scale", found, by_part, text, table_of(rows, said["columns"]))


def simulate(config: RunConfig, cohort: int, full_size: int, options: Options) -> Found:
    """Run the cohorts, and plan the same run with the real sizes, on the real link, in as many chunks."""
    params = [torch.zeros(CHUNKS * CHUNK_PIECE, dtype=torch.bfloat16) for _ in range(NUM_BLOCKS)]
    clock, process, real_s = VirtualClock(), psutil.Process(), [time.perf_counter()]
    memory = [process.memory_info().rss]

    def on_commit(*_: object) -> None:
        real_s.append(time.perf_counter())
        memory.append(process.memory_info().rss)

    idle = [Idle(options.compute_s / options.steps)] * options.clients
    shaped = Link(**config.link.model_dump())
    plan, hooks = server_plan(config, update_form(config)), replace(QUIET, on_commit=on_commit)
    run_here(params, idle, plan, Trace(clock), hooks, link=shaped)
    per_round = median(later - earlier for earlier, later in pairwise(real_s[1:]))
    chunk = full_size // CHUNKS // CHUNK_PIECE * CHUNK_PIECE
    planned = time_rounds(
        walk(config, NUM_BLOCKS, config.federation.delay),
        Sizes([full_size] * NUM_BLOCKS, dtype="bfloat16", wire_format="int4", chunk_bytes=chunk // 2),
        lambda *_: options.compute_s,
        Link(options.mbps, options.mbps),
        delay=config.federation.delay,
    )
    return {
        "cohort": cohort,
        "clients": options.clients,
        "simulated_s": clock.now(),
        "planned_s": planned.wall_s,
        "real_s_per_round": per_round,
        "real_s_per_client": per_round / cohort,
        "grown_bytes": max(*memory, process.memory_info().rss) - memory[0],
        "full_size_bytes": 2 * full_size,
    }


def bandwidths(size: str, options: Options) -> list[Found]:
    """Return the Mbit/s at which a client of each way computes for each part of the time."""
    model = outline(size)
    flops, blocks = FlopModel(model), partition_blocks(model, layers_per_block=1)
    tokens = Tokens.at_most(num_examples=options.batch_size, max_length=options.length)
    speed = ASSUMED_FLOPS["cuda", "bfloat16"]
    compute_s = options.steps * fmean(flops.step(block, tokens) for block in blocks) / speed
    elements, rows = blocks[0].num_parameters, []
    for name, wire_format in WAYS.items():
        encoding = Encoding(wire_format, chunk_bytes=CHUNK_BYTES)
        # streamed: one direction in full, and the other's last chunk
        moved = encoding.payload_bytes(elements) + encoding.payload_bytes(encoding.cut(elements)[0].stop)
        waits_s = compute_s if name.startswith("FL-BCD") else 0.0
        mbps = {f"{part:.0%}": 8e-6 * moved / (compute_s / part - waits_s) for part in UTILISATIONS}
        row = {"model": size, "way": name, "compute_s": compute_s, "block_parameters": elements}
        rows.append(row | {"mbps": mbps})
    return rows


# -- beside an earlier commit
def before(options: Options) -> None:
    """Compare the processor time of whole commands with that at an earlier commit, in turns."""
    folder = kit.fresh_folder(options)
    material = kit.generated(folder / "material", num_clients=2, examples_per_client=100)
    cases = kit.ABOUT["before"]["cases"]
    configs = {name: kit.configured(material, kit.training(options) | cases[name]["settings"]) for name in cases}
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in configs}
    with TemporaryDirectory() as place, ExitStack() as stack:
        git, earlier = ["git", "-C", str(kit.REPOSITORY), "worktree"], Path(place) / "parablock"
        subprocess.run([*git, "add", "--quiet", "--detach", str(earlier), options.against], check=True)
        stack.callback(subprocess.run, [*git, "remove", "--force", str(earlier)], check=True)
        for repeat, (name, config) in product(range(options.repeats + 1), configs.items()):
            trees = [kit.REPOSITORY, earlier][:: -1 if repeat % 2 else 1]  # each is the first as often
            taken = {tree: processor_s(tree, folder, cases[name]["command"], config) for tree in trees}
            if repeat or options.smoke:  # the first turn fills caches
                pairs[name].append((taken[kit.REPOSITORY], taken[earlier]))
    rows = []
    for name, of_it in pairs.items():
        now_s, before_s = map(min, zip(*of_it, strict=True))
        ratios = {"ratio": now_s / before_s, "median_ratio": median(now / then for now, then in of_it)}
        rows.append({"command": name, "now_s": now_s, "before_s": before_s, "pairs": of_it} | ratios)
    bars = [Bar(f"{row['command']}: least processor seconds now / before", row["ratio"], 1.02) for row in rows]
    record(options, rows, bars, {name: config.model_dump(mode="json") for name, config in configs.items()})


def processor_s(tree: Path, folder: Path, command: str, config: RunConfig) -> float:
    """Run a command of a source tree; return the processor seconds that it and its children took."""
    place = Path(mkdtemp(dir=folder))
    (place / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    line = [sys.executable, "-m", "parablock", command, str(place / "config.yaml")]
    line += ["--output-dir", str(place / "run")] if command == "run" else []
    since = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    subprocess.run(line, check=True, env=environment, stdout=subprocess.DEVNULL)
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime - since.ru_utime - since.ru_stime


# -- a picture that stands still
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\r")
PHASES = {
    "export": r"writing|exporting|fitting",
    "score": r"scoring|answers|: (loss|exact_match) of",
    "rounds": r"round +\d",
    "load": r"loading|reading|scanning|checking|$",
}
"""A phase → what a picture says in it; the first that fits. Before there is a picture, Python itself loads."""
ENDED = "end"
PATH, PAUSE_S = ("init", "plan", "run", "eval", "chat"), 0.02


@dataclass
class Screen:
    """What a terminal shows, since when, and the longest time that it showed the same, by phase."""

    shown: str = ""
    since_s: float = field(default_factory=time.monotonic)
    still_s: dict[str, float] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)

    def now_shows(self, text: str, at_s: float, *, has_ended: bool) -> None:
        """Take what was written; the same picture drawn once more is a picture that stands still."""
        if has_ended or (visible := CONTROL.sub("", text)) != self.shown:
            found = (phase for phase, words in PHASES.items() if re.search(words, self.shown))
            phase, still_s = ENDED if has_ended else next(found, "load"), at_s - self.since_s
            if still_s >= self.still_s.get(phase, 0.0):
                self.still_s[phase], self.said[phase] = still_s, " ".join(self.shown.split())[-80:]
            self.shown, self.since_s = "" if has_ended else visible, at_s


def watch(words: Sequence[str], folder: Path, says: Sequence[bytes] = ()) -> Found:
    """Start a command at a terminal; return for how long its picture stood still, by what it was at.

    At each prompt it is told the next of what the user `says`.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ.update(TERM="xterm", COLUMNS="100", LINES="40")
        os.execv(words[0], [*words])
    screen, load, began_s, left = Screen(), os.getloadavg()[0], time.monotonic(), list(says)
    written, is_open = bytearray(), True
    while is_open:
        piece = bytearray()
        while is_open and select.select([terminal], [], [], PAUSE_S if piece else 60.0)[0]:
            try:
                piece += os.read(terminal, 65536)
            except OSError:  # the command has ended
                is_open = False
        if piece:
            screen.now_shows(piece.decode(errors="replace"), time.monotonic(), has_ended=False)
        written += piece
        if left and CONTROL.sub("", piece.decode(errors="replace")).endswith("> "):
            os.write(terminal, left.pop(0))
    screen.now_shows("", time.monotonic(), has_ended=True)
    os.close(terminal)
    _, status, used = os.wait4(pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(f"{' '.join(words)} ended with {code}:\n{written.decode(errors='replace')[-2000:]}")
    facts = {"seconds": time.monotonic() - began_s, "processor_s": used.ru_utime + used.ru_stime, "load": load}
    return {"still_s": screen.still_s, "said": screen.said, **facts}


def still_picture(options: Options) -> None:
    """Measure for how long the picture on a terminal stands still while a command is at work."""
    folder, found = kit.fresh_folder(options), list[Found]()
    if options.smoke:
        material = kit.generated(folder / "material", num_clients=2)
        model, files = material.model, list(material.train)
    else:
        model, files = smollm2(), [str(folder / f"site_{site}.jsonl") for site in "ab"]
        lines = (kit.SHARED / "data" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [line for line in lines if sum(map(len, json.loads(line).values())) <= options.max_chars]
        for n, file in enumerate(files):
            text = "\n".join(rows[n * options.rows : (n + 1) * options.rows])
            Path(file).write_text(f"{text}\n", encoding="utf-8")
    for name, line in kit.ABOUT["still_picture"]["commands"].items():
        if name in options.only:
            words = line.format(files=" ".join(files), file=files[0], model=model).split()
            says = [b"What is 2 + 2?\n", b"\x04"] if name == "chat" else []
            found.append({"command": name, **watch([sys.executable, "-m", "parablock", *words], folder, says)})
            record(options, found, bars_of_pictures(found))


def bars_of_pictures(found: list[Found]) -> list[Bar]:
    """Return the bars of each phase, and of the README's path where all of it was walked."""
    bars = [
        Bar(f"longest still picture, s: {phase}", max(row["still_s"].get(phase, 0.0) for row in found), 5)
        for phase in (*reversed(PHASES), ENDED)
    ]
    path_s = [row["processor_s"] for row in found if row["command"] in PATH]
    is_whole = len(path_s) == len(PATH)
    return bars + [Bar("processor seconds of the README's commands", sum(path_s), 900)] * is_whole


def still_picture_section(found: Found) -> Found:
    phases = [*reversed(PHASES), ENDED]
    rows = [
        [
            row["command"],
            *(f"{row['still_s'][phase]:.1f}" if phase in row["still_s"] else "" for phase in phases),
            *(f"{row[key]:.0f}" for key in ("seconds", "processor_s")),
            f"{row['load']:.1f}",
        ]
        for row in found["results"]
    ]
    columns = ["command", *phases, "seconds in all", "of a processor", "load"]
    missing = [
        name for name in found["options"]["only"] if name not in {row["command"] for row in found["results"]}
    ]
    not_run = [f"Not run: {', '.join(missing)}."] if missing else []
    return section("still_picture", found, table(columns, rows), *not_run)


BENCHMARKS = benchmarks(globals())

if __name__ == "__main__":
    main(__doc__, BENCHMARKS)
