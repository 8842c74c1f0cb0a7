"""Local training of a client, its time and its memory.

trainer     the protocol `Trainer`, and training on the client's own examples
local       K local steps on one block
block_optimizer  AdamW or Muon on the parameters of one block
flops       operations of a local step
step_time   seconds of a local step, stated or estimated for an ordinary device
memory      memory of a client, and of a process with all clients
"""
