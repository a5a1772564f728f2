"""Text embeddings of prompts in a folder, one file per prompt: encoded once, by this run or by another program.

A file is safetensors, named after the SHA-256 of the prompt's UTF-8 bytes, with one tensor "text" [l, e]: the encoder's
output of the prompt's own tokens, no padding.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from hybrid_dit import generation, processes
from hybrid_dit.array_typing import Array
from hybrid_dit.convert.files import Weights, write_safetensors
from hybrid_dit.convert.pipeline import Pipeline
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import pack_text


def embedding_file(folder: Path, prompt: str) -> Path:
    """Returns where a prompt's embedding lies."""
    return folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"


class TextCache:
    """Contexts for `velocity` of prompts from a folder; all of them have the same number of rows.

    Attributes:
        rows: rows of text of every context, see `generation.text_context`.
    """

    def __init__(self, folder: Path, pipeline: Pipeline, prompts: Sequence[str]):
        """Encodes what the folder lacks.

        Args:
            folder: created if need be.
            pipeline: its text encoder.
            prompts: all that will be asked for.

        Raises:
            UserError: a file there doesn't fit the model.
        """
        self._folder, self._width, self._text_tokens = folder, pipeline.wan.text_dim, pipeline.text_tokens
        prompts = list(dict.fromkeys(prompts))
        processes.on_main(self._encode, pipeline, prompts)
        longest = max(len(self._read(prompt)) for prompt in prompts)
        unit = generation.TEXT_ROWS
        self.rows = min(-(-max(longest, 1) // unit) * unit, self._text_tokens)

    def _encode(self, pipeline: Pipeline, prompts: Sequence[str]) -> None:
        encoded, folder = 0, self._folder
        for start in range(0, len(prompts), generation.TEXT_BATCH):
            # Groups don't depend on what is there, so that an interrupted run gets the same numbers to the last bit.
            group = prompts[start : start + generation.TEXT_BATCH]
            missing = [i for i, prompt in enumerate(group) if not embedding_file(folder, prompt).is_file()]
            if not missing:
                continue
            text, count = (np.asarray(a) for a in generation.text_context(pipeline, group))
            for i in missing:
                own = text[i, : int(count[i, :-1].sum())].astype(np.float32)
                write_safetensors(embedding_file(folder, group[i]), {"text": own}, {"prompt": group[i]})
            encoded += len(missing)
        if encoded:
            print(f"text: {encoded} of {len(prompts)} prompts encoded; embeddings are kept in {folder}")

    def context(self, prompts: Sequence[str]) -> tuple[Array, Array]:
        """Returns packed embeddings [b, rows + 1, e] and counts [b, rows + 1], see `pack_text`."""
        found = [self._read(prompt) for prompt in prompts]
        padded = np.stack([np.pad(text, ((0, self.rows - len(text)), (0, 0))) for text in found])
        return pack_text(jnp.asarray(padded), np.array([len(text) for text in found], np.int32), self._text_tokens)

    def _read(self, prompt: str) -> np.ndarray:
        path = embedding_file(self._folder, prompt)
        text = np.asarray(Weights(path).read("text"), np.float32)
        if text.ndim != 2 or text.shape[1] != self._width or len(text) > self._text_tokens:
            raise UserError(
                f"{path} holds an embedding of shape {list(text.shape)}; the model takes up to {self._text_tokens} "
                f"tokens of width {self._width}. Delete it to have it made anew"
            )
        return text
