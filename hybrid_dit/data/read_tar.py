"""Tar shards of `KEY.latent.pt`, `KEY.embed.pt`, `KEY.prompt.txt`, as TurboDiffusion and rCM publish Wan's own samples.

Facts from the program that wrote them (rCM's data generation, which saves what the sampler returns): latents are
[c, t, y, x] on the scale of the DiT, in bfloat16; embeddings are [512, width], zero past the prompt. Members are read
in place, without unpacking the archive and without unpickling.
"""

import tarfile
from pathlib import Path

import numpy as np

from hybrid_dit.convert.open_file import OpenFile
from hybrid_dit.convert.tensor_pickle import Tensor
from hybrid_dit.convert.torch_file import TorchValue
from hybrid_dit.data.library import BadSample, Entry, Library, latent_shape, reason
from hybrid_dit.errors import UserError

LATENT, EMBED = "latent.pt", "embed.pt"


class TarLibrary(Library):
    """A folder of tar files, subfolders included."""

    kind = "tar"

    def find(self) -> tuple[list[Path], dict[str, str]]:
        """Returns all tar files."""
        return sorted(self.folder.rglob("*.tar")), {}

    def expected(self) -> str:
        """Says what the folder should have held."""
        return f"expected .tar files with members KEY.{LATENT} and KEY.{EMBED}"

    def scan(self, file: Path) -> tuple[list[Entry], dict[str, str]]:
        """Returns the samples of one archive, from the headers alone."""
        found, bad = {}, {}
        name = str(file.relative_to(self.folder))
        try:
            with tarfile.open(file, "r:") as archive:  # "r:" takes no compression: its members can't be read in place
                for member in archive:
                    folder, _, rest = member.name.rpartition("/")
                    stem, _, kind = rest.partition(".")
                    if member.isreg() and kind in (LATENT, EMBED):
                        key = f"{folder}/{stem}" if folder else stem
                        found.setdefault(key, {})[kind] = (member.offset_data, member.size)
        except tarfile.TarError as error:  # of a truncated archive everything before the end is there
            bad[name] = f"not a whole uncompressed tar archive: {error}"
        entries = []
        for key, parts in found.items():
            try:
                if len(parts) < 2:
                    raise BadSample(f"has no {EMBED if LATENT in parts else LATENT}")
                shape = latent_shape(_tensor(file, key, LATENT, *parts[LATENT])[1].shape)
                entries.append(Entry(shape, -1, (key, *parts[LATENT], *parts[EMBED])))
            except (UserError, BadSample, OSError) as error:
                bad[f"{name}/{key}"] = reason(error)
        return entries, bad

    def load(self, file: Path, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
        """Returns latents and text of one sample."""
        key, *places = entry.address
        arrays = []
        for kind, begin, size in ((LATENT, *places[:2]), (EMBED, *places[2:])):
            value, tensor = _tensor(file, key, kind, begin, size)
            arrays.append(value.tensor(tensor, kind))
        return arrays[0], arrays[1]


def _tensor(file: Path, key: str, kind: str, begin: int, size: int) -> tuple[TorchValue, Tensor]:
    value = TorchValue(OpenFile(file, (f"{key}.{kind}", begin, size)))
    if not isinstance(value.value, Tensor):
        raise BadSample(f"{kind} holds a {type(value.value).__name__} instead of a tensor")
    value.check(kind, value.value)
    return value, value.value
