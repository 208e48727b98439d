"""How much memory is free, as machine, control group and SLURM tell."""

import os

import pytest

from cryored.memory import free_memory

GIB = 1 << 30


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A machine with 64 GiB available, of which nobody else says anything."""
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {64 << 20} kB\n")
    return tmp_path


def group(root, folder, names, limit, used, files):
    place = root / "sys" / "fs" / "cgroup" / folder
    place.mkdir(parents=True)
    for name, text in zip(names, (limit, used, f"anon 1\nactive_file {files}\ninactive_file 0"), strict=True):
        (place / name).write_text(f"{text}\n")


def test_it_is_less_than_there_is():
    assert 0 < free_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_machine_alone(root):
    assert free_memory(str(root)) == 64 * GIB


def test_nothing_tells(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    assert free_memory(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("", ("memory.max", "memory.current", "memory.stat")),
        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")),
    ],
)
def test_a_control_group_and_the_files_that_it_has_read(root, folder, names):
    group(root, folder, names, 8 * GIB, 7 * GIB, 5 * GIB)
    assert free_memory(str(root)) == 6 * GIB  # RELION's arrays in the page cache make room


def test_a_group_without_a_limit(root):
    group(root, "", ("memory.max", "memory.current", "memory.stat"), "max", 7 * GIB, 0)
    assert free_memory(str(root)) == 64 * GIB


@pytest.mark.parametrize(
    ("line", "top", "names"),
    [
        ("0::", "", ("memory.max", "memory.current", "memory.stat")),
        ("4:cpu,memory:", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")),
    ],
)
def test_a_batch_jobs_own_group_and_those_around_it(root, line, top, names):
    (root / "proc" / "self").mkdir()
    (root / "proc" / "self" / "cgroup").write_text(f"1:name=systemd:/elsewhere\n{line}/slurm/job_7/step_0\n")
    group(root, f"{top}/slurm/job_7/step_0".lstrip("/"), names, "max", 3 * GIB, 0)
    assert free_memory(str(root)) == 64 * GIB
    group(root, f"{top}/slurm/job_8".lstrip("/"), names, 2 * GIB, GIB, 0)  # another's
    assert free_memory(str(root)) == 64 * GIB
    for name, text in zip(names, (10 * GIB, 4 * GIB, "active_file 0"), strict=True):
        (root / "sys" / "fs" / "cgroup" / top / "slurm" / "job_7" / name).write_text(f"{text}\n")
    assert free_memory(str(root)) == 6 * GIB
    if top:  # version 1 tells a group's files without those of its subgroups, whose use counts
        statistics = root / "sys" / "fs" / "cgroup" / top / "slurm" / "job_7" / names[2]
        statistics.write_text(f"active_file 0\ninactive_file 0\ntotal_active_file {GIB}\ntotal_inactive_file 0\n")
        assert free_memory(str(root)) == 7 * GIB


def test_slurms_grant(root, monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "2048")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "4")
    assert free_memory(str(root)) == 8 * GIB
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4096")
    assert free_memory(str(root)) == 4 * GIB
    monkeypatch.delenv("SLURM_MEM_PER_CPU")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")  # all that the node has
    assert free_memory(str(root)) == 64 * GIB
