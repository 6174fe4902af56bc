"""What this machine can do: detection without side effects, probes that measure, and the doctor's report."""

from hybridlab.hardware.detect import detect
from hybridlab.hardware.doctor import DoctorReport, doctor
from hybridlab.hardware.link import LinkProbe, probe_link
from hybridlab.hardware.read_bandwidth import BandwidthProbe, read_bandwidth_gb_s

__all__ = [
    "BandwidthProbe",
    "DoctorReport",
    "LinkProbe",
    "detect",
    "doctor",
    "probe_link",
    "read_bandwidth_gb_s",
]
