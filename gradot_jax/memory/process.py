"""Memory that a process holds, as the system and the devices report it."""

import resource
import sys
from pathlib import Path

import jax


def peak_rss_bytes() -> int:
    """The most memory that this process has held on the host since it began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def process_memory(pid: int | str = "self") -> dict[str, int]:
    """What Linux says of the memory of a process, or of this one.

    Returns:
        Bytes by the names of `/proc/PID/status`, such as `VmRSS`; empty when the process is gone,
        or where the system has no such file.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith("kB"))
    return {name: 1024 * int(value.split()[0]) for name, value in pairs}


def resident_bytes() -> int | None:
    """Memory that this process holds on the host; None where it is not known."""
    return process_memory().get("VmRSS")


def reset_peak() -> bool:
    """Starts a new measurement of `peak_resident_bytes`; false where the system has no such thing.

    `peak_rss_bytes` goes on as before.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_resident_bytes() -> int | None:
    """The most memory held on the host since `reset_peak`; None where it is not known."""
    return process_memory().get("VmHWM")


def peak_device_bytes() -> int | None:
    """The most memory in use on a device since the process began; None where it is not known."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks) if peaks else None
