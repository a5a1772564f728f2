"""Key tables of the UMT5 encoder: transformers' layout (also ComfyUI's) and the one of Wan's own `.pth`.

The token embedding is tied: transformers may save it as `shared.weight`, as `encoder.embed_tokens.weight`, or as both.
`hf_rules` takes the name the file has; a file with neither fails `tables.check` as "missing shared.weight".
"""

from collections.abc import Collection

from hybrid_dit.convert.tables import Rule

EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight")  # the first is the one to write

_HF_BLOCK = {
    "layer.0.SelfAttention.q.weight": ("attention/q/kernel", "linear"),
    "layer.0.SelfAttention.k.weight": ("attention/k/kernel", "linear"),
    "layer.0.SelfAttention.v.weight": ("attention/v/kernel", "linear"),
    "layer.0.SelfAttention.o.weight": ("attention/o/kernel", "linear"),
    "layer.0.SelfAttention.relative_attention_bias.weight": ("attention/relative_bias", "same"),
    "layer.0.layer_norm.weight": ("attention_norm/scale", "same"),
    "layer.1.DenseReluDense.wi_0.weight": ("ffn/gate/kernel", "linear"),
    "layer.1.DenseReluDense.wi_1.weight": ("ffn/up/kernel", "linear"),
    "layer.1.DenseReluDense.wo.weight": ("ffn/down/kernel", "linear"),
    "layer.1.layer_norm.weight": ("ffn_norm/scale", "same"),
}

_WAN_BLOCK = {
    "attn.q.weight": ("attention/q/kernel", "linear"),
    "attn.k.weight": ("attention/k/kernel", "linear"),
    "attn.v.weight": ("attention/v/kernel", "linear"),
    "attn.o.weight": ("attention/o/kernel", "linear"),
    "pos_embedding.embedding.weight": ("attention/relative_bias", "same"),
    "norm1.weight": ("attention_norm/scale", "same"),
    "ffn.gate.0.weight": ("ffn/gate/kernel", "linear"),
    "ffn.fc1.weight": ("ffn/up/kernel", "linear"),
    "ffn.fc2.weight": ("ffn/down/kernel", "linear"),
    "norm2.weight": ("ffn_norm/scale", "same"),
}


def hf_rules(found: Collection[str] = ()) -> list[Rule]:
    """Returns the table of `transformers.UMT5EncoderModel`.

    Args:
        found: names in the file to import, from which the name of the embedding is taken; leave out to export.
    """
    embedding = next((name for name in EMBEDDING_NAMES if name in found), EMBEDDING_NAMES[0])
    return [
        Rule(embedding, "embed/embedding"),
        Rule("encoder.final_layer_norm.weight", "final_norm/scale"),
        *(Rule(f"encoder.block.{{i}}.{torch}", f"blocks/{flax}", kind) for torch, (flax, kind) in _HF_BLOCK.items()),
    ]


def is_optional(name: str) -> bool:
    """Says whether a surplus tensor may be ignored (`optional` of `tables.check`).

    It may if it is the embedding under its second name, or the tokenizer that ComfyUI keeps in the weights' file.
    """
    return name in EMBEDDING_NAMES or name == "spiece_model"


def wan_rules() -> list[Rule]:
    """Returns the table of Wan's `models_t5_umt5-xxl-enc-bf16.pth` (`T5Encoder` of `wan/modules/t5.py`)."""
    return [
        Rule("token_embedding.weight", "embed/embedding"),
        Rule("norm.weight", "final_norm/scale"),
        *(Rule(f"blocks.{{i}}.{torch}", f"blocks/{flax}", kind) for torch, (flax, kind) in _WAN_BLOCK.items()),
    ]
