"""Whether the states of a run's roles add up to their wall clock."""

import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from asyncrl.liveness.pulse import BEAT_S, read_pulses
from asyncrl.observe.role_meter import times
from asyncrl.runfiles.layout import RunDir

SLACK_S = 2 * BEAT_S + 0.5
"""Of the first and the last look at a pulse, on a busy machine."""


@contextmanager
def adding_up(run_dir):
    """The first and the last pulse of every role while the body runs, by role: between them, the states of
    each add up to the time that has passed."""
    pulses, over = {}, threading.Event()

    def watch():
        while not over.wait(0.05):
            for role, pulse in read_pulses(RunDir(Path(run_dir)).pulses).items():
                first, _ = pulses.setdefault(role, (pulse, pulse))
                pulses[role] = first, pulse

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield pulses
    finally:
        over.set()
        watching.join()
    for role, (first, last) in pulses.items():
        before_s, after_s = (sum(pulse.states_s.values()) for pulse in (first, last))
        assert after_s - before_s == pytest.approx(last.at_s - first.at_s, rel=0.01, abs=0.02), role
    assert {"coordinator", "trainer-0", "rollout-0"} <= {*pulses}


def check_role_times(lines, **wanted):
    """The states of each role since the first line add up to the time since then; the wanted ones are among
    them (`rollout_0={"generate"}`)."""
    passed_s = lines[-1]["wall_s"] - lines[0]["wall_s"]
    for role, states in times(lines[1:]).items():
        assert abs(sum(states.values()) - passed_s) <= 0.01 * passed_s + SLACK_S, (role, states, passed_s)
    found = times(lines)
    for role, states in wanted.items():
        assert states <= {*found[role.replace("_", "-")]}, role
