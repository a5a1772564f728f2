"""Full-size models against their PyTorch originals: the same random weights, written by PyTorch, converted by us.

    python benchmarks/full_size.py dit|vae|umt5 [--folder=DIR] [--out=FILE.json]

  dit    Wan2.1 1.3B, one float32 forward against diffusers, 3 x 12 x 20 tokens; 12 GB of memory
  vae    full size, encode and decode of 17 x 240 x 416 in float32 against diffusers; 8 GB
  umt5   UMT5-XXL in bfloat16 against transformers in float32; wants a GPU with 60 GB

Prints relative errors and exits with 1 if one is above its bound. Bounds: 1e-5 for the DiT and 1e-4 for the VAE, of
our choice; for UMT5 the error of transformers' own bfloat16 against its float32.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch uses the same GPU

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from hybrid_dit.convert import sources  # noqa: E402
from hybrid_dit.convert.params import to_tree  # noqa: E402
from hybrid_dit.models import vae as vae_lib  # noqa: E402
from hybrid_dit.models.umt5 import UMT5Encoder  # noqa: E402
from hybrid_dit.models.vae import WanVAE  # noqa: E402
from hybrid_dit.models.wan import WanDiT  # noqa: E402


def relative(ours, theirs) -> float:
    """||ours - theirs|| / ||theirs||, summed in float64."""
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    error = np.square(ours - theirs, dtype=np.float64).sum() / np.square(theirs, dtype=np.float64).sum()
    return float(np.sqrt(error))


@contextlib.contextmanager
def timed(times: dict[str, float], name: str):
    """Adds the seconds of a section to `times`."""
    began = time.perf_counter()
    yield
    times[name] = round(time.perf_counter() - began, 1)
    print(f"{name}: {times[name]} s", flush=True)


def check_dit(folder: Path, times: dict) -> dict[str, tuple[float, float]]:
    """t = 31.5, where diffusers' float32 timestep embedding is accurate (Wan takes it in float64)."""
    import diffusers

    torch.manual_seed(0)
    with timed(times, "PyTorch writes"):
        model = diffusers.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30).eval()
        with torch.no_grad():
            torch.nn.init.normal_(model.proj_out.weight, std=0.02)  # zero in a fresh model
        model.save_pretrained(folder, max_shard_size="2GB")
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 3, 24, 40, 16), np.float32)
    text = rng.standard_normal((1, 77, 4096), np.float32)
    t = np.float32([31.5])
    with timed(times, "PyTorch forward"), torch.no_grad():
        to = torch.from_numpy
        theirs = model(to(latents).movedim(-1, 1), to(t), to(text), return_dict=False)[0].movedim(1, -1).numpy()
    del model
    with timed(times, "conversion"):
        part = sources.open_part(folder, "transformer")
        params = to_tree(part.params)
    with timed(times, "forward, compilation included"):
        ours = jax.jit(WanDiT(part.config).apply)({"params": params}, latents, t, text)
        ours = np.asarray(ours)
    return {"DiT 1.3B, float32": (relative(ours, theirs), 1e-5)}


def check_vae(folder: Path, times: dict) -> dict[str, tuple[float, float]]:
    """Random noise is no video, but reaches every weight."""
    import diffusers

    torch.manual_seed(0)
    with timed(times, "PyTorch writes"):
        model = diffusers.AutoencoderKLWan().eval()
        model.save_pretrained(folder)
    video = np.random.default_rng(0).uniform(-1, 1, (1, 17, 240, 416, 3)).astype(np.float32)
    with timed(times, "PyTorch encode and decode"), torch.no_grad():
        latents = model.encode(torch.from_numpy(video).movedim(-1, 1)).latent_dist.mode()
        decoded = model.decode(latents).sample.movedim(1, -1).numpy()
        latents = latents.movedim(1, -1).numpy()
    with timed(times, "conversion"):
        part = sources.open_part(folder, "vae")
        params, vae = to_tree(part.params), WanVAE(part.config)
    with timed(times, "encode and decode, compilation included"):
        ours = np.asarray(jax.jit(lambda p, x: vae_lib.encode_chunked(vae, p, x)[0])(params, video))
        ours_decoded = np.asarray(jax.jit(lambda p, x: vae_lib.decode_chunked(vae, p, x))(params, latents))
    return {"VAE encode": (relative(ours, latents), 1e-4), "VAE decode": (relative(ours_decoded, decoded), 1e-4)}


def check_umt5(folder: Path, times: dict) -> dict[str, tuple[float, float]]:
    """Two prompts of 77 and 512 tokens, compared where there are tokens."""
    import transformers

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    config = transformers.UMT5Config(**sizes, feed_forward_proj="gated-gelu", architectures=["UMT5EncoderModel"])
    with timed(times, "PyTorch writes"):
        with torch.device(device):
            model = transformers.UMT5EncoderModel(config).to(torch.bfloat16).eval()
        model.save_pretrained(folder, max_shard_size="5GB")
    lengths = np.array([77, 512])
    ids = np.random.default_rng(0).integers(3, sizes["vocab_size"], (2, 512))
    mask = (np.arange(512) < lengths[:, None]).astype(np.int32)

    def run(model):
        with torch.no_grad():
            to = torch.from_numpy
            return model(to(ids).to(device), attention_mask=to(mask).to(device))[0].float().cpu().numpy()[mask > 0]

    with timed(times, "PyTorch forward, bfloat16 and float32"):
        theirs = run(model)
        reference = run(model.float())
    del model
    torch.cuda.empty_cache()
    with timed(times, "conversion and upload"):
        part = sources.open_part(folder, "text_encoder")
        params = jax.tree.map(jnp.asarray, to_tree(part.params))
    with timed(times, "forward, compilation included"):
        encode = jax.jit(UMT5Encoder(part.config, jnp.bfloat16).apply)
        ours = np.asarray(encode({"params": params}, ids.astype(np.int32), mask).astype(jnp.float32))[mask > 0]
    bound = relative(theirs, reference)
    return {"UMT5-XXL, bfloat16 against transformers' float32": (relative(ours, reference), bound)}


def main() -> int:
    """Runs one check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("dit", "vae", "umt5"))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/full_size"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.folder.exists():
        raise SystemExit(f"{args.folder} exists; remove it or give another --folder")
    times: dict[str, float] = {}
    try:
        errors = {"dit": check_dit, "vae": check_vae, "umt5": check_umt5}[args.model](args.folder, times)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    device = jax.devices()[0].device_kind
    if device == "cpu":
        device = f"{os.cpu_count()} CPU cores"
    machine = f"{device}, jax {jax.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    rows = [{"what": what, "relative_error": error, "bound": bound} for what, (error, bound) in errors.items()]
    result = {"machine": machine, "errors": rows, "seconds": times}
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(not error <= bound for error, bound in errors.values()))


if __name__ == "__main__":
    sys.exit(main())
