"""What a configuration allows in place of its own settings: another method, a delay, another wire format."""

from __future__ import annotations

from parablock.config.keys import RunConfig
from parablock.config.load import parse_config, tree_of_method
from parablock.config.methods import METHODS
from parablock.errors import ConfigError

WIRE_FORMATS = ("float32", "bfloat16", "int8", "int4")
"""Widest first."""
OF_A_FORMAT = ("density", "rounding", "error_feedback", "residual_decay")
"""Keys of `wire` that go with a format."""


def with_method(config: RunConfig, name: str, delay: int) -> RunConfig:
    """Return the configuration with another method and delay, without what the method refuses.

    Raises:
        ConfigError: The other settings do not allow that.
    """
    tree = tree_of_method(config, name, delay)
    for key in METHODS[name].refuses:
        section, _, last = key.partition(".")
        tree.get(section, {}).pop(last, None)
    return parse_config(tree, source=f"method {name}")


def allowed_formats(config: RunConfig) -> tuple[str, ...]:
    """Return the configured wire format and those of `WIRE_FORMATS` that may take its place."""
    return tuple(
        name
        for name in dict.fromkeys((*WIRE_FORMATS, config.wire.format))
        if name == config.wire.format or _allows(config, name)
    )


def _allows(config: RunConfig, wire_format: str) -> bool:
    tree = tree_of_method(config, config.federation.method, config.federation.delay)
    kept = {key: value for key, value in tree.get("wire", {}).items() if key not in OF_A_FORMAT}
    try:
        parse_config(tree | {"wire": kept | {"format": wire_format}})
    except ConfigError:
        return False
    return True
