"""How much memory this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

# Limit, use and statistics of a control group, of version 2 and of version 1.
_GROUPS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
_FILES = ("active_file", "inactive_file")  # what the group has read and written, which makes room when it is needed


def free_memory(root: str = "/") -> int | None:
    """Return bytes: of the machine, of the control group, of SLURM's grant, whichever is least; None if nothing tells.

    Parameters
    ----------
    root : str
        Of the file system.
    """
    found = []
    try:
        lines = dict(line.split(":", 1) for line in Path(root, "proc/meminfo").read_text(encoding="ascii").splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) << 10)
    except (OSError, KeyError, ValueError):  # not Linux
        pass
    for names in _GROUPS:
        limit, used, statistics = (Path(root, "sys/fs/cgroup", name) for name in names)
        try:
            found.append(int(limit.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii")))
            files = dict(line.split() for line in statistics.read_text(encoding="ascii").splitlines())
            found[-1] += sum(int(files.get(name, 0)) for name in _FILES)
        except (OSError, ValueError):  # no such group, or "max"
            pass
    granted = os.environ.get("SLURM_MEM_PER_NODE", "")
    if granted.isdigit() and int(granted):  # --mem=0 is the whole node
        found.append(int(granted) << 20)
    per_core, cores = (os.environ.get(name, "") for name in ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"))
    if per_core.isdigit() and cores.isdigit() and int(per_core):
        found.append((int(per_core) << 20) * int(cores))
    return max(min(found), 0) if found else None
