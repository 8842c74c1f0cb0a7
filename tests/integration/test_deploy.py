"""A federation lives by the commands of docs/deploying.md: it begins, breaks, is renewed, and refuses strangers."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from federation import RUN, Federation, free_port, has, lines_of, participants, wait_for
from pages import ROOT, steps
from parablock.deploy.authority import make_all, revoke
from parablock.deploy.door import NO_CERTIFICATE
from tiny_runs import Outcome, Process, Workshop, command, command_apart, summary_of

BEGIN, DAYS = "Ten minutes to a federation", "Day by day"


@pytest.fixture(scope="module")
def federation(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A federation whose files and keys are made by the page; its first run is paused while its sites come."""
    made = Federation(tmp_path_factory.mktemp("a federation"))  # a path with a blank
    shutil.copytree(workshop.model, made.folder / "models" / "base")
    shutil.copy(workshop.test_file, made.folder / "test.jsonl")
    for client_id in (0, 1):
        shutil.copy(workshop.client_file(client_id), made.folder / f"notes-{client_id}.jsonl")
    try:
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def begun(federation: Federation) -> Federation:
    """The page's ten minutes, up to a run that has all sites; what each command printed is in `printed.txt`."""
    printed = []
    for line in map(federation.local, federation.sections[BEGIN]):
        match shlex.split(line)[1:3]:
            case ["deploy", "server"]:
                federation.change_run(RUN)
                federation.start("server", line)
                federation.until("server", lambda: federation.states("first") == ["not seen"] * 2)
                federation.shell("parablock deploy pause server/runs/first")
            case ["deploy", "client"]:
                federation.start("site-0" if "site-0" in line else "site-1", line)
            case ["deploy", "status"]:
                federation.until("server", lambda: federation.states("first") == ["connected"] * 2)
                printed.append(federation.shell(line))
                printed.append(federation.shell(f"{line} --json"))
            case _:
                printed.append(federation.shell(line))
    federation.shell("parablock deploy pause server/runs/first --off")
    (federation.folder / "printed.txt").write_text("\0".join(printed))
    return federation


@pytest.fixture(scope="module")
def expected(begun: Federation, workshop: Workshop) -> str:
    """The hash of the model of one process, from the same run.yaml and rows."""
    folder, run_dir = begun.folder, workshop.path / "one process"
    rows = json.dumps([str(folder / f"notes-{client_id}.jsonl") for client_id in (0, 1)])
    sets = ["--set", f"data.train={rows}", "--set", "data.partition.scheme=by_file"]
    outcome = command("run", str(folder / "server" / "run.yaml"), "--output-dir", str(run_dir), *sets)
    assert outcome.code == 0, outcome.stderr
    return hash_of(run_dir)


def hash_of(run_dir: Path) -> str:
    return str(summary_of(run_dir)["model_sha256"])


def pids(federation: Federation) -> list[int]:
    return [federation.started[f"site-{i}"].pid for i in (0, 1) if federation.started[f"site-{i}"].is_alive]


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_leads_from_nothing_to_the_model_of_one_process(begun: Federation, expected: str):
    assert begun.started["server"].wait(180) == 0, begun.told("server")
    assert hash_of(begun.run_dir("first")) == expected
    assert len(pids(begun)) == 2
    assert participants(begun.run_dir("first")) == [[0, 1]] * RUN["federation"]["num_rounds"]


def test_the_check_and_the_status_say_what_there_is(begun: Federation):
    printed = (begun.folder / "printed.txt").read_text()
    *_, check, table, as_json = printed.split("\0")
    assert check.count("✓") == 10 and "✗" not in check and "the policy allows the run" in check
    assert has(r"certificate of site-0 is valid for 364 days", check) and "8 rows to train on" in check
    assert has(r"hash [0-9a-f]{12}, as at the server", check) and has(r"this clock is 0\.\d s", check)
    assert table.count("connected") == 2 and "paused" in table
    sites = json.loads(as_json)["sites"]
    assert [site["state"] for site in sites] == ["connected"] * 2
    assert table.count("364 days") == 2
    assert sites[0]["certificate"]["key"] in (begun.folder / "authority/issued.jsonl").read_text()
    assert sites[0]["certificate"]["key"] != sites[1]["certificate"]["key"]


def test_nothing_of_a_sites_files_is_in_what_the_server_keeps(begun: Federation):
    for path in (begun.run_dir("first") / "deployment").rglob("*"):
        assert path.is_dir() or "notes-" not in path.read_text(errors="replace"), path


# ── what dies comes back ─────────────────────────────────────────────────────────────────────────────


def test_a_killed_server_goes_on_by_the_same_command_and_sites_stay(begun: Federation, expected: str):
    before = pids(begun)
    begun.serve("second")
    begun.until("server", lambda: begun.rounds("second") >= 10)
    begun.started["server"].kill()
    assert 10 <= begun.rounds("second") < RUN["federation"]["num_rounds"]
    begun.serve("second")
    assert begun.started["server"].wait(180) == 0, begun.told("server")
    assert hash_of(begun.run_dir("second")) == expected
    assert pids(begun) == before


def test_a_killed_site_that_is_started_again_changes_nothing(begun: Federation, expected: str):
    begun.serve("third")
    begun.until("server", lambda: begun.rounds("third") >= 5)
    begun.started["site-1"].kill()
    begun.site(1)
    assert begun.started["server"].wait(180) == 0, begun.told("server")
    assert hash_of(begun.run_dir("third")) == expected
    assert participants(begun.run_dir("third")) == [[0, 1]] * RUN["federation"]["num_rounds"]


def test_a_site_that_is_told_to_stop_leaves_and_the_other_goes_on(begun: Federation):
    begun.serve("fourth")
    begun.until("server", lambda: begun.rounds("fourth") >= 5)
    begun.started["site-1"].send(signal.SIGTERM)
    assert begun.started["site-1"].wait(60) == 0
    assert "this site has left, as its operator asked" in begun.told("site-1")
    assert begun.started["server"].wait(180) == 0, begun.told("server")
    who = participants(begun.run_dir("fourth"))
    assert (who[0], who[-1]) == ([0, 1], [0])
    begun.site(1)


# ── the operator ─────────────────────────────────────────────────────────────────────────────────────


def test_a_run_is_paused_renewed_removed_from_stopped_and_gone_on_with(begun: Federation):
    before, num_rounds = pids(begun), 120
    begun.change_run({"federation": {"num_rounds": num_rounds}})
    begun.serve("fifth")
    run_dir = begun.run_dir("fifth")
    begun.until("server", lambda: begun.rounds("fifth") >= 3)
    asked("pause", run_dir)
    for line in begun.sections[DAYS]:  # renewals, while the run is there
        if any(word in line for word in (" renew ", " sign ", " install ")):
            begun.shell(begun.local(line))
    assert served_serial(begun) == serial_of(begun.folder / "server" / "keys" / "server.pem")
    asked("remove", run_dir, "1")
    wait_for(lambda: begun.states("fifth")[1] == "removed")
    wait_for(lambda: "has been removed from the run" in begun.told("site-1"))
    asked("remove", run_dir, "1", "--undo")
    wait_for(lambda: begun.states("fifth")[1] == "connected")
    asked("pause", run_dir, "--off")
    asked("stop", run_dir)
    assert begun.started["server"].wait(60) == 130, begun.told("server")
    assert 3 <= begun.rounds("fifth") < num_rounds
    begun.serve("fifth")
    assert begun.started["server"].wait(180) == 0, begun.told("server")
    assert begun.rounds("fifth") == num_rounds
    assert pids(begun) == before


def test_a_site_that_the_page_revokes_is_sent_home_and_the_other_stays(begun: Federation):
    for line in begun.sections[DAYS]:
        if " revoke " in line or line.startswith("cp "):
            begun.shell(line)
    begun.serve("sixth")
    assert begun.started["site-1"].wait(180) == 2
    assert "the certificate of site-1 has been revoked" in begun.told("site-1")
    begun.until("server", lambda: begun.states("sixth") == ["connected", "not seen"])
    asked("stop", begun.run_dir("sixth"))
    assert begun.started["server"].wait(60) == 130, begun.told("server")
    assert len(pids(begun)) == 1


def asked(what: str, run_dir: Path, *words: str) -> None:
    outcome = command("deploy", what, str(run_dir), *words)
    assert outcome.code == 0, outcome.stderr


def serial_of(certificate: Path) -> int:
    from parablock.deploy.certificates import read_certificate

    return read_certificate(certificate).serial_number


def served_serial(federation: Federation) -> int:
    """The serial number of the certificate that the server shows to a new connection."""
    pem = ssl.get_server_certificate(("localhost", federation.port))
    from cryptography import x509

    return x509.load_pem_x509_certificate(pem.encode()).serial_number


# ── the door ─────────────────────────────────────────────────────────────────────────────────────────


class Door:
    """A server that waits for three sites, and its keys, all of them at hand."""

    def __init__(self, folder: Path, workshop: Workshop) -> None:
        self.folder, self.port, self.log = folder, free_port(), folder / "server.log"
        self.keys, self.material = folder / "keys", workshop
        make_all(self.keys, 3, [])
        make_all(folder / "others", 3, [])
        tree = yaml.safe_load(workshop.config.read_text())
        del tree["data"]["train"], tree["data"]["partition"]
        (folder / "run.yaml").write_text(yaml.safe_dump(tree))
        self.process = Process(self.command(f"0.0.0.0:{self.port}"), self.log)
        self.process.wait_until(lambda: (folder / "run/deployment/status.json").exists(), 180)

    def command(self, address: str) -> list[str]:
        arguments = ["deploy", "server", str(self.folder / "run.yaml"), "--keys", str(self.keys / "server")]
        return [*arguments, "--address", address, "--output-dir", str(self.folder / "run")]

    def client(self, client_id: int, keys: Path, host: str = "localhost") -> list[str]:
        site = {
            "client_id": client_id,
            "state_dir": str(self.folder / f"state-{client_id}-{keys.parent.name}-{keys.name}"),
            "model": {"name_or_path": str(self.material.model)},
            "data": {"train": [str(self.material.client_file(0))]},
        }
        file = self.folder / f"site-{client_id}.yaml"
        file.write_text(yaml.safe_dump(site))
        return ["deploy", "client", str(file), "--server", f"{host}:{self.port}", "--keys", str(keys)]

    def refused(self) -> list[str]:
        lines = lines_of(self.folder / "run/deployment/server.log")
        return [line for line in lines if line.startswith("refused")]

    def words_of(self, arguments: list[str], wanted: str) -> str:
        """Start a site that goes on waiting; give what it says, once that has some words."""
        log = self.folder / "waits.log"
        with Process(arguments, log) as process:
            process.wait_until(lambda: wanted in log.read_text(), 180)
        return log.read_text()


@pytest.fixture(scope="module")
def door(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    made = Door(tmp_path_factory.mktemp("door"), workshop)
    try:
        yield made
    finally:
        made.process.kill()


def answer(door: Door, context: ssl.SSLContext) -> bytes:
    """What the server says to a caller that shakes hands and speaks HTTP/2; nothing, if it ends the connection."""
    with suppress(ssl.SSLError, ConnectionError):
        plain = socket.create_connection(("localhost", door.port), timeout=30)
        with plain, context.wrap_socket(plain, server_hostname="localhost") as call:
            call.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            return call.recv(64)
    return b""


def caller(door: Door, keys: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(door.keys / "server" / "authority.pem"))
    context.set_alpn_protocols(["h2"])
    if keys is not None:
        context.load_cert_chain(keys / "site.pem", keys / "site.key")
    return context


def test_a_stranger_without_a_certificate_gets_no_answer_and_one_with_it_does(door: Door):
    assert answer(door, caller(door, None)) == b""
    assert answer(door, caller(door, door.folder / "others" / "site-0")) == b""
    assert answer(door, caller(door, door.keys / "site-0")) != b""
    assert door.process.is_alive
    wait_for(lambda: any("from 127.0.0.1:" in line and NO_CERTIFICATE in line for line in door.refused()))


def test_a_site_of_another_authority_says_whom_it_does_not_trust(door: Door):
    told = door.words_of(door.client(0, door.folder / "others" / "site-0"), "is not trusted")
    assert "both ends need the same authority" in told


def test_a_name_that_the_certificate_lacks_is_told_as_that(door: Door):
    told = door.words_of(door.client(0, door.keys / "site-0", "127.0.0.2"), "is not for 127.0.0.2")
    assert "make a new request at the server with --host" in told


def test_the_certificate_of_another_site_is_refused_at_both_ends(door: Door):
    outcome = apart(door, door.client(1, door.keys / "site-0"))
    assert outcome.code == 2
    assert "the certificate of site-0 is not that of client 1" in outcome.stderr
    assert "refused site-0" in door.refused()[-1] and "not that of client 1" in door.refused()[-1]


def test_another_release_is_refused_with_both_named(door: Door):
    change = "import parablock; parablock.__version__ = '9.8.7'; from parablock.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", change, *door.client(0, door.keys / "site-0")],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 2
    for told in (done.stderr, door.refused()[-1]):
        assert "the site runs ParaBlock 9.8.7" in told and "the server 0.1.0" in told


def test_a_revoked_site_is_refused_as_soon_as_the_list_is_there(door: Door):
    assert not (door.keys / "server" / "revoked.pem").exists()
    revoke(door.keys / "authority", "site-2", passphrase=None)
    shutil.copy(door.keys / "authority" / "revoked.pem", door.keys / "server")
    outcome = apart(door, door.client(2, door.keys / "site-2"))
    assert outcome.code == 2
    assert "the certificate of site-2 has been revoked" in outcome.stderr
    assert "the certificate of site-2 has been revoked" in door.refused()[-1]


def test_a_busy_port_is_told_with_the_process_that_has_it(door: Door):
    arguments = door.command(f"127.0.0.1:{door.port}")
    outcome = apart(door, [*arguments[:-1], str(door.folder / "another")])
    assert outcome.code == 1, "a service manager starts it again, once an earlier server has ended"
    assert f"port {door.port} of 127.0.0.1 is taken: process {door.process.pid} " in outcome.stderr


def apart(door: Door, arguments: list[str]) -> Outcome:
    """Run a command that ends by itself as a process of its own; its log stands for both streams."""
    log = door.folder / "apart.log"
    code = Process(arguments, log).wait(180)
    return Outcome(code, "", log.read_text())


# ── what init writes, and what the page offers to copy ───────────────────────────────────────────────


def test_the_units_are_what_systemd_reads(begun: Federation):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is missing")
    units = [*begun.folder.glob("*/*.service")]
    assert len(units) == 3
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, units)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    broken = begun.folder / "parablock-broken.service"
    broken.write_text(units[0].read_text().replace("ExecStart=", "ExecStart=nowhere/"))
    done = subprocess.run(["systemd-analyze", "verify", str(broken)], capture_output=True, text=True, check=False)
    assert done.returncode != 0


def test_the_compose_files_start_the_documented_commands_with_files_where_they_are(begun: Federation):
    for name, words in (("server", ["deploy", "server"]), ("site-0", ["deploy", "client"])):
        tree = yaml.safe_load((begun.folder / name / "compose.yaml").read_text())
        (service,) = tree["services"].values()
        assert service["command"][:2] == words and service["restart"] == "on-failure"
        assert str(begun.folder / name) == service["working_dir"]
        mounted = {volume.split(":")[0] for volume in service["volumes"]}
        assert {str(begun.folder / name), str(begun.folder / "models" / "base")} <= mounted


def test_the_kubernetes_and_slurm_files_of_the_page_have_what_they_need():
    page = (ROOT / "docs" / "deploying.md").read_text()
    (manifest,) = (yaml.safe_load(step.content) for step in steps(page) if step.file_name == "site.k8s.yaml")
    assert (manifest["kind"], manifest["apiVersion"]) == ("StatefulSet", "apps/v1")
    pod = manifest["spec"]["template"]["spec"]
    assert manifest["spec"]["selector"]["matchLabels"] == manifest["spec"]["template"]["metadata"]["labels"]
    (container,) = pod["containers"]
    assert container["args"][:2] == ["deploy", "client"]
    volumes = {volume["name"] for volume in pod["volumes"]} | {
        claim["metadata"]["name"] for claim in manifest["spec"]["volumeClaimTemplates"]
    }
    mounts = [
        mount["name"] for one in [*pod["containers"], *pod["initContainers"]] for mount in one["volumeMounts"]
    ]
    assert set(mounts) == volumes
    job = page.split("```slurm\n")[1].split("```")[0]
    assert job.startswith("#!/bin/bash\n#SBATCH ")
    assert subprocess.run(["bash", "-n"], input=job, text=True, check=False).returncode == 0
    assert "--requeue" in job and "--signal=TERM@60" in job


def test_nobody_waits_for_libraries_that_he_does_not_need():
    """Who looks at a status needs no torch, and a site that connects no Transformers."""
    libraries = ("torch", "transformers")
    for module, loads in (("status", []), ("site_service", ["torch"]), ("site_training", [*libraries])):
        code = (
            f"import sys, parablock.deploy.{module}; print([name for name in {libraries} if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(loads), module


def test_init_writes_over_nothing(tmp_path: Path):
    folder = tmp_path / "site"
    outcome = command("deploy", "init", "site", str(folder), "--client-id", "3", "--train", "a.jsonl")
    assert outcome.code == 0, outcome.stderr
    assert yaml.safe_load((folder / "site.yaml").read_text())["client_id"] == 3
    assert "a.jsonl is not on this machine: put right the path in site.yaml" in outcome.stderr
    assert "models/base is not on this machine" in outcome.stderr
    (tmp_path / "a.jsonl").write_text("")
    there = ("--train", str(tmp_path / "*.jsonl"), "--model", str(tmp_path))
    assert "not on this machine" not in command("deploy", "init", "site", str(tmp_path / "other"), *there).stderr
    (folder / "site.yaml").write_text("mine")
    outcome = command("deploy", "init", "site", str(folder))
    assert outcome.code != 0 and "site.yaml" in outcome.stderr
    assert (folder / "site.yaml").read_text() == "mine"


def test_a_check_names_everything_that_is_wrong_and_exits_with_2(door: Door):
    _, _, file, *options = door.client(1, door.keys / "site-0")
    tree = yaml.safe_load(Path(file).read_text())
    tree["data"]["train"] = [str(door.folder / "gone.jsonl")]
    tree["model"]["name_or_path"] = str(door.folder / "no-model")
    Path(file).write_text(yaml.safe_dump(tree))
    outcome = command_apart("deploy", "check", file, *options)
    assert outcome.code == 2
    crosses = [line for line in outcome.stdout.splitlines() if line.startswith("✗")]
    assert len(crosses) == 4, outcome.stdout
    assert "that of site-0, the file that of client 1" in crosses[0]
    assert "is not that of client 1" in crosses[1]
    assert "gone.jsonl does not exist" in crosses[2] and "no-model" in crosses[3]


def test_this_file_reads_every_command_of_its_sections(begun: Federation):
    assert len(begun.sections[BEGIN]) == 18
    assert all(
        line.startswith(("parablock deploy ", "cp ")) for line in begun.sections[BEGIN] + begun.sections[DAYS]
    )
    assert (begun.folder / "authority").is_dir()
