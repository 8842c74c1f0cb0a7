"""Flower's stock FedAvg on the material of a run, in one process and in simulated time.

What federates is Flower's: array records of every tensor, its weighted mean of the replies, all clients in every
round. What trains and scores is ParaBlock's, so that a comparison differs in the federation alone. A round takes
the download, the local steps and the upload one after the other, at the link's speed, without whatever Flower's own
messages and polling add.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from parablock.config.keys import RunConfig
from parablock.experiment.inputs import read_inputs
from parablock.methods.base import RunInputs
from parablock.methods.choose import make_method_model
from parablock.wire.transport import Link

Point = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What the strategy reads of a client's message."""

    content: RecordDict

    def has_error(self) -> bool:
        return False


def run_fedavg(config: RunConfig) -> tuple[float, list[Point]]:
    """Run the rounds of a configuration whose method sends everything that it trains.

    Returns:
        The loss before, and for each round the seconds and bytes so far and the loss after it.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    job = read_inputs(config)
    fleet, strategy, link = make_method_model(job), FedAvg(), Link(**config.link.model_dump())
    (flat,) = fleet.params
    before = fleet.evaluate((flat,))
    arrays, seconds, moved, points = to_arrays(flat, job), 0.0, 0, []
    steps, step_s = config.train.num_local_steps, config.engine.step_time_s
    assert isinstance(steps, int) and step_s is not None
    for t in range(config.federation.num_rounds):
        replies = []
        for trainer in fleet.trainers:
            trained = trainer.train(t, 0, steps, t * steps, (to_flat(arrays),)).trained[:]
            metrics = MetricRecord({"num-examples": trainer.num_examples})
            replies.append(Reply(RecordDict({"arrays": to_arrays(trained, job), "metrics": metrics})))
        one_way = arrays.count_bytes()
        arrays, _ = strategy.aggregate_train(t + 1, replies)  # type: ignore[arg-type]
        seconds += link.download_s(one_way) + steps * step_s + link.upload_s(one_way)
        moved += 2 * one_way * len(replies)
        points.append(
            {"round": t + 1, "seconds": seconds, "bytes": moved, "loss": fleet.evaluate((to_flat(arrays),))}
        )
    return before, points


def to_arrays(flat: Tensor, job: RunInputs) -> ArrayRecord:
    """Make Flower's record of what a method trains, tensor by tensor."""
    (block,) = job.blocks
    parameters = [job.loaded.model.get_parameter(name) for name in block.parameter_names]
    pieces = torch.split(flat, [parameter.numel() for parameter in parameters])
    return ArrayRecord(
        {
            name: Array(piece.view(parameter.shape).numpy())
            for name, piece, parameter in zip(block.parameter_names, pieces, parameters, strict=True)
        }
    )


def to_flat(arrays: ArrayRecord) -> Tensor:
    return torch.cat([torch.from_numpy(array.numpy()).reshape(-1) for array in arrays.values()])
