"""`parablock plan`: predict bytes, time and memory of a run from its configuration, and advise on settings.

- `forecast`: the plan, joined from the files below.
- `scenario`: the configured run, whose link, delay, block size and wire format can be varied.
- `itinerary`: the rounds: which clients are asked, and which blocks they are sent.
- `traffic`: bytes of the messages. `timing`: computation and messages on a clock.
- `probe`: seconds of computation, measured on this machine.
- `memory`: memory of a client. `advice`: settings that hide the exchange. `view`: the plan as tables.
"""
