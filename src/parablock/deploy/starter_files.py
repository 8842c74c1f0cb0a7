"""The files that an operator starts with: a configuration with comments, a systemd unit, and a compose file."""

from __future__ import annotations

import getpass
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from parablock.config.load import parse_config, read_tree
from parablock.deploy.site import load_site
from parablock.errors import StorageError
from parablock.storage.files import storage, write_atomically

RUN_YAML = Template("""\
# A run over real sites. docs/configuration.md has all keys; `parablock plan run.yaml` says what the run costs.
# Neither the paths in this file nor its test rows are sent to the sites.
model:
  # a folder, or an id of Hugging Face; every site has the same weights
  name_or_path: $model
  # auto, cpu or cuda: where the server scores the model
  device: auto
data:
  # rows to score the model on, at the server alone; `train` is missing: the sites have their own
  test: $test
  # tokens of an example; longer ones are cut
  max_length: 512
federation:
  # parablock trains one block of the model a round; fedit trains adapters (with the extra `lora` at each site): far
  # fewer bytes, and the first choice where a low rank holds what there is to learn
  method: parablock
  # sites; they have the numbers below this one
  num_clients: $clients
  # a round trains one block: give each block several rounds
  num_rounds: 48
  # rounds that an update may be under way while the next one is trained; 0: no overlap
  delay: 1
  # fewest updates that a round needs; with fewer sites the run waits for them. With 1, a site that is left alone
  # goes on: the result of its rounds is its own update
  min_updates: 1
  # seconds without a sign of a site, after which a round goes on without it
  stall_timeout_s: 600
train:
  # optimizer steps of a round; auto: as many as fill the time of an exchange
  num_local_steps: 8
  # examples of a step
  per_device_train_batch_size: 8
  # the optimizer's moments; auto: kept where every round trains all (fedit), reset at each visit of a block
  optimizer_state: auto
wire:
  # or bfloat16, int8, int4, int2: fewer bytes
  format: float32
checkpoint:
  # rounds; a server that dies goes on from the newest checkpoint
  every_rounds: 8
  # checkpoints, each somewhat larger than the model
  keep: 2
evaluation:
  # rounds
  every_rounds: 8
""")

SITE_YAML = Template("""\
# A site of a federation. Nothing in this file is sent to the server.
# Which client this site is, from 0; another one at each site. Its certificate is that of site-$client_id.
client_id: $client_id
# A folder of this site alone, with room for three copies of the model; it may be named from this file's place.
state_dir: state
model:
  # the server's base model; its hash is compared
  name_or_path: $model
  # auto, cpu or cuda: where this site trains
  device: auto
data:
  # JSONL or Parquet; all rows are trained on
  train: $train
# Seconds without a sign of the server, after which the model leaves memory until the server is back.
lease_s: 3600
# Torch threads; without this line, as the server says.
# num_threads: 4
# What a run may ask of this site. The site refuses what this forbids before it reads a row, and again in every
# round; the server learns which key refuses, and not its value. docs/data-protection.md has all keys. The lines
# without a # hold without `policy` too; each line behind a # asks for more.
policy:
  # required: updates leave masked, and the server sees the sum of a round alone; any: it sees this site's updates
  secure_aggregation: any
  # fewest clients that a run asks in a round; how many of them may be missing is `min_updates` of the run, and a
  # mean of one is its update
  min_cohort: 2
  # fewest examples behind an update: examples of a step times steps; fewer can be read out of it
  min_examples_per_round: 8
  max_rounds: 10000
  max_local_steps: 1024
  # layers, embeddings, head: updates of the last two tell which words the rows have
  blocks: [layers]
  # least and largest values of keys of the run's `train` section
  optimizer:
    learning_rate: [0.0, 0.1]
    adam_epsilon: [0.0, 0.000001]
  # figures that may leave beside updates
  metrics: [train_loss, timeline]
  # methods: [parablock, fl_bcd]
  # train_on_prompts: false
  # noise: own
  # min_noise_multiplier: 1.0
  # max_clip_norm: 1.0
  # max_epsilon: 8.0
  # delta: 0.00001
  # base_sha256: [the 64 digits that the server's operator names]
""")

UNIT = Template("""\
[Unit]
Description=ParaBlock $what
Wants=network-online.target
After=network-online.target

[Service]
User=$user
WorkingDirectory=$folder
ExecStart=$command
Restart=on-failure
RestartSec=5
# 2: the input is wrong, or the server refuses this site; 130: saved and stopped, as asked
RestartPreventExitStatus=2
SuccessExitStatus=130
TimeoutStopSec=600
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=full

[Install]
WantedBy=multi-user.target
""")

_PLAIN = re.compile(r"[\w@/.:=+-]+")
SERVER_COMMAND = ("server", "run.yaml", "--keys", "keys", "--address", "0.0.0.0:8000", "--output-dir", "runs/first")


def server_files(folder: Path, *, model: str, test: Sequence[str], clients: int) -> dict[str, str]:
    """Return the files of a server by their names; paths that are here become absolute."""
    folder, model, test = folder.absolute(), _absolute(model), [_absolute(source) for source in test]
    run = RUN_YAML.substitute(model=json.dumps(model), test=json.dumps(test), clients=clients)
    return {
        "run.yaml": run,
        "parablock-server.service": _unit("server", folder, SERVER_COMMAND),
        "compose.yaml": _compose("server", folder, SERVER_COMMAND, [model, *test], {"ports": ["8000:8000"]}),
    }


def site_files(folder: Path, *, client_id: int, model: str, train: Sequence[str], server: str) -> dict[str, str]:
    """Return the files of a site by their names; paths that are here become absolute."""
    folder, model, train = folder.absolute(), _absolute(model), [_absolute(source) for source in train]
    site = SITE_YAML.substitute(client_id=client_id, model=json.dumps(model), train=json.dumps(train))
    command = ("client", "site.yaml", "--server", server, "--keys", "keys")
    return {
        "site.yaml": site,
        "parablock-site.service": _unit(f"site {client_id}", folder, command),
        "compose.yaml": _compose("site", folder, command, [model, *train], {}),
    }


def write_starter_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write files that are not there yet, in a folder for this user alone, and read the configuration back.

    Raises:
        StorageError: One of them is there, or cannot be written.
        ConfigError: A value that was given is wrong.
    """
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise StorageError(
            f"{folder} holds {', '.join(there)} already",
            cause="Files of yours are never written over.",
            remedy="Edit them, or give a new folder.",
        )
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, text in files.items():
        write_atomically(folder / name, text)
    if "site.yaml" in files:
        load_site(folder / "site.yaml")
    else:
        tree = read_tree(folder / "run.yaml")
        tree["data"]["train"] = []
        parse_config({**tree, "engine": {"name": "remote"}}, source=str(folder / "run.yaml"))


def _absolute(source: str) -> str:
    return str(Path(source).absolute()) if Path(source).exists() else source


def _program() -> list[str]:
    """Return the command line of this installation, which service managers find without a PATH."""
    script = Path(sys.executable).with_name("parablock")
    return [str(script)] if script.exists() else [sys.executable, "-m", "parablock"]


def _unit(what: str, folder: Path, command: Sequence[str]) -> str:
    words = [*_program(), "deploy", *command]
    line = " ".join(word if _PLAIN.fullmatch(word) else _quoted(word) for word in words)
    where = str(folder).replace("%", "%%")
    return UNIT.substitute(what=what, user=getpass.getuser(), folder=where, command=line)


def _quoted(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _compose(
    name: str, folder: Path, command: Sequence[str], sources: Sequence[str], more: Mapping[str, object]
) -> str:
    """Return a compose file, in JSON's notation of YAML: files are at the same places inside as outside."""
    outside = [source for source in sources if Path(source).exists() and folder not in Path(source).parents]
    service = {
        "image": "parablock",
        "working_dir": str(folder),
        "command": ["deploy", *command],
        "volumes": [f"{folder}:{folder}", *(f"{source}:{source}:ro" for source in dict.fromkeys(outside))],
        "user": "1000:1000",
        "init": True,
        "restart": "on-failure",
        "stop_grace_period": "10m",
        **more,
    }
    lines = [f"    {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in service.items()]
    head = [
        "# docker build -t parablock . (in the folder of the source), then: docker compose up --detach",
        "# `user` has to own this folder and its keys; for a GPU see docs/operations.md.",
    ]
    return "\n".join([*head, "services:", f"  {name}:", *lines, ""])
