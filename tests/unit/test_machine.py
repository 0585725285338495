"""What the kernel's files say of memory, and what of it can still be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.around.machine import MEMORY_SHARE, Machine

TWO = {"cgroup.controllers": "memory"}


def machine(root: Path, files: dict[str, str], path: str = "0::/") -> Machine:
    """One of 10 MB, of which 1 MB can be had; `files` are those of the cgroups' folder, `path` says which is ours."""
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    files |= {"proc/meminfo": "MemTotal: 9766 kB\nMemFree: 9 kB\nMemAvailable: 977 kB\n", "proc/self/cgroup": path}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return Machine(root)


@pytest.mark.parametrize(
    ("files", "path", "spare"),
    [
        ({}, "0::/", 1_000_448),
        (TWO | {"memory.max": "max", "memory.current": "5000"}, "0::/", 1_000_448),
        (TWO | {"memory.max": "9000000", "memory.current": "0"}, "0::/", 1_000_448),
        (TWO | {"memory.max": "500000", "memory.current": "100000"}, "0::/", 400_000),
        (TWO | {"memory.max": "100000", "memory.current": "500000"}, "0::/", -400_000),
        (TWO | {"memory.max": "500000"}, "0::/", 500_000),
        # What a download left in the page cache was taken for used, and vLLM was not forked.
        (
            TWO | {"memory.max": "500000", "memory.current": "490000",
                   "memory.stat": "anon 1\nfile 400000\ninactive_file 390000\nactive_file 10000"},
            "0::/", 400_000,
        ),
        # A service of systemd's: its limit is not at the root.
        (TWO | {"a/b/memory.max": "300000", "a/b/memory.current": "100000"}, "0::/a/b", 200_000),
        (
            TWO | {"a/memory.max": "900000", "a/memory.current": "800000",
                   "a/b/memory.max": "300000", "a/b/memory.current": "100000"},
            "0::/a/b", 100_000,
        ),
        ({"memory/memory.limit_in_bytes": "500000", "memory/memory.usage_in_bytes": "100000"}, "4:memory:/", 400_000),
        (
            {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "100000"},
            "4:memory:/", 1_000_448,
        ),
        (
            {"memory/memory.limit_in_bytes": "500000", "memory/memory.usage_in_bytes": "450000",
             "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 50000"},
            "4:memory:/", 100_000,
        ),
    ],
)  # fmt: skip
def test_how_much_memory_can_be_had(tmp_path: Path, files: dict[str, str], path: str, spare: int) -> None:
    assert machine(tmp_path, files, path).spare_memory() == int(spare * MEMORY_SHARE)


def test_without_any_file_none_can_be_had(tmp_path: Path) -> None:
    assert Machine(tmp_path).spare_memory() == 0
    assert Machine(tmp_path).cgroup() == {}
