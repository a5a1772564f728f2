import ml_dtypes
import numpy as np
import pytest
from pipelines import random_pipeline

from hybrid_dit import generation
from hybrid_dit.convert.files import write_safetensors
from hybrid_dit.errors import UserError
from hybrid_dit.text_cache import TextCache, embedding_file

PROMPTS = ["a small red circle", "a large blue square moving up on a black background", ""]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return random_pipeline(tmp_path_factory.mktemp("text") / "pipeline")


def test_contexts_are_the_encoders(pipeline, tmp_path):
    cache = TextCache(tmp_path, pipeline, PROMPTS)
    text, count = cache.context(PROMPTS)
    expected = generation.text_context(pipeline, PROMPTS)
    assert text.shape == (3, cache.rows + 1, pipeline.wan.text_dim)
    np.testing.assert_array_equal(count, expected[1])
    np.testing.assert_array_equal(text, expected[0])
    assert cache.context(PROMPTS[:1])[0].shape[1] == text.shape[1]  # one shape for all: one compilation


def test_what_is_there_is_not_encoded_again(pipeline, tmp_path, monkeypatch, capsys):
    TextCache(tmp_path, pipeline, PROMPTS)
    assert "3 of 3 prompts encoded" in capsys.readouterr().out
    monkeypatch.setattr(generation, "text_context", None)  # would fail if called
    TextCache(tmp_path, pipeline, PROMPTS)
    assert not capsys.readouterr().out


def test_an_interrupted_encoding_gives_the_same_numbers(pipeline, tmp_path):
    TextCache(tmp_path / "a", pipeline, PROMPTS)
    TextCache(tmp_path / "b", pipeline, PROMPTS)
    embedding_file(tmp_path / "b", PROMPTS[0]).unlink()
    TextCache(tmp_path / "b", pipeline, PROMPTS)
    for prompt in PROMPTS:
        a, b = (embedding_file(tmp_path / name, prompt).read_bytes() for name in "ab")
        assert a == b


def test_embeddings_of_another_program_may_have_16_bits(pipeline, tmp_path):
    text = np.ones((2, pipeline.wan.text_dim), ml_dtypes.bfloat16)
    write_safetensors(embedding_file(tmp_path, "hello"), {"text": text}, {})
    got, count = TextCache(tmp_path, pipeline, ["hello"]).context(["hello"])
    assert got.dtype == np.float32 and (got[0, :2] == 1).all() and not got[0, 2:].any()
    assert count[0].tolist() == [1, 1, *[0] * 6, pipeline.text_tokens - 2]


def test_an_embedding_of_another_width_is_named(pipeline, tmp_path):
    write_safetensors(embedding_file(tmp_path, "hello"), {"text": np.ones((2, 3), np.float32)}, {})
    with pytest.raises(UserError, match=r"shape \[2, 3\]; the model takes up to 512 tokens of width 8"):
        TextCache(tmp_path, pipeline, ["hello"])
