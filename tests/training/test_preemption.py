"""Signals: noted once, then back in the hands of whoever had them."""

import os
import signal

import pytest

from llama_jax.training.preemption import StopSignal


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def number(request):
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_the_first_signal_is_noted_and_the_second_ends_the_program(number):
    with StopSignal() as stop:
        assert stop.received(1) is None
        os.kill(os.getpid(), number)
        assert stop.received(1) == number.name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with StopSignal() as stop:
        os.kill(os.getpid(), number)
        assert stop.received(1) is None
    assert signal.getsignal(number) is signal.SIG_IGN
