"""Plain checkpoint folders through transformers' own generate, and batches of like length.

Shapes: B examples, S source tokens, T target or output tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.data import IGNORED_LABEL, padded_rows
from pipeline.pretrained import model_of
from pipeline.tokenizer import load_tokenizer

MAX_EXAMPLES_PER_BATCH = 256


def weights_in(dtype: str) -> torch.dtype | None:
    """What weights are loaded in for a recipe's evaluate.dtype, None for the type of the checkpoint; from here on
    products on a GPU are made accordingly."""
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    return torch.bfloat16 if dtype == "bfloat16" else None


def load(folder: Path, device: torch.device, dtype: str = "checkpoint") -> tuple[Any, Any]:
    """Model (ready to decode) and tokenizer of a folder; never from a network.

    Args:
        dtype: as evaluate.dtype of a recipe.
    """
    model: Any = model_of(folder, weights_in(dtype))
    return model.to(device).eval(), load_tokenizer(folder)


def padded_sources(model: Any, sources: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of one batch as a model of transformers takes them, [B, S] int64."""
    source_BS, mask_BS = padded_rows(sources, model.generation_config.pad_token_id or 0, model.device)
    return source_BS, mask_BS.long()


@torch.inference_mode()
def generate(
    model: Any, sources: Sequence[Sequence[int]], max_new_tokens: int, num_beams: int,
    forced_bos_ids: Sequence[int] | None = None,
) -> list[list[int]]:  # fmt: skip
    """Output ids of one batch, greedy (one beam) or with beams.

    Args:
        forced_bos_ids: what each output begins with; None where the model's generation settings say it.
    """
    if forced_bos_ids is None:
        return _generate(model, sources, max_new_tokens=max_new_tokens, num_beams=num_beams)
    outputs: dict[int, list[int]] = {}
    for first in dict.fromkeys(forced_bos_ids):  # generate takes one for all
        places = [i for i, each in enumerate(forced_bos_ids) if each == first]
        found = _generate(
            model, [sources[i] for i in places], max_new_tokens=max_new_tokens, num_beams=num_beams,
            forced_bos_token_id=first,
        )  # fmt: skip
        outputs |= zip(places, found, strict=True)
    return [outputs[i] for i in range(len(sources))]


def _generate(model: Any, sources: Sequence[Sequence[int]], **options: int) -> list[list[int]]:
    source_BS, mask_BS = padded_sources(model, sources)
    ids_BT = model.generate(input_ids=source_BS, attention_mask=mask_BS, do_sample=False, **options)[:, 1:]
    eos = model.generation_config.eos_token_id
    eos_ids = set(eos if isinstance(eos, list) else [eos])
    return [up_to_end(ids, eos_ids) for ids in ids_BT.tolist()]


@torch.inference_mode()
def losses_of(model: Any, sources: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> list[float]:
    """Cross entropy with the reference of each example of one batch, summed over its tokens, in nats."""
    source_BS, mask_BS = padded_sources(model, sources)
    labels_BT, _ = padded_rows(references, IGNORED_LABEL, model.device)
    logits_BTV = model(input_ids=source_BS, attention_mask=mask_BS, labels=labels_BT, use_cache=False).logits
    losses = F.cross_entropy(
        logits_BTV.float().flatten(0, 1), labels_BT.flatten(), reduction="none", ignore_index=IGNORED_LABEL
    )
    return losses.view_as(labels_BT).double().sum(1).tolist()


def up_to_end(ids: list[int], eos_ids: set[int]) -> list[int]:
    """Output ids without what pads them behind the first end of sequence."""
    end = next((i + 1 for i, each in enumerate(ids) if each in eos_ids), len(ids))
    return ids[:end]


def batches_of(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Positions of examples in batches of like length, the longest first so that memory is short at once or never.

    A batch holds at most `tokens_per_batch` padded tokens (but always one example) and MAX_EXAMPLES_PER_BATCH examples.
    """
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if room == 0:
            batches.append([])
            room = max(1, min(MAX_EXAMPLES_PER_BATCH, tokens_per_batch // max(1, lengths[i])))
        batches[-1].append(i)
        room -= 1
    return batches
