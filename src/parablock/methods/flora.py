"""FLoRA: local training of new adapters in every round, and the model to which their product is added."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from parablock.algorithm.stacking import Factors
from parablock.config.keys import RunConfig
from parablock.engine.update_form import StackedAdapters
from parablock.methods.base import UNWATCHED, MethodModel, RunInputs, Watch
from parablock.model.adapters import adapted_layers, draw_adapters, matrices_block
from parablock.model.blocks import Block
from parablock.model.params import Replica
from parablock.training.trainer import LocalTrainer, Trained, Trainer


def factors_of(model: PreTrainedModel, config: RunConfig) -> Factors:
    """Return the shapes and the scale of a model's adapters."""
    layers = [layer for _, layer in adapted_layers(model)]
    return Factors(
        shapes=tuple((layer.out_features, layer.in_features) for layer in layers),
        transposed=tuple(isinstance(layer.get_base_layer(), Conv1D) for layer in layers),
        rank=config.lora.rank,
        scale=config.lora.alpha / config.lora.rank,
    )


class FloraTrainer:
    """Trains new adapters in each round.

    Args:
        client_id: The client.
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

    def train(
        self, round_index: int, block_index: int, num_local_steps: int, steps_before: int, working: Sequence[Tensor]
    ) -> Trained:
        """Draw adapters, and take the local steps of a round on them."""
        self._matrices.load_all(working)
        fresh = draw_adapters(
            self._adapters.model, seed=self._seed, round_index=round_index, client_id=self._client_id
        )
        return self._trainer.train(round_index, block_index, num_local_steps, steps_before, (fresh,))

    def memory(self) -> dict[str, Tensor]:
        """Return nothing: adapters do not outlive a round."""
        return {}

    def remember(self, memory: dict[str, Tensor]) -> None:
        """Restore nothing."""
        assert not memory


class FloraModel(MethodModel):
    """A model whose matrices the server commits, and whose adapters are zero outside training."""

    def __init__(self, inputs: RunInputs, clients: Sequence[int] | None = None, watch: Watch = UNWATCHED) -> None:
        self._adapters = Replica(inputs.loaded.model, inputs.blocks)
        self.form = StackedAdapters(factors_of(inputs.loaded.model, inputs.config))
        super().__init__(inputs, clients, watch)

    def committed_blocks(self) -> tuple[Block, ...]:
        """Return one block of all matrices with adapters."""
        return (matrices_block(self._inputs.loaded.model, layers_path=self._config.blocks.layers_path),)

    def trainer(self, client_id: int, *, alone: bool) -> Trainer:
        """Make the local training of one client."""
        matrices, adapters = self._replica, self._adapters
        if not self._is_shared(alone):
            model = copy.deepcopy(self._inputs.loaded.model)
            matrices, adapters = Replica(model, self._replica.blocks), Replica(model, self._inputs.blocks)
        return FloraTrainer(
            client_id, self._local_trainer(client_id, adapters), matrices, adapters, seed=self._config.seed
        )

    def evaluate(self, params: Sequence[Tensor]) -> float:
        """Score the committed matrices, without adapters."""
        self._without_adapters()
        return super().evaluate(params)

    def finish_model(self, params: Sequence[Tensor]) -> float:
        """Make the final model, without adapters, and return its loss."""
        self._without_adapters()
        return super().finish_model(params)

    def _without_adapters(self) -> None:
        self._adapters.load(0, torch.zeros_like(self._adapters.read(0)))
