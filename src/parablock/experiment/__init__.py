"""A run, from its configuration to its run directory.

run           starts or resumes a run, drives the engine, finishes or fails
inputs        reads rows, base model, blocks and tokens
data_notes    the chat template, who trains on what, and what nothing is learnt from
fit_blocks    `blocks.layers_per_block: auto`
engines       the configuration as the engine and its arguments
protections   the configuration as privacy, robust aggregation and masking
export        a finished run as a folder, an adapter or a difference
recorder      rounds, trace, checkpoints and summary
progress      the display of a run on a terminal or in a log
trackers      TensorBoard and Weights & Biases
"""
