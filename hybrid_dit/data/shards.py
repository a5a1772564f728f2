"""Writing a latent set: array_record shards that TensorFlow Datasets reads, without TensorFlow, complete or absent.

TFDS writes a whole set in one go, in one process. Here each shard is a unit of work of its own: its samples are known
in advance, it appears under its final name when it is whole, and a report beside it says what is in it. Whoever finds
all reports written makes the manifest and TFDS's description from them. So builders share nothing but the folder.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybrid_dit.array_typing import Float
from hybrid_dit.atomic import write_json, write_text
from hybrid_dit.convert.json_file import read_json
from hybrid_dit.data.read_tfds import MANIFEST, SPLIT
from hybrid_dit.errors import UserError

NAME, VERSION = "latents", "1.0.0"  # of the set, for TFDS
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


class Record(NamedTuple):
    """One sample to write."""

    key: str
    prompt: str
    latents: Float[np.ndarray, "t y x c"]  # normalised
    text: Float[np.ndarray, "l e"]  # the prompt's own tokens


def shard_file(number: int, shards: int) -> str:
    """Returns a shard's name as TFDS wants it."""
    return f"{NAME}-{SPLIT}.array_record-{number:05d}-of-{shards:05d}"


class ShardFolder:
    """A set while it is being built.

    Attributes:
        folder: where it is.
        shards: number of shards.
    """

    def __init__(self, folder: Path, items: Sequence[str], per_shard: int, channels: int, text_dim: int, dtype: str):
        """Opens or begins a set.

        Args:
            folder: created if need be.
            items: names of all that is to be encoded, with their captions, in order.
            per_shard: items of one shard.
            channels: of latents.
            text_dim: width of text embeddings.
            dtype: of both.

        Raises:
            UserError: the folder was begun with other items.
        """
        self.folder, self.shards, self._items, self._per_shard = folder, -(-len(items) // per_shard), items, per_shard
        self._features = (channels, text_dim, dtype)
        digest = hashlib.sha256("\n".join(items).encode()).hexdigest()
        begun = folder / "items.json"
        if begun.is_file():
            there = read_json(begun)
            if there.get("sha256") != digest:
                raise UserError(
                    f"{folder} was begun with other videos or captions ({there.get('count')} then, {len(items)} now); "
                    "use another --workdir, or bring them back"
                )
        else:
            write_json(begun, {"count": len(items), "sha256": digest})

    def items(self, number: int) -> range:
        """Returns the numbers of the items of one shard."""
        return range(number * self._per_shard, min((number + 1) * self._per_shard, len(self._items)))

    def report(self, number: int) -> Path:
        """Returns where a shard's report is, which exists if and only if the shard is whole."""
        return self.folder / "reports" / f"{number:05d}.json"

    def write(self, number: int, records: Sequence[Record], skipped: dict[str, str]) -> None:
        """Writes one shard, which may be empty, and its report."""
        from array_record.python.array_record_module import ArrayRecordWriter
        from tensorflow_datasets.core.example_serializer import ExampleSerializer

        features = self.features()
        serializer = ExampleSerializer(features.get_serialized_info())
        name = shard_file(number, self.shards)
        # The name depends on the shard alone, so that what a killed process left is overwritten, not left behind.
        temporary = self.folder / f".{name}.incomplete"
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        for record in records:
            writer.write(serializer.serialize_example(features.encode_example(record._asdict())))
        writer.close()
        content = _sha256(temporary)
        size = temporary.stat().st_size
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / name)
        samples = [[r.key, list(r.latents.shape[:3]), len(r.text)] for r in records]
        report = {"file": name, "bytes": size, "sha256": content, "samples": samples, "skipped": skipped}
        write_json(self.report(number), report)

    def missing(self) -> list[int]:
        """Returns the shards that are not written yet."""
        return [number for number in range(self.shards) if not self.report(number).is_file()]

    def finish(self, skipped: dict[str, str], **facts) -> dict:
        """Writes the manifest, the list of what was left out, and TFDS's description; all shards must be whole.

        Args:
            skipped: what was left out before the items were listed, name -> reason.
            **facts: about the set, kept in the manifest.

        Returns:
            Those facts, with the numbers of samples and of what was left out.

        Raises:
            UserError: nothing could be used.
        """
        reports = [read_json(self.report(number)) for number in range(self.shards)]
        everything = dict(skipped)
        for report in reports:
            everything |= report.pop("skipped")
        lengths = [len(report["samples"]) for report in reports]
        write_text(self.folder / "skipped.csv", "".join(_csv_lines(everything)))
        if not sum(lengths):
            some = "".join(f"\n  {name}: {reason}" for name, reason in list(everything.items())[:5])
            raise UserError(f"none of {len(self._items)} videos could be used; see {self.folder}/skipped.csv{some}")
        facts = {"samples": sum(lengths), "skipped": len(everything), **facts}
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".features") as temporary:
            self.features().save_config(temporary)
            os.replace(Path(temporary) / "features.json", self.folder / "features.json")
        for left in (self.folder / "reports").glob(".partial-*"):  # by processes that were killed
            left.unlink(missing_ok=True)
        split = {"name": SPLIT, "shardLengths": [str(n) for n in lengths], "filepathTemplate": TEMPLATE}
        split["numBytes"] = str(sum(report["bytes"] for report in reports))
        description = "Normalised latents of Wan's VAE [t, y, x, c] and text embeddings of its encoder [l, e]."
        info = {"name": NAME, "version": VERSION, "description": description, "fileFormat": "array_record"}
        write_json(self.folder / "dataset_info.json", {**info, "splits": [split]})
        head = json.dumps(facts, indent=2).removesuffix("\n}")
        lines = ",\n".join(f"    {json.dumps(report, ensure_ascii=False)}" for report in reports)  # one per shard
        write_text(self.folder / MANIFEST, f'{head},\n  "shards": [\n{lines}\n  ]\n}}\n')
        return facts

    def features(self):
        """Returns the TFDS features of a sample."""
        import ml_dtypes
        import tensorflow_datasets as tfds

        channels, text_dim, name = self._features
        dtype = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[name]
        return tfds.features.FeaturesDict(
            {
                "key": tfds.features.Text(),
                "prompt": tfds.features.Text(),
                "latents": tfds.features.Tensor(shape=(None, None, None, channels), dtype=dtype, encoding="bytes"),
                "text": tfds.features.Tensor(shape=(None, text_dim), dtype=dtype, encoding="bytes"),
            }
        )


def _csv_lines(skipped: dict[str, str]) -> Iterator[str]:
    yield "file,reason\n"
    for cells in sorted(skipped.items()):
        yield ",".join('"' + cell.replace('"', '""') + '"' for cell in cells) + "\n"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
