"""A site's store writes what has changed and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from parablock.algorithm.parablock import ClientState, Commit, commit, initial_client
from parablock.storage.checkpoint import ClientSnapshot
from parablock.storage.site_store import SiteStore


def test_a_round_writes_the_block_that_has_changed_and_no_other(tmp_path: Path):
    def files_after(t: int, state: ClientState) -> dict[str, int]:
        store.save_latest("s", t, state, replace(snapshot, versions=state.versions))
        return {path.name: path.stat().st_ino for path in tmp_path.glob("block-*")}

    def after(t: int, block_index: int, state: ClientState) -> ClientState:
        return commit(state, [Commit(block_index, t, torch.full((3,), float(t)), 1.0)], t)

    store, state = SiteStore(tmp_path), initial_client([torch.zeros(3), torch.zeros(3)])
    snapshot = ClientSnapshot(0, state.versions, state.rho, {})
    assert files_after(0, state) == {}, "the base model is at hand anyway"
    first = files_after(1, state := after(0, 0, state))
    second = files_after(2, state := after(1, 1, state))
    assert first.keys() == {"block-000-s-000001"}
    assert second.keys() == {"block-000-s-000001", "block-001-s-000002"}
    assert second["block-000-s-000001"] == first["block-000-s-000001"]
    third = files_after(3, state := after(2, 0, state))
    assert third.keys() == {"block-000-s-000003", "block-001-s-000002"}
    stored, _ = store.newest({"s": 9})
    assert stored is not None and {b: float(value[0]) for b, value in stored.blocks.items()} == {0: 2.0, 1: 1.0}
