"""What a benchmark runs: attention, self-attention with its projections, a block, or a whole DiT, with random inputs.

FLOPs are those of `hybrid_dit.cost`; a forward and backward pass counts three times a forward one, whatever a backward
pass computes anew.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from hybrid_dit import cost
from hybrid_dit.array_typing import Array, PyTree
from hybrid_dit.convert import tables
from hybrid_dit.convert.abstract import abstract_dit
from hybrid_dit.errors import UserError
from hybrid_dit.generation import latent_shape
from hybrid_dit.models.vae import VAEConfig
from hybrid_dit.models.wan import SelfAttention, WanBlock, WanConfig, WanDiT
from hybrid_dit.ops import backends
from hybrid_dit.ops.hybrid import attention
from hybrid_dit.ops.rope import rope_table
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.sample_loading import kept_dtype

WHAT = ("op", "attention", "block", "model")
DIRECTIONS = {"forward": 1, "forward+backward": 3}  # and how many forward passes one counts as


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        what: one of `WHAT`.
        label: attention of the op or block (softmax, R2, linear), or of a model: softmax, or 15R8 for its first 15
            blocks at R = 8.
        video: FRAMESxHEIGHTxWIDTH in pixels.
        direction: one of `DIRECTIONS`.
        dtype: of activations.
        backend: of attention, resolved: xla, tpu or gpu.
    """

    what: str
    label: str
    video: str
    direction: str
    dtype: str
    backend: str


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The model that cases are parts of.

    Attributes:
        wan: of the DiT.
        vae: decides the latents of a video.
        specs: {label: attention}, softmax among them.
        text_tokens: of the prompt.
    """

    wan: WanConfig
    vae: VAEConfig
    specs: dict[str, AttentionSpec]
    text_tokens: int

    def latents(self, video: str) -> tuple[int, int, int, int]:
        """(t, y, x, c) of a video.

        Raises:
            UserError: the video isn't written FRAMESxHEIGHTxWIDTH, or doesn't fit the model.
        """
        return latent_shape(self.wan, self.vae, *video_size(video))

    def tokens(self, video: str) -> int:
        """N of a video."""
        return math.prod(self.wan.grid(self.latents(video)))

    def attention(self, label: str) -> tuple[AttentionSpec, ...]:
        """One spec per block: of a model's label, or the same one everywhere.

        Raises:
            UserError: a model's name that can't be read, or asks for more blocks or another rate than there are.
        """
        blocks = self.wan.num_layers
        if label in self.specs:
            return (self.specs[label],) * blocks
        count, rate = cost.parse_name(label)
        if count > blocks or rate not in self.specs:
            raise UserError(
                f"bench.models: {label} must name at most {blocks} blocks and one of bench.rates="
                f"{','.join(name for name in self.specs if name != 'softmax')}"
            )
        return (self.specs[rate],) * count + (self.specs["softmax"],) * (blocks - count)


def video_size(video: str) -> tuple[int, int, int]:
    """Returns (frames, height, width) of FRAMESxHEIGHTxWIDTH.

    Raises:
        UserError: it isn't written so.
    """
    parts = video.split("x")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise UserError(f"bench.videos: {video!r} is not FRAMESxHEIGHTxWIDTH, such as 81x480x832")
    frames, height, width = map(int, parts)
    return frames, height, width


def resolved_backend(sizes: Sizes, label: str, dtype: str, backend: str) -> str:
    """Returns the backend that computes a label's attention where `backend` is asked for."""
    converted = [spec for spec in sizes.attention(label) if spec.converted]
    spec = (converted or sizes.attention("softmax"))[0]
    return backends.choose(backend, spec, sizes.wan.head_dim, jnp.dtype(dtype))


def flops(sizes: Sizes, case: Case) -> int:
    """Returns the FLOPs of a case."""
    wan, specs = sizes.wan, sizes.attention(case.label)
    tokens = sizes.tokens(case.video)
    shape = cost.Shape(wan.dim, wan.num_heads, wan.ffn_dim, wan.num_layers, tokens, sizes.text_tokens)
    forward = {
        "op": lambda: cost.attention_flops(shape, specs[0]),
        "attention": lambda: cost.self_attention_flops(shape, specs[0]),
        "block": lambda: cost.block_flops(shape, specs[0]),
        "model": lambda: cost.model_flops(shape, specs),
    }
    return DIRECTIONS[case.direction] * forward[case.what]()


def program(sizes: Sizes, case: Case) -> tuple[Callable, tuple[PyTree, ...]]:
    """Returns (function, shapes of its arguments) of a case.

    The function returns (outputs, a number that depends on all of them): who has the number knows that all is computed.
    """
    run, trained, rest = _FORWARD[case.what](sizes, case)
    if case.direction == "forward":
        return partial(_checked, run), (trained, rest)
    output = jax.eval_shape(run, trained, rest)
    return partial(_checked, partial(_with_gradients, run)), (trained, rest, output)


def random_inputs(shapes: PyTree, seed: int = 0) -> PyTree:
    """Returns arrays on the default device: of unit variance, or weights that about keep the variance of what they get.

    Args:
        shapes: nested dicts, tuples and arrays' shapes; parameters are known by their names.
        seed: of the numbers.
    """

    paths, tree = jax.tree_util.tree_flatten_with_path(shapes)
    return jax.tree.unflatten(tree, [_random(seed + i, *path_and_leaf) for i, path_and_leaf in enumerate(paths)])


def _random(seed: int, path, leaf: jax.ShapeDtypeStruct) -> Array:
    name = str(getattr(path[-1], "key", "")) if path else ""
    if name == "scale":
        return jnp.ones(leaf.shape, leaf.dtype)
    matrix = name == "kernel" or (name[:1] == "w" and name[1:].isdigit())
    size = leaf.shape[-2] ** -0.5 if matrix else 0.02 if name else 1.0
    return _uniform(seed, size, leaf.shape, leaf.dtype)


@partial(jax.jit, static_argnums=(2, 3))  # of its own, since many arrays have the same shape
def _uniform(seed, size, shape: tuple[int, ...], dtype) -> Array:
    # Normal numbers of the default generator take longer to compile than what is measured.
    key, limit = jax.random.key(seed, impl="rbg"), math.sqrt(3)  # of unit variance
    return (size * jax.random.uniform(key, shape, jnp.float32, -limit, limit)).astype(dtype)


def _checked(run: Callable, *inputs):
    outputs = run(*inputs)
    return outputs, sum(leaf[(0,) * leaf.ndim].astype(jnp.float32) for leaf in jax.tree.leaves(outputs))


def _with_gradients(run: Callable, trained, rest, cotangent):
    y, vjp = jax.vjp(lambda t: run(t, rest), trained)
    return y, vjp(cotangent)


def _shape(*sizes: int, dtype="float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


def _params(sizes: Sizes, case: Case) -> tuple[dict, PyTree]:
    """(the DiT without feature maps, feature maps), stacked over blocks; as sampling or as training keeps them."""
    flat = tables.flatten(abstract_dit(sizes.wan, sizes.attention(case.label)))
    dtypes = {p: kept_dtype(p, case.dtype) if case.direction == "forward" else x.dtype for p, x in flat.items()}
    tree = tables.unflatten({p: jax.ShapeDtypeStruct(x.shape, dtypes[p]) for p, x in flat.items()})
    return tree, {"q": {}, "k": {}, **tree.pop("feature_maps", {})}


def _of_a_block(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)


def _rope(sizes: Sizes, grid: Sequence[int]) -> PyTree:
    return jax.eval_shape(lambda: rope_table(grid, sizes.wan.head_dim))


# (function of (what gets gradients, the rest), their shapes) of every kind of case; the batch is one video.


def _op(sizes: Sizes, case: Case):
    wan, spec = sizes.wan, sizes.attention(case.label)[0]
    grid = wan.grid(sizes.latents(case.video))
    x = _shape(1, math.prod(grid), wan.num_heads, wan.head_dim, dtype=case.dtype)
    phi = _of_a_block(_params(sizes, case)[1])
    run = partial(attention, spec=spec, grid=grid, backend=case.backend)
    return (lambda trained, rest: run(*trained)), (x, x, x, phi), ()


def _attention(sizes: Sizes, case: Case):
    wan, spec = sizes.wan, sizes.attention(case.label)[0]
    grid = wan.grid(sizes.latents(case.video))
    params, phi = map(_of_a_block, _block_params(sizes, case))
    module = SelfAttention(wan, (spec,), grid, jnp.dtype(case.dtype), backend=case.backend)

    def run(trained, rope):
        x, params, phi = trained
        return module.apply({"params": params}, x, 0, phi, rope)

    x = _shape(1, math.prod(grid), wan.dim, dtype=case.dtype)
    return run, (x, params["self_attn"], phi), _rope(sizes, grid)


def _block(sizes: Sizes, case: Case):
    wan, spec = sizes.wan, sizes.attention(case.label)[0]
    grid = wan.grid(sizes.latents(case.video))
    params, phi = map(_of_a_block, _block_params(sizes, case))
    module = WanBlock(wan, (spec,), grid, jnp.dtype(case.dtype), backend=case.backend)

    def run(trained, rest):
        x, time6, text, params, phi = trained
        return module.apply({"params": params}, x, 0, phi, time6, text, None, rest)[0]

    x = _shape(1, math.prod(grid), wan.dim, dtype=case.dtype)
    text = _shape(1, sizes.text_tokens, wan.dim, dtype=case.dtype)
    return run, (x, _shape(1, 6, wan.dim), text, params, phi), _rope(sizes, grid)


def _model(sizes: Sizes, case: Case):
    """Training recomputes every block in the backward pass, as it has to at full size."""
    wan, specs = sizes.wan, sizes.attention(case.label)
    params, phi = _params(sizes, case)
    if jax.tree.leaves(phi):
        params["feature_maps"] = phi
    remat = "none" if case.direction == "forward" else "block"
    module = WanDiT(wan, specs, jnp.dtype(case.dtype), remat, case.backend)
    inputs = _shape(1, *sizes.latents(case.video)), _shape(1), _shape(1, sizes.text_tokens, wan.text_dim)
    return (lambda params, rest: module.apply({"params": params}, *rest)), params, inputs


def _block_params(sizes: Sizes, case: Case) -> tuple[dict, PyTree]:
    params, phi = _params(sizes, case)
    return params["blocks"], phi


_FORWARD = {"op": _op, "attention": _attention, "block": _block, "model": _model}
