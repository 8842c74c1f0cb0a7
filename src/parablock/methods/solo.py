"""Local training of a client that keeps its model to itself: `local`, and `central` with all data in one client.

It serves the same rounds as any other client; what it sends is an update of no elements, so its traffic is
the headers of the messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from parablock.methods.base import MethodModel, RunInputs
from parablock.training.trainer import Trained, Trainer


class SoloTrainer:
    """Trains on from its own model, which nobody else changes.

    Args:
        trainer: The local training of one block, all parameters.
        start: The base model: that block's flat vector.
    """

    def __init__(self, trainer: Trainer, start: tuple[Tensor, ...]) -> None:
        self._trainer, self.own = trainer, start
        self.num_examples, self.step_time_s = trainer.num_examples, trainer.step_time_s

    def train(
        self,
        round_index: int,
        block_index: int,
        num_local_steps: int,
        steps_before: int,
        working: tuple[Tensor, ...],
    ) -> Trained:
        """Take the local steps of a round on the own model; return a block of no elements."""
        result = self._trainer.train(round_index, block_index, num_local_steps, steps_before, self.own)
        self.own = (result.trained[:].to(self.own[0].dtype),)
        return Trained(working[0].float(), result.train_loss)

    def memory(self) -> dict[str, Tensor]:
        """Give the own model, and what the local training keeps."""
        return {"own": self.own[0], **self._trainer.memory()}

    def remember(self, memory: dict[str, Tensor]) -> None:
        """Take both back."""
        self.own = (memory["own"],)
        self._trainer.remember({name: value for name, value in memory.items() if name != "own"})


class SoloModels(MethodModel):
    """Clients that tell the server nothing: each has a model of its own, and scores are their mean.

    What is exported is that model where there is one client (`central`); else a folder holds one for each,
    `client_0` and so on, and the hash is that of their hashes.
    """

    def __init__(self, job: RunInputs) -> None:
        super().__init__(job)
        self._apart = [SoloTrainer(trainer, self.params) for trainer in self.trainers]
        self.trainers, self.params, self.num_blocks = self._apart, (torch.empty(0),), 1

    def evaluate(self, params: Sequence[Tensor]) -> float:
        """Score every client's model as of the last commit, and give the mean."""
        del params  # nothing is in them
        return fmean(super(SoloModels, self).evaluate(client.own) for client in self._apart)

    def finish_model(self, params: Sequence[Tensor]) -> float:
        """Score every client's last model, and return the mean."""
        return self.evaluate(params)

    def export(self, directory: Path) -> str:
        """Write every client's model."""
        if len(self._apart) == 1:
            return super().export(directory)
        digest = hashlib.sha256()
        for client_id, client in enumerate(self._apart):
            self._replica.load_all(client.own)
            digest.update(super().export(directory / f"client_{client_id}").encode())
        return digest.hexdigest()
