"""The next-token loss at the labels, for training and evaluation alike.

Shapes: B examples, T positions, N positions that predict a label token, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

IGNORED = -100
"""The label of a token that has no part in the loss."""


def num_label_tokens(labels_BT: Tensor) -> int:
    """Count the label tokens that some position predicts; nothing predicts the first token of a row."""
    return int((labels_BT[:, 1:] != IGNORED).sum())


def summed_loss(
    model: PreTrainedModel, *, input_ids_BT: Tensor, attention_mask_BT: Tensor, labels_BT: Tensor
) -> Tensor:
    """Sum the next-token cross-entropy over the label tokens of a batch, in fp32.

    Logits are made only where a label token is predicted: the hidden states of the other positions are
    left out on their way into the head.

    Args:
        model: A causal language model.
        input_ids_BT: Tokens, on any device.
        attention_mask_BT: 0 where there is padding.
        labels_BT: The tokens again, `IGNORED` where they have no part in the loss.

    Returns:
        The sum in nats, a scalar; divided by `num_label_tokens` it is Hugging Face's loss.
    """
    next_BT = pad(labels_BT[:, 1:], (0, 1), value=IGNORED).to(model.device)
    predicts_BT = next_BT != IGNORED
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
