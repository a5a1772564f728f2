"""What the tables are made of: distillations run by the job itself, and scored videos of any assignment of rates.

What was measured is kept as lines of two files, `errors.jsonl` of distillations and `scores.jsonl` of models, with the
machine that measured it, and not measured again. Distillations themselves stay in a work folder. Several processes may
share both: whoever needs what another is at waits for it.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_dit import cost, generation, knapsack, scoring, surgery
from hybrid_dit.command_line import load
from hybrid_dit.convert.pipeline import load_pipeline, load_transformer
from hybrid_dit.data.prompts import read_prompts
from hybrid_dit.data.shapes import parse_prompt
from hybrid_dit.jobs import distill, finetune, select_rates
from hybrid_dit.models.wan import WanDiT
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.sampling import guided, make_sampler, sample
from hybrid_dit.surgery_io import MAPS_FILE, load_choice, load_maps, specs_from_config

UNDISTILLED = "undistilled.safetensors"


@contextlib.contextmanager
def locked(path: Path):
    """Lets one process at a time work on `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Measured:
    """A file of what was measured: JSON lines, found by some of their values."""

    def __init__(self, path: Path, locks: Path):
        self.path, self.locks, self.machines = path, locks, set()

    def get(self, key: Mapping, measure: Callable[[], Mapping]) -> dict:
        """The line with these values; what `measure` returns is added as one where there is none.

        Whoever wants the same line at that time waits for it. `machines` remembers who measured it.
        """
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        with locked(self.locks / f"{self.path.stem}_{name}"):
            line = self._find(key)
            if line is None:
                machine = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
                line = {**key, "machine": machine, **measure()}
                self._add(line)
        self.machines.add(line["machine"])
        return line

    def _find(self, key):
        lines = self.path.read_text().splitlines() if self.path.is_file() else ()
        found = (json.loads(line) for line in lines)
        return next((line for line in found if all(line[name] == value for name, value in key.items())), None)

    def _add(self, line):
        with locked(self.locks / self.path.stem):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = self.path.read_text() if self.path.is_file() else ""
            new = self.path.with_suffix(".new")
            new.write_text(before + json.dumps(line) + "\n")
            new.replace(self.path)  # at once, for those who read


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: a model, whatever the seed.

    Attributes:
        name: shown.
        choose: one label per block, of a distillation's errors [B, labels without softmax].
        distill: settings of section `distill` that differ from the study's.
        maps: which feature maps, `MAPS_FILE` or `UNDISTILLED`.
        finetune: steps of fine-tuning; 0 for none.
    """

    name: str
    choose: Callable[[np.ndarray], tuple[str, ...]]
    distill: Mapping[str, object] = dataclasses.field(default_factory=dict)
    maps: str = MAPS_FILE
    finetune: int = 0


def every_attention(specs: Mapping[str, AttentionSpec], blocks: int) -> tuple[AttentionSpec, ...]:
    """One spec per block with softmax and all of `specs` among them: a program for these computes any choice."""
    labels = ["softmax", *specs]
    return tuple(specs.get(labels[min(b, len(labels) - 1)], AttentionSpec()) for b in range(blocks))


def with_maps(params, maps):
    """A model's parameters with feature maps, of zeros if it has none: such a program takes them always."""
    return {"feature_maps": jax.tree.map(np.zeros_like, next(iter(maps.values())))} | params


class Study:
    """The bundled model, held-out prompts, what was measured, and the work folder."""

    def __init__(self, work: Path, measured: Path, trajectories: int, videos: int, sample_steps: int):
        """Loads the model.

        Args:
            work: folder of distillations, kept between runs.
            measured: folder of `errors.jsonl` and `scores.jsonl`.
            trajectories: of each distillation, 50 steps each.
            videos: held-out prompts that are scored.
            sample_steps: UniPC.
        """
        self.work, self.trajectories, self.sample_steps = work, trajectories, sample_steps
        self.config = load("configs/distill.py")
        self.specs = specs_from_config(self.config.distill)
        self.pipeline = load_pipeline(self.config.model.weights)
        model = self.config.model
        self.shape = generation.latent_shape(
            self.pipeline.wan, self.pipeline.vae, model.frames, model.height, model.width
        )
        # Those that errors are measured on come first in the file and choose the blocks, so others are scored.
        first = self.config.distill.held_out_prompts
        self.prompts = read_prompts(self.config.prompts.held_out)[first : first + videos]
        self.scenes = [parse_prompt(prompt) for prompt in self.prompts]
        self.all_errors, self.all_scores = (
            Measured(measured / f"{x}.jsonl", work / "locks") for x in ("errors", "scores")
        )

    # Distillation

    def settings(self, seed: int, changed: Mapping[str, object], model: Mapping[str, int] | None = None):
        """The config of a distillation."""
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.seed = seed
            config.distill.prompts = self.trajectories
            config.distill.update(changed)
            config.model.update(model or {})
        return config

    def distilled(self, seed: int, changed: Mapping[str, object], model: Mapping[str, int] | None = None) -> Path:
        """Runs stage 1 unless it has run; returns its folder."""
        workdir = self.work / self._name(seed, changed, model)
        with locked(workdir):
            distill.run(self.settings(seed, changed, model), workdir)
        return workdir / "distill"

    def _name(self, seed, changed, model=None):
        parts = [f"{k}-{v}" for k, v in {**changed, **(model or {})}.items()]
        return "_".join(["distill", *parts, f"seed-{seed}"])

    def errors(
        self,
        seed: int,
        changed: Mapping[str, object],
        model: Mapping[str, int] | None = None,
        column: str = "distilled",
    ) -> np.ndarray:
        """Held-out errors [B, labels] of a distillation, in the config's order; it runs unless they are known."""
        key = {"distillation": self._name(seed, changed, model), "trajectories": self.trajectories}

        def measure():
            file, labels = self.distilled(seed, changed, model) / "errors.csv", list(self.config.distill.rates)
            columns = {name: select_rates.read_errors(file, labels, name) for name in ("undistilled", "distilled")}
            return {name: np.round(x, 6).tolist() for name, x in columns.items()}

        return np.array(self.all_errors.get(key, measure)[column])

    # Choices

    def homogeneous(self, count: int, label: str) -> Callable:
        """The `count` blocks with the lowest error at `label`."""

        def choose(errors):
            r = list(self.config.distill.rates).index(label)
            chosen = set(np.argsort(errors[:, r], kind="stable")[:count].tolist())
            return tuple(label if b in chosen else "softmax" for b in range(len(errors)))

        return choose

    def heterogeneous(self, budget: str) -> Callable:
        """The knapsack's choice within the compute of `budget`, such as 5R8."""

        def choose(errors):
            labels = ["softmax", *self.config.select.rates]
            rates = list(self.config.distill.rates)
            columns = [np.zeros(len(errors)), *(errors[:, rates.index(label)] for label in labels[1:])]
            block_costs = select_rates.flop_costs(self.config)
            costs = np.tile([block_costs[label] for label in labels], (len(errors), 1))
            count, label = cost.parse_name(budget)
            limit = count * block_costs[label] + (len(errors) - count) * block_costs["softmax"]
            return tuple(labels[c] for c in knapsack.solve(np.stack(columns, axis=1), costs, limit).choice)

        return choose

    # Scores

    def score(self, row: Row, seed: int) -> dict:
        """Scores of a row's videos: {"choice": labels, "total": [n], "direction": [n], ..., "motion": [n]}."""
        choice = row.choose(self.errors(seed, row.distill))
        key = {
            "distill": json.dumps(dict(row.distill), sort_keys=True),
            "trajectories": self.trajectories,
            "sample_steps": self.sample_steps,
            "videos": len(self.prompts),
            "maps": row.maps,
            "finetune": row.finetune,
            "seed": seed if set(choice) != {"softmax"} else 0,  # the teacher knows no seed
            "choice": " ".join(choice),
        }

        def measure():
            folder = self.distilled(seed, row.distill)
            specs = specs_from_config(self.settings(seed, row.distill).distill)
            if row.finetune:
                params = self._finetuned(row, seed, folder, choice)
            else:
                _, params = surgery.assemble(self.pipeline.dit, load_maps(folder / row.maps), choice, specs)
            print(f"score: {row.name}, seed {seed}", flush=True)
            return self._videos_scores(params, choice, specs, load_maps(folder / row.maps))

        return self.all_scores.get(key, measure) | {"choice": choice}

    def teacher(self) -> dict:
        """The teacher's scores."""
        return self.score(Row("teacher", lambda errors: ("softmax",) * len(errors)), 0)

    def _finetuned(self, row: Row, seed: int, folder: Path, choice: Sequence[str]):
        """Runs stages 2 and 3 beside a copy of stage 1, with the row's own choice in place of stage 2's."""
        workdir = self.work / f"finetune_{row.finetune}_{'-'.join(choice)}_{folder.parent.name}"
        config = self.settings(seed, row.distill)
        with config.unlocked():
            config.finetune.steps, config.finetune.batch, config.finetune.videos = row.finetune, 16, 1000
            config.finetune.save_every = row.finetune
        if not (workdir / "distill").is_dir():
            shutil.copytree(folder, workdir / "distill")
        select_rates.run(config, workdir)
        file = workdir / "select/rates.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"blocks": list(choice)}))
        assert load_choice(file) == list(choice)
        latents, shared = workdir / "finetune/latents.safetensors", self.work / f"latents_seed-{seed}.safetensors"
        if shared.is_file() and not latents.is_file():  # rendered and encoded once for all models of a seed
            latents.parent.mkdir(exist_ok=True)
            latents.hardlink_to(shared)
        finetune.run(config, workdir)
        with contextlib.suppress(FileExistsError):
            shared.hardlink_to(latents)
        _, _, params = load_transformer(workdir / "finetune" / "transformer")
        return params

    def _videos_scores(self, params, choice, specs: Mapping[str, AttentionSpec], maps) -> dict:
        labels = ["softmax", *specs]
        params, run = with_maps(params, maps), self._sampler(every_attention(specs, self.pipeline.wan.num_layers))
        context, negative = self._texts
        noise = generation.noise_for(generation.noise_key(0), self.shape, range(len(self.prompts)))
        which = jnp.asarray([labels.index(label) for label in choice], jnp.int32)
        videos = np.asarray(run((jax.device_put(params), which, self.pipeline.vae_params), noise, context, negative))
        scores = scoring.score_batch(videos, self.scenes)
        kept = {name: scores[name] for name in ("total", "direction", "smoothness", "permanence")}
        # Mean absolute change from frame to frame: what "dynamic degree" is about, without a model of optical flow.
        frames = videos.astype(np.float32)
        kept["motion"] = np.abs(frames[:, 1:] - frames[:, :-1]).mean(axis=(1, 2, 3, 4))
        return {name: [round(float(x), 4) for x in values] for name, values in kept.items()}

    @functools.cached_property
    def _texts(self):
        context = generation.text_context(self.pipeline, [*self.prompts, self.config.model.negative_prompt])
        return jax.tree.map(lambda a: a[:-1], context), jax.tree.map(lambda a: a[-1:], context)

    @functools.cache  # noqa: B019 (one study per process)
    def _sampler(self, attention: tuple[AttentionSpec, ...]):
        """One program for every assignment of the distinct specs in `attention`, all videos at once."""
        model = WanDiT(self.pipeline.wan, attention)
        sampler = make_sampler("unipc", self.sample_steps, self.pipeline.shift)

        def velocity(params, x, t, context):
            dit, which = params
            return model.apply({"params": dit}, x, t, *context, which)

        @jax.jit
        def run(params, noise, context, negative):
            dit, which, vae = params
            latents = sample(guided(velocity, 3.0), sampler, (dit, which), noise, (context, negative))
            return jax.lax.map(lambda z: generation.decode_to_uint8(self.pipeline.vae, vae, z[None])[0], latents)

        return run
