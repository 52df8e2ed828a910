"""A quaver.models.Llama as a LlamaForCausalLM of transformers."""

from __future__ import annotations

from ..errors import UsageError
from ..models import Config

NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
IN_BLOCK = {
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "post_attention_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}


def parts(name: str, config: Config) -> dict[str, int | None]:
    """{the name that transformers has: rows} of the parts of a parameter of ours."""
    if name in NAMES:
        return {NAMES[name]: None}
    _, index, inner = name.split(".", 2)
    prefix = f"model.layers.{index}."
    if inner in IN_BLOCK:
        return {prefix + IN_BLOCK[inner]: None}
    if inner == "attention.qkv.weight":
        kv = config.kv_heads * config.head_dim
        rows = {"q": config.dim, "k": kv, "v": kv}
        return {f"{prefix}self_attn.{part}_proj.weight": n for part, n in rows.items()}
    return {f"{prefix}mlp.{part}_proj.weight": config.ffn for part in ("gate", "up")}


def config(ours: Config, tied: bool):
    """transformers' LlamaConfig. UsageError where transformers is not installed."""
    try:
        from transformers import LlamaConfig
    except ImportError:
        raise UsageError("export: wanted transformers; pip install quaver[hf]") from None
    made = LlamaConfig(
        vocab_size=ours.vocab,
        hidden_size=ours.dim,
        intermediate_size=ours.ffn,
        num_hidden_layers=ours.layers,
        num_attention_heads=ours.heads,
        num_key_value_heads=ours.kv_heads,
        max_position_embeddings=ours.context,
        rms_norm_eps=ours.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    made.architectures = ["LlamaForCausalLM"]
    return made


def generation(ours: Config, tied: bool):
    """transformers' GenerationConfig of that model: greedy, without special tokens."""
    from transformers import GenerationConfig

    return GenerationConfig.from_model_config(config(ours, tied))
