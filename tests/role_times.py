"""Whether the states of a run's roles add up to their wall clock, as far as its metrics tell."""

from asyncrl.liveness.pulse import BEAT_S
from asyncrl.observe.role_meter import times

SLACK_S = 2 * BEAT_S + 0.5
"""Of the first and the last look at a pulse, on a busy machine."""


def check_role_times(lines, **wanted):
    """The states of each role since the first line add up to the time since then; the wanted ones are among
    them (`rollout_0={"generate"}`)."""
    passed_s = lines[-1]["wall_s"] - lines[0]["wall_s"]
    for role, states in times(lines[1:]).items():
        assert abs(sum(states.values()) - passed_s) <= 0.01 * passed_s + SLACK_S, (role, states, passed_s)
    found = times(lines)
    for role, states in wanted.items():
        assert states <= {*found[role.replace("_", "-")]}, role
