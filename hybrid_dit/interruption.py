"""Ends a loop in good order on Ctrl-C (SIGINT) or SIGTERM: the step at hand is finished and saved first.

With several processes all of them stop after the same step, whichever of them got the signal.
"""

import signal
import sys
import threading

from hybrid_dit import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Inside `with`, a first signal is noted for the loop to see, a second one ends the program at once.

    Has no effect outside the main thread, where Python does not deliver signals.

    Attributes:
        signal: the signal that this process received, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._agreed: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def due(self) -> bool:
        """Whether to save and `stop` now, the same in all processes. To be asked once per step."""
        self._agreed = processes.stop(self.signal)
        return self._agreed is not None

    def stop(self) -> None:
        """Ends the program: SIGINT raises KeyboardInterrupt, SIGTERM exits with `processes.stop_code`."""
        if self._agreed == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(processes.stop_code())

    def _note(self, number: int, frame) -> None:
        del frame
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)
