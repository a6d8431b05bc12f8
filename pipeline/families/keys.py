"""The three lists of keys of a config.json: those that a family carries, those that change nothing, and those that it
carries with one value alone. A key on none of them is refused, too: nobody has looked at what it does. Settings of a
part of the model have lists of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

_SPECIAL = {f"{name}_token_id" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "decoder_start")}
_GENERATION = set(GenerationConfig().to_dict()) | {"task_specific_params", "force_bos_token_to_be_generated"}
"""What generate goes by: pipeline.decoding refuses those of them that it does not carry."""
_CARRIED = {"model_type", "vocab_size", "tie_word_embeddings", "dtype", "torch_dtype"} | _SPECIAL | _GENERATION
_HARMLESS = set(PreTrainedConfig().to_dict()) | {
    "_name_or_path", "_num_labels", "num_labels", "gradient_checkpointing", "output_past", "tokenizer_class",
    "finetuning_task", "_commit_hash", "attn_implementation", "_attn_implementation_autoset", "return_dict",
    "use_return_dict", "torchscript", "use_bfloat16", "classif_dropout", "classifier_dropout", "num_hidden_layers",
    "prefix", "save_step", "max_source_length", "max_target_length", "language",
}  # fmt: skip
"""Of classifiers, of training by others, of how a file came to be; and an alias of the depth, which is held against
the weights."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (True,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
    "quantization_config": (),
}


@dataclass(frozen=True)
class Keys:
    """Of one family."""

    carried: frozenset[str]
    harmless: frozenset[str]
    only: Mapping[str, tuple[Any, ...]]
    """The values that a key may have; a key that is null counts as absent."""
    equal: Mapping[str, str]
    """Keys that must have the value of another."""
    parts: Mapping[str, Keys]
    """Keys whose values are settings of a part, with those that it may have."""

    @staticmethod
    def of(
        carried: Iterable[str] = (),
        harmless: Iterable[str] = (),
        equal: Mapping[str, str] | None = None,
        parts: Mapping[str, Keys] | None = None,
        **only: tuple[Any, ...],
    ) -> Keys:
        """Those that this family adds to those of all; a key on several lists is on the strictest."""
        all_only, all_equal, all_parts = _ONLY | only, equal or {}, parts or {}
        strict = all_only.keys() | all_equal.keys() | all_parts.keys()
        carried, harmless = (_CARRIED | {*carried}) - strict, (_HARMLESS | {*harmless}) - strict
        return Keys(frozenset(carried), frozenset(harmless), all_only, all_equal, all_parts)

    def refusal(self, settings: Mapping[str, Any], kind: str = "") -> str | None:
        """What of a config.json is not carried, in words; None where all is.

        Args:
            kind: model type, of settings of a part.
        """
        kind = kind or settings.get("model_type", "")
        for key, value in settings.items():
            if value is None or key in self.carried or key in self.harmless:
                continue
            if key in self.parts:
                if not isinstance(value, Mapping):
                    return f"has {key} {value!r}, which must be an object of settings"
                if refusal := self.parts[key].refusal(value, kind):
                    return refusal
                continue
            if key in self.equal:
                other = self.equal[key]
                if value == settings.get(other, value):
                    continue
                return (
                    f"has {key} {value!r} and {other} {settings[other]!r}, which is not carried unless they are equal"
                )
            if key not in self.only:
                return f"has {key} {value!r}, which is not known to be carried: remove it if it changes nothing"
            if value not in self.only[key]:
                allowed = " or ".join(map(repr, self.only[key])) or "no such key"
                return f"has {key} {value!r}, which is not carried for {kind}: only {allowed} is"
        return None
