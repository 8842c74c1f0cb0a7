"""Every method through the same clients, wire, link, data order and evaluation."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from parablock import load_config, resume
from parablock import run as run_here
from parablock.evaluation.side_by_side import score_models
from parablock.model.adapters import adapted_layers
from tiny_runs import (
    NUM_CLIENTS,
    NUM_LAYERS,
    Outcome,
    Runs,
    Workshop,
    after,
    assert_refused,
    metrics_of,
    summary_of,
)

LORA = ("fedit", "ffa_lora", "rolora", "flora")
LAGGING = ("fedavg", "fedprox", "fedit", "ffa_lora", "rolora")
APART = ("local", "central")
BASELINES = ("fedavg", "fedprox", *LORA, "fedcybgd", *APART)
Folders = dict[str, Path]
HIDDEN, RANK = 32, 8
# a layer of the tiny Llama: q and o are 32 × 32, k and v 32 × 16, gate and up 32 × 64, down 64 × 32
SHAPES = ((32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32))


@pytest.fixture(scope="module")
def runs(runs: Runs) -> Folders:
    """One run of each method, of the same length."""
    return {method: runs(f"federation.method={method}", "federation.delay=0") for method in BASELINES}


def run(workshop: Workshop, directory: Path, method: str, *overrides: str) -> Outcome:
    return workshop.run(directory, f"federation.method={method}", "federation.delay=0", *overrides)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("method", BASELINES)
def test_a_method_learns_and_is_no_other(runs: Folders, method: str):
    summary = summary_of(runs[method])
    assert (summary["method"], summary["delay"]) == (method, 0)
    assert summary["final_eval_loss"] < summary["initial_eval_loss"]
    others = [summary_of(runs[other]) for other in BASELINES if other != method]
    assert summary["final_eval_loss"] not in [other["final_eval_loss"] for other in others]
    assert {other["initial_eval_loss"] for other in others} == {summary["initial_eval_loss"]}


@pytest.mark.parametrize("method", ["fedprox", "fedit", "ffa_lora", "flora", "fedcybgd", *APART])
def test_a_method_that_is_stopped_ends_with_the_same_model(
    workshop: Workshop, runs: Folders, tmp_path: Path, method: str
):
    config = load_config(workshop.config, [f"federation.method={method}", "federation.delay=0"])
    stopped = run_here(config, tmp_path / "run", asked_to_stop=after(3))
    assert stopped["status"] == "interrupted"
    ended, whole = resume(tmp_path / "run"), summary_of(runs[method])
    assert ended["model_sha256"] == whole["model_sha256"]
    assert ended["final_eval_loss"] == whole["final_eval_loss"] != whole["initial_eval_loss"]


# -- adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LORA)
def test_the_adapters_are_merged_into_the_model_that_is_written(workshop: Workshop, runs: Folders, method: str):
    base, tuned = weights(workshop.model), weights(runs[method] / "model")
    assert tuned.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    matrices = {name for name in base if ".layers." in name and base[name].ndim == 2}
    assert changed == matrices
    for name in changed:  # a mean of A and B is of their rank, a stack of more, as is what several rounds add
        rank = torch.linalg.matrix_rank(tuned[name] - base[name], rtol=1e-3)
        assert rank > RANK if method == "flora" else rank <= RANK


@pytest.mark.parametrize("method", LORA)
def test_the_score_of_the_run_is_that_of_the_written_model(workshop: Workshop, runs: Folders, method: str):
    base, tuned = score_models(str(runs[method]), [str(workshop.test_file)], device="cpu")
    assert tuned.value == pytest.approx(summary_of(runs[method])["final_eval_loss"], abs=1e-6)
    assert abs(tuned.value - base.value) > 1e-3


def test_lora_sends_its_adapters_and_ffa_lora_half_of_them(runs: Folders):
    of_a, of_b = (NUM_LAYERS * RANK * sum(shape[side] for shape in SHAPES) for side in (0, 1))
    sent = {"fedit": of_a + of_b, "ffa_lora": of_b}
    for method, elements in sent.items():
        row = metrics_of(runs[method])[0]
        headers = row["uplink_bytes"] / NUM_CLIENTS - 4 * elements
        assert 0 < headers < 600
    for row, elements in zip(metrics_of(runs["rolora"]), [of_b, of_a] * 3, strict=True):  # B first, then in turn
        assert 0 < row["uplink_bytes"] / NUM_CLIENTS - 4 * elements < 600


def test_rolora_trains_one_factor_a_round_and_the_other_stays(workshop: Workshop, tmp_path: Path):
    for rounds in (1, 2):
        directory = tmp_path / str(rounds)
        assert run(workshop, directory, "ffa_lora", f"federation.num_rounds={rounds}").code == 0
    outcome = run(workshop, tmp_path / "one", "rolora", "federation.num_rounds=1")
    assert_refused(outcome, "1 rounds of the cyclic schedule would never train", "adapters, A", "at least 2 rounds")
    assert "blocks." not in outcome.stderr, "methods without blocks have none of these settings"
    run(workshop, tmp_path / "rolora", "rolora", "federation.num_rounds=2", "evaluation.every_rounds=1")
    ours, theirs = (metrics_of(tmp_path / name) for name in ("rolora", "1"))
    assert ours[0]["train_loss"] == theirs[0]["train_loss"], (
        "the first round is FFA-LoRA's: B from zero, A as drawn"
    )
    assert ours[1]["block_index"] == 1 and metrics_of(tmp_path / "2")[1]["train_loss"] != ours[1]["train_loss"]


# -- overlap --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LAGGING)
def test_a_delay_is_a_number_for_every_method_that_averages(
    workshop: Workshop, runs: Folders, tmp_path: Path, method: str
):
    serial = summary_of(runs[method])
    delayed = {}
    for delay, rule in ((1, "aligned"), (1, "none"), (2, "aligned")):
        directory = tmp_path / f"{delay}{rule}"
        changes = (f"federation.method={method}", f"federation.delay={delay}", f"federation.in_flight={rule}")
        outcome = workshop.run(directory, *changes)
        assert outcome.code == 0, outcome.stderr
        delayed[delay, rule] = summary_of(directory)
        assert [row["staleness"] for row in metrics_of(directory)] == [min(t, delay) for t in range(6)]
    assert len({end["model_sha256"] for end in (serial, *delayed.values())}) == 4
    assert all(end["final_eval_loss"] < serial["initial_eval_loss"] for end in delayed.values())
    assert delayed[1, "aligned"]["wall_time_s"] < serial["wall_time_s"]
    assert serial["overlap_fraction"] == 0 < delayed[1, "aligned"]["overlap_fraction"]


def test_sparse_updates_take_a_hundredth_of_the_bytes_and_still_learn(
    workshop: Workshop, runs: Folders, tmp_path: Path
):
    whole, ends = summary_of(runs["fedavg"]), {}
    for density in (0.01, 0.02):
        directory = tmp_path / str(density)
        changes = (
            "federation.method=fedavg",
            "federation.delay=1",
            f"wire={{format: sparse2, density: {density}}}",
        )
        assert workshop.run(directory, *changes).code == 0
        ends[density] = summary_of(directory)
        assert ends[density]["final_eval_loss"] < whole["initial_eval_loss"]
    elements = metrics_of(runs["fedavg"])[0]["uplink_bytes"] / NUM_CLIENTS / 4
    for density, kept in ((0.01, 41), (0.02, 82)):
        row = metrics_of(tmp_path / str(density))[2]
        for way, times in (("uplink_bytes", 1), ("downlink_bytes", 3)):  # but for headers
            payload = times * kept * 14 / 8 / 4096 * elements
            assert 0.95 * payload < row[way] / NUM_CLIENTS < 1.05 * payload + 800
        (drained,) = (summary["downlink_bytes"] for summary in [ends[density]])
        assert drained < 0.04 * whole["downlink_bytes"], "both values of the drain are differences"
    assert ends[0.01]["model_sha256"] != ends[0.02]["model_sha256"]


@pytest.mark.parametrize("method", ["fl_bcd", "fedavg", "fedit"])
def test_muon_learns_with_every_kind_of_group_and_is_not_adamw(workshop: Workshop, tmp_path: Path, method: str):
    changes = (f"federation.method={method}", "federation.delay=0", "federation.num_rounds=4")
    ends = {}
    for optimizer in ("adamw", "muon"):
        assert workshop.run(tmp_path / optimizer, *changes, f"train.optimizer={optimizer}").code == 0
        ends[optimizer] = summary_of(tmp_path / optimizer)
    assert ends["muon"]["final_eval_loss"] < ends["muon"]["initial_eval_loss"]
    assert ends["muon"]["model_sha256"] != ends["adamw"]["model_sha256"]


def test_a_torch_without_muon_is_refused_with_the_version_that_has_it(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(torch.optim, "Muon")
    assert_refused(workshop.run(tmp_path / "run", "train.optimizer=muon"), "train.optimizer: muon needs torch 2.9")
    assert workshop.run(tmp_path / "other", "federation.num_rounds=4").code == 0


def test_moments_are_kept_with_auto_where_every_round_trains_all(workshop: Workshop, runs: Folders, tmp_path: Path):
    ends = {}
    for method in ("fedit", "rolora"):
        for state in ("keep", "auto"):
            directory = tmp_path / f"{method}{state}"
            assert run(workshop, directory, method, f"train.optimizer_state={state}").code == 0
            ends[method, state] = summary_of(directory)["model_sha256"]
        ends[method, "reset"] = summary_of(runs[method])["model_sha256"]
    assert ends["fedit", "auto"] == ends["fedit", "keep"] != ends["fedit", "reset"]
    assert ends["rolora", "auto"] == ends["rolora", "reset"] != ends["rolora", "keep"]


def test_rank_alpha_and_targets_of_adapters_take_effect(workshop: Workshop, tmp_path: Path):
    settings = ("lora.rank=2", "lora.alpha=4", "lora.target_modules=[q_proj, v_proj]")
    ends = set()
    for count in range(len(settings) + 1):
        directory = tmp_path / str(count)
        outcome = run(workshop, directory, "fedit", "federation.num_rounds=2", *settings[:count])
        assert outcome.code == 0, outcome.stderr
        ends.add(summary_of(directory)["model_sha256"])
    assert len(ends) == len(settings) + 1
    base, tuned = weights(workshop.model), weights(directory / "model")
    changed = {name.split(".")[-2] for name in base if not torch.equal(base[name], tuned[name])}
    assert changed == {"q_proj", "v_proj"}


def test_a_module_that_is_not_there_is_refused_with_those_that_are(workshop: Workshop, tmp_path: Path):
    assert_refused(run(workshop, tmp_path / "run", "fedit", "lora.target_modules=[query]"), "query", "q_proj")
    assert not (tmp_path / "run").exists()


def test_without_peft_the_error_says_how_to_get_it(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert_refused(run(workshop, tmp_path / "run", "fedit"), "peft", "parablock[lora]")
    assert run(workshop, tmp_path / "other", "fedavg", "federation.num_rounds=1").code == 0


def test_adapters_start_as_nothing_and_follow_from_the_seed(tiny_llama: Callable[..., LlamaForCausalLM]):
    from parablock.model.adapters import add_adapters, merge_adapters

    first, again, other = (tiny_llama() for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        before = torch.random.get_rng_state()
        add_adapters(model, rank=2, alpha=4.0, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
    states = [model.state_dict() for model in (first, again, other)]
    a = next(name for name in states[0] if "lora_A" in name)
    assert torch.equal(states[0][a], states[1][a]) and not torch.equal(states[0][a], states[2][a])
    assert states[0][a].abs().max() <= HIDDEN**-0.5
    assert len({name for name, _ in adapted_layers(first)}) == 7 * NUM_LAYERS
    merge_adapters(first)
    assert all(torch.equal(value, tiny_llama().state_dict()[name]) for name, value in first.state_dict().items())


# -- the others -----------------------------------------------------------------------------------------------


def test_fedcybgd_asks_one_client_for_a_block_that_is_always_its_own(workshop: Workshop, tmp_path: Path):
    outcome = run(workshop, tmp_path / "run", "fedcybgd", "federation.num_rounds=12")
    assert outcome.code == 0, outcome.stderr
    rows = metrics_of(tmp_path / "run")
    assert {len(row["participants"]) for row in rows} == {1}
    owners = {(row["block_index"], row["participants"][0]) for row in rows}
    assert owners == {(block, block % NUM_CLIENTS) for block in range(NUM_LAYERS)}


def test_a_strong_proximal_term_keeps_clients_near_where_they_started(workshop: Workshop, tmp_path: Path):
    moved = []
    for mu in (1e-6, 100.0):
        directory = tmp_path / str(mu)
        run(workshop, directory, "fedprox", f"federation.proximal_mu={mu}", "federation.num_rounds=2")
        moved.append(metrics_of(directory)[0]["delta_norm"])
    assert moved[1] < 0.9 * moved[0]


@pytest.mark.parametrize("method", APART)
def test_who_trains_apart_sends_headers_alone(runs: Folders, method: str):
    rows = metrics_of(runs[method])
    assert [len(row["participants"]) for row in rows] == [{"local": NUM_CLIENTS, "central": 1}[method]] * len(rows)
    for row in rows:
        assert row["uplink_bytes"] / len(row["participants"]) < 600
    assert metrics_of(runs["fedavg"])[0]["uplink_bytes"] > 100 * rows[0]["uplink_bytes"]


def test_the_score_of_local_training_is_the_mean_over_the_models_of_the_clients(workshop: Workshop, runs: Folders):
    folders = sorted((runs["local"] / "model").iterdir())
    assert [folder.name for folder in folders] == [f"client_{i}" for i in range(NUM_CLIENTS)]
    scores = [score_models(str(f), [str(workshop.test_file)], device="cpu")[0].value for f in folders]
    assert fmean(scores) == pytest.approx(summary_of(runs["local"])["final_eval_loss"], abs=1e-6)
    assert len(set(scores)) == NUM_CLIENTS


def test_a_client_that_trains_apart_ends_where_it_would_end_alone(
    workshop: Workshop, runs: Folders, tmp_path: Path
):
    # a federation of one: FedAvg of client 0 alone, with the same batches
    one = (f"data.train={workshop.client_file(0)}", "federation.num_clients=1")
    run(workshop, tmp_path / "alone", "fedavg", *one)
    places = (tmp_path / "alone" / "model", *(runs["local"] / "model" / f"client_{i}" for i in (0, 1)))
    alone, apart, other = (torch.cat([value.flatten() for value in weights(place).values()]) for place in places)
    # FedAvg adds y − x to x again, whose rounding AdamW makes larger where a gradient is close to zero
    assert (alone - apart).norm() < 0.01 * (alone - other).norm()


def test_central_training_sees_the_examples_of_all_clients(runs: Folders, workshop: Workshop):
    manifest = json.loads((runs["central"] / "manifest.json").read_text())
    every = sum(len(workshop.client_file(i).read_text().splitlines()) for i in range(NUM_CLIENTS))
    assert [client["examples"] for client in manifest["clients"]] == [every]
