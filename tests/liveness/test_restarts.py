from asyncrl.liveness.restarts import MAX_DELAY_S, WINDOW_S, Restarts


def test_the_first_restart_is_immediate_and_the_next_ones_wait_longer_and_longer():
    restarts = Restarts(max_restarts=9)
    delays = [restarts.after_death(now_s=float(i)) for i in range(9)]
    assert delays == [0, 1, 2, 4, 8, 16, 30, 30, 30]
    assert max(delays) == MAX_DELAY_S
    assert restarts.after_death(9.0) is None


def test_restarts_are_forgiven_after_a_while():
    restarts = Restarts(max_restarts=1)
    assert restarts.after_death(0.0) == 0
    assert restarts.after_death(WINDOW_S - 1) is None
    assert restarts.recent(WINDOW_S - 1) == 1
    assert restarts.after_death(WINDOW_S) == 0


def test_a_role_without_restarts_has_none():
    assert Restarts(max_restarts=0).after_death(0.0) is None
