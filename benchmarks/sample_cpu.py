"""Times one CFG video of wan-tiny against diffusers' WanPipeline with the same weights, noise and steps, in one run.

    python benchmarks/sample_cpu.py --out=docs/results/cpu/sample.json     # two minutes on 2 cores

Both compute in float32 with all cores: ours after compilation, diffusers after one short call. The two take turns,
`--repeats` times; the fastest of each is compared, since other work on the machine can only slow them down. What
guidance and reusing steps cost or save is timed once, with the likeness to the video of all steps (PSNR).
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import jax
import numpy as np
import torch

from hybrid_dit import generation
from hybrid_dit.convert.pipeline import load_pipeline
from hybrid_dit.data.prompts import read_prompts

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "assets" / "wan-tiny"
FRAMES, SIZE, GUIDANCE = 33, 128, 3.0


def ours(pipeline, prompt: str, steps: int, **options):
    """Returns a function that makes the video and returns (uint8 video, {"text", "denoise", "decode"} in seconds)."""
    generator = generation.Generator(pipeline, "unipc", steps, GUIDANCE, "float32", **options)
    noise = noise_of(pipeline)
    params = jax.device_put(pipeline.dit)

    def run():
        began = time.perf_counter()
        context = generation.text_context(pipeline, [prompt, ""])
        halves = [jax.block_until_ready(jax.tree.map(lambda a, i=i: a[i : i + 1], context)) for i in (0, 1)]
        text = time.perf_counter() - began
        began = time.perf_counter()
        latents, _ = generator.denoise((), params, noise, *halves)
        denoise = time.perf_counter() - began
        began = time.perf_counter()
        video, _ = generator.decode(latents)
        return video[0], {"text": text, "denoise": denoise, "decode": time.perf_counter() - began}

    return run


def noise_of(pipeline):
    """Returns the noise that both start from."""
    shape = generation.latent_shape(pipeline.wan, pipeline.vae, FRAMES, SIZE, SIZE)
    return generation.noise_for(jax.random.key(0), shape, [0])


def theirs(pipeline, prompt: str, steps: int):
    """Likewise for diffusers, timed as a whole."""
    import diffusers

    pipe = diffusers.WanPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = np.moveaxis(np.asarray(noise_of(pipeline)), -1, 1)

    def run(count=steps):
        began = time.perf_counter()
        video = pipe(
            prompt=prompt,
            negative_prompt="",
            guidance_scale=GUIDANCE,
            max_sequence_length=512,
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=count,
            latents=torch.tensor(noise.copy()),
            output_type="np",
        ).frames[0]
        return np.round(video * 255).astype(np.uint8), {"all": time.perf_counter() - began}

    run(2)
    return run


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """10 log10(255^2 / mean squared error); 100 if equal."""
    error = np.square(a.astype(np.float64) - b).mean()
    return float(10 * np.log10(255**2 / max(error, 255**2 * 1e-10)))


def main():
    """Prints one line per measurement and writes all of them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reuse", type=float, nargs="*", default=[0.05, 0.1, 0.2], help="thresholds to try")
    args = parser.parse_args()

    pipeline, prompt = load_pipeline(FOLDER), read_prompts(ROOT / "assets/prompts/held_out.txt")[0]
    about = {
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "load_at_start": os.getloadavg()[0],
        "jax": jax.__version__,
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "video": f"{FRAMES} x {SIZE} x {SIZE}, UniPC {args.steps} steps, guidance {GUIDANCE:g}",
    }
    print(json.dumps(about), flush=True)
    interval = (300.0, 900.0)
    runs = {
        "ours": ours(pipeline, prompt, args.steps),
        "diffusers": theirs(pipeline, prompt, args.steps),
        "ours, branches in sequence": ours(pipeline, prompt, args.steps, sequential=True),
        f"ours, guidance at {interval[0]:g} <= t <= {interval[1]:g}": ours(
            pipeline, prompt, args.steps, interval=interval
        ),
        **{f"ours, reuse {r:g}": ours(pipeline, prompt, args.steps, reuse=r) for r in args.reuse},
    }
    rows, videos = {}, {}
    for name, run in runs.items():
        if name != "diffusers":
            began = time.perf_counter()
            run()
            rows[name] = {"first_call_s": round(time.perf_counter() - began, 2)}
    for _ in range(args.repeats):
        for name in ("ours", "diffusers"):
            videos[name], seconds = runs[name]()
            rows.setdefault(name, {}).setdefault("s", []).append(round(sum(seconds.values()), 2))
            rows[name] |= {f"{part}_s": round(s, 2) for part, s in seconds.items() if part != "all"}
            print(f"{name:40} {rows[name]['s'][-1]:7.2f} s", flush=True)
    for name, run in runs.items():
        if name not in videos:
            videos[name], seconds = run()
            rows[name] |= {"s": [round(sum(seconds.values()), 2)], "denoise_s": round(seconds["denoise"], 2)}
        rows[name]["psnr_to_ours"] = round(psnr(videos[name], videos["ours"]), 1)
        print(f"{name:40} {min(rows[name]['s']):7.2f} s, {rows[name]['psnr_to_ours']:.1f} dB to ours", flush=True)
    for r in args.reuse:
        generator = generation.Generator(pipeline, "unipc", args.steps, GUIDANCE, "float32", reuse=r)
        rows[f"ours, reuse {r:g}"]["steps_computed"] = int((~generator.reused(pipeline.dit)).sum())
    ratio = min(rows["diffusers"]["s"]) / min(rows["ours"]["s"])
    about |= {"load_at_end": os.getloadavg()[0], "diffusers_over_ours": round(ratio, 3)}
    print(f"diffusers takes {ratio:.2f} times as long as ours; load {about['load_at_end']:.1f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
