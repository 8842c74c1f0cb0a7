"""The model of a method: the parameters that the server holds, the clients' local training, and the result.

Most methods differ only in their blocks. Adapters are merged into the model before its last evaluation, so that
the written model is a plain checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from parablock.algorithm.aggregate import Kinds
from parablock.config.keys import RunConfig
from parablock.data.prompts import Example, find_stop_token_ids
from parablock.engine.update_form import UpdateForm
from parablock.evaluation.answers import answer_examples, choose_prompts, describe_prompts, most_tokens
from parablock.evaluation.generation import BATCH_SIZE
from parablock.evaluation.scoring import evaluate_loss
from parablock.model.adapters import merge_adapters
from parablock.model.blocks import Block
from parablock.model.params import Replica
from parablock.model.pretrained import LoadedModel
from parablock.model.save import model_sha256, save_model
from parablock.training.memory import FreedMemory
from parablock.training.trainer import LocalTrainer, OnStep, Trainer, local_arguments


@dataclass(frozen=True)
class Watch:
    """Callbacks of a display; any thread calls them.

    Attributes:
        on_step: See `OnStep`.
        on_scored: (number of test examples that are scored, or of tokens that answers have).
    """

    on_step: OnStep = lambda *_: None
    on_scored: Callable[[int], None] = lambda _: None


UNWATCHED = Watch()


class MethodModel:
    """The model as the method trains it, with the local training of the clients.

    Args:
        inputs: The inputs of the run; their model is trained itself.
        clients: The clients to train here; None: all. A single one trains without a copy of the model.
        watch: Is told of local steps and scored examples.

    Attributes:
        params: The server's initial parameters, one flat vector for each block; empty after `take_params`.
        num_blocks: Number of blocks.
        num_scored: Number of test examples.
        trainers: Local training of each client, in order of client_id.
        form: The form of the method's updates; None: the configured one.
        kinds: The kinds of parameters in a round's update that have a ρ of their own: A and B; None: there is one.
    """

    form: UpdateForm | None = None

    def __init__(self, inputs: RunInputs, clients: Sequence[int] | None = None, watch: Watch = UNWATCHED) -> None:
        self._inputs, self._config, self._watch = inputs, inputs.config, watch
        clients = range(len(inputs.train)) if clients is None else clients
        self._replica = Replica(inputs.loaded.model, self.committed_blocks())
        self._freed = FreedMemory()
        pad_token_id = inputs.loaded.tokenizer.pad_token_id
        assert isinstance(pad_token_id, int)
        self._pad_token_id = pad_token_id
        self.params = tuple(self._replica.read(block.index) for block in self._replica.blocks)
        self.num_blocks, self.num_scored = len(self.params), len(inputs.test)
        self.kinds = self._kinds()
        self.trainers: Sequence[Trainer] = [
            self.trainer(client_id, alone=len(clients) == 1) for client_id in clients
        ]

    def take_params(self) -> tuple[Tensor, ...]:
        """Return `params`, and keep none of them: each is needed only until its block is committed."""
        params, self.params = self.params, ()
        return params

    def _kinds(self) -> Kinds | None:
        matrices = max(self._config.federation.traits.matrices, key=len, default=())
        lengths = (parameter.numel() for parameter in self._replica.parameters(0))
        return Kinds(tuple(lengths), len(matrices)) if len(matrices) > 1 else None

    def committed_blocks(self) -> tuple[Block, ...]:
        """Return the blocks that the server commits: by default the trained ones."""
        return self._inputs.blocks

    def trainer(self, client_id: int, *, alone: bool) -> Trainer:
        """Make the local training of one client; `alone` if no other one trains here."""
        model = self._inputs.loaded.model
        replica = self._replica if self._is_shared(alone) else Replica(copy.deepcopy(model), self._inputs.blocks)
        return self._local_trainer(client_id, replica)

    def _is_shared(self, alone: bool) -> bool:
        # under the virtual clock one client computes at a time
        return alone or self._config.engine.clock == "virtual"

    def _local_trainer(self, client_id: int, replica: Replica) -> LocalTrainer:
        config = self._config
        return LocalTrainer(
            client_id,
            self._inputs.train[client_id],
            replica,
            train=config.train,
            arguments=local_arguments(config),
            num_rounds=config.federation.num_rounds,
            seed=config.seed,
            pad_token_id=self._pad_token_id,
            step_time_s=config.engine.step_time_s,
            on_step=self._watch.on_step,
            # under the real clock the next visit, which needs it again, may have begun
            tidy=self._freed.give_back if config.engine.clock == "virtual" else lambda: None,
        )

    def evaluate(self, params: Sequence[Tensor]) -> float:
        """Score the committed parameters on the test examples, in nats per token."""
        self._replica.load_all(params)
        return self._loss()

    def finish_model(self, params: Sequence[Tensor]) -> float:
        """Make the final model, and return its loss; nothing is trained afterwards."""
        self._replica.load_all(params)
        merge_adapters(self._replica.model)
        return self._loss()

    def most_answer_tokens(self) -> int:
        """Return the most tokens, one behind the other, that the batches of answers may have."""
        prompts = self._prompts()
        return most_tokens(self._replica.model, prompts) * -(-len(prompts) // BATCH_SIZE)

    def answer(self) -> list[dict[str, Any]]:
        """Answer a few test prompts with the model that was scored last.

        Returns:
            For each prompt: prompt, reference, answer, and cut_at, where it was cut (tokens); None if it ended.
        """
        tokenizer, examples = self._inputs.loaded.tokenizer, self._prompts()
        if not examples:
            return []
        answers = answer_examples(self._replica.model, tokenizer, examples, self._watch.on_scored)
        described = describe_prompts(examples, tokenizer, self._config.data.format)
        return [
            {**facts, "answer": answer, "cut_at": cut_at}
            for facts, (answer, cut_at) in zip(described, answers, strict=True)
        ]

    def _prompts(self) -> tuple[Example, ...]:
        return choose_prompts(self._inputs.test, self._config.evaluation.num_answers)

    def export(self, directory: Path) -> str:
        """Write the final model, and return its `model_sha256`."""
        model, tokenizer = self._replica.model, self._inputs.loaded.tokenizer
        if model.generation_config is not None:  # plain `generate` stops where training ended a turn
            model.generation_config.eos_token_id = list(find_stop_token_ids(tokenizer))
        save_model(model, tokenizer, directory, kept_files=self._inputs.loaded.kept_files)
        return model_sha256(directory)

    def _loss(self) -> float:
        return evaluate_loss(
            self._replica.model,
            self._inputs.test,
            pad_token_id=self._pad_token_id,
            batch_size=self._config.evaluation.per_device_eval_batch_size,
            on_done=self._watch.on_scored,
        )


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run, read and checked.

    Attributes:
        config: The configuration with the defaults of the machine filled in.
        loaded: The base model and its tokenizer.
        blocks: The blocks that the method trains.
        train: The training examples of each client.
        test: The test examples.
        notes: Texts for the user before the run starts.
        manifest: Hashes and facts that have to be the same on resume, and the environment.
        left_out: Those of the notes that name rows that are not trained on.
    """

    config: RunConfig
    loaded: LoadedModel
    blocks: tuple[Block, ...]
    train: tuple[tuple[Example, ...], ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...]
    manifest: dict[str, Any]
    left_out: tuple[str, ...] = ()
