"""Tar shards that are incomplete, damaged, or hostile."""

import gzip
import re
import tarfile

import latent_sets
import pytest
import torch
from latent_sets import VAE, add, channels_first, padded, saved, tensor

from hybrid_dit.data.library import BadSample
from hybrid_dit.data.read_tar import TarLibrary

GOOD, OTHER = latent_sets.samples(2)


def member(i=0):
    return saved(tensor(channels_first((GOOD, OTHER)[i][0]))), saved(tensor(padded((GOOD, OTHER)[i][1])))


class Runs:
    def __reduce__(self):
        return open, ("marker", "w")


def test_parts_may_come_in_any_order_and_the_last_of_equal_names_counts(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "x/000.embed.pt", member(1)[1])
        add(archive, "y.v2.latent.pt", member()[0])  # the key ends at the first dot, so this is no latent.pt of y.v2
        add(archive, "x/000.latent.pt", member(1)[0])
        add(archive, "x/000.embed.pt", member(0)[1])
        add(archive, f"{'long' * 60}.latent.pt", member()[0])
        add(archive, f"{'long' * 60}.embed.pt", member()[1])
    found = TarLibrary(tmp_path, VAE)
    assert [found.key(i) for i in range(2)] == ["a.tar/x/000", f"a.tar/{'long' * 60}"] and not found.index.bad
    assert found.read(0).latents.tobytes() == OTHER[0].tobytes() and found.read(0).text.tobytes() == GOOD[1].tobytes()


def test_a_missing_part_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "000.latent.pt", member()[0])
        add(archive, "001.embed.pt", member()[1])
    assert TarLibrary(tmp_path, VAE).index.bad == {"a.tar/000": "has no embed.pt", "a.tar/001": "has no latent.pt"}


def test_of_a_truncated_archive_the_whole_samples_remain(tmp_path):
    latent_sets.write_tar(tmp_path / "a.tar", latent_sets.samples(3))
    content = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        cut = archive.getmember("000000002.embed.pt").offset_data + 700
    (tmp_path / "a.tar").write_bytes(content[:cut])
    found = TarLibrary(tmp_path, VAE)
    usable = 0
    for i in range(len(found.index.entries)):
        try:
            found.read(i)
            usable += 1
        except BadSample as error:
            assert "000000002" in found.key(i) and "beyond the end" in str(error)
    assert usable == 2 and "not a whole uncompressed tar" in found.index.bad["a.tar"]


def test_a_compressed_archive_is_refused(tmp_path):
    latent_sets.write_tar(tmp_path / "b" / "a.tar", [GOOD])
    (tmp_path / "b" / "a.tar").write_bytes(gzip.compress((tmp_path / "b" / "a.tar").read_bytes()))
    assert "not a whole uncompressed tar" in TarLibrary(tmp_path, VAE).index.bad["b/a.tar"]


@pytest.mark.parametrize(
    "latent, embed, reason",
    [
        ({"a": torch.ones(2)}, None, "latent.pt holds a dict instead of a tensor"),
        (Runs(), None, "refused: it holds more than tensors"),
        (torch.ones(4, 3, 6), None, r"latents \[4, 3, 6\] are not \[c, t, y, x\]"),
        (torch.ones(1).expand(4, 3, 4, 6), None, "goes beyond its storage"),
        (torch.ones(4, 3, 4, 6, dtype=torch.int32), None, "holds int32 instead of floating-point"),
        (None, torch.ones(16), r"text \[16\] have the wrong number of axes"),
        (None, [torch.ones(16, 8)], "embed.pt holds a list instead of a tensor"),
        (None, Runs(), "refused: it holds more than tensors"),
    ],
)
def test_what_is_no_pair_of_tensors_is_told_and_never_run(tmp_path, monkeypatch, latent, embed, reason):
    monkeypatch.chdir(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "000.latent.pt", member()[0] if latent is None else saved(latent))
        add(archive, "000.embed.pt", member()[1] if embed is None else saved(embed))
    found = TarLibrary(tmp_path, VAE)
    if found.index.entries:
        with pytest.raises(BadSample) as error:
            found.read(0)
        told = str(error.value)
    else:  # seen without reading numbers
        told = found.index.bad["a.tar/000"]
    assert re.search(reason, told), told
    assert not (tmp_path / "marker").exists()


def test_a_batch_axis_of_one_is_taken_off(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "000.latent.pt", saved(tensor(channels_first(GOOD[0]))[None]))
        add(archive, "000.embed.pt", saved(tensor(padded(GOOD[1]))[None]))
    found = TarLibrary(tmp_path, VAE)
    assert found.index.entries[0].shape == GOOD[0].shape[:3]
    assert found.read(0).latents.tobytes() == GOOD[0].tobytes() and found.read(0).text.tobytes() == GOOD[1].tobytes()


def test_a_tensor_that_is_a_view_of_a_larger_one_is_read_alone(tmp_path):
    batch = torch.stack([tensor(channels_first(x[0])) for x in (GOOD, OTHER)])
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "000.latent.pt", saved(batch[1]))  # torch.save writes all of the batch
        add(archive, "000.embed.pt", saved(tensor(padded(OTHER[1])).T.contiguous().T))
    sample = TarLibrary(tmp_path, VAE).read(0)
    assert sample.latents.tobytes() == OTHER[0].tobytes() and sample.text.tobytes() == OTHER[1].tobytes()
