"""Ctrl-C, as a signal that is really raised."""

import signal
import threading

import pytest

from emkd.interrupt import Terminated, exit_code, finish_on_interrupt, raising_on_sigterm


def test_once_is_noted_and_twice_stops(capfd):
    before = signal.getsignal(signal.SIGINT)
    with finish_on_interrupt("finishing the current shards") as interrupt:
        assert not interrupt.asked
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
        assert "finishing the current shards; press Ctrl-C again to stop immediately" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before, "afterwards Ctrl-C is what it was"


def test_sigterm_is_like_it_with_its_own_error(capfd):
    before = signal.getsignal(signal.SIGTERM)  # Ray's, where a test before this one in the process has started it
    with finish_on_interrupt("finishing the current shards") as interrupt:
        signal.raise_signal(signal.SIGTERM)
        assert "shards; send SIGTERM again to stop immediately" in capfd.readouterr().err
        assert exit_code(interrupt.error()) == 143
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
    with raising_on_sigterm(), pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_torchrun_sends_each_signal_a_second_time(monkeypatch, capfd):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with finish_on_interrupt("finishing") as interrupt:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
        interrupt._first -= 3
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err.count("interrupted: finishing") == 1


def test_an_error_gives_the_signal_back_as_well():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="odd"), finish_on_interrupt("finishing the current shards"):
        raise ValueError("odd")
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_leaves_the_signal_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def run() -> None:
        with finish_on_interrupt("finishing the current shards") as interrupt:
            seen.append((interrupt.asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
