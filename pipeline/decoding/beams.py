"""Beam search, token for token what Hugging Face generate gives.

Shapes: B examples, K beams of an example, R = B x K rows, C candidates, L most tokens, V vocabulary.
"""

from __future__ import annotations

import torch

from pipeline.decoding.decoder import Decoder, GrowingCache, Memory, step
from pipeline.decoding.rules import Rules


@torch.inference_mode()
def beam_search(
    decoder: Decoder, memory: Memory, rules: Rules, forced_bos_B: torch.Tensor | None = None
) -> list[list[int]]:
    """The best beam of each of B examples, the start token left out, the end of sequence put in.

    An example leaves the batch when transformers would no longer change its result. The beams of one example share its
    cross-attention keys and values.

    Args:
        forced_bos_B: tokens that the outputs begin with, instead of one that the rules have for all.
    """
    beams = _Beams(memory.num_examples, rules, memory.bias.device)
    rows = memory.num_examples * rules.num_beams
    caches = [GrowingCache(each, rows) for each in memory.cross]
    while beams.num_examples:
        tokens_R1, positions_11 = beams.last_tokens()
        finished_RD = step(decoder, caches, memory, tokens_R1, positions_11)[:, 0]
        log_probs_RV = decoder.shared.logits(finished_RD).float().log_softmax(-1)
        if rules.processors:
            log_probs_RV = rules.processors(beams.tokens_so_far(), log_probs_RV)
        if forced_bos_B is not None and beams.length == 1:
            forced_R1 = forced_bos_B.repeat_interleave(rules.num_beams)[:, None]
            log_probs_RV = torch.full_like(log_probs_RV, -torch.inf).scatter(1, forced_R1, 0.0)
        rows_kept, examples_kept = beams.advance(log_probs_RV)
        for cache in caches:
            cache.select(rows_kept)
        if len(examples_kept) < memory.num_examples:
            memory = memory.select(examples_kept)
    return beams.outputs


class _Beams:
    """Running and finished beams of B examples; the steps are those of transformers' beam search, in its order."""

    def __init__(self, num_examples: int, rules: Rules, device: torch.device) -> None:
        self.rules, self.most = rules, 1 + rules.max_new_tokens
        shape = (num_examples, rules.num_beams)
        self.examples_B = torch.arange(num_examples, device=device)
        self.running_BKL = torch.full((*shape, self.most), rules.pad_id, device=device)
        self.running_BKL[:, :, 0] = rules.start_id
        self.running_scores_BK = torch.full(shape, -1e9, device=device)
        self.running_scores_BK[:, 0] = 0.0  # the beams are one at first
        self.finished_BKL = self.running_BKL.clone()
        self.finished_scores_BK = torch.full(shape, -1e9, device=device)
        self.finished_length_BK = torch.zeros(shape, dtype=torch.long, device=device)
        self.is_finished_BK = torch.zeros(shape, dtype=torch.bool, device=device)
        self.eos_ids = torch.tensor(rules.eos_ids, device=device)
        self.length = 1
        self.outputs: list[list[int]] = [[] for _ in range(num_examples)]

    @property
    def num_examples(self) -> int:
        return len(self.examples_B)

    def last_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Last token of each beam [R, 1], and its position [1, 1]."""
        position = torch.tensor([[self.length - 1]], device=self.examples_B.device)
        return self.running_BKL[:, :, self.length - 1].reshape(-1, 1), position

    def tokens_so_far(self) -> torch.Tensor:
        return self.running_BKL[:, :, : self.length].flatten(0, 1)

    def advance(self, log_probs_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one step; (rows that the next step continues from, examples that are still open)."""
        num_beams, vocabulary = self.rules.num_beams, log_probs_RV.shape[-1]
        total = log_probs_RV.view(-1, num_beams, vocabulary) + self.running_scores_BK[:, :, None]
        num_candidates = max(2, 1 + len(self.eos_ids)) * num_beams  # so many that as many beams go on as there were
        scores_BC, places_BC = total.flatten(1).topk(num_candidates)
        beam_BC, token_BC = places_BC // vocabulary, places_BC % vocabulary
        tokens_BCL = _take(self.running_BKL, beam_BC)
        tokens_BCL[:, :, self.length] = token_BC
        self.length += 1
        ends_BC = torch.isin(token_BC, self.eos_ids) | (self.length >= self.most)

        running_BC = scores_BC + ends_BC.float() * -1e9
        next_BK = running_BC.topk(num_beams)[1]
        self.running_BKL, self.running_scores_BK = _take(tokens_BCL, next_BK), _take(running_BC, next_BK)
        self._finish(tokens_BCL, scores_BC, ends_BC)
        open_B = self._open_examples()
        rows_BK = _take(beam_BC, next_BK) + num_beams * torch.arange(len(beam_BC), device=beam_BC.device)[:, None]
        self._hand_out((~open_B).nonzero().squeeze(1))
        examples = open_B.nonzero().squeeze(1)
        self._keep(examples)
        return rows_BK[examples].flatten(), examples

    def _finish(self, tokens_BCL: torch.Tensor, scores_BC: torch.Tensor, ends_BC: torch.Tensor) -> None:
        """Let candidates that end now, and were among the best, take the place of worse finished beams."""
        num_beams = self.rules.num_beams
        among_best_C = torch.arange(scores_BC.shape[1], device=scores_BC.device) < num_beams
        done_BC = ends_BC & among_best_C
        scores_BC = scores_BC / ((self.length - 1) ** self.rules.length_penalty) + (~done_BC) * -1e9
        merged = torch.cat((self.finished_scores_BK, scores_BC), dim=1)
        best_BK = merged.topk(num_beams)[1]
        lengths_BC = torch.full_like(done_BC, self.length, dtype=torch.long)
        self.finished_scores_BK = _take(merged, best_BK)
        self.finished_BKL = _take(torch.cat((self.finished_BKL, tokens_BCL), dim=1), best_BK)
        self.finished_length_BK = _take(torch.cat((self.finished_length_BK, lengths_BC), dim=1), best_BK)
        self.is_finished_BK = _take(torch.cat((self.is_finished_BK, done_BC), dim=1), best_BK)

    def _open_examples(self) -> torch.Tensor:
        """Whether a running beam of an example could still become one of its best."""
        if self.length >= self.most:
            return torch.zeros_like(self.is_finished_BK[:, 0])
        rules = self.rules
        never = rules.early_stopping == "never" and rules.length_penalty > 0
        length = self.most - 1 if never else self.length - 1
        best_B1 = self.running_scores_BK[:, :1] / length**rules.length_penalty
        worst_B1 = self.finished_scores_BK.min(dim=1, keepdim=True)[0]
        open_B = (best_B1 > torch.where(self.is_finished_BK, worst_B1, -1e9)).any(1)
        if rules.early_stopping is True:
            open_B = open_B & ~self.is_finished_BK.all(1)
        return open_B

    def _hand_out(self, examples: torch.Tensor) -> None:
        tokens, lengths = self.finished_BKL[examples, 0].tolist(), self.finished_length_BK[examples, 0].tolist()
        for example, text, length in zip(self.examples_B[examples].tolist(), tokens, lengths, strict=True):
            self.outputs[example] = text[1:length]

    def _keep(self, examples: torch.Tensor) -> None:
        for name in ("examples_B", "running_BKL", "running_scores_BK", "finished_BKL", "finished_scores_BK",
                     "finished_length_BK", "is_finished_BK"):  # fmt: skip
            setattr(self, name, getattr(self, name)[examples])


def _take(values: torch.Tensor, index_BK: torch.Tensor) -> torch.Tensor:
    """values[b, index[b, k]] for every b and k."""
    shape = index_BK.shape + (1,) * (values.dim() - 2)
    return torch.take_along_dim(values, index_BK.view(shape), dim=1)
