"""The doctor's report: the same findings as text, HTML and JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hybridlab import kernels
from hybridlab.hardware import BandwidthProbe, DoctorReport, doctor
from hybridlab.hardware.doctor import _untested
from hybridlab.hardware.gpu import Gpu


@pytest.fixture(scope="module")
def report() -> DoctorReport:
    return doctor(probe=False)


def test_report_names_tier_cores_and_versions(report: DoctorReport) -> None:
    text = str(report)
    assert f"kernel tier    {kernels.tier()} " in text
    assert f"{report.cores.usable} usable" in text
    assert {"python", "torch", "numpy"} <= set(report.versions)
    if len(kernels.supported_tiers()) > 1:
        assert report.compiler.startswith(("GCC", "clang"))


def test_report_is_json(report: DoctorReport) -> None:
    data = json.loads(json.dumps(report.as_dict()))
    assert data["tier"] == kernels.tier()
    assert data["cores"]["usable"] == report.cores.usable
    assert data["read_bandwidth"] == []


def test_html_escapes(report: DoctorReport) -> None:
    html = replace(report, tier="<b>")._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>" not in html


def test_measured_bandwidth_is_shown(report: DoctorReport) -> None:
    probe = BandwidthProbe(2, 51.25, 50.0, 52.0, 7, 1 << 30, "native")
    assert "51.2 GB/s with 2 threads (50.0 to 52.0 in 7 reads of 1024 MiB, native loop)" in str(
        replace(report, read_bandwidth=(probe,))
    )


def test_what_cannot_be_tested_is_said(report: DoctorReport) -> None:
    one_socket = replace(report.cores, sockets=1, numa_nodes=1, flags=frozenset())
    found = _untested(one_socket, (), {"avx512_vbmi_bf16"})
    assert [text.split(":")[0] for text in found[:4]] == [
        "kernel tier avx512_vbmi_bf16",
        "CUDA",
        "two sockets",
        "AMX",
    ]
    big = replace(report.cores, sockets=2, numa_nodes=2, flags=frozenset({"amx_tile"}))
    gpus = (Gpu(0, "x", 1, (9, 0)), Gpu(1, "x", 1, (9, 0)))
    assert _untested(big, gpus, set())[0] == "AMX: no kernel uses it"
