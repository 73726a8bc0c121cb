"""Free memory respects the limits of a container."""

from __future__ import annotations

import pytest

from ming_rt.runtime.memory import available_memory


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000 * 1024),
        ({"memory.max": "max", "memory.current": "5", "memory.stat": "inactive_file 1"}, 1000 * 1024),
        ({"memory.max": "5000", "memory.current": "4000", "memory.stat": "anon 1\ninactive_file 3000"}, 4000),
        ({"memory.max": "5000", "memory.current": "6000", "memory.stat": "anon 1"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "7000",
                "memory/memory.usage_in_bytes": "1000",
                "memory/memory.stat": "cache 1",
            },
            6000,
        ),
    ],
)
def test_the_smaller_limit_counts(tmp_path, files, expected):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  4000 kB\nMemAvailable:  1000 kB\n")
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert available_memory(meminfo, tmp_path / "cgroup") == expected


def test_this_machine_has_some():
    assert available_memory() > 1 << 20
