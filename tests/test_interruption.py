import os
import signal
import threading

import pytest

from hybrid_dit.interruption import Interruption


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_waits_for_the_loop(number, ending):
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert not interruption.due()
        os.kill(os.getpid(), number)
        assert interruption.due()  # and nothing was raised
        with pytest.raises(ending) as info:
            interruption.stop()
    assert signal.getsignal(number) is before
    if ending is SystemExit:
        assert info.value.code == 0


def test_a_scheduler_can_have_another_exit_code(monkeypatch):
    monkeypatch.setenv("HYBRID_DIT_STOP_CODE", "75")
    with Interruption() as interruption, pytest.raises(SystemExit) as info:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.due()
        interruption.stop()
    assert info.value.code == 75


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
            seen.append(interruption.due())

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert seen == [False]
