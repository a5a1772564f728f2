"""Seconds and bytes of compiled programs, and the rates of the device that they are compared with."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from numbers import Real

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_dit import targets
from hybrid_dit.array_typing import PyTree

SHORT = 0.1  # seconds that calls in a row take, for the way to the device to weigh as little in all programs
MOST = 50  # in a row: each holds its outputs


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        seconds: median of the repeats.
        fastest: of the repeats.
        slowest: of the repeats.
        compile_seconds: compilation, from the cache if it is there.
        argument_bytes: of all arguments.
        output_bytes: of all outputs.
        temporary_bytes: what the compiler sets aside beside them.
    """

    seconds: float
    fastest: float
    slowest: float
    compile_seconds: float
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int


def measure(function: Callable, shapes: PyTree, inputs: Callable, repeats: int, warmup: int = 1) -> Timing:
    """Compiles a function and times it.

    Args:
        function: returns (outputs, a number); a call is over when the number has arrived on the host.
        shapes: of its arguments, a tuple.
        inputs: makes the arguments from `shapes`, once the program is compiled.
        repeats: how often it is timed.
        warmup: calls before that.
    """
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*shapes).compile()
    compile_seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    arguments = jax.block_until_ready(inputs(shapes))

    def seconds(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            _, number = compiled(*arguments)
        float(number)  # programs run in order: with the last one all are done
        return (time.perf_counter() - began) / calls

    for _ in range(warmup):
        seconds(1)
    calls = int(np.clip(SHORT / seconds(1), 1, MOST))
    times = [seconds(calls) for _ in range(repeats)]
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    return Timing(statistics.median(times), min(times), max(times), compile_seconds, *sizes)


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device can do at most.

    Attributes:
        flops: FLOP/s of matrix products.
        source: where that number is from.
        bandwidth: bytes/s of its memory, reading and writing, measured.
    """

    flops: float
    source: str
    bandwidth: float

    def floor(self, flops: Real, bytes_: Real) -> Real:
        """Seconds that a program takes at least: its FLOPs, or moving its arguments and outputs once."""
        return max(flops / self.flops, bytes_ / self.bandwidth)


def rates(dtype: str, repeats: int = 5) -> Rates:
    """Returns the rates of this process's first device: its maker's peak for 16 bits if known, else measured ones."""
    device = jax.local_devices()[0]
    large = device.platform != "cpu"
    peak = targets.peak(device.device_kind) if jnp.dtype(dtype).itemsize == 2 else None
    source = f"peak of {device.device_kind} as its maker states it, {dtype}"
    if peak is None:
        n = 8192 if large else 1024
        x = jax.ShapeDtypeStruct((n, n), jnp.dtype(dtype))
        peak = 2 * n**3 / measure(_product, (x, x), _uniform, repeats).fastest
        source = f"measured, {n} x {n} matrix product, {dtype}"
    x = jax.ShapeDtypeStruct((2**28 if large else 2**24,), jnp.float32)
    return Rates(peak, source, 2 * 4 * x.size / measure(_negative, (x,), _uniform, repeats).fastest)


def _product(x, y):
    z = x @ y
    return z, z[0, 0].astype(jnp.float32)


def _negative(x):
    y = -x
    return y, y[0]


def _uniform(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.random.uniform(jax.random.key(0, impl="rbg"), x.shape, x.dtype), shapes)
