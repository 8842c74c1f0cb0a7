"""Everything that a run would need of a site, looked at before the site joins."""

from __future__ import annotations

import fcntl
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from parablock.config.keys import RunConfig
from parablock.config.load import load_server_config, parse_config
from parablock.data.sources import Row
from parablock.deploy.certificates import load_credentials
from parablock.deploy.door import diagnose, host_and_port, server_of
from parablock.deploy.site import SiteConfig, configuration_at, load_site, shared_config
from parablock.deploy.status import WARN_DAYS
from parablock.engine.remote.frames import Opening, Reception, utc_s
from parablock.engine.remote.site_channel import Refused, SiteCaller
from parablock.errors import ParaBlockError
from parablock.printable import counted
from parablock.report.units import format_bytes
from parablock.storage.audit_log import AuditLog
from parablock.storage.release_ledger import ReleaseLedger

MOST_SKEW_S = 30.0
"""How far the clocks of a site and the server may be apart; certificates and records depend on them."""
SNAPSHOTS = 3
"""How many states of about the model's size a site keeps, with the one that is being written."""
REMEDY = "Ask the server's operator whether it runs; look at the name, the port and the firewall of this site."


@dataclass(frozen=True)
class Checked:
    """One thing that was looked at: whether it is as it should be, what was found, and what to do."""

    is_good: bool
    found: str
    remedy: str = ""


def check_site(path: Path, address: str, keys: Path | None, run: Path | None = None) -> Iterator[Checked]:
    """Look at everything that a run would need of a site, and yield what is found, one after another.

    The run is the server's present one, or the one of a server's `run` file.

    Raises:
        ConfigError: The address is none, or the file of the run is wrong.
    """
    shared = None
    if run is not None:
        shared = shared_config(load_server_config(run))
    host_and_port(address)
    try:
        site = load_site(path)
    except ParaBlockError as error:
        yield _problem(error)
        return
    yield Checked(True, f"{path} is the file of client {site.client_id}")
    yield _check_keys(site, keys)
    welcome = None
    for one in _ask(site, address, keys):
        if isinstance(one, Checked):
            yield one
        else:
            welcome = one
    opening = None if welcome is None or welcome.is_over else welcome.opening
    yield from _check_material(site, opening, opening.config if opening and not shared else shared)


def _problem(error: ParaBlockError) -> Checked:
    return Checked(False, error.what, " ".join(words for words in (error.cause, error.remedy) if words))


def _check_keys(site: SiteConfig, keys: Path | None) -> Checked:
    if keys is None:
        return Checked(True, "no keys, as --insecure says: the server has to be on this machine")
    try:
        credentials = load_credentials(keys)
        client_id = credentials.client_id
    except ParaBlockError as error:
        return _problem(error)
    if client_id != site.client_id:
        return Checked(
            False,
            f"the certificate in {keys} is that of {credentials.name}, the file that of client {site.client_id}",
            "Give the keys of this site, or mend `client_id`.",
        )
    soon = "; renew it: parablock deploy keys renew" if credentials.days_left <= WARN_DAYS else ""
    return Checked(True, f"the certificate of {credentials.name} is valid for {credentials.days_left} days{soon}")


def _reach(host: str, port: int, keys: Path | None) -> Checked:
    """Look whether a server can be reached, without a call."""
    if keys is not None:
        problem = diagnose(host, port, load_credentials(keys))
        return Checked(False, problem, REMEDY) if problem else _reached(host, port, keys)
    try:
        with closing(socket.create_connection((host, port), timeout=5)):
            return _reached(host, port, keys)
    except OSError as error:
        return Checked(False, f"{host}:{port} cannot be reached: {error.strerror or error}", REMEDY)


def _reached(host: str, port: int, keys: Path | None) -> Checked:
    return Checked(True, f"{host}:{port} can be reached" + (", and its certificate is right" if keys else ""))


def _ask(site: SiteConfig, address: str, keys: Path | None) -> Iterator[Checked | Reception]:
    """Ask the server which run there is; a site that is connected would be cut by the question.

    The way is looked at by itself only where there is no answer: a server tells its operator of those who connect
    and make no call.
    """
    host, port = host_and_port(address)
    try:
        if keys is not None:
            load_credentials(keys)
    except ParaBlockError:  # which has been told
        yield Checked(False, f"{host}:{port} is not asked: without keys it does not answer")
        return
    if process := process_of(site):
        yield _reach(host, port, keys)
        yield Checked(True, f"process {process} serves this site already, so the server is not asked")
        return
    caller = SiteCaller(site.client_id, server_of(address, keys, lambda _: None), lambda _: None)
    before_s = utc_s()
    try:
        welcome = caller.ask()
    except Refused as refusal:
        yield _reached(host, port, keys)
        yield _problem(refusal)
        return
    except ConnectionError as problem:
        reached = _reach(host, port, keys)
        yield reached
        if reached.is_good:
            yield Checked(False, f"the server has no answer for this site: {problem}", "Try again in a minute.")
        return
    yield _reached(host, port, keys)
    skew_s = (before_s + utc_s()) / 2 - welcome.now_s
    run = "no run" if welcome.opening is None or welcome.is_over else f"run {welcome.opening.run}"
    yield Checked(True, f"the server lets this site in, and has {run} for it")
    direction = "ahead of" if skew_s > 0 else "behind"
    yield Checked(
        abs(skew_s) <= MOST_SKEW_S,
        f"this clock is {abs(skew_s):.1f} s {direction} the server's",
        "" if abs(skew_s) <= MOST_SKEW_S else "Compare both clocks (date -u), and set the wrong one right.",
    )
    yield welcome


def process_of(site: SiteConfig) -> str:
    """Return the number of the process that serves a site; empty if none does."""
    path = site.state_dir / "pid"
    if not path.exists():
        return ""
    with path.open(encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "another"
    return ""


def _check_material(site: SiteConfig, opening: Opening | None, shared: str | None) -> Iterator[Checked]:
    """Look at the policy, rows and model as the run would; without a run, with the defaults of a configuration."""
    from parablock.experiment.inputs import load_base, read_rows
    from parablock.model.save import different_parts

    try:
        config = configuration_at(site, shared) if shared else _alone(site)
    except ParaBlockError as error:
        yield _problem(error)
        return
    if shared:
        yield from _check_policy(site, config, opening if opening and opening.config == shared else None)
    own: Sequence[Row] = ()
    try:
        everybody = config.federation.num_clients
        if site.client_id >= everybody:
            found = f"there is no client {site.client_id} in the run: its clients are 0 to {everybody - 1}"
            yield Checked(
                False, found, "Change `client_id` in this site's file, or `federation.num_clients` of the run."
            )
            return
        all_of = site.client_id if site.share == "all" else None
        parts, _, _ = read_rows(config.data, num_clients=everybody, seed=config.seed, all_rows_of=all_of)
        own = parts[site.client_id]
        remedy = "" if own else "Give its files in `data.train` of its own file."
        yield Checked(
            bool(own),
            f"{counted(len(own), 'row')} to train on, in {counted(len(config.data.train), 'file')}",
            remedy,
        )
    except ParaBlockError as error:
        yield _problem(error)
    try:
        base = load_base(config.model, seed=config.seed)
    except ParaBlockError as error:
        yield _problem(error)
        return
    name = f"{config.model.name_or_path}, {base.num_parameters:,} parameters, hash {base.sha256[:12]}"
    if opening is None:
        yield Checked(True, f"{name}; compare it with `base_sha256` in manifest.json of the server's run")
    elif base.sha256 == opening.base_sha256:
        yield Checked(True, f"{name}, as at the server")
    else:
        words = f"{name}, and is not the server's: {different_parts(base.parts, opening.base_parts)}"
        yield Checked(False, words, "Copy the server's model folder to this site.")
    if own:
        yield _check_learnt(site, config, own, base.loaded.tokenizer)
    yield _check_disk(site, SNAPSHOTS * sum(p.numel() * p.element_size() for p in base.loaded.model.parameters()))


def _check_policy(site: SiteConfig, config: RunConfig, opening: Opening | None) -> Iterator[Checked]:
    """Yield every point of the site's policy that the run would break, and whether its ledger is whole."""
    from parablock.deploy.guarded_trainer import SitePolicy, check_ledger

    try:
        run, base_sha256 = (opening.run, opening.base_sha256) if opening else ("", None)
        log, lost_through = AuditLog(site.audit_log), site.lost_ledgers.get(run, -1)
        if opening is not None:
            check_ledger(ReleaseLedger(log, run, lost_through=lost_through), opening)
        guard = SitePolicy(site.policy, log, run, config, lost_through=lost_through)
        found = guard.found_in_run(base_sha256)
    except ParaBlockError as error:
        yield _problem(error)
        return
    for breach in found:
        remedy = "Agree on another run with the server's operator; or change the site's file."
        yield Checked(False, f"the policy forbids the run by `{breach.key}`: {breach.words}", remedy)
    if not found:
        yield Checked(True, "the policy allows the run")


def _check_learnt(site: SiteConfig, config: RunConfig, rows: Sequence[Row], tokenizer: Any) -> Checked:
    """Count the rows that can be learnt, of which the policy may ask for some."""
    from parablock.experiment.data_notes import describe_skipped, settle_template
    from parablock.experiment.inputs import tokenize

    try:
        day, _ = settle_template(tokenizer, rows, config.data.format, config.data.date)
        data = config.data.model_copy(update={"date": day})
        tokenized = tokenize(rows, tokenizer, data, config.train)
    except ParaBlockError as error:
        return _problem(error)
    found, least = len(tokenized.examples), max(1, site.policy.min_examples_per_round)
    why = "".join(f"; {line}" for line in describe_skipped([tokenized])[:1])
    words = f"{found} of {counted(len(rows), 'row')} can be learnt with data.max_length {data.max_length}{why}"
    if found >= least:
        return Checked(True, words)
    remedy = (
        f"The policy's min_examples_per_round is {least}: agree on a longer data.max_length, or on another number."
    )
    return Checked(False, words, remedy)


def _alone(site: SiteConfig) -> RunConfig:
    tree = {
        "model": site.model.model_dump(),
        "data": site.data,
        "federation": {"num_clients": site.client_id + 1},
        "blocks": {"allow_unvisited": True},
    }
    return parse_config(tree, source=f"the file of client {site.client_id}")


def _check_disk(site: SiteConfig, needed: int) -> Checked:
    folder = site.state_dir
    while not folder.exists():
        folder = folder.parent
    free = psutil.disk_usage(str(folder)).free
    found = f"{format_bytes(free)} free for {site.state_dir}, of which a run takes {format_bytes(needed)}"
    return Checked(free > needed, found, "" if free > needed else "Free some space, or give another `state_dir`.")
