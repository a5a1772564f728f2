"""Several processes that run the same job together, one per host (TPU) or device (Slurm): `--distributed...`.

Every process runs `main` with the same arguments. What belongs to one process alone is wrapped in `on_main`: process 0
does it, the others wait for the result, which is how everything that a file decides is decided once for all. So
process 0 writes all files (but checkpoints, which Orbax writes from all), and it alone prints. With one process all
functions here do the obvious, and nothing is initialised.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from hybrid_dit.errors import UserError
from hybrid_dit.process_group import Group, Store, text_of

HELP = (
    "several processes: --distributed=auto (TPU pod, Slurm), or in each of them --distributed.coordinator=HOST:PORT "
    "--distributed.processes=N --distributed.process_id=I [--distributed.timeout=SECONDS]"
)
TIMEOUT = 300  # seconds that all processes have to come together
PATIENCE = 20.0  # seconds after which it is said that others are missing
# Read if the first one is set and no option is given.
VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}

# Where it is set, the exit code after SIGTERM, for schedulers that would take 0 for a job that is finished.
STOP_CODE = "HYBRID_DIT_STOP_CODE"

_group: Group | None = None
_index = 0  # of this process; still known after the end
_alone = False  # whether this is process 0 in `on_main`
_noted = threading.Event()  # that SIGTERM has come outside of loops


@dataclasses.dataclass(frozen=True)
class Options:
    """How this process finds the others; None: JAX is to find out (TPU metadata, Slurm)."""

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    timeout: int = TIMEOUT


def parse(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> tuple[Options | None, list[str]]:
    """Returns (options, or None for a single process; the other arguments).

    Raises:
        UserError: an unknown option, a wrong value, or one that is missing.
    """
    given, rest = {}, []
    for argument in argv:
        name, _, value = argument.partition("=")
        if name == "--distributed" or name.startswith("--distributed."):
            given[name.removeprefix("--distributed").removeprefix(".")] = value
        else:
            rest.append(argument)
    auto = given.pop("", None)
    if auto not in (None, "auto"):
        raise UserError(f"--distributed={auto} is unknown; {HELP}")
    timeout = _number("--distributed.timeout", given.pop("timeout", str(TIMEOUT)), 1)
    unknown = given.keys() - VARIABLES.keys()
    if unknown:
        raise UserError(f"unknown option --distributed.{min(unknown)}; {HELP}")
    where = {name: f"--distributed.{name}" for name in VARIABLES}
    if auto:
        if given:
            raise UserError(f"--distributed=auto finds out --distributed.{min(given)} by itself; give one or the other")
        return Options(timeout=timeout), rest
    if not given:
        if not environment.get(VARIABLES["coordinator"]):
            return None, rest
        where = VARIABLES
        given = {name: environment[variable] for name, variable in VARIABLES.items() if environment.get(variable)}
    missing = [where[name] for name in VARIABLES if not given.get(name)]
    if missing:
        raise UserError(f"{missing[0]} is missing; {HELP}")
    host, _, port = given["coordinator"].rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{where['coordinator']}={given['coordinator']} is not HOST:PORT, such as 10.0.0.2:8476")
    processes = _number(where["processes"], given["processes"], 1)
    process_id = _number(where["process_id"], given["process_id"], 0)
    if process_id >= processes:
        raise UserError(f"{where['process_id']}={process_id} must be less than {where['processes']}={processes}")
    return Options(given["coordinator"], processes, process_id, timeout), rest


@contextlib.contextmanager
def joined(options: Options | None) -> Iterator[None]:
    """Inside `with`, this process is one of those that `options` describes; None changes nothing.

    They end together: at the end each waits for the others. If one of them raises, all end with its exit code, and say
    which it was and why (`os._exit`: the others may hang in a collective). SIGTERM ends them, too: in good order in
    loops that look for it (`Interruption`), at once everywhere else, since there is nothing to save.

    Raises:
        UserError: the others can't be found.
    """
    with _ended_by_sigterm():
        if options is None:
            yield
        else:
            with _together(options):
                yield


@contextlib.contextmanager
def _together(options: Options) -> Iterator[None]:
    global _group, _index
    _initialise(options)
    from jax._src import distributed  # the store has no public name; Orbax takes it from here, too

    state = distributed.global_state
    _index = state.process_id
    _group = Group(Store(state.client), state.process_id, state.num_processes)
    if _index:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    stopped = None
    try:
        try:
            yield
        except (SystemExit, KeyboardInterrupt) as error:
            if _group.signal is None:  # not what all have agreed on
                raise
            stopped = error
        _group.end()
    except BaseException as error:
        _group.fail(error)
    _group = None
    distributed.shutdown()
    if stopped is not None:
        raise stopped


def is_main() -> bool:
    """Whether this is process 0, or the only one."""
    return _index == 0


def count() -> int:
    """Number of processes of this run."""
    return _group.count if _group else 1


def on_main(function: Callable[..., Any], *args, **kwargs) -> Any:
    """Calls the function in process 0 alone, once all processes ask for it; all get what it returns, or its UserError.

    The function must not use devices of other processes (see `devices`); what it returns must be JSON (None, numbers,
    text, lists). Within it, `on_main` is a plain call.
    """
    global _alone
    if _group is None or _alone:
        return function(*args, **kwargs)

    def alone():
        global _alone
        _alone = True
        try:
            return function(*args, **kwargs)
        finally:
            _alone = False

    return _group.on_main(alone, getattr(function, "__qualname__", type(function).__name__))


def barrier(name: str, seconds: float = 600.0) -> None:
    """Waits until all processes are here.

    Raises:
        UserError: some are not in time.
    """
    if _group is not None and not _alone:
        _group.barrier(name, seconds)


def stop(signal: int | None) -> int | None:
    """Returns the signal to stop for, or None: the same in all processes, whichever of them got one.

    To be called equally often by all, once per step of a loop.
    """
    return signal if _group is None or _alone else _group.stop(signal)


def stop_code() -> int:
    """Returns the exit code after SIGTERM: 0, or what the variable `STOP_CODE` says."""
    return int(os.environ.get(STOP_CODE) or 0)


def devices() -> list:
    """Devices that the code at hand may use: all, or those of process 0 within `on_main`."""
    import jax

    return jax.local_devices() if _alone else jax.devices()


def check_joined() -> None:
    """Raises UserError if JAX knows of other processes (on a TPU pod) that nobody told us of."""
    import jax

    if _group is None and jax.process_count() > 1:
        raise UserError(
            f"this is one of {jax.process_count()} processes of a TPU pod; start all of them with --distributed=auto"
        )


def _initialise(options: Options) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if hasattr(jax.config, "jax_enable_preemption_service"):
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `Interruption`
    found = {"cluster_detection_method": "deactivate"} if options.coordinator else {}
    who = f"process {options.process_id} of {options.processes} at {options.coordinator}" if found else "this process"
    advice = f"is every one of them started, and is the coordinator's port open between the machines? {HELP}"
    # Told beforehand: when the time is over, JAX aborts with a stack trace instead of raising an error.
    waiting = f"{who} waits for the others, for {options.timeout} s at most; {advice}"
    hint = threading.Timer(min(PATIENCE, options.timeout / 2), print, [waiting], {"file": sys.stderr, "flush": True})
    hint.daemon = True
    hint.start()
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process_id,
            initialization_timeout=options.timeout,
            **found,
        )
        jax.devices()  # which waits for all processes, too: within `on_main`, the others would never come
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the processes of this run can't come together ({reason}); {advice}") from error
    finally:
        hint.cancel()


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside `with`, SIGTERM ends the process at once, unless somebody else has taken over the signal.

    A thread does it: Python's own handlers have to wait while the main thread compiles.
    """
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in that one alone
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch():
        while number := os.read(reading, 1)[0]:
            if number == signal.SIGTERM and (signal.getsignal(signal.SIGTERM) is _note or _noted.is_set()):
                _end()

    thread = threading.Thread(target=watch, daemon=True, name="hybrid_dit SIGTERM")
    thread.start()
    before = signal.signal(signal.SIGTERM, _note), signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before[1])
        signal.signal(signal.SIGTERM, before[0])
        os.write(writing, b"\0")  # ends the thread
        thread.join()
        os.close(writing)
        os.close(reading)


def _note(number: int, frame) -> None:
    """Has the thread end the process even if a loop takes over the signal before the thread has looked."""
    del number, frame
    _noted.set()


def _end() -> NoReturn:
    stop = SystemExit(stop_code())
    try:
        if _group is not None:
            _group.fail(stop)
        print(f"{text_of(stop)}\n", end="", file=sys.stderr, flush=True)
        sys.stdout.flush()
    finally:
        os._exit(stop.code)


def _number(option: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{option}={text} is not a whole number of at least {least}")
    return int(text)
