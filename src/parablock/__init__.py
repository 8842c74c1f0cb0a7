"""ParaBlock: federated fine-tuning of LLMs by block coordinate descent in two parallel threads."""

__version__ = "0.1.0"
