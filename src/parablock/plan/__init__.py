"""`parablock plan`: predict bytes, time and memory of a run from its configuration, and advise on settings.

forecast    the plan, joined from the files below
scenario    a run whose link, delay and blocks can be varied
itinerary   the rounds: which clients are asked, and which blocks they are sent
traffic     bytes of the messages
timing      computation and messages on a clock
masking_bytes  the messages of secure aggregation
probe       seconds of computation, measured on this machine
advice      settings that hide the exchange
alternatives  what other methods would take, and which to choose
allowed     the methods, delays and wire formats that a configuration allows
view        the plan as tables
"""
