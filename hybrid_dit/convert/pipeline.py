"""A whole Wan pipeline in memory, from and to a folder: DiT, VAE, text encoder, tokenizer, timestep shift."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from hybrid_dit.atomic import atomic_path, write_json
from hybrid_dit.convert import part_files, sources
from hybrid_dit.convert.params import Params, from_tree, to_tree
from hybrid_dit.convert.source_folders import SourceFolder, find_pipeline
from hybrid_dit.data.tokenizer import Tokenizer, load_tokenizer
from hybrid_dit.errors import UserError
from hybrid_dit.models.umt5 import UMT5Config
from hybrid_dit.models.vae import VAEConfig
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops.spec import AttentionSpec

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Everything needed to go from a prompt to a video. Parameters are float32 NumPy trees without the "params" level.

    Attributes:
        wan: sizes of the DiT.
        dit: its parameters (with `feature_maps` if any block is converted).
        attention: one spec per block; empty for a teacher.
        vae: the VAE's config.
        vae_params: its parameters.
        text: the text encoder's config.
        text_params: its parameters.
        tokenizer: maps prompts to ids.
        tokenizer_folder: where the tokenizer's files are (copied on save).
        shift: timestep shift of the flow schedule.
        text_tokens: padded text length that the DiT was trained with (Wan: 512).
    """

    wan: WanConfig
    dit: dict
    attention: tuple[AttentionSpec, ...]
    vae: VAEConfig
    vae_params: dict
    text: UMT5Config
    text_params: dict
    tokenizer: Tokenizer
    tokenizer_folder: Path
    shift: float
    text_tokens: int = 512


def load_transformer(folder: str | Path) -> tuple[WanConfig, tuple[AttentionSpec, ...], dict]:
    """Reads a DiT (teacher or hybrid): its sizes, attention specs and float32 parameters.

    Args:
        folder: anything that `sources.open_part` takes.

    Raises:
        UserError: missing or broken files, or keys and shapes that don't fit the sizes.
    """
    part = sources.open_part(folder, "transformer")
    return part.config, part.attention, to_tree(part.params, np.float32)


def save_transformer(
    folder: str | Path, config: WanConfig, attention: tuple[AttentionSpec, ...], params: dict, dtype: str = "float32"
) -> None:
    """Writes a transformer folder that diffusers loads; a hybrid's feature maps and description are added to it.

    Args:
        folder: written as a whole or not at all.
        config: sizes.
        attention: one spec per block; empty or all softmax for a teacher.
        params: the DiT's parameters.
        dtype: of the stored tensors.
    """
    with atomic_path(folder) as temporary:
        part_files.write_torch(temporary, "transformer", config, attention, _stored(params, dtype))


def load_pipeline_config(folder: str | Path) -> tuple[WanConfig, VAEConfig]:
    """Reads the sizes of DiT and VAE alone, without weights where a config.json tells them.

    Raises:
        UserError: the folder is no pipeline folder.
    """
    places = find(folder)

    def config(kind: str):
        path = places.parts[kind]
        told = path.is_dir() and (path / "config.json").is_file()
        return sources.read_config(path, kind) if told else sources.open_part(path, kind).config

    return config("transformer"), config("vae")


def find(folder: str | Path) -> SourceFolder:
    """Returns where the parts of a pipeline are.

    Raises:
        UserError: no folder was given, or it is no whole pipeline.
    """
    if not str(folder):
        raise UserError("no weights given; set --config.model.weights to the folder of a Wan2.1 pipeline")
    places = find_pipeline(folder)
    if places is None:
        raise UserError(
            f"{folder} is not a pipeline folder: neither in diffusers' layout (it has no model_index.json) nor in the "
            "original release's (it has no models_t5_* file)"
        )
    return places


def load_pipeline(folder: str | Path, kinds: Sequence[str] = sources.KINDS) -> Pipeline:
    """Reads a whole pipeline: diffusers' layout, with safetensors or Orbax parts, or the original release's folder.

    Args:
        folder: the pipeline's.
        kinds: parts whose parameters are read; those of the others are empty, for what the memory doesn't hold at once.

    Raises:
        UserError: a part is missing or doesn't fit its config.json.
    """
    places = find(folder)
    wan, text, vae = (sources.open_part(places.parts[kind], kind) for kind in sources.KINDS)

    def values(part: sources.Part) -> dict:
        return to_tree(part.params, np.float32) if part.kind in kinds else {}

    return Pipeline(
        wan=wan.config,
        dit=values(wan),
        attention=wan.attention,
        vae=vae.config,
        vae_params=values(vae),
        text=text.config,
        text_params=values(text),
        tokenizer=load_tokenizer(places.tokenizer),
        tokenizer_folder=places.tokenizer,
        shift=places.shift,
    )


def save_pipeline(folder: str | Path, pipeline: Pipeline, dtype: str = "bfloat16") -> None:
    """Writes a folder that `diffusers.WanPipeline.from_pretrained` and `load_pipeline` read, whole or not at all.

    The text encoder is stored in float32: transformers computes in the dtype it finds.
    """
    with atomic_path(folder) as temporary:
        dit, vae, text = pipeline.dit, pipeline.vae_params, pipeline.text_params
        write = part_files.write_torch
        write(temporary / "transformer", "transformer", pipeline.wan, pipeline.attention, _stored(dit, dtype))
        write(temporary / "vae", "vae", pipeline.vae, (), _stored(vae, dtype))
        write(temporary / "text_encoder", "text_encoder", pipeline.text, (), _stored(text, "float32"))
        write_rest(temporary, pipeline.tokenizer_folder, pipeline.shift)


def write_rest(folder: Path, tokenizer: Path, shift: float) -> None:
    """Writes what a pipeline folder has beside its three parts: tokenizer, scheduler and model_index.json."""
    shutil.copytree(tokenizer, folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", _scheduler_config(shift))
    write_json(folder / "model_index.json", _MODEL_INDEX)


def _stored(params: dict, dtype: str) -> Params:
    return {path: param.astype(DTYPES[dtype]) for path, param in from_tree(params).items()}


def _scheduler_config(shift: float) -> dict:
    """UniPC on the flow schedule, as the published Wan2.1 pipelines have it."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "solver_order": 2,
        "solver_type": "bh2",
        "lower_order_final": True,
        "predict_x0": True,
    }


_MODEL_INDEX = {
    "_class_name": "WanPipeline",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
