"""CTranslate2, which serves encoder-decoders on CPUs and GPUs several times as fast as transformers.

Its own converter writes the model. What it takes for granted of transformers 4 is said to it here: that a T5 scales its
outputs where its config calls the head tied (version 5 calls every T5's so), that a BART's config has
`normalize_before`, and that a tokenizer has as many tokens as the model. Then log-probabilities of the converted model
are held against the checkpoint's.

Shapes: B examples, S source tokens, T target tokens, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from data_prep.publish import discard
from pipeline.beside import GENERATION, TOKENIZER_CONFIG, read
from pipeline.engines.base import TOLERANCE
from pipeline.families import family_of
from pipeline.ordinary import read_model
from pipeline.tokenizer import copy_tokenizer

AUTO = "AutoTokenizer"
MODEL = "model.bin"
OPTIONS = ("length_penalty", "no_repeat_ngram_size", "repetition_penalty")
"""Settings of generation_config.json that translate_batch takes under the same names."""
PATIENCE = 3.0
"""For how many times as many finished outputs as beams a search goes on. With 1, its default, it ends where generate
with `early_stopping` does; without that generate goes on as long as a better one may come."""
SOURCE_LENGTHS, TARGET_LENGTHS = (16, 11, 3), (8, 5, 2)


def to_ctranslate2(checkpoint: Path, folder: Path, quantization: str) -> str:
    """Write a checkpoint into a folder as a CTranslate2 model, with its tokenizer.

    As `Engine.convert`.
    """
    converter = _converter(checkpoint)
    for name, text in _files(converter, folder, quantization).items():
        (folder / name).write_text(text, encoding="utf-8")
    copy_tokenizer(checkpoint, folder)
    if (checkpoint / GENERATION).is_file():
        shutil.copy2(checkpoint / GENERATION, folder / GENERATION)  # for Translator
    if quantization == "float32":
        check_scores(checkpoint, folder)
    return _loading(checkpoint, _vocabulary(folder))


def _files(converter: Any, folder: Path, quantization: str) -> dict[str, str]:
    """Convert beside `folder`, since the converter wants no folder to be there; move the model in; return the rest."""
    made = folder / "made"
    converter.convert(str(made), quantization=quantization)
    (made / MODEL).rename(folder / MODEL)
    texts = {path.name: path.read_text(encoding="utf-8") for path in made.iterdir()}
    discard(made)
    return texts


def _converter(checkpoint: Path) -> Any:
    """CTranslate2's converter for a checkpoint, told what it would take from it in the wrong way."""
    from ctranslate2.converters import TransformersConverter  # late: it need not be installed

    class Converter(TransformersConverter):
        def load_model(self, model_class: Any, model_name_or_path: str, **options: Any) -> Any:
            model, _ = read_model(Path(model_name_or_path), **options)
            config, family = model.config, family_of(model.config.model_type)
            if hasattr(config, "scale_decoder_outputs"):  # by which version 5 of transformers scales
                config.tie_word_embeddings = config.scale_decoder_outputs
            elif family.scales_tied_head is False:
                config.tie_word_embeddings = False  # never scales
            for key, values in family.keys.only.items():
                if values and not hasattr(config, key):  # what transformers takes for granted of the family
                    setattr(config, key, values[0])
            # one that names none is taken for an mBART-25's, whose texts begin with a language
            config.tokenizer_class = getattr(config, "tokenizer_class", None) or AUTO
            return model

        def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **options: Any) -> Any:
            tokenizer = super().load_tokenizer(tokenizer_class, model_name_or_path, **options)
            if tokenizer.bos_token is None:  # as of mBART-50; the engine wants a name, and uses it nowhere
                tokenizer.bos_token = tokenizer.eos_token
            num_tokens = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"]
            tokenizer.num_madeup_words = 0  # which it would add once more to an M2M100's
            tokenizer.add_tokens([f"<unused_{index}>" for index in range(len(tokenizer), num_tokens)])
            return tokenizer

    return Converter(str(checkpoint))


@torch.no_grad()
def check_scores(checkpoint: Path, folder: Path) -> None:
    """Hold that a converted model gives random texts the log-probabilities that its checkpoint gives them.

    Raises:
        ValueError: it does not.
    """
    import ctranslate2

    translator = ctranslate2.Translator(str(folder), device="cpu", intra_threads=torch.get_num_threads())
    model, _ = read_model(checkpoint, dtype=torch.float32)
    words = _vocabulary(folder)
    drawn = torch.tensor([i for i in range(len(words)) if i != model.config.pad_token_id])  # no text has padding in it
    start = getattr(model.config, family_of(model.config.model_type).start_key)
    generator = torch.Generator().manual_seed(0)
    for source_length, target_length in zip(SOURCE_LENGTHS, TARGET_LENGTHS, strict=True):
        source_S, target_T = (
            drawn[torch.randint(len(drawn), (length,), generator=generator)]
            for length in (source_length, target_length)
        )
        inputs_T = torch.cat([torch.tensor([start]), target_T])
        logits_TV = model(input_ids=source_S[None], decoder_input_ids=inputs_T[None]).logits[0, :-1, : len(words)]
        ours_T = logits_TV.float().log_softmax(-1).gather(1, target_T[:, None])[:, 0]
        (scored,) = translator.score_batch([[words[i] for i in source_S]], [[words[i] for i in target_T]])
        apart = (ours_T - torch.tensor(scored.log_probs[:target_length])).abs().max().item()
        if not apart <= TOLERANCE:
            raise ValueError(
                f"{checkpoint}: what CTranslate2 makes of it gives log-probabilities up to {apart:.2g} apart: not "
                f"published; install the version of requirements.txt"
            )


def _vocabulary(folder: Path) -> list[str]:
    return json.loads((folder / "shared_vocabulary.json").read_text(encoding="utf-8"))


def options_of(told: Mapping[str, Any], words: Sequence[str], num_beams: int, max_new_tokens: int) -> dict[str, Any]:
    """What generate goes by, in the words of translate_batch.

    Args:
        told: what generation_config.json says.
        words: what the engine calls each id.
    """
    options = {name: told[name] for name in OPTIONS if told.get(name) is not None}
    options |= {"beam_size": num_beams, "max_decoding_length": max_new_tokens}
    options["max_input_length"] = 0  # all of a source: the engine by itself would cut it at 1,024 tokens
    if num_beams > 1 and told.get("early_stopping") is not True:
        options["patience"] = PATIENCE
    # generate counts the token that the decoder starts with; the engine by itself would allow no empty output
    options["min_decoding_length"] = max(0, (told.get("min_length") or 0) - 1)
    if isinstance(ends := told.get("eos_token_id"), list):
        options["end_token"] = [words[each] for each in ends]
    # an OPUS-MT's padding is no word of the engine's, which never writes it
    never = [ids for ids in told.get("bad_words_ids") or [] if max(ids) < len(words)]
    if never:
        options["suppress_sequences"] = [[words[each] for each in ids] for ids in never]
    return options


class Translator:
    """A converted model that takes and gives token ids, as a model of transformers does."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        import ctranslate2

        self._model = ctranslate2.Translator(
            str(folder), device=device.type, device_index=device.index or 0, intra_threads=torch.get_num_threads()
        )
        self._told = read(folder / GENERATION)
        self._words = _vocabulary(folder)
        self._ids = {word: index for index, word in enumerate(self._words)}
        self.num_bytes = (folder / MODEL).stat().st_size

    def generate(
        self, sources: Sequence[Sequence[int]], max_new_tokens: int, num_beams: int,
        forced_bos_ids: Sequence[int] | None = None, min_new_tokens: int = 0,
    ) -> list[list[int]]:  # fmt: skip
        """Output ids of one batch, each with its end of sequence.

        Args:
            forced_bos_ids: what each output begins with; None where the generation settings say it.
            min_new_tokens: no output is shorter; 0 where the generation settings say it.
        """
        options = options_of(self._told, self._words, num_beams, max_new_tokens)
        if min_new_tokens:
            options["min_decoding_length"] = min_new_tokens
        forced = self._told.get("forced_bos_token_id")
        if forced_bos_ids is None and forced is not None:
            forced_bos_ids = [forced] * len(sources)
        prefix = [[self._words[each]] for each in forced_bos_ids] if forced_bos_ids else None
        results = self._model.translate_batch(
            self._named(sources), target_prefix=prefix, return_end_token=True, **options
        )
        outputs: list[list[int]] = [[self._ids[word] for word in result.hypotheses[0]] for result in results]
        if (end := self._told.get("forced_eos_token_id")) is not None:
            outputs = [ids if len(ids) < max_new_tokens else [*ids[:-1], end] for ids in outputs]
        return outputs

    def losses_of(self, sources: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> list[float]:
        """Cross entropy with the reference of each example of one batch, summed over its tokens, in nats.

        Args:
            references: each with its end of sequence.
        """
        targets = [ids[:-1] for ids in references]  # the engine adds the end
        results = self._model.score_batch(self._named(sources), self._named(targets), max_input_length=0)
        return [-sum(result.log_probs) for result in results]

    def _named(self, rows: Sequence[Sequence[int]]) -> list[list[str]]:
        return [[self._words[each] for each in ids] for ids in rows]


def _loading(checkpoint: Path, words: Sequence[str]) -> str:
    """How the folder is used, with what generation_config.json says in CTranslate2's words; a tokenizer with tokens of
    languages is told them first."""
    told = read(checkpoint / GENERATION)
    options = options_of(told, words, told.get("num_beams") or 1, told.get("max_new_tokens") or 128)
    first, languages = [], []
    if language := read(checkpoint / TOKENIZER_CONFIG).get("src_lang"):
        languages = [
            f"tokenizer.src_lang = tokenizer.tgt_lang = {language!r}  # of the texts, and of what is to be written"
        ]
        first = ["first = tokenizer.convert_ids_to_tokens(tokenizer(text_target='').input_ids[:1])"]
    elif told.get("forced_bos_token_id") is not None:
        token = AutoTokenizer.from_pretrained(checkpoint).convert_ids_to_tokens(told["forced_bos_token_id"])
        first = [f"first = [{token!r}]"]
    code = [
        "import ctranslate2",
        "from transformers import AutoTokenizer",
        'folder, texts = ".", ["a text"]  # this folder',
        "translator, tokenizer = ctranslate2.Translator(folder), AutoTokenizer.from_pretrained(folder)",
        *languages,
        "pieces = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts).input_ids]",
        f"options = {options}",
        *first,
        *(["options['target_prefix'] = [first] * len(texts)"] if first else []),
        "for result in translator.translate_batch(pieces, **options):",
        "    ids = tokenizer.convert_tokens_to_ids(result.hypotheses[0])",
        "    print(tokenizer.decode(ids, skip_special_tokens=True))",
    ]
    return "".join(f"    {line}\n" for line in code)
