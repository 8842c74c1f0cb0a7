"""The next-token loss of a causal language model on the labelled tokens.

Shapes: B examples, T positions, D hidden size, N positions that predict a labelled token, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from parablock.data.prompts import IGNORED_LABEL


def count_label_tokens(labels_BT: Tensor) -> int:
    """Count the labelled tokens; the first token of a row is never predicted and does not count."""
    return int((labels_BT[:, 1:] != IGNORED_LABEL).sum())


def sum_loss(
    model: PreTrainedModel, *, input_ids_BT: Tensor, attention_mask_BT: Tensor, labels_BT: Tensor
) -> Tensor:
    """Sum the next-token cross-entropy over the labelled tokens of a batch, in fp32.

    Only the hidden states that predict a labelled token enter the head, so no other logits are computed.

    The arguments are as in `Batch`, on any device. The sum is in nats, a scalar; divided by `count_label_tokens` it
    is Hugging Face's loss.
    """
    next_BT = pad(labels_BT[:, 1:], (0, 1), value=IGNORED_LABEL).to(model.device)
    predicts_BT = next_BT != IGNORED_LABEL
    selected = False

    def select(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal selected
        selected = True
        hidden_BTD, *rest = inputs
        return (hidden_BTD[predicts_BT].unsqueeze(0), *rest)

    head = model.get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(select)
    try:
        logits = model(
            input_ids=input_ids_BT.to(model.device),
            attention_mask=attention_mask_BT.to(model.device),
            use_cache=False,
        ).logits
    finally:
        if hook is not None:
            hook.remove()
    logits_NV = logits.squeeze(0) if selected else logits[predicts_BT]
    return cross_entropy(logits_NV.float(), next_BT[predicts_BT], reduction="sum")
