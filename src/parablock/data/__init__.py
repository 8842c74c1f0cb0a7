"""Data, from files to batches; no file here knows the model, the algorithm or the wire.

file_kinds  what a file is by its first bytes, and what makes one of it that can be read
readers     files of every kind, plain or compressed
sources     rows from files, folders, patterns or a hub dataset
conversations  turns in one spelling, and which are learnt
switches    what rows and turns say about whether they are learnt
formats     the meaning of a row's fields
templates   text, cut into prompt and completion
unwritten   what a chat template does not write of a row
template_limits  what a chat template may take
prompts     token ids and labels
preview     rows as the model will see them
partition   the rows of each client
histogram   a partition as text and as counts
batches     the micro-batches of a client's round
"""
