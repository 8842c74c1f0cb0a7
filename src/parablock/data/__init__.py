"""Data, from files to batches; no file here knows the model, the algorithm or the wire.

sources     rows from files or a hub dataset
formats     the meaning of a row's fields
templates   text, cut into prompt and completion
prompts     token ids and labels
partition   the rows of each client
histogram   a partition as text and as counts
batches     the micro-batches of a client's round
"""
