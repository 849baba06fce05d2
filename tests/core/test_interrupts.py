from __future__ import annotations

import signal
import threading

import pytest

from sae.core.interrupts import deferred_interrupts


def interrupt():
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_waits_for_the_end_of_the_block():
    done = False
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        interrupt()
        done = True
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_acts_at_once():
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        interrupt()
        interrupt()
        raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_is_not_lost_when_the_block_fails():
    with pytest.raises(KeyboardInterrupt) as raised, deferred_interrupts():
        interrupt()
        raise ValueError("something else")
    assert isinstance(raised.value.__context__, ValueError)


def test_a_handler_of_the_user_is_called():
    called = []
    usual = signal.signal(signal.SIGINT, lambda *given: called.append(given))
    try:
        mine = signal.getsignal(signal.SIGINT)
        with deferred_interrupts():
            interrupt()
            assert not called
        assert len(called) == 1 and signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, usual)


def test_where_ctrl_c_is_ignored_it_stays_so():
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_interrupts():
            interrupt()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, usual)


def test_another_thread_than_the_main_one_leaves_it_alone():
    seen = []

    def work():
        with deferred_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
