import pickle

import pytest
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

from cluster.training.ray_failures import StopAtOurErrors, translate
from moe_bitnet.errors import CheckpointError, ClusterError, TrainingError

OURS = TrainingError("step 7: the loss is not finite")
COLLATERAL = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
DEATH = WorkerHealthCheckFailedError("A worker failed its health check", RayActorError())


@pytest.mark.parametrize(
    "error",
    [
        WorkerGroupError("failed", {0: COLLATERAL, 1: OURS}),
        WorkerGroupError("failed", {0: UserExceptionWithTraceback(OURS, "a long traceback")}),
        ControllerError(OURS),
        ControllerError(ControllerError(OURS)),
    ],
)
def test_an_error_of_ours_comes_out_as_it_was_raised(error):
    assert translate(error, 3) is OURS


@pytest.mark.parametrize("failures", [{0: DEATH}, {0: COLLATERAL, 1: DEATH}, {0: COLLATERAL}])
def test_workers_that_died_once_too_often_are_a_cluster_error(failures):
    error = translate(WorkerGroupError("failed", failures), 3)
    assert isinstance(error, ClusterError)
    assert "after 3 restarts" in str(error)
    assert "resumes from the last checkpoint" in str(error)


def test_a_host_that_does_not_come_back_is_a_cluster_error():
    error = translate(ControllerError(WorkerGroupStartupTimeoutError(2)), 3)
    assert isinstance(error, ClusterError)
    assert "2" in str(error)


def test_a_bug_stays_a_bug():
    for error in (WorkerGroupError("a traceback", {0: KeyError("a bug")}), KeyError("another")):
        assert translate(error, 3) is error


def test_an_error_of_ours_is_never_retried_and_others_are():
    callback = pickle.loads(pickle.dumps(StopAtOurErrors()))
    with pytest.raises(CheckpointError, match="no space"):
        callback.after_exception(None, {0: COLLATERAL, 1: CheckpointError("no space left")})
    callback.after_exception(None, {0: COLLATERAL, 1: DEATH})
