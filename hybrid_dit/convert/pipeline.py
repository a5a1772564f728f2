"""A whole Wan pipeline as one folder in diffusers' layout: transformer, vae, text_encoder, tokenizer, scheduler."""

import dataclasses
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from hybrid_dit.atomic import atomic_path, write_json
from hybrid_dit.convert import hybrid, tables, umt5_keys, vae_keys, wan_keys
from hybrid_dit.convert.files import Weights, read_json, write_safetensors
from hybrid_dit.data.tokenizer import Tokenizer, load_tokenizer
from hybrid_dit.errors import UserError
from hybrid_dit.models import vae as vae_lib
from hybrid_dit.models.umt5 import UMT5Config, UMT5Encoder
from hybrid_dit.models.vae import VAEConfig
from hybrid_dit.models.wan import WanConfig, WanDiT
from hybrid_dit.ops.spec import AttentionSpec

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"


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
        folder: where the tokenizer's files are (copied on save).
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
    folder: Path
    shift: float
    text_tokens: int = 512


def abstract_dit(config: WanConfig, attention: tuple[AttentionSpec, ...] = ()) -> dict:
    """Returns the DiT's parameter tree as shapes, without allocating anything."""
    latents = jnp.zeros((1, *config.patch, config.in_channels))
    text = jnp.zeros((1, 1, config.text_dim))
    return jax.eval_shape(WanDiT(config, attention).init, jax.random.key(0), latents, jnp.zeros(1), text)["params"]


def load_transformer(folder: str | Path) -> tuple[WanConfig, tuple[AttentionSpec, ...], dict]:
    """Reads a transformer folder (teacher or hybrid): its sizes, attention specs and float32 parameters.

    Raises:
        UserError: missing or broken files, or keys and shapes that don't fit config.json.
    """
    folder = Path(folder)
    config = wan_keys.config_from_diffusers(read_json(folder / "config.json"))
    attention = hybrid.read_description(folder, config.num_layers)
    weights = Weights(folder)
    entries = hybrid.stored_entries(config, attention, "diffusers", abstract_dit(config, attention))
    tables.check(entries, weights.shapes, str(folder))
    return config, attention, hybrid.import_dit(entries, weights.read, abstract_dit(config, attention))


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
    entries = hybrid.stored_entries(config, attention, "diffusers", params)
    tensors = {name: t.astype(DTYPES[dtype]) for name, t in tables.export_tree(entries, params)}
    with atomic_path(folder) as temporary:
        write_safetensors(temporary / DIFFUSERS_FILE, tensors, {"format": "pt"})
        write_json(temporary / "config.json", wan_keys.config_to_diffusers(config))
        hybrid.write_description(temporary, attention)


def load_pipeline_config(folder: str | Path) -> tuple[WanConfig, VAEConfig]:
    """Reads the sizes of DiT and VAE alone, without weights.

    Raises:
        UserError: the folder is no pipeline folder.
    """
    folder = check_folder(folder)
    wan = wan_keys.config_from_diffusers(read_json(folder / "transformer" / "config.json"))
    return wan, VAEConfig.from_diffusers(read_json(folder / "vae" / "config.json"))


def check_folder(folder: str | Path) -> Path:
    """Returns the folder as a Path.

    Raises:
        UserError: no folder was given, or it is no pipeline folder.
    """
    if not str(folder):
        raise UserError("no weights given; set --config.model.weights to a pipeline folder in diffusers' layout")
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is not a pipeline folder in diffusers' layout: it has no model_index.json")
    return folder


def load_pipeline(folder: str | Path) -> Pipeline:
    """Reads a pipeline folder in diffusers' layout.

    Raises:
        UserError: a part is missing or doesn't fit its config.json.
    """
    folder = check_folder(folder)
    wan, attention, dit = load_transformer(folder / "transformer")

    vae_config = VAEConfig.from_diffusers(read_json(folder / "vae" / "config.json"))
    vae_init = jax.eval_shape(partial(vae_lib.init, vae_config), jax.random.key(0))
    vae_params = _load(folder / "vae", vae_keys.diffusers_rules(vae_config), vae_init)

    text_config = UMT5Config.from_hf(read_json(folder / "text_encoder" / "config.json"))
    weights = Weights(folder / "text_encoder")
    text_init = abstract_text(text_config)
    rules = umt5_keys.hf_rules(weights.shapes)
    text_params = _load(folder / "text_encoder", rules, text_init, umt5_keys.is_tied_copy)

    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    return Pipeline(
        wan=wan,
        dit=dit,
        attention=attention,
        vae=vae_config,
        vae_params=vae_params,
        text=text_config,
        text_params=text_params,
        tokenizer=load_tokenizer(folder / "tokenizer"),
        folder=folder,
        shift=float(scheduler.get("flow_shift", scheduler.get("shift", 1.0))),
    )


def save_pipeline(folder: str | Path, pipeline: Pipeline, dtype: str = "bfloat16") -> None:
    """Writes a folder that `diffusers.WanPipeline.from_pretrained` and `load_pipeline` read, whole or not at all.

    The text encoder is stored in float32: transformers computes in the dtype it finds.
    """
    with atomic_path(folder) as temporary:
        save_transformer(temporary / "transformer", pipeline.wan, pipeline.attention, pipeline.dit, dtype)
        _save(temporary / "vae" / DIFFUSERS_FILE, vae_keys.diffusers_rules(pipeline.vae), pipeline.vae_params, dtype)
        write_json(temporary / "vae" / "config.json", pipeline.vae.to_diffusers())
        _save(temporary / "text_encoder" / "model.safetensors", umt5_keys.hf_rules(), pipeline.text_params, "float32")
        write_json(temporary / "text_encoder" / "config.json", pipeline.text.to_hf())
        shutil.copytree(pipeline.folder / "tokenizer", temporary / "tokenizer")
        write_json(temporary / "scheduler" / "scheduler_config.json", _scheduler_config(pipeline.shift))
        write_json(temporary / "model_index.json", _MODEL_INDEX)


def abstract_text(config: UMT5Config) -> dict:
    """Returns the text encoder's parameter tree as shapes."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(UMT5Encoder(config).init, jax.random.key(0), ids, ids)["params"]


def _load(folder: Path, rules: list[tables.Rule], abstract: dict, optional=lambda key: False) -> dict:
    weights = Weights(folder)
    entries = tables.expand(rules, abstract)
    tables.check(entries, weights.shapes, str(folder), optional)
    return tables.import_tree(entries, weights.read, np.float32)


def _save(path: Path, rules: list[tables.Rule], params: dict, dtype: str) -> None:
    entries = tables.expand(rules, params)
    tensors = {name: t.astype(DTYPES[dtype]) for name, t in tables.export_tree(entries, params)}
    write_safetensors(path, tensors, {"format": "pt"})


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
