"""How much memory there is to be had, as Linux and the devices report it."""

from collections.abc import Iterator
from pathlib import Path

import jax

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
_FIRST_VERSION = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_SECOND_VERSION = ("memory.max", "memory.current")


def available_host_bytes(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int | None:
    """Memory that this process can still take on the host without swapping.

    The least of what the system has and what the control groups that the process is in allow;
    cached files count as free. None where neither is known.

    Args:
        proc: where the system reports.
        cgroup: where control groups report, of version 1 or 2.
    """
    free = [_system_free(proc / "meminfo"), *_groups_free(proc / "self" / "cgroup", cgroup)]
    known = [size for size in free if size is not None]
    return min(known, default=None)


def available_device_bytes() -> int | None:
    """Memory still free on the fullest local device; None where devices do not say, as on CPUs."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    free = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if s and s.get("bytes_limit")]
    return min(free, default=None)


def devices_share_host() -> bool:
    """Whether arrays on the devices take memory of the host."""
    return all(device.platform == "cpu" for device in jax.local_devices())


def _system_free(meminfo: Path) -> int | None:
    lines = [line for line in _lines(meminfo) if line.startswith("MemAvailable:")]
    return int(lines[0].split()[1]) * 1024 if lines else None


def _groups_free(own: Path, root: Path) -> Iterator[int]:
    """Bytes left in each memory group from the process's own up."""
    for line in _lines(own):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, names = (root / "memory", _FIRST_VERSION) if controllers else (root, _SECOND_VERSION)
        group = top / path.strip("/")
        # In a container the path may be that of the host, and only the root is there.
        for folder in (group, *group.parents):
            left = _group_free(folder, *names)
            if left is not None:
                yield left
            if folder == top:
                break


def _group_free(folder: Path, limit: str, usage: str) -> int | None:
    most, used = (" ".join(_lines(folder / name)) for name in (limit, usage))
    if not (most.isdecimal() and used.isdecimal()):
        return None
    pairs = (line.split() for line in _lines(folder / "memory.stat"))
    stat = {name: int(number) for name, number in pairs if number.isdecimal()}
    # The first version counts the groups below under names of their own.
    whole = "total_" if "total_inactive_file" in stat else ""
    # Pages of files are dropped before the limit is felt.
    cached = sum(stat.get(f"{whole}{name}_file", 0) for name in ("active", "inactive"))
    return max(int(most) - int(used) + cached, 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
