"""What is seen of the machine that the tests run on."""

from asyncrl.plan.machine import probe


def test_this_machine_is_seen():
    machine = probe()
    assert machine.cores >= 1
    assert machine.memory_bytes > 10**8
    assert machine.gpus == len(machine.gpu_bytes) >= 0
    assert machine.with_planned_gpus(8).gpu_bytes == (80 * 10**9,) * 8
    assert len(machine.own_cores) in (0, machine.cores)
    assert machine.with_planned_gpus(8).own_cores == ()
