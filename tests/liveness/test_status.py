"""What a person is told of a run before its first step, and after its last."""

import pytest

from asyncrl import work
from asyncrl.liveness.pulse import Pulse
from asyncrl.liveness.status import own_status, read_beginning, status_of, tell_beginning
from asyncrl.trainer.backend import make_trainer
from asyncrl.waits import Wait, waiting
from asyncrl.work import Work, unhurried, working

pytestmark = pytest.mark.usefixtures("own_waits")


def test_roles_that_do_the_same_are_told_together_and_the_trainer_says_what_it_is_at():
    loading = dict.fromkeys(["trainer-0", "trainer-1", "trainer-2"], "loading the model")
    vllm = dict.fromkeys(["rollout-0", "rollout-1"], "starting vLLM")
    starting = dict.fromkeys(["coordinator", "reward-0"], "starting")
    assert status_of(loading | vllm | starting, None) == (
        "coordinator, reward-0: starting; rollout-0, rollout-1: starting vLLM; "
        "trainer-0 to trainer-2: loading the model"
    )
    waits = Pulse(1, 0, [Wait("the batch of step 0", 0.0)])
    assert status_of({}, waits) == "trainer-0: waiting for the batch of step 0"
    assert status_of({"rollout-0": "starting vLLM"}, waits) == (
        "rollout-0: starting vLLM; trainer-0: waiting for the batch of step 0"
    )
    computes = Pulse(1, 0, [], work=Work("micro-batches of the policy's updates", 3, 40, 0.0))
    assert status_of({}, computes) == "trainer-0: computing the micro-batches of the policy's updates"
    writes = Pulse(1, 0, waits.waits, work=computes.work, unhurried="writing the checkpoint of step 9")
    assert status_of({}, writes) == "trainer-0: writing the checkpoint of step 9"
    assert status_of({}, Pulse(1, 0, [])) == ""


def test_one_process_says_what_it_does_itself():
    assert own_status() == "running inline"
    with waiting("the batch of step 3"):
        assert own_status() == "waiting for the batch of step 3"
        with working("micro-batches"), unhurried("reading the newest checkpoint"):
            assert own_status() == "reading the newest checkpoint"


@pytest.fixture
def beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "_listener", None)
    return tmp_path / ".beginning" / "trainer-0"


def test_a_beginning_is_told_from_outside_as_it_goes_on(beginning):
    assert read_beginning(beginning) == "starting"
    tell_beginning(beginning)
    assert read_beginning(beginning) == "starting"
    with unhurried("loading the model"):
        assert read_beginning(beginning) == "loading the model"
        with unhurried("compiling"):
            assert read_beginning(beginning) == "compiling"
        assert read_beginning(beginning) == "loading the model"
    assert read_beginning(beginning) == "starting"


def test_a_beginning_that_cannot_be_written_ends_nothing(beginning):
    tell_beginning(beginning)
    beginning.unlink()
    beginning.parent.rmdir()
    with unhurried("loading the model"):
        assert read_beginning(beginning) == "starting"


def test_a_trainer_says_which_of_its_models_it_loads(make_config, monkeypatch):
    told = []
    monkeypatch.setattr(work, "_listener", lambda: told.append(work.current_unhurried()))
    make_trainer(make_config("objective.advantage=gae", "critic={}", "reference={}"))
    said = [what for what in told if what is not None]
    assert said == ["loading the model", "loading the critic", "loading the reference"]
