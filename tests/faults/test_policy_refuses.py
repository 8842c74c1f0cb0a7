"""A server asks for what a site's policy forbids: the site refuses before it reads a row, and in a round."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from doors import Door
from dotted import nested
from engines import server_plan
from parablock.config.load import parse_config
from parablock.deploy.guarded_trainer import GuardedTrainer, RoundRefusedError, SitePolicy, epsilon_of
from parablock.deploy.policy import OPEN_POLICY, Policy
from parablock.deploy.site import SiteConfig, configuration_at, load_site, shared_config
from parablock.deploy.site_check import check_site
from parablock.deploy.starter_files import site_files, write_starter_files
from parablock.engine.local_steps import FixedSteps
from parablock.engine.plans import Hooks
from parablock.engine.update_form import Differences
from parablock.errors import ConfigError, DataError, ParaBlockError, PolicyError
from parablock.privacy.protection import LOCAL_DISTANCE
from parablock.storage.audit_log import AuditLog, verify
from parablock.wire.quantize import Encoding
from remote_runs import Town
from toy import ToyTrainer, initial

RUN = {
    "model.name_or_path": "of the server",
    "data.train": [],
    "data.test": ["of the server"],
    "federation.num_clients": 6,
    "engine.name": "remote",
}
"""What every policy below allows without its one line."""
NOISE = {"privacy.clip_norm": 1.0, "privacy.noise_multiplier": 0.5}
MASKS = {"privacy.clip_norm": 1.0, "privacy.secure_aggregation": "masked", "wire.streaming": False}
TOGETHER = {**MASKS, "privacy.noise_multiplier": 2.0, "privacy.mode": "distributed"}
HASH = "ab" * 32

FORBIDDEN: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "no masks": ("secure_aggregation", "required", {}),
    "words without masks": ("secure_aggregation", "required", {**MASKS, "privacy.secure_aggregation": "plain"}),
    "half of the clients": ("min_cohort", 4, {"federation.participation": 0.5}),
    "one client": ("min_cohort", 2, {"federation.num_clients": 1}),
    "one client in turn": ("min_cohort", 2, {"federation.method": "fedcybgd"}),
    "masks that few may take off": ("min_cohort", 5, MASKS),
    "noise of the server": ("noise", "own", NOISE),
    "no noise of its own": ("noise", "own", {}),
    "little noise": ("min_noise_multiplier", 1.0, NOISE),
    "little noise of all together": ("min_noise_multiplier", 2.1, TOGETHER),
    "no noise": ("min_noise_multiplier", 0.1, {}),
    "a large epsilon": ("max_epsilon", 8.0, NOISE),
    "an epsilon without noise": ("max_epsilon", 8.0, {}),
    "a long update": ("max_clip_norm", 1.0, {"privacy.clip_norm": 2.0}),
    "an update of any length": ("max_clip_norm", 1.0, {}),
    "one example": (
        "min_examples_per_round",
        8,
        {"train.per_device_train_batch_size": 1, "train.num_local_steps": 1},
    ),
    "few steps by choice": ("min_examples_per_round", 16, {"train.num_local_steps": "auto"}),
    "many rounds": ("max_rounds", 10_000, {"federation.num_rounds": 1_000_000}),
    "many steps": ("max_local_steps", 1024, {"train.num_local_steps": 100_000}),
    "many steps by choice": ("max_local_steps", 32, {"train.num_local_steps": "auto"}),
    "another method": ("methods", ["parablock"], {"federation.method": "fl_bcd"}),
    "embeddings": ("blocks", ["layers"], {"blocks.include_embeddings": True}),
    "the head": ("blocks", ["layers", "embeddings"], {"blocks.include_head": True}),
    "the whole model": ("blocks", ["layers", "head"], {"federation.method": "fedavg"}),
    "another base model": ("base_sha256", ["cd" * 32], {}),
    "raw gradients": ("optimizer", {"adam_epsilon": [0, 1e-6]}, {"train.adam_epsilon": 1e12}),
    "giant steps": ("optimizer", {"learning_rate": [0, 0.1]}, {"train.learning_rate": 1e12}),
    "gradients of any length": ("optimizer", {"max_grad_norm": [1e-3, 10]}, {"train.max_grad_norm": 0}),
    "prompts": ("train_on_prompts", False, {"train.completion_only_loss": False}),
    "prompts as completions": ("train_on_prompts", False, {"data.columns": {"completion": "prompt"}}),
    "all of a row": ("train_on_prompts", False, {"data.format": "text"}),
}


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    made = Door()
    yield made
    made.listener.close()


def site_with(folder: Path, policy: dict[str, Any] | None) -> SiteConfig:
    """A site whose rows are not there: an error of theirs shows that it tried to read them."""
    site = {
        "client_id": 0,
        "state_dir": "state",
        "model": {"name_or_path": "/secret/model"},
        "data": {"train": ["/secret/rows.jsonl"]},
        **({} if policy is None else {"policy": policy}),
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    return load_site(folder / "site.yaml")


def shared(**more: Any) -> str:
    return shared_config(parse_config(nested({**RUN, **more})))


@pytest.mark.parametrize("case", FORBIDDEN)
def test_what_a_policy_forbids_is_refused_before_a_row_is_read(tmp_path: Path, door: Door, case: str):
    key, value, run = FORBIDDEN[case]
    error, leave = door.take_part(site_with(tmp_path, {**OPEN_POLICY, key: value}), shared(**run), HASH)
    assert isinstance(error, PolicyError) and error.keys == (key,)
    assert leave.problem == f"POLICY its policy forbids it: {key}"
    entries = verify(tmp_path / "state" / "audit.jsonl").entries
    assert [entry.kind for entry in entries] == ["join", "refusal", "leave"]
    assert entries[1].facts["keys"] == [key] and entries[1].facts["words"] == error.what
    # the control: without the line the site goes on to its rows
    error, leave = door.take_part(site_with(tmp_path, OPEN_POLICY), shared(**run), HASH)
    assert isinstance(error, DataError) and "/secret/rows.jsonl" in error.what
    assert "secret" not in leave.problem


BY_DEFAULT = (
    *("one client", "one client in turn", "one example", "many rounds", "many steps"),
    *("embeddings", "the whole model", "raw gradients", "giant steps"),
)


def test_a_site_without_a_policy_has_one_that_refuses_runs_made_to_read_rows(tmp_path: Path, door: Door):
    for case in BY_DEFAULT:
        key, _, run = FORBIDDEN[case]
        error, _ = door.take_part(site_with(tmp_path, None), shared(**run), HASH)
        assert isinstance(error, PolicyError) and key in error.keys, case
    error, _ = door.take_part(site_with(tmp_path, None), shared(), HASH)
    assert isinstance(error, DataError)


def test_the_policy_that_init_writes_is_the_default_one(tmp_path: Path):
    files = site_files(tmp_path, client_id=0, model="m", train=["t"], server="h:1")
    write_starter_files(tmp_path, files)
    assert load_site(tmp_path / "site.yaml").policy == Policy()
    commented = files["site.yaml"].split("policy:\n")[1]
    named = {line.strip("# ").split(":")[0] for line in commented.splitlines() if line.startswith("  ")}
    assert set(Policy.model_fields) <= named


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"min_cohorts": 3}, "did you mean"),
        ({"optimizer": {"learning_rat": [0, 1]}}, "no number of `train`"),
        ({"optimizer": {"learning_rate": [1, 0.1]}}, "is above"),
        ({"base_sha256": ["abc"]}, "base_sha256"),
        ({"blocks": []}, "blocks"),
        ({"methods": ["fedsgd"]}, "methods"),
    ],
)
def test_a_policy_that_cannot_be_read_is_no_policy(tmp_path: Path, policy, words: str):
    with pytest.raises(ConfigError, match=words):
        site_with(tmp_path, policy)


def test_bounds_that_a_policy_does_not_name_stay(tmp_path: Path):
    assert site_with(tmp_path, {"optimizer": {"learning_rate": [0, 0.5]}}).policy.optimizer == {
        "learning_rate": (0, 0.5),
        "adam_epsilon": (0, 1e-6),
    }


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"data": {"test": ["/etc/passwd"]}}, "data.test"),
        ({"model": {"name_or_path": "/elsewhere"}}, "model.name_or_path"),
        ({"data": {"partition": {"scheme": "by_file"}}}, "data.partition"),
        ({"checkpoint": {"keep": 10**6}}, "checkpoint"),
        ({"report_to": ["wandb"]}, "report_to"),
    ],
)
def test_a_server_that_names_files_or_what_a_site_keeps_is_refused(tmp_path: Path, door: Door, changed, named: str):
    tree = yaml.safe_load(shared())
    for section, value in changed.items():
        tree[section] = {**tree.get(section, {}), **value} if isinstance(value, dict) else value
    error, leave = door.take_part(site_with(tmp_path, OPEN_POLICY), yaml.safe_dump(tree), HASH)
    assert isinstance(error, ConfigError) and named in str(error)
    assert leave.problem == "its configuration does not fit the run"
    for broken in ("a: [", "[]", "model: 1", "7"):
        with pytest.raises(ConfigError, match="the configuration that the server sends"):
            configuration_at(site_with(tmp_path, OPEN_POLICY), broken)


def test_a_check_shows_every_point_that_a_run_would_break(tmp_path: Path):
    site_with(tmp_path, {"secure_aggregation": "required", "min_cohort": 3})
    run = nested({**RUN, "train.num_local_steps": 1, "train.per_device_train_batch_size": 2})

    def crosses(run: dict[str, Any]) -> str:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
        found = check_site(tmp_path / "site.yaml", "127.0.0.1:1", None, tmp_path / "run.yaml")
        return "\n".join(one.found for one in found if "policy" in one.found)

    said = crosses(run)
    assert "`secure_aggregation`" in said and "`min_examples_per_round`" in said and "min_cohort" not in said
    assert crosses(nested({**RUN, **MASKS})) == "the policy allows the run"


def test_a_check_names_a_client_that_the_run_does_not_have(tmp_path: Path):
    for client_id, said in ((7, True), (0, False)):
        site_with(tmp_path, OPEN_POLICY)
        site = yaml.safe_load((tmp_path / "site.yaml").read_text())
        (tmp_path / "site.yaml").write_text(yaml.safe_dump({**site, "client_id": client_id}))
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(nested({**RUN, "federation.num_clients": 2})))
        found = check_site(tmp_path / "site.yaml", "127.0.0.1:1", None, tmp_path / "run.yaml")
        assert any(f"there is no client {client_id} in the run" in one.found for one in found) is said


# ── in a round ───────────────────────────────────────────────────────────────────────────────────────


def guard(folder: Path, policy: dict[str, Any], run: str = "run", **more: Any) -> SitePolicy:
    config = parse_config(nested({**RUN, "federation.num_rounds": 64, **more}))
    return SitePolicy(
        Policy.model_validate({**OPEN_POLICY, **policy}), AuditLog(folder / "audit.jsonl"), run, config
    )


def trained(
    policy: SitePolicy, round_index: int, num_local_steps: int, rows: int = 100, *, tells_loss: bool = True
):
    trainer = GuardedTrainer(ToyTrainer(0, rows), policy, tells_loss=tells_loss)
    return trainer.train(round_index, 0, num_local_steps, 0, initial(4))


def test_a_round_is_refused_whatever_the_configuration_said(tmp_path: Path):
    policy = guard(tmp_path, {"min_examples_per_round": 16, "max_local_steps": 8})
    policy.check_run(HASH)
    assert trained(policy, 0, 2).train_loss == 0.0
    for steps, rows, key in ((1, 100, "min_examples_per_round"), (9, 100, "max_local_steps")):
        with pytest.raises(RoundRefusedError) as caught:
            trained(policy, 1, steps, rows)
        assert str(caught.value) == f"POLICY its policy forbids it: {key}"
    with pytest.raises(RoundRefusedError):
        trained(policy, 1, 8, 15)  # fewer rows than an update needs
    with pytest.raises(PolicyError, match="has 15 rows, not at least 16; not trained on: a"):
        policy.check_rows(15, ["not trained on: a.jsonl, line 1: too long"])
    policy.check_rows(16)
    for beyond in (-1, 64):
        with pytest.raises(PolicyError, match=r"max_rounds.*the run's last round is 64"):
            trained(policy, beyond, 2)
    kinds = Counter(entry.kind for entry in verify(tmp_path / "audit.jsonl").entries)
    assert kinds == {"round": 1, "refusal": 6}


def test_epsilon_is_counted_by_the_site_over_restarts_and_runs(tmp_path: Path):
    """Ten rounds at z = 4 are within the bound, eleven are not: by the accountant on exactly these releases."""
    ten, eleven = (epsilon_of(Counter({4.0: count}), 1e-5) for count in (10, 11))
    bound = {"max_epsilon": (ten + eleven) / 2}
    noise = {"privacy.clip_norm": 1.0, "privacy.noise_multiplier": 4.0}
    short = {**noise, "federation.num_rounds": 6}
    policy = guard(tmp_path, bound, **short)
    policy.check_run(HASH)
    for t in range(6):
        trained(policy, t, 8)
    trained(guard(tmp_path, bound, **short), 5, 8)  # the same round after a restart is the same release
    other = guard(tmp_path, bound, "other", **short)
    with pytest.raises(PolicyError, match="max_epsilon"):
        other.check_run(HASH)  # six more would be twelve
    for t in range(4):
        trained(other, t, 8)
    with pytest.raises(PolicyError, match="max_epsilon"):
        trained(other, 4, 8)
    elsewhere = tmp_path / "elsewhere"  # the control: without the memory, the same run may take place
    guard(elsewhere, bound, "other", **short).check_run(HASH)


@pytest.mark.parametrize("mine", [0, 3])
def test_rounds_beyond_all_measure_are_counted_and_not_listed(tmp_path: Path, mine: int):
    """The number is the server's: a list of so many rounds would take a site's memory."""
    noise = {"privacy.clip_norm": 1.0, "privacy.noise_multiplier": 4.0, "federation.num_rounds": 1 << 20}
    policy = guard(tmp_path, {"max_epsilon": 1e3}, **noise)
    for t in range(mine):
        trained(policy, t, 8)
    whole = epsilon_of(Counter({4.0: 1 << 20}), 1e-5)
    tracemalloc.start()
    (found,) = policy.found_in_run(HASH)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert f"{whole:.4g} after its last round" in found.words
    assert peak < 8 << 20


def test_noise_of_a_site_counts_half_and_none_counts_as_no_bound(tmp_path: Path):
    noise = {"privacy.clip_norm": 1.0, "privacy.noise_multiplier": 4.0, "federation.num_rounds": 4}
    bound = {"max_epsilon": epsilon_of(Counter({4.0: 4}), 1e-5) * 1.001}
    guard(tmp_path, bound, **noise).check_run(HASH)
    with pytest.raises(PolicyError, match="max_epsilon"):
        guard(tmp_path, bound, **noise, **{"privacy.mode": "local"}).check_run(HASH)
    assert epsilon_of(Counter({0.0: 1}), 1e-5) == float("inf")
    assert epsilon_of(Counter(), 1e-5) == 0.0


def test_noise_of_all_counts_as_the_servers_and_the_part_of_a_site_alone_where_it_trusts_itself_alone(
    tmp_path: Path,
):
    """Of six clients four are the fewest in a sum, so that each adds a noise of z / 2."""
    rounds = {"federation.num_rounds": 4}
    whole, half = (epsilon_of(Counter({noise: 4}), 1e-5) for noise in (2.0, 1.0 / LOCAL_DISTANCE))
    guard(tmp_path, {"max_epsilon": 1.001 * whole, "min_noise_multiplier": 2.0}, **TOGETHER, **rounds).check_run(
        HASH
    )
    with pytest.raises(PolicyError, match="max_epsilon"):
        guard(tmp_path, {"max_epsilon": 0.999 * whole}, **TOGETHER, **rounds).check_run(HASH)
    own = {"noise": "own", "min_noise_multiplier": 1.0}
    guard(tmp_path, {**own, "max_epsilon": 1.001 * half}, **TOGETHER, **rounds).check_run(HASH)
    with pytest.raises(PolicyError, match="max_epsilon"):
        guard(tmp_path, {**own, "max_epsilon": 0.999 * half}, **TOGETHER, **rounds).check_run(HASH)
    with pytest.raises(PolicyError, match=r"this site's part of the noise is 1, not 1\.1"):
        guard(tmp_path, {**own, "min_noise_multiplier": 1.1}, **TOGETHER, **rounds).check_run(HASH)


def test_a_damaged_log_lets_nothing_be_trained(tmp_path: Path):
    policy = guard(tmp_path, {})
    trained(policy, 0, 8)
    trained(policy, 1, 8)
    log = tmp_path / "audit.jsonl"
    first, second = log.read_text().splitlines()
    log.write_text(first.replace('"round":0', '"round":7') + f"\n{second}\n")
    with pytest.raises(ParaBlockError, match="line 1"):
        guard(tmp_path, {})


def test_figures_that_may_not_leave_do_not(tmp_path: Path):
    assert trained(guard(tmp_path, {}), 0, 8, tells_loss=False).train_loss is None


def test_the_others_run_goes_on_without_a_site_that_refuses_rounds(tmp_path: Path):
    """Site 1 refuses the rounds with 3 steps, which are all; site 2 does not tell its loss."""
    counted: list[dict[int, float | None]] = []

    def make_trainer(client_id: int, examples: int, step_time_s: None) -> GuardedTrainer:
        policy = {"max_local_steps": 2} if client_id == 1 else {}
        trainer = ToyTrainer(client_id, examples, step_time_s)
        return GuardedTrainer(trainer, guard(tmp_path / f"{client_id}", policy), tells_loss=client_id != 2)

    def on_commit(_, updates, __) -> None:
        counted.append({update.client_id: update.train_loss for update in updates})

    plan = server_plan(3, 4, 1, Differences(Encoding("float32")), local_steps=FixedSteps(3))
    town = Town(tmp_path, plan, [3, 1, 2], make_trainer=make_trainer)
    said: list[str] = []
    assert town.run(Hooks(on_commit, lambda _: None, on_event=said.append)).finished
    assert counted == [{0: 0.0, 2: None}] * 4
    assert "round 1 goes on without client 1: POLICY its policy forbids it: max_local_steps" in said
    words = [json.dumps(entry.facts) for entry in verify(tmp_path / "1" / "audit.jsonl").entries]
    assert len(words) == 4 and all("has 3 local steps, not at most 2" in word for word in words)
