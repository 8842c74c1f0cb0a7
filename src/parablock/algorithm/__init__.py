"""The method as pure functions, without threads, bytes or clocks.

parablock     states and steps of client and server, with d rounds of updates in flight
sequential    the oracle: the whole method in one thread
schedule      the block and the clients of each round
aggregate     the weighted mean, its alignment ρ, and the server optimizer
robust        median, trimmed mean, Krum, clipping, noise
sparse_mean   the mean of updates of which few elements travel
fixed_point   integer updates for secure aggregation
stacking      stacked LoRA adapters (FLoRA)
"""
