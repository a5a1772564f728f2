"""Prompts to token ids, as Wan does it: clean, tokenise with `</s>` appended, cut or pad to a fixed length.

Tokenisers are folders in the format of transformers (`tokenizer.json` and two small files), read with the `tokenizers`
package alone. Encode the ids with `hybrid_dit.models.umt5.encode_prompts`.
"""

import dataclasses
import html
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from hybrid_dit.array_typing import Int
from hybrid_dit.errors import UserError

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in UMT5
SHOWN = 60  # characters of a prompt in a message

# The part of `ftfy.fix_text` that matters for text without encoding errors: plain quotes, and plain forms of full-width
# characters (which Wan's Chinese negative prompt has) and of Latin ligatures.
_PLAIN = str.maketrans(
    {c: "'" for c in "\u02bc\u2018\u2019\u201a\u201b"}
    | {c: '"' for c in "\u201c\u201d\u201e\u201f"}
    | {c: unicodedata.normalize("NFKC", c) for c in map(chr, [*range(0xFF01, 0xFFF0), *range(0xFB00, 0xFB07), 0x3000])}
)


def clean_prompt(text: str) -> str:
    """Returns the prompt as Wan feeds it to the tokeniser: plain quotes, HTML entities resolved, single spaces.

    Equals Wan's cleaning for text without encoding errors. Wan also repairs those (mojibake) with ftfy where that is
    installed; here the result never depends on what is installed.
    """
    text = unicodedata.normalize("NFC", text.translate(_PLAIN))
    text = html.unescape(html.unescape(text))  # twice, as Wan does: "&amp;lt;" is "<"
    return re.sub(r"\s+", " ", text).strip()


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Maps prompts to padded ids; made by `load_tokenizer`."""

    backend: tokenizers.Tokenizer

    def __call__(
        self, prompts: Sequence[str], max_length: int = 512
    ) -> tuple[Int[np.ndarray, "b {max_length}"], Int[np.ndarray, "b"]]:
        """Cleans and tokenises prompts.

        Args:
            prompts: texts; longer ones are cut such that `</s>` remains the last token, which is said.
            max_length: of the result; Wan uses 512 (diffusers' helper defaults to 226).

        Returns:
            ids, int32, padded with `<pad>`; and the number of real tokens of each prompt (`</s>` included), int32.
        """
        self.backend.no_truncation()  # whatever the file says
        self.backend.no_padding()
        ids = np.full((len(prompts), max_length), self.backend.token_to_id(PAD), np.int32)
        lengths = np.zeros(len(prompts), np.int32)
        for i, encoded in enumerate(self.backend.encode_batch([clean_prompt(p) for p in prompts])):
            own = encoded.ids
            if len(own) > max_length:
                start = f"{prompts[i][:SHOWN]!r}..."
                print(f"note: a prompt of {len(own)} tokens is cut to {max_length}: {start}", flush=True)
                own = [*own[: max_length - 1], own[-1]]
            ids[i, : len(own)], lengths[i] = own, len(own)
        return ids, lengths


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads `folder/tokenizer.json`.

    Raises:
        UserError: the file is missing, can't be read, or does not do what UMT5's does (pad token, `</s>` appended).
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; give the tokenizer folder of a Wan model (google/umt5-xxl or tokenizer/), which "
            "holds tokenizer.json (a lone spiece.model is not enough)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise UserError(f"{path} is not a tokenizer file: {error}") from error
    if backend.token_to_id(PAD) is None or backend.encode("").tokens != [EOS]:
        raise UserError(f"{path} is not a tokenizer of UMT5: it needs a {PAD} token and must append {EOS}")
    return Tokenizer(backend)


def build_word_tokenizer(words: Iterable[str], folder: str | Path) -> Tokenizer:
    """Writes a tokenizer folder with one token per lower-cased, whitespace-separated word; for small vocabularies.

    transformers (`AutoTokenizer`) and diffusers' `WanPipeline` load the folder too. Ids 0, 1, 2 are `<pad>`, `</s>` and
    `<unk>`; the words follow in the order given.

    Raises:
        UserError: an entry of `words` is empty or has a space in it, and so could never be matched.
    """
    unique = list(dict.fromkeys(word.lower() for word in words))
    bad = [word for word in unique if word.split() != [word]]
    if bad:
        raise UserError(f"words of a tokenizer must be non-empty and without spaces, found {bad[0]!r}")
    specials = [PAD, EOS, UNK]
    vocabulary = {word: i for i, word in enumerate(specials + [w for w in unique if w not in specials])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, vocabulary[EOS])])
    backend.add_special_tokens(specials)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")
    return load_tokenizer(folder)
