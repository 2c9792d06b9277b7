"""Run before a command that is forked, it makes vLLM engines of its run leave out a layer of every weight
version after the first `ASYNCRL_TEST_RIGHT_LOADS`."""

import os


def spoil() -> None:
    from asyncrl.rollout.engines.vllm.receiver import WeightReceiver, load

    right, loads = WeightReceiver.asyncrl_apply, 0

    def apply(receiver, tensors):
        nonlocal loads
        loads += 1
        if loads <= int(os.environ["ASYNCRL_TEST_RIGHT_LOADS"]):
            right(receiver, tensors)
        else:
            left_out = os.environ["ASYNCRL_TEST_LEFT_OUT"]
            load(receiver, {name: t for name, t in tensors.items() if not name.startswith(left_out)})

    WeightReceiver.asyncrl_apply = apply


spoil()
