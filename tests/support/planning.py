"""What tests of plans and of their parts start from."""

from __future__ import annotations

from typing import Any

import torch

from parablock.config.keys import RunConfig
from parablock.config.load import load_config, parse_config
from parablock.data.batches import Batch
from parablock.model.loss import sum_loss
from parablock.plan.forecast import Plan, make_plan
from tiny_runs import Workshop


def config_of(**sections: Any) -> RunConfig:
    return parse_config({"model": {"name_or_path": "m"}, "data": {"train": ["a.jsonl"]}} | sections)


def plan_of(workshop: Workshop, *overrides: str) -> Plan:
    return make_plan(load_config(workshop.config, overrides))


def batch(num_examples: int = 3, length: int = 16) -> Batch:
    """The first half of each row is a prompt without labels."""
    ids = torch.randint(2, 100, (num_examples, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return Batch(ids, torch.ones_like(ids), labels)


def loss_of(model: Any, given: Batch) -> torch.Tensor:
    return sum_loss(
        model, input_ids_BT=given.input_ids_BT, attention_mask_BT=given.attention_mask_BT, labels_BT=given.labels_BT
    )
