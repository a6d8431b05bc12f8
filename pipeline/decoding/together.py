"""Many assemblies over the same examples, sharing what they have in common.

Encoders: one layer call for each distinct prefix of the encoder paths. Cross-attention keys and values: once for each
encoder output and decoder layer. References: one teacher-forced pass gives the validation loss of every assembly, one
call for each distinct prefix of the decoder paths; the same pass is the first guess that greedy decoding verifies, and
often all that is needed; without references it is left out. What is left of all assemblies with the same decoder is
decoded as one batch.

Shapes: B examples, S source tokens, T target tokens, D model width, V vocabulary, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.data import IGNORED_LABEL, padded_rows
from pipeline.decoding.beams import beam_search
from pipeline.decoding.decoder import Decoder, Memory, logits_at_once
from pipeline.decoding.greedy import NOTHING, Prefix, greedy, lay_out_drafts, settle
from pipeline.decoding.pending import Pending, join
from pipeline.decoding.plain import MAX_EXAMPLES_PER_BATCH, batches_of
from pipeline.decoding.rules import Rules
from pipeline.decoding.views import Pool
from pipeline.families import KeysValues
from pipeline.spans import Span, walk

# padded source tokens that encoders and references are computed on together; on a GPU as many as the batch has
TOKENS_PER_PART = {"cpu": 1024, "cuda": 2**30}
MAX_PENDING_BYTES = {"cpu": 2**29, "cuda": 2**33}  # keys and values of rows that wait for others


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
    """Cross entropy with the reference, summed over its tokens, in nats; empty where there are no references."""


@dataclass
class LayerCalls:
    """How often a layer was called: `encoder` on sources, `decoder` on references."""

    encoder: int = 0
    decoder: int = 0


@torch.inference_mode()
def decode_together(
    pool: Pool, members: Sequence[Member], sources: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]] | None, rules: Rules, calls: LayerCalls | None = None,
    beat: Callable[[], None] = lambda: None, forced_bos_ids: Sequence[int] | None = None,
) -> dict[str, Outputs]:  # fmt: skip
    """Outputs and losses of every member on one batch of examples.

    Args:
        members: the first one's outputs serve the others as drafts, so let it be the teacher.
        sources, references: token ids of B examples; without references there are no losses.
        calls: counts layer calls.
        beat: called after each piece of work.
        forced_bos_ids: tokens that the outputs begin with, instead of one that the rules have for all.

    Returns:
        By member name.
    """
    batch = _Batch(pool, members, len(sources), references, rules, calls or LayerCalls(), beat, forced_bos_ids)
    for places in parts_of(sources, pool.device):
        batch.read([sources[i] for i in places], places)
    batch.decode_pending()
    return batch.results


def parts_of(sources: Sequence[Sequence[int]], device: torch.device) -> list[list[int]]:
    """Places of the examples that encoders and references are computed on together: few enough to hold little padding
    and to stay in a CPU's cache."""
    return batches_of([len(text) for text in sources], TOKENS_PER_PART[device.type])


class _Batch:
    """The examples of one call of decode_together, and what has been found out so far."""

    def __init__(
        self, pool: Pool, members: Sequence[Member], num_examples: int, references: Sequence[Sequence[int]] | None,
        rules: Rules, calls: LayerCalls, beat: Callable[[], None], forced_bos_ids: Sequence[int] | None,
    ) -> None:  # fmt: skip
        self.pool, self.members, self.references = pool, members, references
        self.rules, self.calls, self.beat, self.forced_bos_ids = rules, calls, beat, forced_bos_ids
        no_losses = [0.0] * (0 if references is None else num_examples)
        self.results = {each.name: Outputs([[] for _ in range(num_examples)], no_losses.copy()) for each in members}
        self.pending: dict[tuple[Span, ...], list[Pending]] = {}  # by decoder

    def read(self, sources: Sequence[Sequence[int]], places: Sequence[int]) -> None:
        """Encode some examples, and take their references through every decoder, where there are any."""
        pool = self.pool
        source_BS, mask_BS = padded_rows(sources, self.rules.pad_id, pool.device)
        inputs = pool.shared.inputs("encoder", mask_BS)

        def encode(hidden_BSD: torch.Tensor, span: Span) -> torch.Tensor:
            self.calls.encoder += 1
            return pool.family.call_layer(pool.layers["encoder"][span], hidden_BSD, None, inputs)

        embedded_BSD = pool.shared.embed("encoder", source_BS)
        for path, hidden_BSD in walk([member.encoder for member in self.members], embedded_BSD, encode):
            members = [member for member in self.members if member.encoder == path]
            encoded_BSD = pool.shared.finish("encoder", hidden_BSD)
            cross = {
                span: pool.family.cross_keys_values(pool.layers["decoder"][span], encoded_BSD)
                for span in {span: None for member in members for span in member.decoder}
            }
            cross_bias = pool.shared.cross_bias(mask_BS)
            prefixes = {} if self.references is None else self._force(members, cross, cross_bias, places)
            for decoder in {member.decoder: None for member in members}:
                names = [member.name for member in members if member.decoder == decoder]
                memory = Memory([cross[span] for span in decoder], cross_bias)
                self._wait(decoder, Pending(names, places, memory, prefixes.get(decoder)))

    def _force(
        self, members: Sequence[Member], cross: Mapping[Span, KeysValues], cross_bias: torch.Tensor,
        places: Sequence[int],
    ) -> dict[tuple[Span, ...], Prefix]:  # fmt: skip
        """Losses of all members that share an encoder output; what the pass over the references has found out, by
        decoder."""
        pool, found = self.pool, {}
        assert self.references is not None
        labels_BT, _ = padded_rows([self.references[i] for i in places], IGNORED_LABEL, pool.device)
        given_BT = pool.shared.decoder_inputs(labels_BT)
        positions_1T = torch.arange(given_BT.shape[1], device=pool.device)[None]
        inputs = pool.shared.inputs_at(positions_1T, given_BT.shape[1], cross_bias)

        def force(state: tuple[torch.Tensor, tuple[KeysValues, ...]], span: Span) -> tuple[torch.Tensor, Any]:
            hidden_BTD, seen = state
            self.calls.decoder += 1
            cache = _Recorder()
            layer = pool.layers["decoder"][span]
            hidden_BTD = pool.family.call_cached(layer, hidden_BTD, cache, cross[span], inputs)
            return hidden_BTD, (*seen, *cache.seen)

        start: tuple[torch.Tensor, tuple[KeysValues, ...]] = (pool.shared.embed_at(given_BT, positions_1T), ())
        for path, (hidden_BTD, seen) in walk([member.decoder for member in members], start, force):
            said_BT, losses = _score(self._decoder(path), pool.shared.finish("decoder", hidden_BTD), labels_BT)
            if (forced_bos_B := self._forced_bos(places)) is not None:
                said_BT[:, 0] = forced_bos_B
            names = [member.name for member in members if member.decoder == path]
            for name in names:
                for place, loss in zip(places, losses, strict=True):
                    self.results[name].losses[place] = loss
            found[path] = Prefix(given_BT, said_BT, seen)
            self.beat()
        return found

    def _wait(self, path: tuple[Span, ...], rows: Pending) -> None:
        """Let rows wait for others with the same decoder, after those that their references have settled."""
        if self.rules.num_beams > 1 or self.rules.processors:
            rows = replace(rows, prefix=None)
        elif rows.prefix is not None:
            outputs, unsettled = settle(rows.prefix, self.rules)
            self._put(rows.names, rows.examples, outputs)
            rows = rows.select(unsettled)
        if rows.examples:
            self.pending.setdefault(path, []).append(rows)
        if (
            sum(each.num_bytes for parts in self.pending.values() for each in parts)
            > MAX_PENDING_BYTES[self.pool.device.type]
        ):
            self.decode_pending()

    def decode_pending(self) -> None:
        """Decode all rows that wait; those of the first member first, for they are drafts for the others."""
        for path in sorted(self.pending, key=lambda path: path != self.members[0].decoder):
            decoder, parts = self._decoder(path), self.pending.pop(path)
            while parts:
                room = MAX_EXAMPLES_PER_BATCH - len(parts[0].examples)
                together = [parts.pop(0)]
                while parts and len(parts[0].examples) <= room:
                    room -= len(parts[0].examples)
                    together.append(parts.pop(0))
                self._decode(decoder, together)

    def _decode(self, decoder: Decoder, parts: Sequence[Pending]) -> None:
        memory, prefix = join(parts)
        examples = [i for part in parts for i in part.examples]
        forced_bos_B = self._forced_bos(examples)
        if self.rules.num_beams > 1:
            outputs = beam_search(decoder, memory, self.rules, forced_bos_B)
        else:
            outputs = greedy(decoder, memory, self.rules, prefix, self._drafts(examples), forced_bos_B)
        rest = iter(outputs)
        for part in parts:
            self._put(part.names, part.examples, [next(rest) for _ in part.examples])
        self.beat()

    def _forced_bos(self, examples: Sequence[int]) -> torch.Tensor | None:
        if self.forced_bos_ids is None:
            return None
        return torch.tensor([self.forced_bos_ids[i] for i in examples], device=self.pool.device)

    def _decoder(self, path: tuple[Span, ...]) -> Decoder:
        pool = self.pool
        return Decoder(pool.family, pool.shared, pool.path("decoder", path), pool.vocabulary_size)

    def _put(self, names: Sequence[str], examples: Sequence[int], outputs: Sequence[list[int]]) -> None:
        for name in names:
            for example, tokens in zip(examples, outputs, strict=True):
                self.results[name].tokens[example] = tokens

    def _drafts(self, examples: Sequence[int]) -> torch.Tensor:
        """What greedy decoding takes its guesses from: what the first member says, and the references."""
        texts = [self.results[self.members[0].name].tokens, *([self.references] if self.references else [])]
        return lay_out_drafts([[each[i] for i in examples] for each in texts], self.rules, self.pool.device)


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
