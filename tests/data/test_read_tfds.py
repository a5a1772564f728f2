"""Built sets that were copied in part, changed or damaged (what whole ones hold: test_library, test_shards)."""

import latent_sets
import pytest
from latent_sets import VAE

from hybrid_dit.data.library import BadSample
from hybrid_dit.data.read_tfds import TfdsLibrary
from hybrid_dit.errors import UserError


@pytest.fixture
def folder(tmp_path):
    latent_sets.write_tfds(tmp_path, latent_sets.samples(5), per_shard=2)
    return tmp_path


@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_shard_that_is_not_whole_is_told(folder, how):
    shard = folder / "latents-train.array_record-00001-of-00003"
    if how == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="00001-of-00003 (is missing|has 131,071 bytes), expected 131,072 bytes"):
        TfdsLibrary(folder, VAE)


def test_a_manifest_of_something_else_is_told(folder):
    (folder / "manifest.json").write_text('{"shards": [{"name": 3}]}')
    with pytest.raises(UserError, match="manifest.json is not what build_data writes"):
        TfdsLibrary(folder, VAE)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", [None, "{}", "junk"])
def test_a_description_that_is_missing_or_broken_is_told(folder, name, content):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match="dataset_info.json or features.json in .* is missing or not what build_data"):
        TfdsLibrary(folder, VAE)


def test_a_set_that_was_built_anew_from_the_same_videos_is_other_data(folder, tmp_path_factory):
    digests = [TfdsLibrary(folder, VAE).index.digest()]
    for seed in (0, 1):
        other = tmp_path_factory.mktemp("other")
        latent_sets.write_tfds(other, latent_sets.samples(5, seed=seed), per_shard=2)
        digests.append(TfdsLibrary(other, VAE).index.digest())
    assert digests[0] == digests[1] != digests[2]


def test_damage_inside_a_shard_is_a_bad_sample(folder):
    shard = folder / "latents-train.array_record-00001-of-00003"
    content = bytearray(shard.read_bytes())
    content[300:310] = bytes(b ^ 255 for b in content[300:310])  # in the first of its two records
    shard.write_bytes(content)
    found = TfdsLibrary(folder, VAE)
    with pytest.raises(BadSample, match="can't be read"):
        found.read(2)
    for i, (latents, _) in enumerate(latent_sets.samples(5)):
        if i != 2:
            assert found.read(i).latents.tobytes() == latents.tobytes()
