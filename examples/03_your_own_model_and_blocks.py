"""Your own architecture, and ParaBlock's pieces alone: partition a model, train a block, aggregate."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from parablock.algorithm.aggregate import average
from parablock.algorithm.sequential import OracleProblem, run_sequential
from parablock.data.batches import Batch
from parablock.model.blocks import partition_blocks
from parablock.model.params import Replica
from parablock.training.local import LocalArguments, LocalResult, train_block

TEXTS = (b"the cat sat on the mat. " * 3, b"a dog ran in the park.. " * 3)  # what each of two clients has
ARGUMENTS = LocalArguments(learning_rate=1e-2)


class ConvLM(PreTrainedModel):  # bytes through causal convolutions, in a list called `stages`
    def __init__(self, width: int = 48, depth: int = 4) -> None:
        super().__init__(PreTrainedConfig())
        self.embed_tokens, self.lm_head = nn.Embedding(128, width), nn.Linear(width, 128)
        self.stages = nn.ModuleList(nn.Conv1d(width, width, kernel_size=4) for _ in range(depth))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> CausalLMOutput:
        hidden = self.embed_tokens(input_ids).transpose(1, 2)
        for stage in self.stages:
            hidden = hidden + torch.relu(stage(nn.functional.pad(hidden, (3, 0))))
        return CausalLMOutput(logits=self.lm_head(hidden.transpose(1, 2)))


torch.manual_seed(0)
model = ConvLM()
blocks = partition_blocks(model, layers_per_block=2, layers_path="stages", include_head=True)
replicas = [Replica(copy.deepcopy(model), blocks) for _ in TEXTS]
params = [replicas[0].read(block.index) for block in blocks]
batches = [Batch(ids, torch.ones_like(ids), ids) for ids in (torch.tensor([list(text)]) for text in TEXTS)]


def train(client: int, round_index: int, block: int, working: tuple[Tensor, ...]) -> LocalResult:
    replica, steps, first_step = replicas[client], [[batches[client]]] * 4, 4 * round_index
    replica.load_all(working)
    return train_block(replica, block, working[block], steps, ARGUMENTS, first_step=first_step, total_steps=48)


print("blocks:", ", ".join(f"{block.name} ({block.num_parameters:,})" for block in blocks))
# One round by hand: both clients train block 1, and the server commits the mean of their changes.
results = [train(client, 0, 1, tuple(params)) for client in range(2)]
aggregate = average({i: (result.trained[:] - params[1], len(TEXTS[i])) for i, result in enumerate(results)})
params[1] = params[1] + aggregate.mean_delta
print(f"by hand: losses {results[0].train_loss:.2f}, {results[1].train_loss:.2f}; agreement {aggregate.rho:.2f}")
# The whole method in one thread: eleven more rounds, with one update of each client in flight (delay 1).
outcome = run_sequential(
    params, OracleProblem([1, 1], num_rounds=11, delay=1), lambda *turn: train(*turn).trained[:]
)
results = [train(client, 11, 1, outcome.server.params) for client in range(2)]
print(f"after 12 rounds: losses {results[0].train_loss:.2f}, {results[1].train_loss:.2f}")
