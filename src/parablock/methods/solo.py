"""Local training of a client that keeps its model to itself: `local`, and `central` with all data in one client.

It serves the same rounds as any other client; what it sends is an update of no elements, so its traffic is
the headers of the messages.
"""

from __future__ import annotations

from torch import Tensor

from parablock.engine.client import Trained, Trainer
from parablock.wire.messages import RoundStart


class ApartTrainer:
    """Trains on from its own model, which nobody else changes.

    Args:
        trainer: The local training of one block, all parameters.
        start: The base model: that block's flat vector.
    """

    def __init__(self, trainer: Trainer, start: tuple[Tensor, ...]) -> None:
        self._trainer, self.own = trainer, start
        self.num_examples, self.step_time_s = trainer.num_examples, trainer.step_time_s

    def train(self, start: RoundStart, working: tuple[Tensor, ...]) -> Trained:
        """Take the round's local steps on the own model; give a block of no elements."""
        result = self._trainer.train(start, self.own)
        self.own = (result.trained[:].to(self.own[0].dtype),)
        return Trained(working[0].float(), result.train_loss)

    def memory(self) -> dict[str, Tensor]:
        """Give the own model, and what the local training keeps."""
        return {"own": self.own[0], **self._trainer.memory()}

    def remember(self, memory: dict[str, Tensor]) -> None:
        """Take both back."""
        self.own = (memory["own"],)
        self._trainer.remember({name: value for name, value in memory.items() if name != "own"})
