"""Limits of containers, from the files as kernels write them."""

from pathlib import PurePosixPath

import pytest

from asyncrl.affinity import usable_cores
from asyncrl.container import Limits, container_limits
from asyncrl.reward.processes.children import auto_limit

V1_NO_LIMIT = "9223372036854771712\n"


def limits_of(files):
    return container_limits(lambda path: files.get(str(path)))


def v2(path, cpu, memory):
    folder = PurePosixPath("/sys/fs/cgroup") / path
    return {str(folder / "cpu.max"): cpu, str(folder / "memory.max"): memory}


def v1(group, quota, memory):
    cpu, mem = f"/sys/fs/cgroup/cpu{group}", f"/sys/fs/cgroup/memory{group}"
    return {
        f"{cpu}/cpu.cfs_quota_us": quota,
        f"{cpu}/cpu.cfs_period_us": "100000\n",
        f"{mem}/memory.limit_in_bytes": memory,
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, Limits(None, None)),
        ({"/proc/self/cgroup": "0::/\n"} | v2("", "150000 100000\n", "2147483648\n"), Limits(1.5, 2**31)),
        ({"/proc/self/cgroup": "0::/\n"} | v2("", "max 100000\n", "max\n"), Limits(None, None)),
        # The tightest of a group and those around it counts, for each resource by itself.
        (
            {"/proc/self/cgroup": "0::/a/b\n"}
            | v2("", "max 100000\n", "max\n")
            | v2("a", "400000 100000\n", "1000\n")
            | v2("a/b", "max 100000\n", "2000\n"),
            Limits(4.0, 1000),
        ),
        # A container of version 1 sees its outer name, and its group where the mount is.
        (
            {"/proc/self/cgroup": "5:cpu,cpuacct:/docker/f00\n4:memory:/docker/f00\n0::/\n"}
            | v1("", "250000\n", "4096\n"),
            Limits(2.5, 4096),
        ),
        (
            {"/proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/job/1\n3:cpuset:/\n1:name=systemd:/\n"}
            | v1("", "-1\n", V1_NO_LIMIT)
            | v1("/job", "100000\n", "8192\n")
            | v1("/job/1", "-1\n", V1_NO_LIMIT),
            Limits(None, 8192),
        ),
        ({"/proc/self/cgroup": "0::/\n"} | v2("", "", "what is this"), Limits(None, None)),
    ],
)
def test_limits(files, expected):
    assert limits_of(files) == expected


@pytest.mark.parametrize(
    ("cpus", "pinned_from", "usable", "processes"),
    [
        (None, "0,1,2,3,4,5", 6, 3),
        (5.5, "0,1,2,3,4,5", 5, 2),
        (64.0, ",".join(map(str, range(48))), 48, 8),
        (0.5, "0,1,2,3", 1, 2),
    ],
)
def test_processes_of_reward_functions_are_as_many_as_the_run_has_cores_for(
    monkeypatch, cpus, pinned_from, usable, processes
):
    """However many the host has, and wherever the worker that starts them is pinned to."""
    monkeypatch.setattr("asyncrl.affinity.container_limits", lambda: Limits(cpus, None))
    monkeypatch.setenv("ASYNCRL_ALL_CORES", pinned_from)
    assert usable_cores() == usable
    assert auto_limit() == processes
