"""Real Flower federations on this machine: SuperLinks, SuperNodes, trainers, TLS, and what happens when one dies.

Most of their time is Flower's waiting, so two of them are played side by side; each test looks at one. Flower's
commands are those beside this Python, or beside the one that PARABLOCK_FLOWER_PYTHON names, with another release.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pages import ROOT
from parablock.config.keys import RunConfig
from parablock.config.load import load_config, parse_config
from parablock.deploy import processes
from parablock.deploy.client_app import CONNECT_S
from parablock.deploy.one_machine import Deployment, deploy_local, watch
from parablock.deploy.processes import (
    CONNECTION,
    ServerFiles,
    environment,
    flower,
    free_ports,
    submit,
    wait_for_port,
    write_connection,
)
from parablock.deploy.variables import server_log
from parablock.errors import ParaBlockError
from parablock.experiment.progress import LoggedProgress
from parablock.experiment.run import run
from parablock.privacy.accounting import Accountant
from tiny_runs import Workshop, make_workshop, metrics_of, noise_keys, noise_under, summary_of

pytestmark = [pytest.mark.flower, pytest.mark.slow, pytest.mark.timeout(900)]

FLOWER_PYTHON = Path(os.environ.get("PARABLOCK_FLOWER_PYTHON", sys.executable))
SITES = 2
LEAST_MASKED = 3
"""Of two clients a sum would tell each what the other sent."""
ROUNDS = {"stopped": 60, "masked": 2}
DELAYS = {"stopped": 0, "masked": 1}
PATIENCE_S = 500.0
"""When a deployment is given up; on a free machine the longest takes two minutes."""

Facts = dict[str, Any]


# ── what is played ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def plays(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Iterator[Mapping[str, Future[Facts]]]:
    """The deployments of the chosen tests, begun together; what is computed in this process comes first.

    A play loads no model: transformers does not tie weights right where two threads load at once.
    """
    chosen = " ".join(item.originalname for item in request.session.items if item.module is request.module)
    folder = tmp_path_factory.mktemp("plays")
    begun: dict[str, Callable[[], Facts]] = {}
    for play in (stopped, masked):
        name = play.__name__
        if name in chosen:
            (folder / name).mkdir()
            workshop = make_workshop(folder / name, tiny_llama, tiny_tokenizer)
            if play is masked:
                tiny_llama(num_layers=2, vocab_size=300).save_pretrained(workshop.model)
            config = deployed(workshop, name)
            begun[name] = lambda p=play, w=workshop, c=config: p(w, c) | {"config": c}
            if play is not masked:  # whose keys are known when it has ended
                in_one_process(config, workshop.path / "one")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(max_workers=2) as pool:
        patch.setattr(processes, "PYTHON", FLOWER_PYTHON)
        yield {name: pool.submit(play) for name, play in begun.items()}


def deployed(workshop: Workshop, play: str) -> RunConfig:
    sites = LEAST_MASKED if play == "masked" else SITES
    tree = yaml.safe_load(workshop.config.read_text())
    tree["engine"], tree["link"] = {"num_threads": 1, "name": "flower"}, {}
    tree["federation"] |= {"num_clients": sites, "num_rounds": ROUNDS[play], "delay": DELAYS[play]}
    tree["data"]["train"] = tree["data"]["train"][:sites]
    tree["evaluation"] = {"every_rounds": 0}
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


def model_of(run_dir: Path) -> str:
    return str(summary_of(run_dir)["model_sha256"])


class Patience:
    """Asked to stop, it says no, and fails when it has been asked for too long."""

    def __init__(self) -> None:
        self.give_up = time.monotonic() + PATIENCE_S

    def __call__(self) -> bool:
        assert time.monotonic() < self.give_up, "the deployment does not end"
        return False


def wait_for(what: Callable[[], bool], log: Path, patience: Callable[[], bool]) -> None:
    try:
        while not what():
            patience()
            time.sleep(0.05)
    except AssertionError:
        pytest.fail(f"it took too long; {log} ends with {read(log)[-3000:]}")


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def rounds_done(output_dir: Path) -> int:
    return len(metrics_of(output_dir)) if (output_dir / "metrics.jsonl").exists() else 0


@contextmanager
def watching(deployment: Deployment, patience: Patience) -> Iterator[list[Any]]:
    """Submit the run and watch it beside; what it ends with is in the list when the context is left."""
    ended: list[Any] = []

    def run_it(run_id: str) -> None:
        try:
            ended.append(watch(deployment, run_id, LoggedProgress(), patience))
        except (ParaBlockError, AssertionError) as error:
            ended.append(error)

    thread = threading.Thread(target=run_it, args=(deployment.submit(),), daemon=True)
    thread.start()
    yield ended
    thread.join()


# ── proxies before the server ───────────────────────────────────────────────────────────────────────


PROXIES = [proxy for proxy in ("nginx", "caddy") if shutil.which(proxy)]


class BehindProxies(Deployment):
    """SuperNodes reach the SuperLink through the proxies of docs/engines.md in turn, and nobody else does."""

    def start_superlink(self) -> None:
        super().start_superlink()
        self.ports = dict(zip(PROXIES, free_ports(len(PROXIES)), strict=True))
        blocks = re.findall(r"```text\n(  .*?\n  \}\n)", (ROOT / "docs/engines.md").read_text(), re.DOTALL)
        for proxy, block in zip(("nginx", "caddy"), blocks, strict=True):
            if proxy not in PROXIES:
                continue
            (folder := self.folder / proxy).mkdir()
            mine = {
                "443": str(self.ports[proxy]),
                "127.0.0.1:8000": self.files.address,
                "/etc/fl": str(self.files.keys),
            }
            mine |= {"fl.example.org": "127.0.0.1"}
            text = re.sub("|".join(map(re.escape, mine)), lambda found, mine=mine: mine[found[0]], block)
            command = self._command(proxy, folder, text)
            self._launch(
                proxy, (command, {**os.environ, "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)})
            )
            wait_for_port(
                f"127.0.0.1:{self.ports[proxy]}", self.processes[proxy], self.folder / "logs" / f"{proxy}.log"
            )

    @staticmethod
    def _command(proxy: str, folder: Path, text: str) -> list[str]:
        conf = folder / "conf"
        if proxy == "caddy":
            conf.write_text(f"{{\n admin off\n auto_https off\n}}\n{text}")
            return ["caddy", "run", "--config", str(conf), "--adapter", "caddyfile"]
        paths = "".join(f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy"))
        main = f"daemon off; master_process off; pid {folder}/pid; events {{}}"
        conf.write_text(f"{main} http {{ access_log off; {paths}\n{text} }}")
        return ["nginx", "-c", str(conf), "-e", str(folder / "error.log")]

    def start_supernode(self, client_id: int, superlink: str | None = None) -> None:
        proxy = PROXIES[client_id % len(PROXIES)]
        super().start_supernode(client_id, superlink or f"127.0.0.1:{self.ports[proxy]}")


def through(deployment: BehindProxies, proxy: str) -> str:
    """Try to start a run as somebody who knows the address and the authority's certificate."""
    address, folder = f"127.0.0.1:{deployment.ports[proxy]}", deployment.folder / f"stranger-{proxy}"
    stranger = ServerFiles(folder, deployment.files.keys, address)
    write_connection(stranger)
    try:
        return submit(stranger, deployment.folder / "app")
    except ParaBlockError as refused:
        return str(refused)


# ── a trainer is killed, and the run is stopped by Flower ───────────────────────────────────────────


def stopped(workshop: Workshop, config: RunConfig) -> Facts:
    """Kill a trainer, stop the run with `flwr stop`, and go on with another `flwr run`.

    The trainer is the ClientApp; it dies as on a machine without memory, and nobody starts it by hand.
    """
    output_dir, patience = workshop.path / "deployed", Patience()
    kind = BehindProxies if PROXIES else Deployment
    deployment, log = kind(output_dir, SITES), server_log(output_dir)
    deployment.prepare(config)
    with deployment:
        run_id = deployment.submit()
        wait_for(lambda: rounds_done(output_dir) >= 3, log, patience)
        trainer = deployment.trainer_pid(0)
        assert trainer is not None
        os.kill(trainer, signal.SIGKILL)
        killed_at = rounds_done(output_dir)
        strangers = {
            proxy: through(deployment, proxy) for proxy in PROXIES if isinstance(deployment, BehindProxies)
        }
        wait_for(lambda: deployment.trainer_pid(0) not in (None, trainer), log, patience)
        wait_for(lambda: rounds_done(output_dir) >= killed_at + 3, log, patience)
        trainers, said = [deployment.trainer_pid(client_id) for client_id in range(SITES)], log.read_text()
        command = [flower("flwr"), "stop", run_id, CONNECTION]
        done = subprocess.run(command, env=environment(deployment.files.home), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        asked_s = time.monotonic()
        wait_for(lambda: not any(map(deployment.trainer_pid, range(SITES))), log, patience)
        took_s, before = time.monotonic() - asked_s, metrics_of(output_dir)
        with watching(deployment, patience) as ended:
            pass
    facts = {"killed_at": killed_at, "log": said, "trainers": trainers, "took_s": took_s, "before": before}
    return facts | {"strangers": strangers, "ended": ended, "output_dir": output_dir, "folder": deployment.folder}


def test_a_killed_trainer_of_the_stopped_run_had_come_back_by_a_new_invitation(plays: Mapping[str, Future[Facts]]):
    facts = plays["stopped"].result()
    assert facts["killed_at"] < len(facts["before"]) < ROUNDS["stopped"]
    assert "is invited again, invitation 2" in facts["log"]


def test_the_stopped_run_left_its_secrets_to_nobody(plays: Mapping[str, Future[Facts]]):
    folder = plays["stopped"].result()["folder"]
    secrets = [*folder.rglob("*.key"), *folder.rglob("*.secret")]
    assert len(secrets) == 2 + SITES + 1 + SITES
    assert all(path.stat().st_mode & 0o077 == 0 for path in secrets)
    kept = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".log", ".toml", ".json")]
    assert not [path for path in kept if b"BEGIN" in path.read_bytes()], "the run's certificate is on no disk"


def test_a_stopped_run_ends_its_sites_and_another_flwr_run_goes_on_to_the_same_model(
    plays: Mapping[str, Future[Facts]], tmp_path: Path
):
    facts = plays["stopped"].result()
    (summary,), after = facts["ended"], metrics_of(facts["output_dir"])
    assert None not in facts["trainers"]
    assert facts["took_s"] < CONNECT_S + 60, "they wait no longer for a server that had no time to say that it ends"
    assert 6 <= len(facts["before"]) < len(after) == ROUNDS["stopped"]
    assert after[0] == facts["before"][0]  # with its seconds: the run went on, it did not begin anew
    assert summary["model_sha256"] == model_of(facts["output_dir"].parent / "one")
    assert summary["model_sha256"] != in_one_process(facts["config"], tmp_path / "other", delay=1)


@pytest.mark.parametrize("proxy", ["nginx", "caddy"])
def test_a_stranger_at_the_documented_proxy_of_the_stopped_run_starts_nothing(
    plays: Mapping[str, Future[Facts]], proxy: str
):
    if proxy not in PROXIES:
        pytest.skip(f"{proxy} is missing: make proxies")
    facts = plays["stopped"].result()
    said = facts["strangers"][proxy]
    assert "403" in said or "failed" in said
    assert not said.isdecimal(), "no run has begun"
    assert facts["ended"][0]["status"] == "completed", "while SuperNodes get through"


# ── masked updates, and the whole deployment in one call ────────────────────────────────────────────


def masked(workshop: Workshop, config: RunConfig) -> Facts:
    """Deploy, run and take everything down in one call, with masked updates to which each site adds its noise."""
    output_dir = workshop.path / "deployed"
    ended = [deploy_local(noisy(config), output_dir, asked_to_stop=Patience())]
    folder = output_dir / "deployment"
    logs = [path.read_text() for path in sorted((folder / "logs").glob("supernode-*-helper.log"))]
    return {"ended": ended, "logs": logs, "keys": noise_keys(folder / "state"), "output_dir": output_dir}


def noisy(config: RunConfig) -> RunConfig:
    tree = config.model_dump(mode="json")
    noise = {"noise_multiplier": 0.5, "mode": "distributed"}
    tree |= {"privacy": {"clip_norm": 0.01, "secure_aggregation": "masked", **noise}, "wire": {"streaming": False}}
    return parse_config(tree)


def test_masked_updates_with_the_noise_of_each_site_give_what_one_process_gives_with_their_keys(
    plays: Mapping[str, Future[Facts]], tmp_path: Path
):
    facts = plays["masked"].result()
    (summary,), config, keys = facts["ended"], noisy(facts["config"]), facts["keys"]
    assert len(set(keys.values())) == LEAST_MASKED
    with noise_under(keys):
        assert summary["model_sha256"] == in_one_process(config, tmp_path / "own")
    with noise_under(dict.fromkeys(keys, keys[0])):
        assert summary["model_sha256"] != in_one_process(config, tmp_path / "shared")
    assert summary["epsilon"] == Accountant(0.5, "distributed", 1e-5).epsilon(ROUNDS["masked"])


def test_masked_sites_are_told_that_little_is_left_of_their_updates(plays: Mapping[str, Future[Facts]]):
    logs = plays["masked"].result()["logs"]
    assert len(logs) == LEAST_MASKED and all("clipping removes 9" in log for log in logs)


def test_the_masked_deployment_has_taken_its_processes_down(plays: Mapping[str, Future[Facts]]):
    output_dir = plays["masked"].result()["output_dir"]
    parts = ("superlink", *(f"supernode-{client_id}" for client_id in range(LEAST_MASKED)))
    logs = {log.stem for log in (output_dir / "deployment" / "logs").iterdir()}
    assert logs == {*parts, *(f"{part}-helper" for part in parts)}
    # Flower's own children look for their parent every few seconds
    wait_for(lambda: str(output_dir) not in running(), server_log(output_dir), Patience())
    assert "python" in running()


def running() -> str:
    return subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True, check=True).stdout
