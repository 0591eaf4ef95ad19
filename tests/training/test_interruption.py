import signal
import threading

import pytest

from idl.training import stop_on_interrupt


def test_the_first_interrupt_is_an_answer_and_the_second_an_exception():
    previous = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as should_stop:
        assert not should_stop()
        signal.raise_signal(signal.SIGINT)
        assert should_stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is previous


def test_outside_of_the_main_thread_nothing_is_installed():
    answers = []

    def run():
        with stop_on_interrupt() as should_stop:
            answers.append(should_stop())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [False]
