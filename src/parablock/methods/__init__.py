"""The methods at work: the blocks that a method trains, and its model with the clients' local training.

base             most methods, which differ only in their blocks; the inputs of a run
trained_blocks   the blocks of each method
flora            new adapters in every round
solo             `local` and `central`, whose clients keep their models
choose           the class of a method, by its traits
"""
