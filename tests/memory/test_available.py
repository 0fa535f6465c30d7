import jax
import pytest

from gradot_jax.memory.available import (
    available_device_bytes,
    available_host_bytes,
    devices_share_host,
)

MEMINFO = "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 4000 kB\n"


@pytest.fixture
def system(tmp_path):
    """Folders as the kernel's, written from texts by path."""

    def write(**files):
        for path, text in files.items():
            file = tmp_path.joinpath(*path.split("/"))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path / "proc", tmp_path / "cgroup"

    return write


def test_without_groups_it_is_what_the_system_has(system):
    assert available_host_bytes(*system(**{"proc/meminfo": MEMINFO})) == 4000 * 1024


def test_nothing_is_claimed_where_nothing_is_known(system):
    assert available_host_bytes(*system()) is None


@pytest.mark.parametrize(("limit", "left"), [("max", 4096000), ("1000000", 750000), ("1000", 0)])
def test_a_group_of_the_second_version_limits_it_but_for_its_cache(system, limit, left):
    folders = system(
        **{
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/a/b\n",
            "cgroup/a/b/memory.max": f"{limit}\n",
            "cgroup/a/b/memory.current": "300000\n",
            "cgroup/a/b/memory.stat": "anon 5\nactive_file 20000\ninactive_file 30000\n",
        }
    )
    assert available_host_bytes(*folders) == left


def test_the_narrowest_of_the_enclosing_groups_counts(system):
    folders = system(
        **{
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/a/b\n",
            "cgroup/a/b/memory.max": "900000",
            "cgroup/a/b/memory.current": "1000",
            "cgroup/a/memory.max": "800000",
            "cgroup/a/memory.current": "700000",
        }
    )
    assert available_host_bytes(*folders) == 100000


def test_a_group_of_the_first_version_limits_it_too(system):
    folders = system(
        **{
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "3:cpu:/x\n2:memory:/of/the/host\n",
            "cgroup/memory/memory.limit_in_bytes": "1000000",
            "cgroup/memory/memory.usage_in_bytes": "300000",
            "cgroup/memory/memory.stat": "total_active_file 1000\ntotal_inactive_file 2000\n",
        }
    )
    assert available_host_bytes(*folders) == 703000


def test_cpu_devices_share_the_memory_of_the_host():
    if jax.default_backend() != "cpu":
        pytest.skip("asks a CPU")
    assert devices_share_host() and available_device_bytes() is None
