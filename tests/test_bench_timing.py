"""Timing of programs: how often they run, what their seconds and bytes mean, and rates of a device."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_dit import bench_timing, targets

N = 1000
PAUSE = 0.03


def test_every_repeat_is_a_whole_call(monkeypatch):
    monkeypatch.setattr(bench_timing, "SHORT", PAUSE / 2)  # such a program is not run several times in a row
    calls = []

    def pause(x):
        time.sleep(PAUSE + 0.05 * (len(calls) == 3))  # one of the repeats is slow
        calls.append(1)
        return np.float32(x)

    def program(x):
        return 2 * x, jax.pure_callback(pause, jax.ShapeDtypeStruct((), jnp.float32), x[0])

    made = []

    def inputs(shapes):
        made.append(shapes)
        return tuple(jnp.ones(x.shape, x.dtype) for x in shapes)

    shapes = (jax.ShapeDtypeStruct((N,), jnp.float32),)
    timing = bench_timing.measure(program, shapes, inputs, repeats=5, warmup=2)
    assert len(calls) == 2 + 1 + 5 and made == [shapes]  # warm-up, one to see how long it takes, repeats
    # A call isn't over before its number is there, and the slow one does not move the median.
    assert PAUSE <= timing.fastest <= timing.seconds < PAUSE + 0.05 <= timing.slowest
    assert timing.argument_bytes == 4 * N and timing.output_bytes >= 4 * N + 4
    assert timing.temporary_bytes >= 0 and timing.compile_seconds > 0


def test_short_programs_run_several_times_in_a_row():
    calls = []

    def count(x):
        calls.append(1)
        return np.float32(x)

    def program(x):
        return x, jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), x[0])

    shapes = (jax.ShapeDtypeStruct((1,), jnp.float32),)
    bench_timing.measure(program, shapes, lambda s: (jnp.ones(1),), repeats=2, warmup=1)
    row = (len(calls) - 2) / 2
    assert 1 < row <= bench_timing.MOST and row.is_integer()


def test_the_floor_is_whatever_takes_longer():
    rates = bench_timing.Rates(flops=100.0, source="", bandwidth=10.0)
    assert rates.floor(500, 20) == 5.0 and rates.floor(100, 20) == 2.0


def test_the_makers_peak_counts_for_16_bits_alone(monkeypatch):
    timing = bench_timing.Timing(3.0, 2.0, 4.0, 0.0, 0, 0, 0)
    monkeypatch.setattr(bench_timing, "measure", lambda *args: timing)
    unknown = bench_timing.rates("bfloat16")  # a CPU
    assert unknown.flops == 2 * 1024**3 / 2.0 and unknown.source == "measured, 1024 x 1024 matrix product, bfloat16"
    assert unknown.bandwidth == 2 * 4 * 2**24 / 2.0  # read and written, float32
    monkeypatch.setattr(targets, "peak", lambda kind: 123e12)
    assert bench_timing.rates("bfloat16").flops == 123e12
    assert "maker" in bench_timing.rates("bfloat16").source
    assert bench_timing.rates("float32").flops == unknown.flops


@pytest.mark.parametrize("program, count", [(bench_timing._product, 2), (bench_timing._negative, 1)])
def test_what_rates_are_measured_with(program, count):
    x = jnp.arange(16.0).reshape(4, 4)
    outputs, number = program(*[x] * count)
    assert outputs.shape == x.shape and number.size in (1, 4)
    expected = np.asarray(x) @ np.asarray(x) if count == 2 else -np.asarray(x)
    np.testing.assert_array_equal(outputs, expected)
