"""Stop signals are noted, and the handlers that were there come back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from rlprompt.runs.interrupt import StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == number.name


def test_former_handlers_come_back() -> None:
    def mine(*_: object) -> None: ...

    before = signal.signal(signal.SIGUSR1, mine)
    others = [signal.getsignal(number) for number in SIGNALS]
    try:
        with StopRequest():
            assert signal.getsignal(signal.SIGUSR1) is not mine
        assert [signal.getsignal(number) for number in SIGNALS] == others
        with pytest.raises(ValueError, match="oops"), StopRequest():
            raise ValueError("oops")
        assert [signal.getsignal(number) for number in SIGNALS] == others
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_second_ctrl_c_ends_at_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGTERM"


def test_a_second_sigterm_is_only_noted() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"


def test_outside_the_main_thread_nothing_is_installed() -> None:
    seen: list[object] = []

    def use() -> None:
        with StopRequest() as stop:
            seen.extend([stop.reason, signal.getsignal(signal.SIGTERM)])

    expected = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [None, expected]


def test_a_signal_before_the_inner_block_is_known_inside_it_and_the_other_way_round() -> None:
    with StopRequest(keyboard=False) as outer:
        os.kill(os.getpid(), signal.SIGUSR1)
        with StopRequest() as inner:
            assert inner.reason == "SIGUSR1"
    with StopRequest(keyboard=False) as outer:
        with StopRequest() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (inner.reason, outer.reason) == ("SIGTERM", "SIGTERM")


def test_ctrl_c_can_be_left_as_it_was() -> None:
    # A shell that starts a command in the background lets it ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest(keyboard=False) as stop:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            assert stop.reason is None
    finally:
        signal.signal(signal.SIGINT, before)
