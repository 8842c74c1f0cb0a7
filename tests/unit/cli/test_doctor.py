from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from parablock.cli import doctor
from parablock.cli.doctor import examine

GIB = 2**30


@pytest.fixture(autouse=True)
def short_probe(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "COMPUTE_PROBE_S", 0.02)


def test_the_examination_names_versions_devices_room_extras_and_a_probe():
    findings = examine()
    assert [finding.name for finding in findings if finding.name != "cuda"] == [
        *("python", "parablock", "torch", "transformers", "datasets", "cpu", "memory", "disk", "temporary folder"),
        *(
            "cryptography",
            "dp_accounting",
            "flwr",
            "gguf",
            "lm_eval",
            "peft",
            "py3langid",
            "rouge_score",
            "tensorboard",
            "wandb",
        ),
        "compute probe",
    ]
    assert sum(finding.name == "cuda" for finding in findings) >= 1
    assert all(finding.value for finding in findings)


def test_exactly_the_findings_that_are_not_ok_have_a_remedy():
    findings = [*examine(), doctor._find_extra("no_such_package", "this test"), doctor._find_free_memory(0)]
    assert {finding.status for finding in findings} >= {"ok", "warning", "problem"}
    assert all(bool(finding.remedy) == (finding.status != "ok") for finding in findings)


def test_a_version_outside_the_declared_range_is_a_problem_and_one_inside_is_not():
    found = doctor._find_package("torch", Requirement("torch>=99"))
    assert (found.status, "needs >=99" in found.value, "torch>=99" in found.remedy) == ("problem", True, True)
    assert doctor._find_package("torch", Requirement("torch>=2.6")).status == "ok"


def test_a_package_that_is_missing_is_a_problem_and_an_extra_that_is_missing_only_a_warning():
    assert doctor._find_package("no-such-package", None).status == "problem"
    extra = doctor._find_extra("no_such_package", "this test")
    assert (extra.status, "pip install no_such_package" in extra.remedy) == ("warning", True)
    assert doctor._find_extra("torch", "this test").status == "ok"


def test_an_absent_parablock_is_a_problem_and_not_a_traceback(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "metadata", absent)
    assert [(one.name, one.status) for one in doctor._find_versions()] == [
        ("python", "ok"),
        ("parablock", "problem"),
    ]


def test_a_torch_built_for_cuda_that_finds_no_device_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor._find_devices()[-1].status == "ok"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert (doctor._find_devices()[-1].status, "13.0" in doctor._find_devices()[-1].value) == ("warning", True)


@pytest.mark.parametrize(("gib", "status"), [(0.5, "problem"), (2, "warning"), (64, "ok")])
def test_little_free_memory_is_told(gib: float, status: str):
    finding = doctor._find_free_memory(int(gib * GIB))
    assert (finding.status, finding.value) == (status, f"{gib:.1f} GiB free")


@pytest.mark.parametrize(("gib", "status"), [(0.5, "problem"), (2, "warning"), (64, "ok")])
def test_little_free_disk_is_told(gib: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=int(gib * GIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert doctor._find_free_disk(tmp_path).status == status


def test_a_folder_that_is_gone_is_a_problem_and_not_a_traceback(tmp_path: Path):
    assert doctor._find_free_disk(tmp_path / "gone").status == "problem"
    assert doctor._find_temporary_folder(tmp_path / "gone").status == "problem"
    assert doctor._find_temporary_folder(tmp_path).status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_the_compute_probe_tells_a_positive_speed_and_its_device():
    finding = doctor._probe_compute()
    number, unit = finding.value.split(" ")[:2]
    assert (finding.status, unit, float(number) >= 0) == ("ok", "GFLOP/s", True)
    assert ("cuda" if torch.cuda.is_available() else "cpu") in finding.value
