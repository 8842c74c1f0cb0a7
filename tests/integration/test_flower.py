"""A real deployment on this machine: SuperLink, SuperNodes, trainers, TLS, and what happens when one is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from cuttable_proxy import CuttableProxy
from parablock.config import RunConfig, load_config
from parablock.deploy.local import Deployment, resume_local, watch
from parablock.errors import ParaBlockError
from parablock.experiment import run
from parablock.report.progress import LoggedProgress
from tiny_runs import Workshop, make_workshop, metrics_of, summary_of

pytestmark = [pytest.mark.flower, pytest.mark.slow]

SITES = 2


@pytest.fixture
def workshop(
    tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast
) -> Workshop:
    (tmp_path / "workshop").mkdir()
    return make_workshop(tmp_path / "workshop", tiny_llama, tiny_tokenizer)


@pytest.fixture
def config(workshop: Workshop) -> RunConfig:
    tree = yaml.safe_load(workshop.config.read_text())
    tree["engine"], tree["link"] = {"num_threads": 1, "name": "flower"}, {}
    tree["federation"] |= {"num_clients": SITES, "num_rounds": 6, "stall_timeout_s": 200}
    tree["data"]["train"] = tree["data"]["train"][:SITES]
    tree["checkpoint"] = {"every_rounds": 1}
    path = workshop.path / "deployed.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_config(path)


def in_one_process(config: RunConfig, output_dir: Path, **federation: object) -> str:
    """The model of the same configuration without Flower."""
    tree = {
        "engine": config.engine.model_copy(update={"name": "inprocess"}),
        "federation": config.federation.model_copy(update=federation),
    }
    return str(run(config.model_copy(update=tree), output_dir)["model_sha256"])


def wait_for(what: Callable[[], bool], process_of: Deployment, seconds: float = 200) -> None:
    give_up = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < give_up, process_of.log("superlink").read_text()[-3000:]
        time.sleep(0.1)


def rounds_done(output_dir: Path) -> int:
    return len(metrics_of(output_dir)) if (output_dir / "metrics.jsonl").exists() else 0


def test_killed_trainers_supernodes_and_superlink_change_nothing(config: RunConfig, tmp_path: Path):
    expected = in_one_process(config, tmp_path / "one")
    output_dir = tmp_path / "deployed"
    deployment = Deployment(output_dir, SITES)
    deployment.prepare(config)
    ended: list[ParaBlockError] = []

    def run_it(run_id: str) -> None:
        try:
            watch(deployment, run_id, LoggedProgress())
        except ParaBlockError as error:
            ended.append(error)

    with deployment:
        watching = threading.Thread(target=run_it, args=(deployment.submit(),))
        watching.start()
        wait_for(lambda: rounds_done(output_dir) >= 1, deployment)
        trainer = deployment.trainer_pid(0)
        assert trainer is not None
        os.kill(trainer, signal.SIGKILL)
        deployment.kill("supernode-1")
        deployment.start_supernode(1)
        wait_for(lambda: rounds_done(output_dir) >= 3, deployment)
        assert deployment.trainer_pid(0) != trainer
        deployment.kill("superlink")
        watching.join()
    assert "SuperLink ended" in ended[0].what
    assert "parablock resume" in ended[0].remedy
    assert rounds_done(output_dir) < config.federation.num_rounds

    before = metrics_of(output_dir)[0]
    summary = resume_local(output_dir)
    assert metrics_of(output_dir)[0] == before  # with its seconds: the run went on, it did not begin anew
    assert summary["status"] == "completed"
    assert summary["model_sha256"] == expected
    assert summary["model_sha256"] != in_one_process(config, tmp_path / "other", delay=0)
    assert not deployment.trainer_pid(0)
    for client_id in range(SITES):
        assert (deployment.folder / "keys" / f"site-{client_id}" / "site.key").stat().st_mode & 0o077 == 0


def test_a_slow_link_that_breaks_up_and_down_and_a_site_that_is_late_change_nothing(
    config: RunConfig, workshop: Workshop, tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]
):
    tiny_llama(num_layers=4, hidden_size=128, vocab_size=300).save_pretrained(workshop.model)
    expected = in_one_process(config, tmp_path / "one")
    payload = json.loads((tmp_path / "one" / "manifest.json").read_text())["blocks"][0]["parameters"] * 4
    output_dir = tmp_path / "deployed"
    deployment = Deployment(output_dir, SITES)
    deployment.prepare(config)
    with deployment:
        deployment.kill("supernode-0")
        proxy = CuttableProxy(int(deployment.files.address.rpartition(":")[2]), bytes_per_s=payload / 3)
        finished: list[dict[str, object]] = []
        watching = threading.Thread(
            target=lambda run_id: finished.append(watch(deployment, run_id, LoggedProgress())),
            args=(deployment.submit(),),
        )
        watching.start()
        time.sleep(5)  # site 0 is late
        deployment.start_supernode(0, superlink=f"127.0.0.1:{proxy.port}")
        wait_for(lambda: rounds_done(output_dir) >= 1, deployment)
        for direction in ("up", "down"):
            before = getattr(proxy, direction)
            wait_for(lambda d=direction, n=before: getattr(proxy, d) > n + payload / 2, deployment)
            proxy.cut(8)
        proxy.swallow_next = True
        wait_for(lambda: proxy.swallowed == 1, deployment)
        watching.join()
        proxy.close()
    (summary,) = finished
    assert summary["model_sha256"] == expected
    assert (proxy.cuts, proxy.swallowed) == (3, 1)
    assert proxy.up < (config.federation.num_rounds + 3) * payload * 1.2 + 500_000
    assert summary["uplink_bytes"] < SITES * config.federation.num_rounds * payload * 1.1


def test_what_is_wrong_at_a_site_is_said_where_the_run_was_started(
    config: RunConfig, workshop: Workshop, tmp_path: Path
):
    output_dir = tmp_path / "deployed"
    deployment = Deployment(output_dir, SITES, insecure=True)
    deployment.prepare(config)
    site = yaml.safe_load(deployment.site_file(1).read_text())
    site["model"]["name_or_path"] = str(tmp_path / "nowhere")
    deployment.site_file(1).write_text(yaml.safe_dump(site))
    with deployment, pytest.raises(ParaBlockError, match=r"client 1 has given up: .*nowhere"):
        watch(deployment, deployment.submit(), LoggedProgress())
    assert summary_of(output_dir)["status"] == "failed"
