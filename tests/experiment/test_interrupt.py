"""Signals: put off while a step is under way, heard at once elsewhere, and nobody else's business outside the command line."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from keeplora.experiment.interrupt import STOP, Interrupted, Stop, listening
from tests.experiment.deaths import in_child


def test_the_first_is_put_off_while_somebody_holds_and_the_second_is_not():
    stop = Stop()
    with stop.held():
        assert not stop.requested
        stop.ask(signal.SIGINT)
        assert stop.requested
        with pytest.raises(Interrupted, match="stopped by SIGINT") as caught:
            stop.ask(signal.SIGINT)
    assert caught.value.signal == signal.SIGINT
    assert isinstance(caught.value, KeyboardInterrupt)


def test_it_is_heard_at_once_where_nobody_holds():
    stop = Stop()
    stop.check()
    with stop.held():
        pass
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        stop.ask(signal.SIGTERM)


def test_real_signals_go_to_the_process_s_own_and_handlers_come_back():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGTERM, signal.SIGINT):
        with listening():
            with STOP.held():
                os.kill(os.getpid(), number)
                assert STOP.requested
            with pytest.raises(Interrupted) as caught:
                STOP.check()
            assert caught.value.signal == number
        assert not STOP.requested
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_no_handler_is_installed_outside_the_main_thread():
    found = []
    before = signal.getsignal(signal.SIGTERM)

    def work():
        with listening():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_an_ignored_ctrl_c_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening():
            os.kill(os.getpid(), signal.SIGINT)
            assert not STOP.requested
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_forked_process_leaves_the_decision_to_its_parent():
    """Ctrl-C in a terminal reaches the loader's processes too; one that died of it would break the step that is to end."""

    def work():
        with listening():
            assert in_child(lambda: os.kill(os.getpid(), signal.SIGINT)) == 0
            assert not STOP.requested

    assert in_child(work) == 0
