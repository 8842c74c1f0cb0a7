"""Loading, blocks and parameters of Hugging Face causal language models."""
