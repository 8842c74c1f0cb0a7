"""FLoRA's adapters in a model, and the local training of a client that has new ones in every round."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from parablock.algorithm.stacking import Factors
from parablock.config.load import RunConfig
from parablock.engine.client import Trained
from parablock.model.adapters import adapted_layers, fresh_adapters
from parablock.model.params import Replica
from parablock.training.trainer import LocalTrainer
from parablock.wire.messages import RoundStart


def factors_of(model: PreTrainedModel, config: RunConfig) -> Factors:
    """Read the adapters of a model off."""
    layers = [layer for _, layer in adapted_layers(model)]
    return Factors(
        shapes=tuple((layer.out_features, layer.in_features) for layer in layers),
        transposed=tuple(isinstance(layer.get_base_layer(), Conv1D) for layer in layers),
        rank=config.lora.rank,
        scale=config.lora.alpha / config.lora.rank,
    )


class StackedTrainer:
    """Trains adapters on the matrices as they are now.

    Args:
        client_id: Whose adapters are drawn.
        trainer: The local training of the adapters, one block.
        matrices: The part of the model that the server commits.
        adapters: The part of the same model that is trained.
        seed: The run's seed.
    """

    def __init__(
        self, client_id: int, trainer: LocalTrainer, matrices: Replica, adapters: Replica, *, seed: int
    ) -> None:
        self._client_id, self._trainer, self._seed = client_id, trainer, seed
        self._matrices, self._adapters = matrices, adapters
        self.num_examples, self.step_time_s = trainer.num_examples, trainer.step_time_s

    def train(self, start: RoundStart, working: tuple[Tensor, ...]) -> Trained:
        """Take the round's local steps on new adapters; give these."""
        self._matrices.load_all(working)
        fresh = fresh_adapters(
            self._adapters.model, seed=self._seed, round_index=start.round_index, client_id=self._client_id
        )
        return self._trainer.train(start, (fresh,))

    def memory(self) -> dict[str, Tensor]:
        """Nothing outlives a round."""
        return {}

    def remember(self, memory: dict[str, Tensor]) -> None:
        """Nothing to take back."""
        assert not memory
