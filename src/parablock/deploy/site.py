"""A site's own configuration, and what the server tells it of the run's. Nothing here imports torch.

Paths and secrets stay where they are: the server sends the method, never where its files lie; a site says what
it trains on, and that is not sent at all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from parablock.config.keys import RunConfig
from parablock.config.load import NOT_YAML, parse_config, read_tree, read_yaml, validate
from parablock.config.section import Section
from parablock.deploy.policy import Policy
from parablock.errors import ConfigError
from parablock.storage.audit_log import FILE_NAME

FROM_SERVER = "the configuration that the server sends"
SITE_VARIABLE = "PARABLOCK_SITE"
"""The environment variable that names the site's file where the SuperNode's `--node-config` does not."""


class SiteModel(Section):
    """The base model at this site."""

    name_or_path: str = Field(min_length=1, description="Hugging Face id or a folder.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where local training runs.")


class SiteConfig(Section):
    """What a site says of itself, in its own YAML file."""

    client_id: int = Field(ge=0, description="Which client it is, from 0.")
    state_dir: Path = Field(description="A folder of its own for what has to last.")
    model: SiteModel
    data: dict[str, Any] = Field(description="`data` as in a run's configuration; `train` names this site's files.")
    share: Literal["all", "part"] = Field(
        "all",
        description="Train on all rows, or on this client's part of them when they are split over all clients.",
    )
    num_threads: int | None = Field(
        None, ge=1, description="Torch threads; null: as the server's configuration says."
    )
    lease_s: float = Field(3600.0, gt=0, description="How long the trainer lives without a sign of the server.")
    policy: Policy = Policy()
    lost_ledgers: Mapping[str, Annotated[int, Field(ge=0)]] = Field(
        {}, description="Runs of which this site's ledger is lost: run → the last round that it may have released."
    )

    @property
    def audit_log(self) -> Path:
        """The log of what this site took part in, refused and released."""
        return self.state_dir / FILE_NAME


def load_site(path: Path | str) -> SiteConfig:
    """Read a site's file.

    Raises:
        ConfigError: With every problem.
    """
    path = Path(path).absolute()
    site = validate(SiteConfig, read_tree(path), source=str(path))
    return site.model_copy(update={"state_dir": (path.parent / site.state_dir).resolve()})


def is_simulated(node_config: Mapping[str, Any]) -> bool:
    """Return whether a node is one of Flower's simulation, which stands for no site."""
    return "partition-id" in node_config and "num-partitions" in node_config and not _named_file(node_config)


def site_file(node_config: Mapping[str, Any]) -> Path:
    """Find the file of the site that a SuperNode runs for.

    Raises:
        ConfigError: It names none.
    """
    named = _named_file(node_config)
    if not named:
        problem = (
            "the SuperNode does not say whose it is; start it with "
            f"--node-config 'site=\"/path/site.yaml\"', or set {SITE_VARIABLE}"
        )
        raise ConfigError([problem], source="the SuperNode")
    return Path(named)


def _named_file(node_config: Mapping[str, Any]) -> str:
    return str(node_config.get("site") or os.environ.get(SITE_VARIABLE) or "")


OWN_KEYS = {"model": ("name_or_path", "device"), "data": ("train", "test", "partition")}
OWN_SECTIONS = ("report_to", "evaluation", "checkpoint", "link")
"""What each side keeps to itself."""


def shared_config(config: RunConfig) -> str:
    """Return the configuration that the sites need, as YAML: none of the server's paths, trackers or data."""
    tree = config.model_dump(mode="json")
    for section, keys in OWN_KEYS.items():
        for key in keys:
            tree[section].pop(key)
    for section in OWN_SECTIONS:
        tree.pop(section)
    return yaml.safe_dump(tree, sort_keys=False)


def configuration_at(site: SiteConfig, shared: str) -> RunConfig:
    """Put the server's part and the site's own together.

    Raises:
        ConfigError: With every problem, as one of the site's file; or the server says what it has no say in.
    """
    tree = _read_shared(shared)
    tree["model"] |= site.model.model_dump()
    tree["data"] |= site.data
    if site.num_threads is not None:
        tree["engine"]["num_threads"] = site.num_threads
    return parse_config(tree, source=f"the file of client {site.client_id}, with what the server says,")


def _read_shared(shared: str) -> dict[str, Any]:
    """Read what the server says, in which no file of this site is named."""
    try:
        tree = read_yaml(shared)
    except NOT_YAML as error:
        raise ConfigError([f"it is not YAML: {' '.join(str(error).split()):.200}"], source=FROM_SERVER) from None
    if not isinstance(tree, dict) or not all(
        isinstance(tree.get(section), dict) for section in ("engine", *OWN_KEYS)
    ):
        raise ConfigError(["it lacks sections"], source=FROM_SERVER)
    foreign = [f"{section}.{key}" for section, keys in OWN_KEYS.items() for key in keys if key in tree[section]]
    foreign += [section for section in OWN_SECTIONS if section in tree]
    if foreign:
        raise ConfigError([f"{key}: a site decides that itself" for key in foreign], source=FROM_SERVER)
    return tree
