"""What the method makes of a job: the parameters that travel, every client's local training, and the model.

Most methods differ in what they train and in nothing else. Those that train adapters merge them into the
model before it is scored for the last time and written, so that it is a plain checkpoint; `flora` merges them in
every round. `local` and `central` have no common model: each client keeps its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from parablock.config.keys import RunConfig
from parablock.data.prompts import Example, find_stop_token_ids
from parablock.engine.update_form import UpdateForm
from parablock.evaluation.scoring import evaluate_loss
from parablock.model.adapters import merge_adapters
from parablock.model.blocks import Block
from parablock.model.load import LoadedModel
from parablock.model.params import Replica
from parablock.model.save import model_sha256, save_model
from parablock.training.trainer import LocalTrainer, Trainer, local_arguments


class MethodModel:
    """The model as the method trains it, with the local training of all clients.

    Args:
        job: The run's material; its model becomes the fleet's.
        clients: Whose local training is made; None: everybody's. A single one trains with the model itself.

    Attributes:
        params: What the server starts from, one flat vector for each block; none once they have been taken.
        num_blocks: How many there are.
        trainers: Local training of each client, in order of client_id.
        form: The form of the method's updates; None: differences, in the configured format.
    """

    form: UpdateForm | None = None

    def __init__(self, job: RunInputs, clients: Sequence[int] | None = None) -> None:
        self._job, self._config = job, job.config
        clients = range(len(job.train)) if clients is None else clients
        self._replica = Replica(job.loaded.model, self.committed_blocks())
        pad_token_id = job.loaded.tokenizer.pad_token_id
        assert isinstance(pad_token_id, int)
        self._pad_token_id = pad_token_id
        self.params = tuple(self._replica.read(block.index) for block in self._replica.blocks)
        self.num_blocks = len(self.params)
        self.trainers: Sequence[Trainer] = [
            self.trainer(client_id, alone=len(clients) == 1) for client_id in clients
        ]

    def take_params(self) -> tuple[Tensor, ...]:
        """Give `params`, and keep none of them: each is needed only until its block is committed."""
        params, self.params = self.params, ()
        return params

    def committed_blocks(self) -> tuple[Block, ...]:
        """Give the blocks that the server holds: those that are trained, unless the method commits others."""
        return self._job.blocks

    def trainer(self, client_id: int, *, alone: bool) -> Trainer:
        """Make the local training of one client."""
        model = self._job.loaded.model
        replica = self._replica if self._is_shared(alone) else Replica(copy.deepcopy(model), self._job.blocks)
        return self._local_trainer(client_id, replica)

    def _is_shared(self, alone: bool) -> bool:
        # Under the virtual clock one client computes at a time, so all can train with one model.
        return alone or self._config.engine.clock == "virtual"

    def _local_trainer(self, client_id: int, replica: Replica) -> LocalTrainer:
        config = self._config
        return LocalTrainer(
            client_id,
            self._job.train[client_id],
            replica,
            train=config.train,
            arguments=local_arguments(config),
            num_rounds=config.federation.num_rounds,
            seed=config.seed,
            pad_token_id=self._pad_token_id,
            step_time_s=config.engine.step_time_s,
        )

    def evaluate(self, params: Sequence[Tensor]) -> float:
        """Score the committed parameters on the test examples, in nats per token."""
        self._replica.load_all(params)
        return self._loss()

    def finish_model(self, params: Sequence[Tensor]) -> float:
        """Make the model that will be written, and return its loss; nothing is trained afterwards."""
        self._replica.load_all(params)
        merge_adapters(self._replica.model)
        return self._loss()

    def export(self, directory: Path) -> str:
        """Write the finished model, and return its `model_sha256`."""
        model, tokenizer = self._replica.model, self._job.loaded.tokenizer
        if model.generation_config is not None:  # plain `generate` stops where training ended a turn
            model.generation_config.eos_token_id = list(find_stop_token_ids(tokenizer))
        save_model(model, tokenizer, directory)
        return model_sha256(directory)

    def _loss(self) -> float:
        return evaluate_loss(
            self._replica.model,
            self._job.test,
            pad_token_id=self._pad_token_id,
            batch_size=self._config.evaluation.per_device_eval_batch_size,
        )


@dataclass(frozen=True)
class RunInputs:
    """A configuration with everything that it names, read and checked; nothing has been written.

    Attributes:
        config: Resolved: nothing is left to a default of the machine.
        loaded: The base model and its tokenizer.
        blocks: Its partition.
        train: The examples of each client.
        test: The examples that the model is scored on.
        notes: What a user should read before the run starts.
        manifest: What has to be the same when the run is resumed, and where it ran.
    """

    config: RunConfig
    loaded: LoadedModel
    blocks: tuple[Block, ...]
    train: tuple[tuple[Example, ...], ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...]
    manifest: dict[str, Any]
