"""The checks of `parablock doctor`: versions, devices, memory, disk, extras, and a short compute probe.

A check returns findings and never raises. The probe is bounded in time, so that a slow machine need not wait.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from packaging.requirements import Requirement
from rich.text import Text

from parablock.cli.word_table import WordTable

Status = Literal["ok", "warning", "problem"]

COMPUTE_PROBE_S = 1.0
_GIB = 2**30
_STYLES = {"ok": "", "warning": "yellow", "problem": "red"}
_SHOWN_PACKAGES = ("torch", "transformers", "datasets")
_EXTRAS = {
    "cryptography": "secure aggregation, noise",
    "dp_accounting": "epsilon of differential privacy",
    "flwr": "deployments over a network",
    "gguf": "exports for llama.cpp",
    "lm_eval": "standard benchmarks",
    "peft": "methods of adapters",
    "py3langid": "languages of answers",
    "rouge_score": "ROUGE-L of answers",
    "tensorboard": "curves in TensorBoard",
    "wandb": "curves in Weights & Biases",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the result: the thing that was checked, its state with units, and a remedy if one is needed.

    A `warning` means that runs are slower or that an extra is missing, a `problem` that runs will fail.
    """

    name: str
    value: str
    status: Status = "ok"
    remedy: str = ""


def examine() -> list[Finding]:
    """Check the machine and the installation; return the findings in reading order."""
    return [
        *_find_versions(),
        *_find_devices(),
        _find_free_memory(psutil.virtual_memory().available),
        _find_free_disk(Path()),
        _find_temporary_folder(Path(tempfile.gettempdir())),
        *(_find_extra(name, purpose) for name, purpose in _EXTRAS.items()),
        _probe_compute(),
    ]


def as_table(findings: Sequence[Finding]) -> WordTable:
    """Lay out the findings."""
    table = WordTable("", "check", "found", "cure")
    for finding in findings:
        status = Text(finding.status, style=_STYLES[finding.status])
        table.add_row(status, finding.name, finding.value, finding.remedy)
    return table


def _find_versions() -> list[Finding]:
    findings = [Finding("python", platform.python_version())]
    try:
        package = importlib.metadata.metadata("parablock")
        requirements = [Requirement(text) for text in importlib.metadata.requires("parablock") or ()]
    except importlib.metadata.PackageNotFoundError:
        return [*findings, Finding("parablock", "not installed", "problem", "Run: pip install parablock")]
    findings.append(Finding("parablock", package["Version"]))
    wanted = {requirement.name: requirement for requirement in requirements if requirement.marker is None}
    return findings + [_find_package(name, wanted.get(name)) for name in _SHOWN_PACKAGES]


def _find_package(name: str, requirement: Requirement | None) -> Finding:
    """Compare the installed version of a package with the one that ParaBlock requires."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", "problem", f"Run: pip install '{requirement or name}'")
    if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
        value = f"{version}, but ParaBlock needs {requirement.specifier}"
        return Finding(name, value, "problem", f"Run: pip install '{requirement}'")
    return Finding(name, version)


def _find_devices() -> list[Finding]:
    threads = torch.get_num_threads()
    cpu = Finding("cpu", f"{os.cpu_count()} cores, {threads} torch threads")
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [cpu, *(Finding("cuda", f"{one.name}, {one.total_memory / _GIB:.0f} GiB") for one in devices)]
    if torch.version.cuda is not None:
        remedy = "If there is a GPU, check its driver with nvidia-smi; ParaBlock runs on the CPU meanwhile."
        return [cpu, Finding("cuda", f"none, though torch is built for {torch.version.cuda}", "warning", remedy)]
    return [cpu, Finding("cuda", "none: torch is built for the CPU")]


def _find_free_memory(available_bytes: int) -> Finding:
    value = f"{available_bytes / _GIB:.1f} GiB free"
    if available_bytes < 1 * _GIB:
        return Finding("memory", value, "problem", "Close other programs, or use a machine with more memory.")
    if available_bytes < 4 * _GIB:
        return Finding("memory", value, "warning", "Enough for small models only; close other programs.")
    return Finding("memory", value)


def _find_free_disk(folder: Path) -> Finding:
    try:
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        value = f"the folder cannot be read: {error.strerror or error}"
        return Finding("disk", value, "problem", "Change to a folder that exists and that you can read.")
    value = f"{free_bytes / _GIB:.1f} GiB free in {folder.absolute()}"
    if free_bytes < 1 * _GIB:
        return Finding("disk", value, "problem", "Free some space, or give an --output-dir on another disk.")
    if free_bytes < 10 * _GIB:
        remedy = "Checkpoints of larger models need more: free some space, or lower checkpoint.keep."
        return Finding("disk", value, "warning", remedy)
    return Finding("disk", value)


def _find_temporary_folder(folder: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        value = f"{folder} is not writable: {error.strerror or error}"
        return Finding("temporary folder", value, "problem", "Set TMPDIR to a folder that you can write to.")
    return Finding("temporary folder", f"{folder} is writable")


def _find_extra(name: str, purpose: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, f"not installed; only for {purpose}", "warning", f"If needed, run: pip install {name}")
    return Finding(name, f"installed, for {purpose}")


def _probe_compute() -> Finding:
    """Multiply float32 matrices for `COMPUTE_PROBE_S` on the device that `device: auto` chooses."""
    device, size = ("cuda", 4096) if torch.cuda.is_available() else ("cpu", 512)
    try:
        matrix = torch.full((size, size), 1.0 / size, device=device)
        float((matrix @ matrix)[0, 0])  # the first product also loads kernels; reading waits for the device
        start = time.perf_counter()
        num_products, elapsed_s = 0, 0.0
        while elapsed_s < COMPUTE_PROBE_S:
            float((matrix @ matrix)[0, 0])
            num_products += 1
            elapsed_s = time.perf_counter() - start
    except RuntimeError as error:
        remedy = "Check the driver and the installation of torch; `model.device: cpu` may still work."
        return Finding("compute probe", f"failed on {device}: {error}", "problem", remedy)
    gigaflops = num_products * 2 * size**3 / elapsed_s / 1e9
    return Finding("compute probe", f"{gigaflops:.1f} GFLOP/s (float32 on {device})")
