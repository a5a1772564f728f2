"""`load_hybrid`: a diffusers model that says what the Flax model says, and goes wherever diffusers' own goes."""

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate
import diffusers
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from hybrids import (
    GRID,
    PAPER,
    channels_first,
    every_kind,
    random_hybrid,
    random_inputs,
    relative_error,
    velocity_of_jax,
)
from pipelines import FRAMES, SIZE, random_like, random_pipeline

from hybrid_dit import generation
from hybrid_dit.convert.abstract import abstract_dit
from hybrid_dit.convert.pipeline import load_pipeline, save_transformer
from hybrid_dit.data.prompts import read_prompts
from hybrid_dit.errors import UserError
from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec, from_label
from hybrid_dit.torch import load_hybrid

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "transformer"
    return folder, *random_hybrid(folder)


def run(model, latents, timesteps, text, dtype=torch.float32):
    with torch.no_grad():
        args = channels_first(latents).to(dtype), torch.tensor(timesteps), torch.tensor(text).to(dtype)
        return model(*args).sample.float().movedim(1, -1).numpy()


MAPS = {
    "paper": PAPER,
    "shared": FeatureMapSpec(layers=3, hidden=10, activation="square", shared=True),
    "parameterless": FeatureMapSpec("elu"),
}


@pytest.mark.parametrize("maps", MAPS)
def test_equals_the_flax_model(maps, tmp_path):
    specs, params = random_hybrid(tmp_path, every_kind(MAPS[maps]))
    inputs = random_inputs()
    model = load_hybrid(tmp_path)
    assert type(model) is diffusers.WanTransformer3DModel and not model.training
    sides = {name.split(".")[3] for name in model.state_dict() if "feature_map" in name}
    assert sides == {"paper": {"q", "k"}, "shared": {"q"}, "parameterless": set()}[maps]
    # diffusers' float32 timestep embedding costs a few 1e-6 of this (known deviation).
    assert relative_error(run(model, *inputs), velocity_of_jax(specs, params, *inputs)) <= 1e-5


def test_a_model_of_another_grid_shape_is_not_confused_by_the_last_one(export):
    """Same number of tokens, other rows and columns: the lattice must follow, as in a model that sees only these."""
    model, inputs = load_hybrid(export[0]), random_inputs(grid=(3, 3, 5))
    run(model, *random_inputs())
    assert np.array_equal(run(model, *inputs), run(load_hybrid(export[0]), *inputs))
    q = torch.randn(1, 45, 2, 24)
    grids = [model.blocks[2].feature_map(q, q, q, grid) for grid in (GRID, (3, 3, 5))]
    assert not torch.allclose(*grids)  # else the above would be no test


def test_dtype_of_parameters(export, tmp_path):
    model = load_hybrid(export[0], dtype=torch.bfloat16)
    precise = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert "scale_shift_table" in precise and "blocks.0.norm2.weight" in precise
    assert {model.get_parameter(f"blocks.1.{x}").dtype for x in ("feature_map.q.w0", "attn1.to_q.weight")} == {
        torch.bfloat16
    }
    inputs = random_inputs()
    exact = run(load_hybrid(export[0]), *inputs)
    # Four blocks of a dozen roundings each, of unit 2^-8, that add up as a random walk: sqrt(48) / 256 = 0.027.
    assert relative_error(run(model, *inputs, torch.bfloat16), exact) <= 0.027
    random_hybrid(tmp_path, dtype="bfloat16")
    assert {p.dtype for p in load_hybrid(tmp_path).parameters()} == {torch.bfloat16}


def test_save_pretrained_and_load_hybrid_are_inverse(export, tmp_path):
    model = load_hybrid(export[0])
    model.save_pretrained(tmp_path / "saved")
    again = load_hybrid(tmp_path / "saved")
    assert (tmp_path / "saved/hybrid_config.json").read_text() == (export[0] / "hybrid_config.json").read_text()
    stored = safetensors.torch.load_file(export[0] / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == again.state_dict().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in again.state_dict().items())


def test_copies_are_independent(export):
    model, inputs = load_hybrid(export[0]), random_inputs()
    before = run(model, *inputs)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[3].feature_map.q.w0.zero_()
    assert np.array_equal(run(model, *inputs), before) and not np.array_equal(run(other, *inputs), before)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.cpu_offload_with_hook])
def test_offloading_hooks_fetch_the_feature_maps(offload, shared, tmp_path):
    """Parameters are on `meta` between calls under `cpu_offload`: whatever reads them around the hooks fails."""
    random_hybrid(tmp_path, every_kind(FeatureMapSpec(shared=shared)))
    model, inputs = load_hybrid(tmp_path), random_inputs()
    before = run(model, *inputs)
    offload(model, torch.device("cpu"))
    if offload is accelerate.cpu_offload:
        assert model.blocks[1].feature_map.q.w0.is_meta
    assert np.array_equal(run(model, *inputs), before)


def test_fused_projections(export):
    model, inputs = load_hybrid(export[0]), random_inputs()
    before = run(model, *inputs)
    for block in model.blocks:
        block.attn1.fuse_projections()
    assert relative_error(run(model, *inputs), before) <= 1e-6


COMPILE = """
import sys
import torch
import hybrid_dit.torch
assert not {"jax", "flax", "diffusers"} & sys.modules.keys(), "import hybrid_dit.torch imports more than torch"
torch.set_num_threads(1)
whole, model = (hybrid_dit.torch.load_hybrid(sys.argv[1]) for _ in range(2))
assert "jax" not in sys.modules
args = torch.load(sys.argv[2])
del whole.blocks[1]  # for one graph a second block costs time and shows nothing that it doesn't show below
with torch.no_grad():
    want = [whole(*inputs).sample for inputs in args]
    compiled = torch.compile(whole, backend="eager", fullgraph=True)
    hybrid_dit.torch.options.compile = True  # as on CUDA: inside a compiled model nothing is compiled on its own
    for inputs, expected in zip(args, want):
        error = (compiled(*inputs).sample - expected).norm() / expected.norm()
        assert error <= 1e-6, error
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    for inputs in args:
        print(float(model(*inputs).sample.double().sum()))
"""


def test_compiles_as_one_graph_and_imports_nothing_of_jax(tmp_path):
    """In a process of its own: the shape checks that conftest switches on are not for compilers.

    Two blocks have every step that a block can have: softmax tokens and a mask by grid, and the linear part alone.
    """
    maps = FeatureMapSpec(activation="exp", shared=True)
    random_hybrid(
        tmp_path / "transformer",
        (from_label("R2", pattern="lattice", feature_map=maps), from_label("linear", feature_map=maps)),
    )
    several = [random_inputs(grid=grid) for grid in ((3, 5, 3), (3, 3, 5))]
    torch.save([(channels_first(x), torch.tensor(t), torch.tensor(e)) for x, t, e in several], tmp_path / "inputs.pt")
    command = [sys.executable, "-c", COMPILE, str(tmp_path), str(tmp_path / "inputs.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    model = load_hybrid(tmp_path)
    for line, inputs in zip(done.stdout.split(), several):
        want = run(model, *inputs).astype(np.float64)
        assert abs(float(line) - want.sum()) <= 1e-6 * np.abs(want).sum()


def test_errors_name_file_and_cause(export, tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        load_hybrid(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no hybrid_config.json"):
        load_hybrid(ROOT / "assets/wan-tiny")
    folder = tmp_path / "transformer"
    shutil.copytree(export[0], folder)
    (folder / "config.json").write_text('{"dim": 1536, "model_type": "t2v"}')
    with pytest.raises(UserError, match="use patch_wan"):
        load_hybrid(folder)
    config = json.loads((export[0] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "ffn_dim": 32}))
    with pytest.raises(UserError, match=r"another shape than the model: \(64,\) in .*, \(32,\) in the model"):
        load_hybrid(folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(UserError, match="describes 4 blocks, but the model has 3"):
        load_hybrid(tmp_path)  # found in a pipeline folder's transformer/


def videos(folder, pipeline, specs, params, prompt, frames, size, steps):
    """One video [t, y, x, 3] in [0, 1] by diffusers and one by JAX, from the same noise."""
    cfg = pipeline.wan
    save_transformer(folder / "hybrid", cfg, specs, params)
    theirs = diffusers.WanPipeline.from_pretrained(
        folder / "pipeline", transformer=load_hybrid(folder / "hybrid"), dtype=torch.float32
    )
    theirs.set_progress_bar_config(disable=True)
    noise = generation.noise_for(jax.random.key(3), generation.latent_shape(cfg, pipeline.vae, frames, size, size), [0])
    video = theirs(
        prompt=prompt,
        negative_prompt="",
        guidance_scale=3.0,
        height=size,
        width=size,
        num_frames=frames,
        num_inference_steps=steps,
        latents=channels_first(np.asarray(noise)),
        output_type="np",
    ).frames[0]
    generator = generation.Generator(pipeline, "unipc", steps, 3.0, "float32")
    context = generation.text_context(pipeline, [prompt, ""])
    part = [jax.tree.map(lambda a, s=s: a[s], context) for s in (slice(0, 1), slice(1, 2))]
    latents, _ = generator.denoise(specs, params, noise, *part)
    return video, generator.decode(latents)[0][0] / 255


def psnr(got, want):
    return -10 * math.log10(np.square(got - want).mean())


def test_pipeline_makes_the_video_that_jax_makes(tmp_path):
    """A random pipeline of a few kilobytes: text encoder, guidance, sampler and VAE around two hybrid blocks."""
    pipeline = random_pipeline(tmp_path / "pipeline")
    specs = from_label("R2"), from_label("linear")
    params = random_like(abstract_dit(pipeline.wan, specs), np.random.default_rng(1))
    theirs, ours = videos(tmp_path, pipeline, specs, params, "a red circle", FRAMES, SIZE, 3)
    print(f"PSNR {psnr(ours, theirs):.1f} dB, std {theirs.std():.3f}")
    assert psnr(ours, theirs) >= 50 and theirs.std() > 0.05  # 50 dB is the promise; a constant video would be no test


@pytest.mark.slow
def test_wan_tiny_makes_the_video_that_jax_makes(tmp_path):
    """wan-tiny with three blocks converted, untrained, in all 50 steps.

    Features of the early blocks are made small (bias of the last layer less 3), which keeps the video a video.
    """
    shutil.copytree(ROOT / "assets/wan-tiny", tmp_path / "pipeline")
    pipeline = load_pipeline(tmp_path / "pipeline")
    converted = {1: from_label("R2"), 3: from_label("R2", stabiliser="lse"), 6: from_label("R4", pattern="lattice")}
    specs = tuple(converted.get(i, AttentionSpec()) for i in range(8))
    cfg, keys = pipeline.wan, jax.random.split(jax.random.key(1), 8)
    maps = jax.vmap(lambda key: feature_maps.init(key, cfg.num_heads, cfg.head_dim, specs[1].feature_map))(keys)
    maps = jax.tree.map(np.array, maps)
    for x in "qk":
        maps[x]["b1"][:6] -= 3
    prompt = read_prompts(ROOT / "assets/prompts/held_out.txt")[0]
    theirs, ours = videos(tmp_path, pipeline, specs, {**pipeline.dit, "feature_maps": maps}, prompt, 33, 128, 50)
    print(f"50 steps: PSNR {psnr(ours, theirs):.1f} dB, std {theirs.std():.3f}")
    assert psnr(ours, theirs) >= 50 and theirs.std() > 0.05
