"""How much memory this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

# Limit, usage and statistics of the container, cgroup v2 and v1.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be allocated without swapping, within the limits of a container."""
    found = [_system(meminfo)]
    for limit, usage, stat in _CGROUP_FILES:
        try:
            # Cached file pages count as used but are given up on demand.
            fields = dict(line.split() for line in (cgroup / stat).read_text().splitlines())
            used = int((cgroup / usage).read_text()) - int(fields.get("inactive_file", 0))
            found.append(int((cgroup / limit).read_text()) - used)
        except (OSError, ValueError):  # no such controller, or "max": no limit
            continue
    return max(min(found), 0)


def _system(meminfo: Path) -> int:
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    except OSError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return int(fields["MemAvailable"].split()[0]) * 1024
