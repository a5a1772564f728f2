"""A folder with `metadata.csv` and one `.tensors.pth` per video, as DiffSynth-Studio writes and PusaV1 has.

Facts from DiffSynth-Studio's `train_wan_t2v.py`, which writes `train/VIDEO.tensors.pth` beside each video listed in
`metadata.csv` (`file_name,text`): a dict with "latents" [c, t, y, x], which its VAE returns on the scale of the DiT,
and "prompt_emb" {"context": [1, 512, width]}, zero past the prompt. Nothing is unpickled.
"""

import csv
from pathlib import Path

import numpy as np

from hybrid_dit.convert.json_file import shown
from hybrid_dit.convert.open_file import OpenFile
from hybrid_dit.convert.tensor_pickle import Tensor
from hybrid_dit.convert.torch_file import TorchValue
from hybrid_dit.data.library import BadSample, Entry, Library, latent_shape
from hybrid_dit.errors import UserError

NAME_COLUMNS = ("file_name", "video", "file")
SUFFIX = ".tensors.pth"


class CsvLibrary(Library):
    """A folder with `metadata.csv`."""

    kind = "csv"

    def find(self) -> tuple[list[Path], dict[str, str]]:
        """Returns the tensor files of all rows."""
        table = self.folder / "metadata.csv"
        if not table.is_file():
            return [], {}
        try:
            with open(table, encoding="utf-8-sig", newline="") as lines:
                reader = csv.DictReader(lines)
                column = next((name for name in NAME_COLUMNS if name in (reader.fieldnames or ())), None)
                names = [row[column] or "" for row in reader] if column else []
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{table} can't be read as UTF-8 CSV: {shown(error)}") from error
        if column is None:
            raise UserError(f"{table} has no column {' or '.join(NAME_COLUMNS)}; its first line must name the columns")
        found, bad = {}, {}
        for name in names:
            places = [self.folder / "train" / (name + SUFFIX), self.folder / (name + SUFFIX)]
            if name.endswith(".pth"):
                places += [self.folder / "train" / name, self.folder / name]
            outside = Path(name).is_absolute() or ".." in Path(name).parts
            place = None if outside else next((p for p in places if p.is_file()), None)
            if place is not None:
                found[place] = None  # a file that is listed twice counts once
            else:
                bad[shown(name)] = "leads out of the folder" if outside else f"there is no {places[0].name}"
        return list(found), bad

    def expected(self) -> str:
        """Says what the folder should have held."""
        return f"expected metadata.csv with a column file_name, and train/FILE_NAME{SUFFIX} for its rows"

    def scan(self, file: Path) -> tuple[list[Entry], dict[str, str]]:
        """Returns the one sample of a file."""
        latents, _, _ = _tensors(file)
        return [Entry(latent_shape(latents.shape), -1, ())], {}

    def load(self, file: Path, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
        """Returns latents and text of one file."""
        latents, context, value = _tensors(file)
        return value.tensor(latents, "latents"), value.tensor(context, "context")


def _tensors(file: Path) -> tuple[Tensor, Tensor, TorchValue]:
    value = TorchValue(OpenFile(file))
    content = value.value if isinstance(value.value, dict) else {}
    latents, context = content.get("latents"), content.get("prompt_emb")
    if isinstance(context, dict):
        context = context.get("context")
    for name, tensor in (("latents", latents), ("prompt_emb/context", context)):
        if not isinstance(tensor, Tensor):
            raise BadSample(f"holds no tensor {name}")
        value.check(name, tensor)
    return latents, context, value
