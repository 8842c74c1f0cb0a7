"""From files to batches: sources → formats → templates → prompts, and partition → batches.

Nothing here knows a model, an algorithm or a message; rows and examples are immutable values.
"""
