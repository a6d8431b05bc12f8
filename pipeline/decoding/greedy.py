"""Greedy decoding that verifies guesses, token for token what Hugging Face generate gives.

A draft of the next tokens (the reference, what a sibling said of the same source, what the row itself said before) goes
through the decoder in one call, and as much of it is kept as the decoder would have said itself, one token more at
least. So siblings that agree cost one call instead of one a token, and the output is that of decoding token by token,
up to the order of summation. (Speculative decoding, Leviathan et al. 2023, at temperature 0, without a draft model.)

Shapes: B examples, R rows, Q new tokens of a row, L most tokens, T tokens of a pass, D model width, H heads, K width of
a head, P tokens that drafts are taken from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.decoding.decoder import Decoder, GrowingCache, Memory, best_tokens, step
from pipeline.decoding.rules import Rules
from pipeline.families import KeysValues

NOTHING = -1  # in drafts: no token
LONGEST_DRAFT = 12
# what a call costs whatever its size, in tokens through the decoder: a guess for small models on a CPU, not tuned yet;
# on a GPU a call of few tokens costs what its weights cost to read
TOKENS_PER_CALL = {"cpu": 64, "cuda": 2048}
COMPACT_SHARE = 0.85  # rows are put together again when no more than this share of them is unfinished


@dataclass(frozen=True)
class Prefix:
    """What one pass over given tokens has found out: the start of greedy decoding."""

    given_BT: torch.Tensor
    """Decoder inputs, the start token first."""
    said_BT: torch.Tensor
    """What the decoder says after each of them."""
    caches: Sequence[KeysValues]
    """Self-attention's keys and values of each layer, [B, H, T, K]."""

    def select(self, rows: torch.Tensor) -> Prefix:
        """Some of the examples."""
        return Prefix(self.given_BT[rows], self.said_BT[rows], [each.select(rows) for each in self.caches])


def settle(prefix: Prefix, rules: Rules) -> tuple[list[list[int]], torch.Tensor]:
    """Outputs of the examples that one pass takes to their end, nothing for the others; and the places of these."""
    rows = _Rows(len(prefix.given_BT), rules, prefix.given_BT.device)
    rows.take(prefix.given_BT, prefix.said_BT)
    unsettled = rows.compact()
    return rows.outputs, unsettled


@torch.inference_mode()
def greedy(
    decoder: Decoder, memory: Memory, rules: Rules, prefix: Prefix | None = None,
    drafts_BP: torch.Tensor | None = None, forced_bos_B: torch.Tensor | None = None,
) -> list[list[int]]:  # fmt: skip
    """Greedy outputs of B examples, the start token left out, the end of sequence put in.

    Args:
        prefix: a pass over guessed outputs, which has settled none of these examples (see `settle`).
        drafts_BP: texts to take drafts from, one after the other, NOTHING between them.
        forced_bos_B: tokens that the outputs begin with, instead of one that the rules have for all.
    """
    device, num_examples = memory.bias.device, memory.num_examples
    rows = _Rows(num_examples, rules, device)
    if prefix is not None:
        rows.take(prefix.given_BT, prefix.said_BT)
        caches = [GrowingCache.of(each) for each in prefix.caches]
    else:
        caches = [GrowingCache(each, num_examples) for each in memory.cross]
    drafts_RP = None if rules.processors else drafts_BP
    share = 1.0 if rules.processors else COMPACT_SHARE
    while len(rows.examples_R):
        draft_RQ = rows.draft(drafts_RP)
        block_RQ = torch.cat((rows.last_token(), draft_RQ), dim=1)
        positions_RQ = rows.positions(block_RQ.shape[1])
        finished_RQD = step(decoder, caches, memory, block_RQ.clamp(min=0), positions_RQ)
        if rules.processors:
            logits_RV = decoder.shared.logits(finished_RQD[:, -1]).float()
            said_RQ = rules.processors(rows.tokens_RL[:, : rows.longest], logits_RV).argmax(-1, keepdim=True)
        else:
            said_RQ = best_tokens(decoder, finished_RQD)
        if forced_bos_B is not None and rows.longest == 1:
            said_RQ[:, 0] = forced_bos_B
        rows.take(block_RQ, said_RQ)
        if rows.num_unfinished <= share * len(rows.examples_R):
            unfinished = rows.compact()
            memory = memory.select(unfinished)
            for cache in caches:
                cache.select(unfinished)
            drafts_RP = None if drafts_RP is None else drafts_RP[unfinished]
    return rows.outputs


class _Rows:
    """The rows of a greedy batch: tokens so far, which are finished, and what to guess next."""

    def __init__(self, num_rows: int, rules: Rules, device: torch.device) -> None:
        self.rules = rules
        self.most = 1 + rules.max_new_tokens
        self.capacity = self.most + LONGEST_DRAFT
        self.examples_R = torch.arange(num_rows, device=device)
        self.tokens_RL = torch.full((num_rows, self.capacity), NOTHING, device=device)
        self.tokens_RL[:, 0] = rules.start_id
        self.length_R = torch.ones(num_rows, dtype=torch.long, device=device)  # tokens known, the start token too
        self.done_R = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.eos_ids = torch.tensor(rules.eos_ids, device=device)
        self.outputs: list[list[int]] = [[] for _ in range(num_rows)]
        self.num_unfinished = num_rows
        self.longest = 1
        self.is_level = True  # the unfinished rows all have as many tokens as the longest
        self.hope = 0.5

    def take(self, block_RQ: torch.Tensor, said_RQ: torch.Tensor) -> None:
        """Keep what the decoder said for as long as the block was what it says.

        The block begins with the last token known of each row; said[:, i] is what it says after block[:, : i + 1], or
        NOTHING where it was not asked.
        """
        width = block_RQ.shape[1]
        right_RQ = (said_RQ[:, :-1] == block_RQ[:, 1:]) & (said_RQ[:, 1:] != NOTHING)
        num_kept_R = right_RQ.long().cumprod(1).sum(1) + 1
        places_Q = torch.arange(width, device=block_RQ.device)
        ends_RQ = torch.isin(said_RQ, self.eos_ids) & (places_Q < num_kept_R[:, None])
        ended_R = ends_RQ.any(1)
        num_kept_R = torch.where(ended_R, ends_RQ.long().argmax(1) + 1, num_kept_R)
        num_kept_R = torch.minimum(num_kept_R, self.most - self.length_R).masked_fill(self.done_R, 0)
        kept_RQ = places_Q < num_kept_R[:, None]
        places_RQ = self.length_R[:, None] + places_Q
        row_RQ = torch.arange(len(block_RQ), device=block_RQ.device)[:, None].expand_as(places_RQ)
        self.tokens_RL[row_RQ[kept_RQ], places_RQ[kept_RQ]] = said_RQ[kept_RQ]
        self._learn(right_RQ, ended_R)
        self.length_R = self.length_R + num_kept_R
        self.done_R = self.done_R | ended_R | (self.length_R >= self.most)
        shortest = self.length_R.masked_fill(self.done_R, self.most).min()
        found = torch.stack(((~self.done_R).sum(), self.length_R.max(), shortest)).tolist()
        self.num_unfinished, self.longest, self.is_level = found[0], found[1], found[1] == found[2]

    def _learn(self, right_RQ: torch.Tensor, ended_R: torch.Tensor) -> None:
        """How likely a guess is right, from those that were tried: a row tries on until one is wrong."""
        tried_RQ = right_RQ.long().cumprod(1).roll(1, 1)
        tried_RQ[:, :1] = 1
        counted_RQ = tried_RQ.bool() & ~(self.done_R | ended_R)[:, None]
        num_right, num_tried = int((right_RQ & counted_RQ).sum()), int(counted_RQ.sum())
        if num_tried:
            self.hope = 0.5 * (self.hope + num_right / num_tried)
        else:
            self.hope = min(1.0, self.hope + 0.05)  # nothing was tried: sooner or later try again

    def _width(self) -> int:
        """The number of guesses that yields most for its cost: 1 + h + ... + h^width tokens for a call of 1 + width."""
        overhead = TOKENS_PER_CALL[self.tokens_RL.device.type] / max(1, self.num_unfinished)
        gain, best, best_rate = 1.0, 0, 1.0 / (overhead + 1)
        for width in range(1, LONGEST_DRAFT + 1):
            gain += self.hope**width
            rate = gain / (overhead + 1 + width)
            if rate > best_rate:
                best, best_rate = width, rate
        return best

    def compact(self) -> torch.Tensor:
        """Hand the finished rows out; the places of the rows that stay."""
        done, unfinished = self.done_R.nonzero().squeeze(1), (~self.done_R).nonzero().squeeze(1)
        tokens, lengths = self.tokens_RL[done].tolist(), self.length_R[done].tolist()
        for example, row, length in zip(self.examples_R[done].tolist(), tokens, lengths, strict=True):
            self.outputs[example] = row[1:length]
        self.examples_R, self.tokens_RL = self.examples_R[unfinished], self.tokens_RL[unfinished]
        self.length_R, self.done_R = self.length_R[unfinished], self.done_R[unfinished]
        self.longest = int(self.length_R.max()) if len(unfinished) else 0
        return unfinished

    def last_token(self) -> torch.Tensor:
        return self.tokens_RL.gather(1, self.length_R[:, None] - 1)

    def positions(self, width: int) -> torch.Tensor:
        """Positions of a block, [R, width], or [1, width] where all unfinished rows stand at the same."""
        places_Q = torch.arange(width, device=self.length_R.device)
        if self.is_level:
            return (places_Q + self.longest - 1)[None]
        return self.length_R[:, None] - 1 + places_Q

    def draft(self, drafts_RP: torch.Tensor | None) -> torch.Tensor:
        """Guesses for the next tokens of each row, [R, Q]: what followed the row's last tokens where they were seen."""
        width = 0 if drafts_RP is None else self._width()
        if drafts_RP is None or width == 0:
            return self.tokens_RL[:, :0]
        seen_RP = torch.cat((drafts_RP, self.tokens_RL[:, : self.longest]), dim=1)
        last_R1 = self.last_token()
        before_R1 = self.tokens_RL.gather(1, (self.length_R[:, None] - 2).clamp(min=0))
        same_RP = seen_RP == last_R1
        both_RP = same_RP & (seen_RP.roll(1, 1) == before_R1)
        place_P = _places(seen_RP.shape[1], drafts_RP.shape[1], self.most + 1, seen_RP.device)
        aside_RP = (place_P - (self.length_R[:, None] - 1)).abs()
        score_RP = both_RP * 2000 + same_RP * 1000 - aside_RP
        score_RP[:, drafts_RP.shape[1] :].masked_fill_(
            torch.arange(self.longest, device=place_P.device) >= self.length_R[:, None] - 1, -(10**6)
        )
        after_R1 = score_RP.argmax(1, keepdim=True) + 1
        places_RQ = after_R1 + torch.arange(width, device=place_P.device)
        inside_RQ = places_RQ < seen_RP.shape[1]
        return seen_RP.gather(1, places_RQ.clamp(max=seen_RP.shape[1] - 1)).masked_fill(~inside_RQ, NOTHING)


def _places(num_seen: int, num_drafts: int, period: int, device: torch.device) -> torch.Tensor:
    """Position of each token within its own text: drafts are laid side by side in columns of `period`."""
    places_P = torch.arange(num_seen, device=device)
    return torch.where(places_P < num_drafts, places_P % period, places_P - num_drafts)


def lay_out_drafts(texts: Sequence[Sequence[Sequence[int]]], rules: Rules, device: torch.device) -> torch.Tensor:
    """Texts to take drafts from, for each source of drafts a text for each example, as `greedy` wants them, [B, P]."""
    width = rules.max_new_tokens + 2  # the start token's place, and one that parts it from the next
    columns = []
    for each in texts:
        rows = [[NOTHING, *text[: width - 2]] for text in each]
        columns.append(torch.tensor([row + [NOTHING] * (width - len(row)) for row in rows]))
    return torch.cat(columns, dim=1).to(device)
