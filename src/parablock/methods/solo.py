"""`local` and `central`: clients that keep their models; in `central` one client has all data.

Such a client serves the same rounds as any other; its updates have no elements, so it sends headers only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from parablock.methods.base import UNWATCHED, MethodModel, RunInputs, Watch
from parablock.training.trainer import Trained, Trainer


class SoloTrainer:
    """Trains a client's own model.

    Args:
        trainer: The local training of one block, all parameters.
        start: The base model, as that block's flat vector.
    """

    def __init__(self, trainer: Trainer, start: tuple[Tensor, ...]) -> None:
        self._trainer, self.own = trainer, start
        self.num_examples, self.step_time_s = trainer.num_examples, trainer.step_time_s

    def train(
        self, round_index: int, block_index: int, num_local_steps: int, steps_before: int, working: Sequence[Tensor]
    ) -> Trained:
        """Take the local steps of a round on the own model; return a block of no elements."""
        result = self._trainer.train(round_index, block_index, num_local_steps, steps_before, self.own)
        self.own = (result.trained[:].to(self.own[0].dtype),)
        return Trained(working[0].float(), result.train_loss)

    def memory(self) -> dict[str, Tensor]:
        """Return the own model, and the memory of the local training."""
        return {"own": self.own[0], **self._trainer.memory()}

    def remember(self, memory: dict[str, Tensor]) -> None:
        """Restore both."""
        self.own = (memory["own"],)
        self._trainer.remember({name: value for name, value in memory.items() if name != "own"})


class SoloModels(MethodModel):
    """One model for each client, scored by the mean.

    With one client (`central`), its model is exported. Otherwise a folder has a model for each, `client_0` and so
    on, and the hash is that of their hashes.
    """

    def __init__(self, inputs: RunInputs, watch: Watch = UNWATCHED) -> None:
        super().__init__(inputs, watch=watch)
        self._clients = [SoloTrainer(trainer, self.params) for trainer in self.trainers]
        self.trainers, self.params, self.num_blocks = self._clients, (torch.empty(0),), 1

    def evaluate(self, params: Sequence[Tensor]) -> float:
        """Return the mean loss of the clients' models."""
        del params  # they are empty
        return fmean(super(SoloModels, self).evaluate(client.own) for client in self._clients)

    def finish_model(self, params: Sequence[Tensor]) -> float:
        """Return the mean loss of the clients' last models."""
        return self.evaluate(params)

    def answer(self) -> list[dict[str, Any]]:
        """Answer a few test prompts with the model of the first client."""
        self._replica.load_all(self._clients[0].own)
        return super().answer()

    def export(self, directory: Path) -> str:
        """Write every client's model."""
        if len(self._clients) == 1:
            return super().export(directory)
        digest = hashlib.sha256()
        for client_id, client in enumerate(self._clients):
            self._replica.load_all(client.own)
            digest.update(super().export(directory / f"client_{client_id}").encode())
        return digest.hexdigest()
