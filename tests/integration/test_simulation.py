"""Flower's simulation runs the same app, with Ray's actors in the place of SuperNodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from parablock.deploy.processes import (
    CONNECTION,
    SIMULATION,
    ServerFiles,
    environment,
    free_ports,
    superlink_command,
    wait_for_port,
    write_connection,
)
from tiny_runs import command, make_workshop, summary_of

pytest.importorskip("ray", reason="Ray is missing: pip install 'parablock[simulation]'")
pytestmark = [pytest.mark.flower, pytest.mark.slow]


def test_the_simulation_ends_with_the_model_of_one_process(
    tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast
):
    (tmp_path / "workshop").mkdir()
    workshop = make_workshop(tmp_path / "workshop", tiny_llama, tiny_tokenizer)
    tree = yaml.safe_load(workshop.config.read_text())
    tree["engine"], tree["link"] = {"num_threads": 1}, {}
    tree["federation"] |= {"num_clients": 2, "num_rounds": 4}
    tree["data"]["train"] = tree["data"]["train"][:2]
    workshop.config.write_text(yaml.safe_dump(tree))
    for delay in (0, 1):
        assert workshop.run(tmp_path / f"delay-{delay}", f"federation.delay={delay}").code == 0
    written = command("deploy", "app", str(workshop.config), "--output-dir", str(tmp_path / "run"))
    simulate(written.stdout.strip(), tmp_path / "flower", lambda: (tmp_path / "run" / "summary.json").exists())
    summary = summary_of(tmp_path / "run")
    assert summary["status"] == "completed"
    assert summary["model_sha256"] == summary_of(tmp_path / "delay-1")["model_sha256"]
    assert summary["model_sha256"] != summary_of(tmp_path / "delay-0")["model_sha256"]


def simulate(line: str, folder: Path, done: Callable[[], bool]) -> None:
    """Type the line that `deploy app` has printed, to a SuperLink in simulation mode, and wait until it is done."""
    files = ServerFiles(folder, None, f"127.0.0.1:{free_ports(1)[0]}")
    write_connection(files)
    log = folder / "superlink.log"
    with log.open("wb") as output:
        superlink = subprocess.Popen(
            [*superlink_command(files), "--simulation"],
            env=environment(files.home, SIMULATION),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_for_port(files.address, superlink, log)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        typed = f"FLWR_HOME={files.home} {line} {CONNECTION}"
        submitted = subprocess.run(
            ["bash", "-c", typed], env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        give_up = time.monotonic() + 300
        while not done():
            assert time.monotonic() < give_up, log.read_text()[-3000:]
            assert "simulation raised" not in log.read_text().lower(), log.read_text()[-3000:]
            time.sleep(0.2)
    finally:
        superlink.terminate()
        try:
            superlink.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(superlink.pid, signal.SIGKILL)
            superlink.wait()
