"""Ends a loop in good order on Ctrl-C (SIGINT) or SIGTERM: the step at hand is finished and saved first."""

import signal
import sys
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Inside `with`, a first signal is noted for the loop to see, a second one ends the program at once.

    Has no effect outside the main thread, where Python does not deliver signals.

    Attributes:
        signal: the signal received, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal is not None

    def stop(self) -> None:
        """Ends the program as the signal asks for: SIGINT raises KeyboardInterrupt, SIGTERM exits with code 0."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(0)

    def _note(self, number: int, frame) -> None:
        del frame
        if self:
            raise KeyboardInterrupt
        self.signal = number
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)
