"""What a run will take, told before it: bytes, time, memory, and which settings to change.

The outline of the model gives the blocks; `flops` and `compute` tell how long they train, `traffic` walks
through the rounds and counts bytes, `timing` puts both on a clock, `memory` adds up a client. `forecast`
joins them, `advice` recommends, `view` prints.
"""
