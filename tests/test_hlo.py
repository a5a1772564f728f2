"""Programs compiled here for fake devices, whose collectives are known, and lines of programs for TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_dit import hlo
from hybrid_dit.errors import UserError

DEVICES, STEPS = 4, 7


def compiled(function, *shapes_and_specs):
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("x",))
    inputs = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in shapes_and_specs
    ]
    return hlo.parse(jax.jit(function(mesh)).lower(*inputs).compile().as_text())


def mapped(body):
    """A function of a mesh: `body` under shard_map, input and output split over their first axis."""
    split = PartitionSpec("x")
    return lambda mesh: jax.shard_map(body, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)


@pytest.mark.parametrize(
    "kind, body, size",
    [
        # Shards are [2, 8] float32, 64 bytes; the sizes are those of the whole array that a collective is about.
        ("all-gather", lambda x: jax.lax.all_gather(x, "x", tiled=True)[:2], 64 * DEVICES),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(jnp.tile(x, (2, 1)), "x", tiled=True) + x[:1], 2 * 64),
        ("all-reduce", lambda x: jax.lax.psum(x, "x"), 64),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % DEVICES) for i in range(4)]), 64),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "x", 1, 1, tiled=True), 64),
    ],
)
def test_every_collective_once_and_in_a_loop(kind, body, size):
    shape = (2 * DEVICES, 8)
    assert hlo.collectives(compiled(mapped(body), (shape, PartitionSpec("x")))) == ({kind: hlo.Traffic(1, size)}, 0)

    def loop(x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c + body(c).sum()), None), x, None, length=STEPS)[0]

    looped = compiled(mapped(loop), (shape, PartitionSpec("x")))
    assert hlo.collectives(looped) == ({kind: hlo.Traffic(STEPS, STEPS * size)}, 0)


def test_origins_are_names_of_jax_operations():
    def body(x):
        with jax.named_scope("big"):
            big = jax.lax.psum(x, "x")
        with jax.named_scope("small"):
            return big + jax.lax.ppermute(big[:1], "x", [(i, i) for i in range(DEVICES)])

    program = compiled(mapped(body), ((8, 8), PartitionSpec("x")))
    (first, second), traffic = zip(*hlo.collectives_by_origin(program).items())
    assert (first[0], second[0]) == ("all-reduce", "collective-permute")
    assert "big" in first[1] and "small" in second[1] and traffic == (hlo.Traffic(1, 64), hlo.Traffic(1, 32))


def test_loops_in_loops_multiply():
    def inner(c, _):
        return jnp.tanh(c + jax.lax.psum(c, "x")), None

    def outer(c, _):
        return jax.lax.scan(inner, c, None, length=3)[0], None

    program = compiled(mapped(lambda x: jax.lax.scan(outer, x, None, length=5)[0]), ((8, 8), PartitionSpec("x")))
    assert hlo.collectives(program)[0]["all-reduce"].count == 15


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    def body(x):
        return jax.lax.while_loop(lambda c: c.sum() < 100, lambda c: c + jax.lax.psum(c, "x"), x)

    traffic, unknown = hlo.collectives(compiled(mapped(body), ((8, 8), PartitionSpec("x"))))
    assert traffic["all-reduce"].count == unknown == 1


def test_collectives_that_the_compiler_adds_are_found():
    # A matrix product contracted over the split axis: partial sums of [16, 16] float32 have to be added up.
    program = compiled(
        lambda mesh: lambda a, b: jax.lax.with_sharding_constraint(a @ b, NamedSharding(mesh, PartitionSpec())),
        ((16, 8), PartitionSpec(None, "x")),
        ((8, 16), PartitionSpec("x")),
    )
    assert hlo.collectives(program) == ({"all-reduce": hlo.Traffic(1, 16 * 16 * 4)}, 0)


# What libtpu 0.0.42 writes (shortened): tiled layouts, no stated trip count, asynchronous pairs, cycles of fusions.
TPU = """
HloModule jit_f, is_scheduled=true

%fused (param_0.7: bf16[4096,1024]) -> bf16[4096,4096] {
  %param_0.7 = bf16[4096,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.1 = bf16[4096,4096]{1,0:T(8,128)(2,1)} copy(%param_0.7)
}

%body (wide.param.2: (s32[], bf16[2048,1024], /*index=5*/u32[])) -> (s32[], bf16[2048,1024]) {
  %wide.param.2 = (s32[]{:T(128)}, bf16[2048,1024]{1,0:T(8,128)(2,1)S(1)}, /*index=5*/u32[]) parameter(0)
  %gte.1 = bf16[2048,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.2), index=1
  %cp-start = (bf16[2048,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[2048,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%gte.1), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %cp-done = bf16[2048,1024]{1,0:T(8,128)(2,1)} collective-permute-done(%cp-start)
  %ag-start = (bf16[2048,1024]{1,0}, bf16[4096,1024]{1,0}) all-gather-start(%cp-done), replica_groups={{0,1}}
  %ag-done = bf16[4096,1024]{1,0:T(8,128)(2,1)} all-gather-done(%ag-start)
  %fusion.3 = bf16[4096,4096]{1,0} fusion(%ag-done), kind=kOutput, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"1000","iteration_bounds":["2"]}}
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[2048,1024]{1,0:T(8,128)(2,1)}) tuple(%gte.1, %cp-done)
}

%condition (wide.param.1: (s32[], bf16[2048,1024])) -> pred[] {
  %constant.9.clone.1 = s32[]{:T(128)} constant(7)
  %wide.param.1 = (s32[]{:T(128)}, bf16[2048,1024]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %gte.20 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  ROOT %lt.3 = pred[]{:T(512)} compare(%gte.20, %constant.9.clone.1), direction=LT
}

ENTRY %main.7_spmd (param.3: bf16[2048,1024]) -> bf16[2048,1024] {
  %param.3 = bf16[2048,1024]{1,0:T(8,128)(2,1)} parameter(0), sharding={devices=[2,1]<=[2]}
  %tuple.21 = (s32[]{:T(128)}, bf16[2048,1024]{1,0:T(8,128)(2,1)}) tuple(%param.3, %param.3)
  %while.10 = (s32[]{:T(128)}, bf16[2048,1024]{1,0}) while(%tuple.21), condition=%condition, body=%body
  %fusion.4 = bf16[4096,4096]{1,0} fusion(%param.3), kind=kLoop, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"50"}}
  ROOT %gte.9 = bf16[2048,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%while.10), index=1
}
"""


def test_text_of_the_tpu_compiler():
    program = hlo.parse(TPU)
    shard = 2048 * 1024 * 2
    expected = {"all-gather": hlo.Traffic(7, 7 * 2 * shard), "collective-permute": hlo.Traffic(7, 7 * shard)}
    assert hlo.collectives(program) == (expected, 0)
    assert hlo.estimated_cycles(program) == 7 * 1000 + 50


# One all-gather that three fused computations carry on, as libtpu 0.0.42 writes it for v5e, and another by itself.
CHAIN = """
HloModule jit_f
"""
for part in "abc":
    CHAIN += f"""
%fused.{part} (param_0.{part}: bf16[64,128]) -> bf16[256,128] {{
  %param_0.{part} = bf16[64,128] parameter(0)
  ROOT %all-gather.{part} = bf16[256,128] all-gather(%param_0.{part}), channel_id=5, dimensions={{0}}, \
frontend_attributes={{chain_id="3"}}, backend_config={{"async_collective_fusion_config":{{"flag_start":"2"}}}}
}}
"""
CHAIN += """
ENTRY %main (param.3: bf16[64,128]) -> bf16[256,128] {
  %param.3 = bf16[64,128] parameter(0)
  %fusion.1 = bf16[256,128] fusion(%param.3), kind=kCustom, calls=%fused.a
  %fusion.2 = bf16[256,128] fusion(%param.3), kind=kCustom, calls=%fused.b
  %fusion.3 = bf16[256,128] fusion(%param.3), kind=kCustom, calls=%fused.c
  ROOT %all-gather.9 = bf16[256,128] all-gather(%param.3), channel_id=6, dimensions={0}
}
"""


def test_a_collective_in_pieces_counts_once():
    assert hlo.collectives(hlo.parse(CHAIN)) == ({"all-gather": hlo.Traffic(2, 2 * 256 * 128 * 2)}, 0)


def test_text_that_is_no_program():
    with pytest.raises(UserError, match="no entry computation"):
        hlo.parse("HloModule nothing")
