import numpy as np
import pytest
import tokenizers
import torch
import transformers
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from hybrid_dit.data.tokenizer import build_word_tokenizer, clean_prompt, load_tokenizer
from hybrid_dit.errors import UserError

torch.set_num_threads(1)

WORDS = ["a", "red", "Ball", "moves", "left", "ball"]  # "Ball" and "ball" are one token
PROMPTS = ["A red ball moves left", "", "a  GREEN\nball", "a red ball moves left " * 3]


@pytest.fixture
def folder(tmp_path):
    build_word_tokenizer(WORDS, tmp_path)
    return tmp_path


@pytest.mark.parametrize("loader", [transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast])
def test_same_ids_as_transformers(folder, loader):
    theirs = loader.from_pretrained(folder)(
        [prompt_clean(p) for p in PROMPTS],
        padding="max_length",
        truncation=True,
        max_length=9,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="np",
    )
    ids, lengths = load_tokenizer(folder)(PROMPTS, 9)
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int32)
    np.testing.assert_array_equal(ids, theirs.input_ids)
    np.testing.assert_array_equal(lengths, theirs.attention_mask.sum(1))


def test_word_tokenizer_ids(folder, capsys):
    ids, lengths = load_tokenizer(folder)(PROMPTS, 7)
    start = "'a red ball moves left a red ball moves left a red ball moves'..."
    assert capsys.readouterr().out == f"note: a prompt of 16 tokens is cut to 7: {start}\n"
    assert ids.tolist() == [
        [3, 4, 5, 6, 7, 1, 0],
        [1, 0, 0, 0, 0, 0, 0],
        [3, 2, 5, 1, 0, 0, 0],
        [3, 4, 5, 6, 7, 3, 1],  # cut; </s> stays
    ]
    assert lengths.tolist() == [6, 1, 4, 7]


def test_special_tokens_are_known_to_transformers(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    assert theirs.decode([3, 4, 5, 1, 0], skip_special_tokens=True) == "a red ball"


def test_wan_pipeline_uses_the_folder(folder):
    config = transformers.UMT5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    encoder = transformers.UMT5EncoderModel(config)
    pipeline = WanPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        text_encoder=encoder,
        vae=None,
        scheduler=None,
        transformer=None,
    )
    embeddings = pipeline._get_t5_prompt_embeds(PROMPTS, max_sequence_length=512, device="cpu")
    _, lengths = load_tokenizer(folder)(PROMPTS, 512)
    zero = (embeddings == 0).all(-1).numpy()
    np.testing.assert_array_equal(zero, np.arange(512) >= lengths[:, None])


@pytest.mark.parametrize(
    "text",
    [
        "  two\n\t spaces\u00a0here ",
        "salt &amp; pepper &amp;lt;3&gt;",
        "it\u2019s \u201cfine\u201d",
        "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，ＪＰＥＧ压缩残留",
        "Ame\u0301lie\u3000in \ufb01lm",
    ],
)
def test_cleaning_equals_that_of_wan_with_ftfy(text):
    pytest.importorskip("ftfy")
    assert clean_prompt(text) == prompt_clean(text)
    assert clean_prompt(text) != text


def test_missing_folder_names_the_file(tmp_path):
    with pytest.raises(UserError, match="tokenizer.json does not exist"):
        load_tokenizer(tmp_path / "nowhere")


def test_broken_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer file"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_eos_is_refused(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, "<pad>")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="must append </s>"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("word", ["", "two words"])
def test_unusable_words_are_refused(tmp_path, word):
    with pytest.raises(UserError, match="without spaces"):
        build_word_tokenizer(["fine", word], tmp_path)
