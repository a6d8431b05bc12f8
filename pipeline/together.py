"""Many assemblies over the same examples, sharing what they have in common.

Encoders: one layer call for each distinct prefix of the encoder paths. Cross-attention keys and values: once for each
encoder output and decoder layer. References: one teacher-forced pass gives the validation loss of every assembly, one
call for each distinct prefix of the decoder paths; the same pass is the first guess that greedy decoding verifies.

Shapes: B examples, S source tokens, T target tokens, D model width, V vocabulary, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from pipeline.beams import beam_search
from pipeline.decoder import Decoder, Memory, Rules, logits_at_once
from pipeline.families import StackInputs
from pipeline.families.base import KeysValues
from pipeline.greedy import NOTHING, Prefix, greedy, lay_out_drafts
from pipeline.prefixes import walk
from pipeline.spans import Span
from pipeline.views import Pool

IGNORED_LABEL = -100
# settings of a generation config that Rules carry; anything else leaves the checkpoint to transformers' own generate
UNDERSTOOD = {
    "bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens",
    "num_beams", "length_penalty", "early_stopping", "do_sample", "use_cache", "transformers_version",
    "_from_model_config", "repetition_penalty", "no_repeat_ngram_size", "min_length", "forced_bos_token_id",
    "forced_eos_token_id",
}  # fmt: skip


@dataclass(frozen=True)
class Member:
    """One assembly of a pool: its path through each stack."""

    name: str
    encoder: tuple[Span, ...]
    decoder: tuple[Span, ...]


@dataclass(frozen=True)
class Outputs:
    """What one assembly makes of B examples."""

    tokens: list[list[int]]
    """Output ids, the start token left out."""
    losses: list[float]
    """Cross entropy with the reference, summed over its tokens, in nats."""


@dataclass
class LayerCalls:
    """How often a layer was called: `encoder` on sources, `decoder` on references."""

    encoder: int = 0
    decoder: int = 0


def rules_of(model: Any, max_new_tokens: int, num_beams: int) -> Rules:
    """Decoding settings of a Hugging Face model as generate(max_new_tokens=..., num_beams=..., do_sample=False) has it.

    Raises:
        ValueError: the model's generation config holds a setting that is not carried over.
    """
    config = model.generation_config
    unknown = sorted(
        name
        for name, value in config.to_diff_dict().items()
        if name not in UNDERSTOOD and value not in (None, False, 0, 1.0)
    )
    if unknown:
        raise ValueError(f"generation settings {', '.join(unknown)} are left to transformers")
    start_id = config.decoder_start_token_id
    if start_id is None:
        start_id = getattr(model.config, "decoder_start_token_id", None) or config.bos_token_id
    eos_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return Rules(
        start_id=int(start_id),
        eos_ids=tuple(int(each) for each in eos_ids if each is not None),
        pad_id=int(config.pad_token_id or 0),
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        length_penalty=1.0 if config.length_penalty is None else config.length_penalty,
        early_stopping=config.early_stopping or False,
        processors=_processors(config, eos_ids, max_new_tokens, str(model.device)),
    )


def _processors(config: Any, eos_ids: list[int], max_new_tokens: int, device: str) -> Any:
    """transformers' own logits processors, in the order in which generate applies them; None where there is none."""
    found: list[Any] = []
    if config.repetition_penalty not in (None, 1.0):
        found.append(transformers.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        found.append(transformers.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.min_length:
        found.append(transformers.MinLengthLogitsProcessor(config.min_length, eos_ids, device=device))
    if config.forced_bos_token_id is not None:
        found.append(transformers.ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        ends = config.forced_eos_token_id
        found.append(transformers.ForcedEOSTokenLogitsProcessor(1 + max_new_tokens, ends, device=device))
    return transformers.LogitsProcessorList(found) if found else None


@torch.inference_mode()
def decode_together(
    pool: Pool, members: Sequence[Member], sources: Sequence[Sequence[int]], references: Sequence[Sequence[int]],
    rules: Rules, calls: LayerCalls | None = None, beat: Callable[[], None] = lambda: None,
) -> dict[str, Outputs]:  # fmt: skip
    """Outputs and losses of every member on one batch of examples.

    Args:
        members: the first one's outputs serve the others as drafts, so let it be the teacher.
        sources, references: token ids of B examples.
        calls: counts layer calls.
        beat: called after each member.

    Returns:
        By member name.
    """
    calls = calls or LayerCalls()
    batch = _Batch(pool, rules, calls, beat, *_padded(pool, rules, sources, references))
    encoder_inputs = StackInputs(pool.shared.self_bias("encoder", batch.mask_BS))

    def encode(hidden_BSD: torch.Tensor, span: Span) -> torch.Tensor:
        calls.encoder += 1
        return pool.family.call_layer(pool.layers["encoder"][span], hidden_BSD, None, encoder_inputs)

    embedded_BSD = pool.shared.embed("encoder", batch.source_BS)
    for path, hidden_BSD in walk([member.encoder for member in members], embedded_BSD, encode):
        encoded_BSD = pool.shared.finish("encoder", hidden_BSD)
        batch.decode([member for member in members if member.encoder == path], encoded_BSD, members[0].name)
    return batch.results


def _padded(
    pool: Pool, rules: Rules, sources: Sequence[Sequence[int]], references: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(source_BS, mask_BS, labels_BT) on the pool's device."""

    def pad(texts: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        longest = max(1, *(len(text) for text in texts)) if texts else 1
        return torch.tensor([[*text, *[filler] * (longest - len(text))] for text in texts], device=pool.device)

    lengths = torch.tensor([len(text) for text in sources], device=pool.device)
    source_BS = pad(sources, rules.pad_id)
    mask_BS = torch.arange(source_BS.shape[1], device=pool.device) < lengths[:, None]
    return source_BS, mask_BS, pad(references, IGNORED_LABEL)


@dataclass
class _Batch:
    """The examples of one call of decode_together, and what has been found out so far."""

    pool: Pool
    rules: Rules
    calls: LayerCalls
    beat: Callable[[], None]
    source_BS: torch.Tensor
    mask_BS: torch.Tensor
    labels_BT: torch.Tensor
    results: dict[str, Outputs] = field(default_factory=dict)

    def decode(self, members: Sequence[Member], encoded_BSD: torch.Tensor, drafter: str) -> None:
        """All members that share this encoder output."""
        pool, calls = self.pool, self.calls
        cross: dict[Span, KeysValues] = {}
        for span in {span: None for member in members for span in member.decoder}:
            cross[span] = pool.family.cross_keys_values(pool.layers["decoder"][span], encoded_BSD)
        given_BT = pool.shared.decoder_inputs(self.labels_BT)
        positions_1T = torch.arange(given_BT.shape[1], device=pool.device)[None]
        cross_bias = pool.shared.cross_bias(self.mask_BS)
        inputs = StackInputs(pool.shared.bias_at(positions_1T, given_BT.shape[1]), cross_bias)

        def force(state: tuple[torch.Tensor, tuple[KeysValues, ...]], span: Span) -> tuple[torch.Tensor, Any]:
            hidden_BTD, seen = state
            calls.decoder += 1
            cache = _Recorder()
            layer = pool.layers["decoder"][span]
            hidden_BTD = pool.family.call_cached(layer, hidden_BTD, cache, cross[span], inputs)
            return hidden_BTD, (*seen, *cache.seen)

        start: tuple[torch.Tensor, tuple[KeysValues, ...]] = (pool.shared.embed_at(given_BT, positions_1T), ())
        for path, (hidden_BTD, seen) in walk([member.decoder for member in members], start, force):
            decoder = Decoder(pool.family, pool.shared, pool.path("decoder", path), pool.vocabulary_size)
            said_BT, losses = _score(decoder, pool.shared.finish("decoder", hidden_BTD), self.labels_BT)
            memory = Memory([cross[span] for span in path], cross_bias)
            if self.rules.num_beams > 1:
                tokens = beam_search(decoder, memory, self.rules)
            else:
                tokens = greedy(decoder, memory, self.rules, Prefix(given_BT, said_BT, seen), self._drafts(drafter))
            for member in members:
                if member.decoder == path:
                    self.results[member.name] = Outputs(tokens, losses)
            self.beat()

    def _drafts(self, drafter: str) -> torch.Tensor:
        """What greedy decoding takes its guesses from: the member decoded last, the drafter, the references."""
        references = [[token for token in text if token >= 0] for text in self.labels_BT.tolist()]
        texts = [references]
        if drafter in self.results:
            texts = [self.results[drafter].tokens, references]
        if self.results and (last := next(reversed(self.results))) != drafter:
            texts = [self.results[last].tokens, *texts]
        return lay_out_drafts(texts, self.rules, self.pool.device)


class _Recorder:
    """A cache that keeps what one pass over many tokens leaves, and lets every token look at the pass itself."""

    def __init__(self) -> None:
        self.seen: list[KeysValues] = []

    def extend(self, new: KeysValues) -> KeysValues:
        self.seen.append(new)
        return new


def _score(decoder: Decoder, finished_BTD: torch.Tensor, labels_BT: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """The likeliest token after each state that has a label [B, T], NOTHING after the others, and each example's cross
    entropy summed over its labels, in nats."""
    has_label_BT = labels_BT != IGNORED_LABEL
    num_at_once = logits_at_once(decoder, labels_BT.device)
    said, losses = [], []
    for states_ND, labels_N in zip(
        finished_BTD[has_label_BT].split(num_at_once), labels_BT[has_label_BT].split(num_at_once), strict=True
    ):
        logits_NV = decoder.shared.logits(states_ND).float()
        said.append(logits_NV.argmax(-1))
        losses.append(logits_NV.logsumexp(-1) - logits_NV.gather(1, labels_N[:, None]).squeeze(1))
    said_BT = torch.full_like(labels_BT, NOTHING)
    said_BT[has_label_BT] = torch.cat(said)
    loss_BT = torch.zeros(labels_BT.shape, dtype=torch.float64, device=labels_BT.device)
    loss_BT[has_label_BT] = torch.cat(losses).double()
    return said_BT, loss_BT.sum(1).tolist()
