"""The protocol between the processes of one run: agreements, and ends. `hybrid_dit.processes` is what the rest uses.

Everything goes through the key-value store of JAX's coordination service, which process 0 hosts, and nothing through
devices, so that it works while the devices hang in a collective that will never complete. A thread in every process
reads the store twice a second:

* `event/failed`: the first failure, claimed by whoever failed first. All others print it and exit.
* `event/stop`: somebody got SIGTERM or SIGINT. Each process is held at its next check until all have said how many
  checks they have passed; all stop at the check after the highest.
* `alive/I`: counts up as long as process I lives; process 0 reports who stood still for too long.
"""

import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from hybrid_dit.errors import UserError

POLL = 0.5  # seconds between two looks at the store
SAME = 3.0  # seconds in which a process is to find the same bad input as another one, which is told once then
LOST = 60.0  # seconds without a sign of life after which a process is given up
LEAVE = 15.0  # seconds that process 0, which hosts the store, waits for the others to have read why they end
END = 600.0  # seconds that a process that is done waits for the others


class Store:
    """The few operations on the key-value store that are needed, under one prefix."""

    def __init__(self, client):
        """Wraps the client of `jax.distributed`."""
        self._client = client

    def put(self, key: str, value: str) -> None:
        """Writes, whatever is there."""
        self._client.key_value_set(f"hybrid_dit/{key}", value, allow_overwrite=True)

    def claim(self, key: str, value: str) -> bool:
        """Writes and returns True, or leaves what is there and returns False."""
        try:
            self._client.key_value_set(f"hybrid_dit/{key}", value, allow_overwrite=False)
        except RuntimeError as error:
            if "ALREADY_EXISTS" in str(error):
                return False
            raise
        return True

    def folder(self, key: str) -> dict[str, str]:
        """Returns everything under `key/`, by the rest of its name."""
        prefix = f"hybrid_dit/{key}/"
        return {name.rpartition("/")[2]: value for name, value in self._client.key_value_dir_get(prefix)}

    def wait(self, key: str, seconds: float) -> str | None:
        """Returns a value as soon as it is there, None if it isn't in time."""
        try:
            return self._client.blocking_key_value_get(f"hybrid_dit/{key}", int(seconds * 1000))
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def barrier(self, name: str, seconds: float) -> None:
        """Waits until all processes are here; raises RuntimeError if they aren't in time."""
        self._client.wait_at_barrier(f"hybrid_dit/{name}", int(seconds * 1000))


class Group:
    """One process's view of all of them.

    Attributes:
        index: of this process.
        count: of processes.
        signal: that all have agreed to stop for, once `stop` has returned it.
    """

    def __init__(self, store: Store, index: int, count: int, host: str = ""):
        """Starts the watching thread."""
        self.index, self.count, self.signal = index, count, None
        self._store, self._host = store, host or socket.gethostname()
        self._results, self._barriers = itertools.count(), itertools.count()
        self._checks, self._stop_at, self._stop_signal = 0, None, None
        self._held = threading.Lock()  # while the check to stop at is being agreed on
        self._failing, self._over, self._ending = threading.Event(), threading.Event(), threading.Lock()
        self._show_life(0)  # now: a process that is killed before it was seen would not be missed
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="hybrid_dit processes")
        self._watcher.start()

    # Agreements

    def on_main(self, function: Callable[[], Any], name: str = "") -> Any:
        """Calls the function in process 0; every process gets its result (what JSON holds), or its UserError.

        Results are told apart by their number; `name` is checked, since processes that call for different things would
        take one for the other from then on.
        """
        key = f"result/{next(self._results)}"
        if self.index == 0:
            try:
                outcome = json.dumps({"name": name, "value": function()})
            except UserError as error:
                self._store.put(key, json.dumps({"name": name, "error": str(error)}))
                raise
            self._store.put(key, outcome)
        else:
            # Without a limit: the first may work for hours. The watcher ends this process if it fails.
            while (outcome := self._store.wait(key, 1.0)) is None:
                pass
        outcome = json.loads(outcome)
        if outcome["name"] != name:
            raise RuntimeError(f"process {self.index} asked for {name!r} when process 0 did {outcome['name']!r}")
        if "error" in outcome:
            raise UserError(outcome["error"])
        return outcome["value"]

    def barrier(self, name: str, seconds: float) -> None:
        """Waits until all processes are here.

        Raises:
            UserError: some are not in time; says which, as JAX knows them.
        """
        try:
            self._store.barrier(f"{name}/{next(self._barriers)}", seconds)
        except RuntimeError as error:
            told = " ".join(str(error).split())[:400]
            raise UserError(f"not all processes reached {name!r} within {seconds:g} s: {told}") from error

    def stop(self, signal: int | None) -> int | None:
        """Returns the signal to stop for, at the same call in all processes; `signal` is what this one received."""
        with self._held:
            self._checks += 1
            if self._stop_at is not None and self._checks >= self._stop_at:
                self.signal = self._stop_signal
        if signal is not None and self.signal is None:
            self._store.claim("event/stop", str(signal))
        return self.signal

    def end(self) -> None:
        """Waits for the others to be done, too. Nothing may be asked of the group afterwards."""
        self.barrier("end", END)
        self._over.set()
        self._watcher.join()

    # Failures

    def fail(self, error: BaseException) -> NoReturn:
        """Ends the process for an error of its own, after the others have been told of it."""
        self._failing.set()
        same = isinstance(error, (UserError, KeyboardInterrupt, SystemExit))  # may be raised in all of them
        mine = {"process": self.index, "host": self._host, "text": text_of(error), "code": _code(error), "same": same}
        mine["stopped"] = isinstance(error, SystemExit)
        if _may_be_collateral(error):  # a collective breaks if another process fails: let that one speak first
            self._store.wait("event/failed", LOST + 5)
        first = self._claim_failure(mine)
        if first["process"] == self.index:
            told = "" if same else "".join(traceback.format_exception(error))
            self._leave(first, told + (first["text"] if first["stopped"] else f"error: {first['text']}"))
        self._leave(first, None if same and first["text"] == mine["text"] else _told(first))

    def _claim_failure(self, failure: dict) -> dict:
        """Makes this the failure that all end for, unless there is one; returns the one that counts."""
        self._store.claim("event/failed", json.dumps(failure))
        return json.loads(self._store.wait("event/failed", 10.0))

    def _leave(self, first: dict, message: str | None) -> NoReturn:
        self._ending.acquire()  # never released: one thread tells and ends
        if message:
            print(f"{message}\n", end="", file=sys.stderr)  # in one piece: processes may write to one file
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            self._store.put(f"left/{self.index}", "")
            began, others = time.monotonic(), self.count - (1 if first.get("lost") else 0)
            while self.index == 0 and time.monotonic() - began < LEAVE and len(self._store.folder("left")) < others:
                time.sleep(0.1)
            time.sleep(0.2 if self.index == 0 else 0)  # what the others still do before they are gone
        finally:
            os._exit(first["code"])  # a normal exit would wait for processes that may be gone

    def _watch(self) -> None:
        alive: dict[str, tuple[str, float]] = {}  # process -> (its last sign of life, when it was seen first)
        for beat in itertools.count(1):
            if self._over.wait(POLL):
                return
            try:
                self._show_life(beat)
                events = self._store.folder("event")
                if "failed" in events:
                    self._follow(json.loads(events["failed"]))
                    return
                if "stop" in events and self._stop_at is None:
                    self._settle(int(events["stop"]))
                if self.index == 0:
                    self._look_for_lost(alive)
            except RuntimeError:
                continue  # the store does not answer: JAX ends the process if that lasts

    def _show_life(self, beat: int) -> None:
        self._store.put(f"alive/{self.index}", f"{beat} {self._host}")

    def _follow(self, first: dict) -> None:
        # If the main thread fails for the same reason, it says so itself, or nothing at all.
        if self._failing.is_set() or (first["same"] and self._failing.wait(SAME)):
            return
        self._leave(first, _told(first))

    def _settle(self, signal: int) -> None:
        """Agrees with all others on the check to stop at; the main thread doesn't pass another one meanwhile."""
        with self._held:
            self._store.put(f"checks/{self.index}", str(self._checks))
            counts = []
            for i in range(self.count):
                while (count := self._store.wait(f"checks/{i}", 1.0)) is None:
                    if "failed" in self._store.folder("event"):
                        return  # to `_watch`, which ends the process
                counts.append(int(count))
            self._stop_at, self._stop_signal = max(counts) + 1, signal

    def _look_for_lost(self, alive: dict[str, tuple[str, float]]) -> None:
        now = time.monotonic()
        for process, sign in self._store.folder("alive").items():
            if alive.get(process, ("", 0))[0] != sign:
                alive[process] = sign, now
            elif now - alive[process][1] > LOST:
                text = f"no sign of life for {LOST:g} s; it was killed (out of memory?), or its machine is gone"
                host = sign.partition(" ")[2]
                failure = {"process": int(process), "host": host, "text": text, "code": 1, "same": False, "lost": True}
                self._claim_failure(failure)


def _told(first: dict) -> str:
    if first.get("stopped"):
        return f"process {first['process']} on {first['host']} {first['text']}"
    return f"error: process {first['process']} on {first['host']} failed first: {first['text']}"


def text_of(error: BaseException) -> str:
    """Returns what is told of the error that ends a process."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command continues"
    if isinstance(error, SystemExit):
        return f"stopped with exit code {error.code}; the same command continues"
    return f"{type(error).__name__}: {error}"


def _code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def _may_be_collateral(error: BaseException) -> bool:
    own = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")  # what no other process can be the reason of
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and not str(error).startswith(own)
