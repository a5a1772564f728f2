"""One console line for long work: how far, how fast, how long still."""

import sys
import time


class Progress:
    """Prints `label 120/1000 12%  3.4 step/s  4m19s left  loss 0.012` at most every `every` seconds, and at the end."""

    def __init__(self, label: str, total: int, unit: str = "step", start: int = 0, every: float = 2.0):
        """Starts the clock; `start` steps were done by an earlier run and don't count for the rate."""
        self.label, self.total, self.unit, self.start, self.every = label, total, unit, start, every
        self.began = time.monotonic()
        self.printed = -float("inf")

    def update(self, done: int, **values: float) -> None:
        """Reports that `done` of `total` units are complete, with any numbers worth watching."""
        now = time.monotonic()
        if done < self.total and now - self.printed < self.every:
            return
        self.printed = now
        elapsed = max(now - self.began, 1e-9)
        rate = (done - self.start) / elapsed
        left = (self.total - done) / rate if rate > 0 else float("inf")
        speed = f"{rate:.3g} {self.unit}/s" if rate >= 0.1 or rate == 0 else f"{1 / rate:.3g} s/{self.unit}"
        ending = f"{duration(left)} left" if done < self.total else f"{duration(elapsed)} in all"
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"{self.label} {done}/{self.total} {100 * done // self.total}%  {speed}  {ending}  {shown}".rstrip())
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """Returns 47s, 4m19s or 2h05m."""
    if seconds == float("inf"):
        return "?"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
