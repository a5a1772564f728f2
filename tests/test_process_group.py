"""The protocol between processes, played by threads on a store in memory; `os._exit` ends a thread here."""

import json
import threading
import time

import pytest

from hybrid_dit import process_group
from hybrid_dit.errors import UserError
from hybrid_dit.process_group import Group, Store


class Ended(BaseException):
    """What `os._exit` does here."""


class FakeStore(Store):
    """What `process_group.Store` does, in this process."""

    def __init__(self):
        self.values, self.changed, self.here = {}, threading.Condition(), {}

    def put(self, key, value):
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def claim(self, key, value):
        with self.changed:
            if key in self.values:
                return False
            self.put(key, value)
            return True

    def folder(self, key):
        with self.changed:
            return {name[len(key) + 1 :]: v for name, v in self.values.items() if name.startswith(f"{key}/")}

    def wait(self, key, seconds):
        with self.changed:
            return self.values[key] if self.changed.wait_for(lambda: key in self.values, seconds) else None

    def barrier(self, name, seconds):
        with self.changed:
            self.here[name] = self.here.get(name, 0) + 1
            self.changed.notify_all()
            if not self.changed.wait_for(lambda: self.here[name] == self.count, seconds):
                raise RuntimeError(f"DEADLINE_EXCEEDED: {name}: {self.here[name]}/{self.count}\nfirst: 0")


@pytest.fixture
def store(monkeypatch):
    store = FakeStore()
    store.exits = []

    def end(code):
        store.exits.append(code)
        raise Ended

    monkeypatch.setattr(process_group.os, "_exit", end)
    monkeypatch.setattr(process_group, "POLL", 0.01)
    monkeypatch.setattr(process_group, "LEAVE", 1.0)
    monkeypatch.setattr(process_group, "SAME", 0.5)
    monkeypatch.setattr(threading, "excepthook", lambda info: None)  # of threads that `Ended` ends
    return store


def play(store, count, program):
    """Runs program(group) in `count` threads; returns what each returned or raised. Watchers are stopped at the end."""
    store.count, groups, results = count, [Group(store, i, count, f"host{i}") for i in range(count)], [None] * count

    def run(i):
        try:
            results[i] = program(groups[i])
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for group in groups:
        group._over.set()
        group._watcher.join(20)
    return results


def test_the_first_process_decides_for_all(store):
    called = []

    def program(group):
        def decide():
            called.append(group.index)
            return {"steps": [1, 2], "folder": "ä b"}

        return group.on_main(decide), group.on_main(lambda: None)

    assert play(store, 3, program) == [({"steps": [1, 2], "folder": "ä b"}, None)] * 3
    assert called == [0]


def test_bad_input_that_the_first_process_finds_is_raised_in_all(store):
    def program(group):
        def refuse():
            raise UserError("no such folder: x")

        with pytest.raises(UserError, match="no such folder: x"):
            group.on_main(refuse)
        return group.on_main(lambda: "and on it goes")

    assert play(store, 2, program) == ["and on it goes"] * 2


def test_processes_that_part_ways_are_told_so(store):
    def program(group):
        return group.on_main(lambda: 1, "finish" if group.index == 0 else "open")

    first, second = play(store, 2, program)
    assert first == 1 and str(second) == "process 1 asked for 'open' when process 0 did 'finish'"


@pytest.mark.parametrize("process", [0, 2])
@pytest.mark.parametrize("at", [1, 7])
def test_all_stop_after_the_same_step_whoever_got_the_signal(store, process, at):
    """Steps are in lock-step as collectives make them: nobody is in step n + 1 before all have finished step n - 1."""
    step = threading.Barrier(3)

    def program(group):
        for n in range(1, 200):
            step.wait(10)
            time.sleep(0.002 * group.index)
            if group.stop(15 if group.index == process and n >= at else None):
                return n, group.signal
        return None

    stops = play(store, 3, program)
    assert len(set(stops)) == 1 and stops[0][0] > at and stops[0][1] == 15


def test_a_process_between_two_loops_stops_with_the_others(store):
    """The request comes while process 1 passes no checks; then both stop at the same one."""

    def program(group):
        if group.index:
            group._store.wait("checks/0", 10)
        n = 0
        while not group.stop(2 if group.index == 0 else None):
            n += 1
            time.sleep(0.01)
        return n

    first, second = play(store, 2, program)
    assert first == second


def test_a_barrier_says_who_is_missing(store):
    def program(group):
        if group.index == 0:
            group.barrier("data", 0.05)
        return None

    error, _ = play(store, 2, program)
    assert isinstance(error, UserError)
    missing = "not all processes reached 'data' within 0.05 s: DEADLINE_EXCEEDED: data/0: 1/2 first: 0"
    assert str(error) == missing


def test_bad_input_of_all_processes_is_told_once(store, capfd):
    play(store, 3, lambda group: group.fail(UserError("frames=2 is not 4n + 1")))
    assert store.exits == [2, 2, 2]
    assert capfd.readouterr().err == "error: frames=2 is not 4n + 1\n"


def test_a_failure_ends_processes_that_wait_and_names_the_first(store, capfd):
    def program(group):
        if group.index == 1:
            try:
                raise KeyError("no such key")
            except KeyError as error:
                group.fail(error)
        return group._store.wait("never", 1.0)  # as if in a collective; the watcher ends the process, here its thread

    play(store, 3, program)
    assert store.exits == [1, 1, 1]
    told = capfd.readouterr().err
    assert told.count("Traceback") == 1 and "error: KeyError: 'no such key'\n" in told
    assert told.count("error: process 1 on host1 failed first: KeyError: 'no such key'\n") == 2


def test_what_breaks_because_another_process_failed_is_not_blamed(store, capfd, monkeypatch):
    broken = type("JaxRuntimeError", (RuntimeError,), {})

    def program(group):
        if group.index == 0:
            group.fail(broken("UNKNOWN: Gloo AllGather failed: Connection closed by peer"))
        time.sleep(0.2)
        group.fail(UserError("the file is damaged"))

    play(store, 2, program)
    assert store.exits == [2, 2]
    told = capfd.readouterr().err
    assert "Gloo" not in told and "error: process 1 on host1 failed first: the file is damaged\n" in told


def test_out_of_memory_is_told_at_once(store, capfd):
    broken = type("JaxRuntimeError", (RuntimeError,), {})
    began = time.monotonic()
    play(store, 1, lambda group: group.fail(broken("RESOURCE_EXHAUSTED: out of memory")))
    assert store.exits == [1] and time.monotonic() - began < 5
    assert "error: JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory\n" in capfd.readouterr().err


def test_a_process_that_shows_no_life_is_given_up(store, capfd, monkeypatch):
    monkeypatch.setattr(process_group, "LOST", 0.3)
    put = store.put

    def lossy(key, value):
        if key != "alive/1" or value.startswith("0 "):  # process 1 is killed after its first sign of life
            put(key, value)

    monkeypatch.setattr(store, "put", lossy)
    play(store, 2, lambda group: store.wait("never", 1.5))
    assert json.loads(store.values["event/failed"])["process"] == 1
    assert "error: process 1 on host1 failed first: no sign of life for 0.3 s; it was killed" in capfd.readouterr().err
    assert store.exits[0] == 1
