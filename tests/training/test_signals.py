"""Signals that ask a training to end, sent to this very process."""

from __future__ import annotations

import os
import signal

import pytest

from bnexp.training.signals import SIGNALS, Interruption


@pytest.fixture(autouse=True)
def not_ignored():
    """Whatever the shell that started the tests ignores."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_interrupts(number):
    before = signal.getsignal(number)
    with Interruption(SIGNALS) as interruption:
        assert not interruption
        os.kill(os.getpid(), number)
        assert interruption
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_without_a_step_to_finish_the_first_interrupts():
    with Interruption(SIGNALS) as interruption:
        interruption.at_once()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_request_that_came_before_the_last_step_ended_interrupts_after_it():
    with Interruption(SIGNALS) as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interruption.at_once()


def test_a_signal_that_was_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption(SIGNALS) as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interruption
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_no_signal_is_touched_that_was_not_named():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption(()):
        assert [signal.getsignal(number) for number in SIGNALS] == before
