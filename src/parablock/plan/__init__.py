"""What a run will take, told before it: bytes, time, memory, and which settings to change.

`scenario` has the outline of the model and its blocks; `probe` and the package `estimate` tell how long they train;
`itinerary` walks through the rounds, `traffic` counts their bytes, `timing` puts both on a clock; `memory` adds
up a client. `forecast` joins them to a plan, `advice` recommends, `view` prints.
"""
