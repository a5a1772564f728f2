import os
import signal
import threading

import pytest

from hybrid_dit.interruption import Interruption


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_waits_for_the_loop(number, ending):
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert not interruption
        os.kill(os.getpid(), number)
        assert interruption  # and nothing was raised
        with pytest.raises(ending) as info:
            interruption.stop()
    assert signal.getsignal(number) is before
    if ending is SystemExit:
        assert info.value.code == 0


def test_a_second_signal_ends_at_once(capsys):
    with pytest.raises(KeyboardInterrupt), Interruption():
        os.kill(os.getpid(), signal.SIGINT)
        assert "once more" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("not interrupted")


def test_other_threads_can_use_it():
    seen = []

    def loop():
        with Interruption() as interruption:
            seen.append(bool(interruption))

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert seen == [False]
