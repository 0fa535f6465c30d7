"""Memory of this process, as Linux and the devices report it."""

from pathlib import Path

import jax

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> bool:
    """Starts a new measurement of the peak; false where the system has no such thing."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_resident_bytes() -> int | None:
    """Largest resident memory of the process on the host since `reset_peak`."""
    return _status("VmHWM")


def resident_bytes() -> int | None:
    """Resident memory of the process on the host."""
    return _status("VmRSS")


def peak_device_bytes() -> int | None:
    """Largest memory in use on the devices since the process began; None where none is known."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks) if peaks else None


def _status(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith(f"{field}:")]
    return int(found[0].split()[1]) * 1024 if found else None
