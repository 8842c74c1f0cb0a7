"""How long a client computes, told before it does: operations of a step, an ordinary device, blocks that fit."""
