"""Real deployments on this machine: SuperLinks, SuperNodes, trainers, TLS, and what happens when they are killed.

Most of their time is Flower's waiting, so two of them are played side by side; each test looks at one.
"""

from __future__ import annotations

import json
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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from cuttable_proxy import CuttableProxy
from parablock.config.keys import RunConfig
from parablock.config.load import load_config, parse_config
from parablock.deploy.credentials import make_keys
from parablock.deploy.one_machine import Deployment, resume_local, watch
from parablock.deploy.processes import environment, flower, free_ports
from parablock.deploy.variables import failure_file, server_log
from parablock.errors import ParaBlockError
from parablock.experiment.progress import LoggedProgress
from parablock.experiment.run import run
from tiny_runs import Workshop, make_workshop, metrics_of, summary_of

pytestmark = [pytest.mark.flower, pytest.mark.slow, pytest.mark.timeout(1200)]

SITES = 2
LEAST_MASKED = 3
"""Of two clients a sum would tell each what the other sent."""
PATIENCE_S = 800.0
"""When a deployment is given up; on a free machine the longest takes three minutes."""

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
    chosen = {item.originalname for item in request.session.items if item.module is request.module}
    folder = tmp_path_factory.mktemp("plays")
    begun: dict[str, Callable[[], Facts]] = {}
    for play, num_rounds in ((kills, 5), (bad_link, 5), (operators, 4), (masked, 2)):
        if f"test_{play.__name__}" in {name[: len(play.__name__) + 5] for name in chosen}:
            workshop_dir = folder / play.__name__
            workshop_dir.mkdir()
            workshop = make_workshop(workshop_dir, tiny_llama, tiny_tokenizer)
            if play is bad_link:
                tiny_llama(num_layers=4, hidden_size=128, vocab_size=300).save_pretrained(workshop.model)
            if play is masked:
                tiny_llama(num_layers=2, vocab_size=300).save_pretrained(workshop.model)
            config = deployed(workshop, num_rounds, sites=LEAST_MASKED if play is masked else SITES)
            if play is masked:
                config = on_the_grid(config, "plain")
            expected = in_one_process(config, workshop_dir / "one")
            begun[play.__name__] = lambda p=play, w=workshop, c=config, e=expected: p(w, c) | {"expected": e}
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {name: pool.submit(play) for name, play in begun.items()}


def deployed(workshop: Workshop, num_rounds: int, sites: int) -> RunConfig:
    tree = yaml.safe_load(workshop.config.read_text())
    tree["engine"], tree["link"] = {"num_threads": 1, "name": "flower"}, {}
    tree["federation"] |= {"num_clients": sites, "num_rounds": num_rounds, "stall_timeout_s": 400}
    tree["data"]["train"] = tree["data"]["train"][:sites]
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


# ── killed processes ────────────────────────────────────────────────────────────────────────────────


def kills(workshop: Workshop, config: RunConfig) -> Facts:
    """Kill a trainer, the ClientApp that starts the next one, a SuperNode, and at last the SuperLink."""
    output_dir, patience = workshop.path / "deployed", Patience()
    deployment = Deployment(output_dir, SITES, lanes=2)
    deployment.prepare(config)
    facts: Facts = {"folder": deployment.folder}
    log = server_log(output_dir)
    with deployment:
        with watching(deployment, patience) as ended:
            wait_for(lambda: rounds_done(output_dir) >= 1, log, patience)
            deployment.kill("supernode-1")
            deployment.start_supernode(1)
            facts["trainer"] = deployment.trainer_pid(0)
            os.kill(facts["trainer"], signal.SIGKILL)
            supernode = deployment.processes["supernode-0"].pid
            wait_for(lambda: kill_courier(supernode), log, patience)
            wait_for(lambda: rounds_done(output_dir) >= 3, log, patience)
            facts["next_trainer"] = deployment.trainer_pid(0)
            deployment.kill("superlink")
        (facts["ended"],) = ended
    facts["server_log"] = log.read_text()
    facts["before"] = metrics_of(output_dir)
    facts["summary"] = resume_local(output_dir, asked_to_stop=patience)
    facts["after"] = metrics_of(output_dir)
    wait_for(lambda: not any(map(deployment.trainer_pid, range(SITES))), log, patience)
    return facts


def kill_courier(supernode: int) -> bool:
    """Kill the ClientApp of a SuperNode in the middle of its exchange: when it has started a trainer.

    A trainer that was found late, on a machine with much else to do, may have served it already, and is killed
    instead; another ClientApp starts the next one.
    """
    for process in psutil.Process(supernode).children(recursive=True):
        try:
            if "parablock.deploy.site_trainer" in process.cmdline() and (courier := process.parent()):
                process.suspend()
                if time.time() - process.create_time() > 1.0:  # less than it takes to begin
                    process.kill()
                    return False
                assert courier.name() == "flwr-clientapp"
                courier.kill()
                process.resume()
                return True
        except psutil.Error:
            continue
    return False


def test_kills_of_trainer_clientapp_supernode_and_superlink_change_nothing(
    plays: Mapping[str, Future[Facts]], tmp_path: Path
):
    facts = plays["kills"].result()
    assert facts["next_trainer"] not in (None, facts["trainer"])
    assert "ClientApp stopped responding" in facts["server_log"]
    assert "SuperLink ended" in facts["ended"].what
    assert "parablock resume" in facts["ended"].remedy
    assert len(facts["before"]) < len(facts["after"])
    assert facts["after"][0] == facts["before"][0]  # with its seconds: the run went on, it did not begin anew
    assert facts["summary"]["status"] == "completed"
    assert facts["summary"]["model_sha256"] == facts["expected"]
    config = load_config(facts["folder"] / "config.yaml")
    assert facts["summary"]["model_sha256"] != in_one_process(config, tmp_path / "other", delay=0)
    for client_id in range(SITES):
        assert (facts["folder"] / "keys" / f"site-{client_id}" / "site.key").stat().st_mode & 0o077 == 0


# ── a bad link ──────────────────────────────────────────────────────────────────────────────────────


def bad_link(workshop: Workshop, config: RunConfig) -> Facts:
    """Let a site come late, with one SuperNode, over a slow link that is cut up and down and loses an answer."""
    payload = json.loads((workshop.path / "one" / "manifest.json").read_text())["blocks"][0]["parameters"] * 4
    output_dir, patience = workshop.path / "deployed", Patience()
    deployment = Deployment(output_dir, SITES, lanes=1)
    deployment.prepare(config)
    log = server_log(output_dir)
    with deployment:
        deployment.kill("supernode-0")
        proxy = CuttableProxy(int(deployment.files.address.rpartition(":")[2]), bytes_per_s=payload / 2)
        with watching(deployment, patience) as ended:
            wait_for(lambda: "client 1 has connected" in read(log), log, patience)
            deployment.start_supernode(0, superlink=f"127.0.0.1:{proxy.port}")  # late
            wait_for(lambda: rounds_done(output_dir) >= 1, log, patience)
            halfway(proxy, "up", payload, log, patience)
            proxy.cut(4)
            proxy.swallow_next = True
            wait_for(lambda: proxy.swallowed == 1, log, patience)
            halfway(proxy, "down", payload, log, patience)
            proxy.cut(4)
        proxy.close()
    return {"ended": ended, "proxy": proxy, "payload": payload}


def halfway(proxy: CuttableProxy, direction: str, payload: int, log: Path, patience: Patience) -> None:
    """Wait until half of a payload has passed from now on."""
    before = getattr(proxy, direction)
    wait_for(lambda: getattr(proxy, direction) > before + payload / 2, log, patience)


def test_bad_link_that_breaks_up_and_down_and_a_site_that_is_late_change_nothing(
    plays: Mapping[str, Future[Facts]],
):
    facts = plays["bad_link"].result()
    (summary,), proxy, payload = facts["ended"], facts["proxy"], facts["payload"]
    rounds = summary["num_rounds"]
    assert summary["model_sha256"] == facts["expected"]
    assert (proxy.cuts, proxy.swallowed) == (3, 1)
    assert proxy.up < (rounds + 3) * payload * 1.2 + 500_000
    assert summary["uplink_bytes"] < SITES * rounds * payload * 1.1


# ── as operators do it ──────────────────────────────────────────────────────────────────────────────


def operators(workshop: Workshop, config: RunConfig) -> Facts:
    """Follow docs/deploying.md by command line, with strangers at the door and a mistake at a site."""
    del config
    folder, patience = workshop.path / "operators", Patience()
    folder.mkdir()
    output_dir, port = folder / "run", free_ports(1)[0]
    tree = yaml.safe_load((workshop.path / "deployed.yaml").read_text())
    del tree["data"]["train"], tree["data"]["partition"]
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    one_command(
        "deploy", "keys", "--sites", str(SITES), "--host", "127.0.0.1", "--output-dir", str(folder / "keys")
    )
    with ExitStack() as stack:
        server = ["server", "run.yaml", "--keys", "keys/server", "--address", f"127.0.0.1:{port}"]
        beside(stack, folder, "server", [*server, "--output-dir", str(output_dir)])
        said = folder / "server.log"
        wait_for(lambda: "flwr run" in said.read_text(), said, patience)
        submit = said.read_text().partition("Start the run when you like: ")[2].splitlines()[0]
        log = server_log(output_dir)
        with ExitStack() as door:
            strangers(door, folder, port)
            for client_id in range(SITES):
                name, model = f"site-{client_id}", folder / "nowhere" if client_id == 1 else workshop.model
                write_site(folder, name, client_id, workshop.client_file(client_id), model)
                start_site(stack, folder, name, port, keys=f"keys/{name}")
            in_a_shell(submit)
            last_words = {"no-key": "registered", "wrong-key": "starts again", "no-tls": "attempt failed"}
            words = {name: said_by(folder, name, word, patience) for name, word in last_words.items()}
        wait_for(failure_file(output_dir).exists, log, patience)
        facts = {"failure": json.loads(failure_file(output_dir).read_text())}
        write_site(folder, "site-1", 1, workshop.client_file(1), workshop.model)
        in_a_shell(submit)
        wait_for(lambda: summary_there(output_dir), log, patience)
    facts |= words | {
        "summary": summary_of(output_dir),
        "superlink_log": (output_dir / "deployment" / "superlink.log").read_text(),
        "codes": {path.stem: int(path.read_text()) for path in folder.glob("*.code")},
    }
    return facts


def said_by(folder: Path, name: str, word: str, patience: Patience) -> str:
    """Give what a command has said as soon as a word is in it."""
    log = folder / f"{name}.log"
    wait_for(lambda: word in log.read_text(), log, patience)
    return log.read_text()


def summary_there(output_dir: Path) -> bool:
    return (output_dir / "summary.json").exists() and summary_of(output_dir)["status"] == "completed"


def one_command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "parablock", *arguments], check=True, capture_output=True)


def in_a_shell(line: str) -> None:
    """What an operator types, where Flower's commands are on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", line], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def beside(stack: ExitStack, folder: Path, name: str, command: list[str], *, is_ours: bool = True) -> None:
    """Run a command in the background; at the end it is told to end, and its code written down."""
    words = [sys.executable, "-m", "parablock", "deploy", *command] if is_ours else command
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            words, cwd=folder, stdout=log, stderr=log, env=environment(folder / "home" / name)
        )

    def end() -> None:
        process.terminate()
        (folder / f"{name}.code").write_text(str(process.wait(30)))

    stack.callback(end)


def write_site(folder: Path, name: str, client_id: int, rows: Path, model: Path | str) -> None:
    site = {
        "client_id": client_id,
        "state_dir": f"state-{name}",
        "model": {"name_or_path": str(model), "device": "cpu"},
        "data": {"train": [str(rows)]},
        "lease_s": 150.0,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(site))


def start_site(stack: ExitStack, folder: Path, name: str, port: int, keys: str | None) -> None:
    command = ["client", f"{name}.yaml", "--superlink", f"127.0.0.1:{port}"]
    command += ["--port", str(free_ports(1)[0]), *(["--keys", keys] if keys else ["--insecure"])]
    command += ["--lanes", "1"] if name == "site-1" else []  # sites may differ in it
    beside(stack, folder, name, command)


def strangers(stack: ExitStack, folder: Path, port: int) -> None:
    """Knock at the server as client 0: with a key that it does not know, with none, and without TLS."""
    make_keys(folder / "foreign", 1, ["127.0.0.1"])
    shutil.copy(folder / "keys" / "server" / "ca.pem", folder / "foreign" / "site-0" / "ca.pem")
    for name, keys in (("wrong-key", "foreign/site-0"), ("no-tls", None)):
        write_site(folder, name, 0, folder / "no-rows.jsonl", "no-model")
        start_site(stack, folder, name, port, keys=keys)
    node = ["--superlink", f"127.0.0.1:{port}", "--port", str(free_ports(1)[0])]
    node += ["--root-certificates", str(folder / "keys" / "server" / "ca.pem")]
    node += ["--node-config", f'site="{folder / "no-tls.yaml"}"']
    beside(stack, folder, "no-key", [flower("flower-supernode"), *node], is_ours=False)


def test_operators_get_a_model_and_strangers_are_refused(plays: Mapping[str, Future[Facts]]):
    facts = plays["operators"].result()
    assert "client 1 has given up" in facts["failure"]["what"]
    assert "nowhere" in facts["failure"]["what"]
    assert facts["summary"]["status"] == "completed"
    assert "does not know this site's key" in facts["wrong-key"]
    assert "All SuperNodes must be registered" in facts["no-key"]
    assert "Connection attempt failed" in facts["no-tls"]
    nodes = set(re.findall(r"Activated node_id=(\d+)", facts["superlink_log"]))
    assert len(nodes) == 3, "two of site 0, one of site 1"
    assert facts["summary"]["model_sha256"] == facts["expected"]  # each site's rows are its own, as by_file has it
    assert {facts["codes"][name] for name in ("site-0", "site-1", "no-tls")} == {128 + signal.SIGTERM}
    assert facts["codes"]["server"] == 0


# ── masked updates ──────────────────────────────────────────────────────────────────────────────────


def masked(workshop: Workshop, config: RunConfig) -> Facts:
    """Mask updates that in one process are on the grid without masks."""
    deployment = Deployment(workshop.path / "deployed", LEAST_MASKED, lanes=1)
    deployment.prepare(on_the_grid(config, "masked"))
    with deployment, watching(deployment, Patience()) as ended:
        pass
    logs = [path.read_text() for path in sorted(workshop.path.rglob("trainer.log"))]
    return {"ended": ended, "config": config, "logs": logs}


def on_the_grid(config: RunConfig, grid: str) -> RunConfig:
    tree = config.model_dump(mode="json")
    tree |= {"privacy": {"clip_norm": 0.01, "secure_aggregation": grid}, "wire": {"streaming": False}}
    return parse_config(tree)


def test_masked_updates_give_what_the_plain_grid_gives_in_one_process(
    plays: Mapping[str, Future[Facts]], tmp_path: Path
):
    facts = plays["masked"].result()
    (summary,) = facts["ended"]
    assert summary["model_sha256"] == facts["expected"]
    without = in_one_process(on_the_grid(facts["config"], "none"), tmp_path / "without")
    assert without != facts["expected"]


def test_masked_sites_are_told_that_little_is_left_of_their_updates(plays: Mapping[str, Future[Facts]]):
    logs = plays["masked"].result()["logs"]
    assert logs and all("clipping removes 9" in log for log in logs)
