"""Configurations of public models, so that a run can be planned where none has been fetched."""

from __future__ import annotations

from typing import Any

_Sizes = tuple[int, int, int, int, int]  # d_model, d_kv, d_ff, heads, layers of each stack

_T5: dict[str, _Sizes] = {
    "small": (512, 64, 2048, 8, 6),
    "base": (768, 64, 3072, 12, 12),
    "large": (1024, 64, 4096, 16, 24),
    "3b": (1024, 128, 16384, 32, 24),
    "11b": (1024, 128, 65536, 128, 24),
}
"""T5 v1.0 (Raffel et al. 2020, section 3.7)."""

_GATED: dict[str, _Sizes] = {
    "small": (512, 64, 1024, 6, 8),
    "base": (768, 64, 2048, 12, 12),
    "large": (1024, 64, 2816, 16, 24),
    "xl": (2048, 64, 5120, 32, 24),
    "xxl": (4096, 64, 10240, 64, 24),
}
"""T5 v1.1, Flan-T5, mT5 and umT5: gated feed-forward layers, and a head of its own."""

_BART: dict[str, _Sizes] = {"base": (768, 64, 3072, 12, 6), "large": (1024, 64, 4096, 16, 12)}

_M2M100: dict[str, tuple[int, _Sizes]] = {  # pieces, and the rest
    "m2m100_418M": (128112, (1024, 64, 4096, 16, 12)),
    "m2m100_1.2B": (128112, (1024, 64, 8192, 16, 24)),
    "nllb-200-distilled-600M": (256206, (1024, 64, 4096, 16, 12)),
    "nllb-200-distilled-1.3B": (256206, (1024, 64, 8192, 16, 24)),
    "nllb-200-1.3B": (256206, (1024, 64, 8192, 16, 24)),
    "nllb-200-3.3B": (256206, (2048, 128, 8192, 16, 24)),
}
"""M2M100 (Fan et al. 2020) and NLLB (Costa-jussa et al. 2022)."""


_PEGASUS = {"large": 1024, "cnn_dailymail": 1024, "xsum": 512, "multi_news": 1024, "arxiv": 1024, "pubmed": 1024}
"""Positions of the fine-tuned models, which are all of one size (Zhang et al. 2020)."""
_T5GEMMA2: dict[str, tuple[int, int, int, int, int]] = {
    "270m": (640, 2048, 4, 1, 18),
    "1b": (1152, 6912, 4, 1, 26),
    "4b": (2560, 10240, 8, 4, 34),
}
"""T5Gemma 2 (Zhang et al. 2025): hidden_size, intermediate_size, heads, heads of keys and values, layers of a stack."""

_SIGLIP = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27,
    "image_size": 896, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
"""The vision tower of every T5Gemma 2."""


def public_config(name: str) -> dict[str, Any]:
    """What config.json of a public model says, as far as its layers and their sizes go by it and transformers' own
    defaults differ.

    Args:
        name: of a repository or a folder; its last part counts, such as t5-large, flan-t5-xl or mt5-large.

    Raises:
        ValueError: none of the models known here.
    """
    short = name.partition("@")[0].rstrip("/").rpartition("/")[2]
    if short not in PUBLIC:
        raise ValueError(f"{name} is not here and no public model known offline ({', '.join(sorted(PUBLIC))})")
    return PUBLIC[short]


def _t5(sizes: _Sizes, **more: Any) -> dict[str, Any]:
    names = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers")
    shared = {"model_type": "t5", "vocab_size": 32128, "feed_forward_proj": "relu", "decoder_start_token_id": 0}
    return {**shared, **dict(zip(names, sizes, strict=True)), "num_decoder_layers": sizes[-1], **more}


def _bart(sizes: _Sizes, **more: Any) -> dict[str, Any]:
    d_model, _, d_ff, num_heads, num_layers = sizes
    stacks = {"ffn_dim": d_ff, "attention_heads": num_heads, "layers": num_layers}
    both = {f"{stack}_{key}": value for stack in ("encoder", "decoder") for key, value in stacks.items()}
    shared = {"model_type": "bart", "vocab_size": 50265, "max_position_embeddings": 1024, "d_model": d_model}
    return shared | both | more


def _t5gemma2(sizes: tuple[int, int, int, int, int]) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    stack = {"vocab_size": 262144, "head_dim": 256, **dict(zip(names, sizes, strict=True))}
    encoder = {"text_config": stack, "vision_config": _SIGLIP}
    return {"model_type": "t5gemma2", "vocab_size": 262144, "encoder": encoder, "decoder": stack}


_MBART_50 = {"model_type": "mbart", "vocab_size": 250054, "decoder_start_token_id": 2, "scale_embedding": True}
_OF_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
PUBLIC: dict[str, dict[str, Any]] = {
    **{f"t5-{size}": _t5(sizes) for size, sizes in _T5.items()},
    **{f"{kind}-{size}": _t5(sizes, **_OF_GATED) for kind in ("t5-v1_1", "flan-t5") for size, sizes in _GATED.items()},
    "madlad400-3b-mt": _t5((1024, 128, 8192, 16, 32), vocab_size=256000, **_OF_GATED),
    **{f"mt5-{size}": _t5(sizes, model_type="mt5", vocab_size=250112, **_OF_GATED) for size, sizes in _GATED.items()},
    **{
        f"umt5-{size}": _t5(_GATED[size], model_type="umt5", vocab_size=256384, **_OF_GATED)
        for size in ("small", "base", "xl", "xxl")
    },
    **{f"bart-{size}": _bart(sizes) for size, sizes in _BART.items()},
    "mbart-large-50": _bart(_BART["large"], **_MBART_50),
    **{
        f"mbart-large-50-{kind}-mmt": _bart(_BART["large"], **_MBART_50, activation_function="relu")
        for kind in ("many-to-many", "one-to-many", "many-to-one")
    },
    **{
        f"pegasus-{name}": _bart(
            (1024, 64, 4096, 16, 16),
            model_type="pegasus",
            vocab_size=96103,
            max_position_embeddings=count,
            activation_function="relu",
            scale_embedding=True,
        )
        for name, count in _PEGASUS.items()
    },
    "opus-mt-en-de": _bart(
        (512, 64, 2048, 8, 6),
        model_type="marian",
        vocab_size=58101,
        max_position_embeddings=512,
        activation_function="swish",
        scale_embedding=True,
    ),
    **{f"t5gemma-2-{size}-{size}": _t5gemma2(sizes) for size, sizes in _T5GEMMA2.items()},
    **{name: _bart(sizes, model_type="m2m_100", vocab_size=vocab) for name, (vocab, sizes) in _M2M100.items()},
}
"""Settings by name."""
