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

LORA = ("fedit", "ffa_lora", "flora")
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


@pytest.mark.parametrize("method", ["fedprox", *LORA, "fedcybgd", *APART])
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
