"""A run, from its configuration to its run directory.

run           starts or resumes a run, drives the engine, finishes or fails
forget        a run anew, without one of its clients
inputs        reads rows, base model, blocks and tokens
data_notes    the chat template, who trains on what, and what nothing is learnt from
first_config  `parablock init`
fit_blocks    `blocks.layers_per_block: auto`
engines       the configuration as the engine and its arguments
protections   the configuration as privacy, robust aggregation and masking
held_out      the rows of a run that is over, for `parablock eval`
export        a finished run as a folder, in GGUF, an adapter or a difference
upload        an exported folder to the Hugging Face hub
recorder      rounds, trace, checkpoints and summary
progress      the display of a run on a terminal or in a log
lamps         … the row of lamps of each client in it
pace          how far a run is, and how long the rest takes
outlook       what a run will take on this machine
trackers      TensorBoard and Weights & Biases
"""
