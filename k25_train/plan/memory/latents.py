"""Numbers of a token that ranks which share its sequence exchange, and what is made of them; torch-free."""

from k25_train.config.model import ModelConfig


def latent_width(model: ModelConfig) -> int:
    """Numbers of a token that ranks exchange in a layer: the compressed key-value and the rotary key, from
    which all heads' keys and values are made; without latent attention these themselves."""
    if model.has_latent_attention:
        return model.key_value_widths[1] + model.qk_rope_head_dim
    return model.key_value_widths[-1]


def key_value_width(model: ModelConfig) -> int:
    """Numbers of a token in all heads' keys and values."""
    heads = model.num_key_value_heads or model.num_attention_heads
    return heads * (model.q_head_dim + model.v_head_dim)
