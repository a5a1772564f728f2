"""metadata.csv with rows that lead nowhere, and files that are not what they should be."""

import latent_sets
import pytest
import torch
from latent_sets import VAE

from hybrid_dit.data.library import BadSample
from hybrid_dit.data.read_csv import CsvLibrary
from hybrid_dit.errors import UserError


@pytest.fixture
def folder(tmp_path):
    latent_sets.write_csv(tmp_path, latent_sets.samples(3))
    return tmp_path


def test_rows_without_a_file_and_names_that_lead_out_are_named(folder):
    outside = folder.parent / "outside.tensors.pth"
    outside.write_bytes((folder / "train" / "video_000000.mp4.tensors.pth").read_bytes())
    with open(folder / "metadata.csv", "a") as table:
        table.write(f"gone.mp4,x\n../outside,x\n{outside},x\nvideo_000001.mp4,listed twice\n,x\n")
    (folder / "train" / "video_000002.mp4.tensors.pth").rename(folder / "video_000002.mp4.tensors.pth")
    found = CsvLibrary(folder, VAE)
    assert len(found.index.entries) == 3
    assert found.index.bad == {
        "gone.mp4": "there is no gone.mp4.tensors.pth",
        "../outside": "leads out of the folder",
        str(outside): "leads out of the folder",
        "": "there is no .tensors.pth",
    }
    assert found.key(2) == "video_000002.mp4.tensors.pth"


@pytest.mark.parametrize("header", ["video,prompt", "file,caption", "\ufefffile_name,text"])
def test_columns_may_have_other_usual_names(folder, header):
    rows = (folder / "metadata.csv").read_text().split("\n", 1)[1]
    (folder / "metadata.csv").write_text(f"{header}\n{rows}", encoding="utf-8")
    assert len(CsvLibrary(folder, VAE).index.entries) == 3


@pytest.mark.parametrize("content, reason", [(b"a,b\nx,y\n", "no column file_name"), (b"\xff\xfe\x00", "UTF-8 CSV")])
def test_another_table_is_told(folder, content, reason):
    (folder / "metadata.csv").write_bytes(content)
    with pytest.raises(UserError, match=reason):
        CsvLibrary(folder, VAE)


def test_tables_without_any_file_say_so(folder):
    (folder / "metadata.csv").write_text("file_name,text\nnone.mp4,x\n")
    with pytest.raises(UserError, match="no data of the kind csv.*\n  none.mp4: there is no none.mp4.tensors.pth"):
        CsvLibrary(folder, VAE)


@pytest.mark.parametrize(
    "value, reason",
    [
        ([1, 2], "holds no tensor latents"),
        ({"latents": torch.ones(4, 3, 4, 6)}, "holds no tensor prompt_emb/context"),
        ({"latents": [], "prompt_emb": {"context": torch.ones(1, 16, 8)}}, "holds no tensor latents"),
        ({"latents": torch.ones(4), "prompt_emb": {"context": torch.ones(1, 16, 8)}}, r"latents \[4\] are not"),
        ({"latents": torch.ones(2, 4, 3, 4, 6), "prompt_emb": torch.ones(16, 8)}, "are not"),
    ],
)
def test_other_content_is_told(folder, value, reason):
    torch.save(value, folder / "train" / "video_000001.mp4.tensors.pth")
    bad = CsvLibrary(folder, VAE).index.bad
    assert bad.keys() == {"train/video_000001.mp4.tensors.pth"}
    with pytest.raises(BadSample, match=reason):
        raise BadSample(*bad.values())


def test_a_file_that_vanishes_later_is_a_bad_sample(folder):
    found = CsvLibrary(folder, VAE)
    (folder / "train" / "video_000001.mp4.tensors.pth").unlink()
    with pytest.raises(BadSample, match="is missing"):
        found.read(1)
    found.read(2)
