import os
import signal
import threading

import pytest

from cluster.training.stopping import StopSignals, is_stop_requested, request_stop, withdraw_stop


def test_the_first_signal_asks_and_the_second_acts():
    with StopSignals() as signals:
        assert not signals.is_requested
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.is_requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_thread_takes_no_signals():
    before = signal.getsignal(signal.SIGINT)
    inside = []

    def body():
        with StopSignals():
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert inside == [before]


def test_a_request_can_be_withdrawn(tmp_path):
    folder = tmp_path / "run"
    withdraw_stop(folder)
    assert not is_stop_requested(folder)
    request_stop(folder)
    assert is_stop_requested(folder)
    withdraw_stop(folder)
    assert not is_stop_requested(folder)
