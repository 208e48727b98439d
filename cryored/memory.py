"""How much memory this process may still take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Limit, use and statistics of a control group: of version 2, and of version 1 by the controller's name.
_FILES_OF = {
    "": ("memory.max", "memory.current", "memory.stat"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
}
_FILES = ("active_file", "inactive_file")  # what the group has read and written, which makes room when it is needed


def free_memory(root: str = "/") -> int | None:
    """Return bytes: of the machine, of its control groups, of SLURM's grant, whichever is least; None if nothing tells.

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
    for limit, used, statistics in _groups(root):
        try:
            found.append(int(limit.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii")))
            files = dict(line.split() for line in statistics.read_text(encoding="ascii").splitlines())
            # Version 1 tells a group's own files by these names, and with those of its subgroups as a total.
            found[-1] += sum(int(files.get(f"total_{name}", files.get(name, 0))) for name in _FILES)
        except (OSError, ValueError):  # no such group, or "max"
            pass
    granted = os.environ.get("SLURM_MEM_PER_NODE", "")
    if granted.isdigit() and int(granted):  # --mem=0 is the whole node
        found.append(int(granted) << 20)
    per_core, cores = (os.environ.get(name, "") for name in ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"))
    if per_core.isdigit() and cores.isdigit() and int(per_core):
        found.append((int(per_core) << 20) * int(cores))
    return max(min(found), 0) if found else None


def _groups(root: str) -> Iterator[tuple[Path, Path, Path]]:
    """Yield limit, use and statistics of each control group that the process is in, the outermost first.

    In a container the file system begins with its own group; on a machine it has all, and a batch job's is one of a
    subfolder, whose limits and those of the folders around it hold.
    """
    inside = dict.fromkeys(_FILES_OF, "/")
    try:
        for line in Path(root, "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, place = line.split(":", 2)
            inside.update((name, place) for name in controllers.split(",") if name in inside)
    except (OSError, ValueError):  # not Linux
        pass
    for controller, files in _FILES_OF.items():
        top = Path(root, "sys/fs/cgroup", controller)
        own = PurePosixPath(inside[controller].lstrip("/"))
        for group in (*reversed(own.parents), own):
            limit, used, statistics = (top / group / name for name in files)
            yield limit, used, statistics
