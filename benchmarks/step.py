"""Step time and training memory of one block against full fine-tuning, in one process.

Both take the same batches, loss, clipping and AdamW. A block's time is that of a whole visit (loading the
block, making the optimizer, K steps, reading the result) divided by K, averaged over all blocks; full
fine-tuning keeps its optimizer. Visits and full steps take turns, so that a slow moment hits both.

    .venv/bin/python benchmarks/step.py
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from parablock.algorithm.local import LocalArguments, train_block
from parablock.data.batches import Batch
from parablock.model.blocks import Block, partition_blocks
from parablock.model.load import load_model
from parablock.model.params import Replica

REPOSITORY = Path(__file__).resolve().parents[1]
BAR = 0.65
MIB = 2**20
