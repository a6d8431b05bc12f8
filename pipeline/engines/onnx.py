"""ONNX, which ONNX Runtime computes wherever it runs: Python, C++, Java, browsers, phones.

torch.onnx traces three graphs, with the names that optimum gives them: the encoder, the decoder's first step, and its
later steps with a cache. Of torch's two exporters the older one writes them: in seconds, where the newer takes half a
minute for the smallest model. The decoder's graphs share one file of weights. Then log-probabilities of the graphs are
held against the checkpoint's.

Shapes: B examples, S source tokens, T target tokens, P target tokens in the cache, H heads, K width of a head, V
vocabulary, D width.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import shutil
import tempfile
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from pipeline.beside import CONFIG, GENERATION, TOKENIZER_CONFIG, read
from pipeline.engines.base import TOLERANCE
from pipeline.ordinary import read_model
from pipeline.tokenizer import copy_tokenizer

if TYPE_CHECKING:
    from onnxruntime import InferenceSession  # it need not be installed

QUANTIZATIONS = ("float32", "int8")
ENCODER, FIRST, NEXT = "encoder_model", "decoder_model", "decoder_with_past_model"
WEIGHTS = {f"{ENCODER}.onnx_data": (ENCODER,), f"{FIRST}.onnx_data": (FIRST, NEXT)}
"""File of weights -> the graphs that read it."""
SMALLEST, ALIGNED = 1024, 64  # bytes of a tensor that lies in a file of weights, and what its place is a multiple of
OPSET = 17
BATCH, SOURCE, TARGET = "batch_size", "encoder_sequence_length", "decoder_sequence_length"
PAST = f"past_{TARGET}"
LENGTHS, NUM_TARGETS = (16, 11, 3), 6
Axes = dict[int, str]  # axis of a tensor -> its name, where its length may be any


def to_onnx(checkpoint: Path, folder: Path, quantization: str) -> str:
    """Write a checkpoint into a folder as three graphs, with its settings and its tokenizer.

    As `Engine.convert`.
    """
    model, _ = read_model(checkpoint, dtype=torch.float32, attn_implementation="eager")
    graphs = _graphs(model)
    quantized = {name: _quantized(graph) for name, graph in graphs.items()} if quantization == "int8" else {}
    _write(folder, graphs)
    copy_tokenizer(checkpoint, folder)
    for name in (CONFIG, GENERATION):
        if (checkpoint / name).is_file():
            shutil.copy2(checkpoint / name, folder / name)
    check_scores(model, folder)
    if quantized:
        _write(folder, quantized)
    return _loading(checkpoint)


class _Encoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, input_ids_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, D]."""
        return self.encoder(input_ids=input_ids_BS, attention_mask=mask_BS).last_hidden_state


class _Decoder(nn.Module):
    """A step of the decoder. Its cache goes in and out as keys and values [B, H, P or S, K]: for each layer those of
    its own tokens, then those of the source."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def step(
        self, mask_BS: torch.Tensor, input_ids_BT: torch.Tensor, hidden_BSD: torch.Tensor, cache: EncoderDecoderCache
    ) -> torch.Tensor:
        """Logits [B, T, V]; the cache becomes longer."""
        # by place: transformers renamed past_key_values to cache, and says so in every call by the older name
        return self.model(None, mask_BS, input_ids_BT, None, (hidden_BSD,), cache, use_cache=True).logits


class _First(_Decoder):
    def forward(
        self, mask_BS: torch.Tensor, input_ids_BT: torch.Tensor, hidden_BSD: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Logits and the whole cache."""
        cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        logits_BTV = self.step(mask_BS, input_ids_BT, hidden_BSD, cache)
        own, cross = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
        pairs = zip(own, cross, strict=True)
        return logits_BTV, *(each for a, b in pairs for each in (a.keys, a.values, b.keys, b.values))


class _Next(_Decoder):
    def forward(
        self, mask_BS: torch.Tensor, input_ids_B1: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Logits and the cache of the decoder's own tokens; that of the source remains as it is."""
        layers = [past[i : i + 4] for i in range(0, len(past), 4)]
        cache: Any = EncoderDecoderCache(*(DynamicCache([each[s] for each in layers]) for s in (slice(2), slice(2, 4))))
        unread_BSD = torch.zeros((*mask_BS.shape, self.model.config.d_model))  # the cache has what it would be read for
        logits_B1V = self.step(mask_BS, input_ids_B1, unread_BSD, cache)
        return logits_B1V, *(each for a in cache.self_attention_cache.layers for each in (a.keys, a.values))


@torch.no_grad()
def _graphs(model: Any) -> dict[str, Any]:
    """The three graphs, each with its weights in it."""
    source_BS, target_BT = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
    encoder, first = _Encoder(model), _First(model)
    hidden_BSD = encoder(source_BS, source_BS)
    _, *past = first(source_BS, target_BT, hidden_BSD)
    sources, targets = {0: BATCH, 1: SOURCE}, {0: BATCH, 1: TARGET}
    num_layers = len(past) // 4
    befores, afters = _cached(num_layers, "past_key_values", PAST), _cached(num_layers, "present", f"{PAST} + 1")
    return {
        ENCODER: _traced(
            encoder,
            {"input_ids": (source_BS, sources), "attention_mask": (source_BS, sources)},
            {"last_hidden_state": sources},
        ),
        FIRST: _traced(
            first,
            {
                "encoder_attention_mask": (source_BS, sources),
                "input_ids": (target_BT, targets),
                "encoder_hidden_states": (hidden_BSD, sources),
            },
            {"logits": targets, **_cached(num_layers, "present", TARGET)},
        ),
        NEXT: _traced(
            _Next(model),
            {
                "encoder_attention_mask": (source_BS, sources),
                "input_ids": (target_BT[:, :1], {0: BATCH}),
                **{name: (each, befores[name]) for name, each in zip(befores, past, strict=True)},
            },
            {"logits": {0: BATCH}, **{name: axes for name, axes in afters.items() if ".decoder." in name}},
        ),
    }


def _cached(num_layers: int, when: str, length: str) -> dict[str, Axes]:
    """Names and axes of a cache, in the order of `_Decoder`.

    Args:
        length: name of the axis of the decoder's own tokens.
    """
    return {
        f"{when}.{layer}.{stack}.{kind}": {0: BATCH, 2: length if stack == "decoder" else SOURCE}
        for layer in range(num_layers)
        for stack in ("decoder", "encoder")
        for kind in ("key", "value")
    }


def _traced(module: nn.Module, inputs: Mapping[str, tuple[torch.Tensor, Axes]], outputs: Mapping[str, Axes]) -> Any:
    """The graph of a module, from one call with these inputs."""
    import onnx  # late: it need not be installed

    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a newer exporter, and of questions that are asked once
        torch.onnx.export(
            module.eval(), tuple(example for example, _ in inputs.values()), f"{scratch}/graph.onnx", dynamo=False,
            opset_version=OPSET, input_names=[*inputs], output_names=[*outputs],
            dynamic_axes={name: axes for name, (_, axes) in inputs.items()} | dict(outputs),
        )  # fmt: skip
        return onnx.load(f"{scratch}/graph.onnx")


def _write(folder: Path, graphs: Mapping[str, Any]) -> None:
    """Write graphs beside their weights; what several graphs have lies in a file once, and so does a matrix that is
    also there transposed, as tied embeddings are. Takes the weights out of `graphs`."""
    import onnx
    from onnx.external_data_helper import set_external_data

    for file_name, names in WEIGHTS.items():
        places: dict[bytes, int] = {}
        with open(folder / file_name, "wb") as file:
            for graph in (graphs[name].graph for name in names):
                for weight in [each for each in graph.initializer if len(each.raw_data) >= SMALLEST]:
                    array = onnx.numpy_helper.to_array(weight)
                    if array.ndim == 2 and _digest(array.T) in places and _digest(array) not in places:
                        graph.node.insert(0, onnx.helper.make_node("Transpose", [f"{weight.name}.T"], [weight.name]))
                        weight.name, weight.dims[:] = f"{weight.name}.T", reversed(weight.dims)
                        array = array.T
                    if (digest := _digest(array)) not in places:
                        file.write(bytes(-file.tell() % ALIGNED))
                        places[digest] = file.tell()
                        file.write(weight.raw_data)
                    set_external_data(weight, file_name, offset=places[digest], length=len(weight.raw_data))
                    weight.ClearField("raw_data")
        for name in names:
            onnx.save(graphs[name], folder / f"{name}.onnx")


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).digest()


def _quantized(graph: Any) -> Any:
    """A graph with the matrices of its products and its embeddings in int8."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as scratch:
        logging.disable(logging.WARNING)  # that constants should be folded first, as torch.onnx does
        try:
            quantize_dynamic(graph, f"{scratch}/graph.onnx", weight_type=QuantType.QInt8)
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(f"{scratch}/graph.onnx")


def sessions(folder: Path) -> list[InferenceSession]:
    """Encoder, first step and later steps, each ready to run on as many threads as torch."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return [InferenceSession(folder / f"{name}.onnx", options) for name in (ENCODER, FIRST, NEXT)]


@torch.no_grad()
def check_scores(model: Any, folder: Path) -> None:
    """Hold that graphs give random texts the log-probabilities that their checkpoint gives them, two tokens at once
    and then one by one, in a batch with padding.

    Raises:
        ValueError: they do not.
    """
    pad, generator = model.config.pad_token_id, torch.Generator().manual_seed(0)
    drawn = torch.tensor([i for i in range(model.config.vocab_size) if i != pad])
    source_BS, target_BT = (
        drawn[torch.randint(len(drawn), (len(LENGTHS), length), generator=generator)]
        for length in (max(LENGTHS), NUM_TARGETS)
    )
    mask_BS = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    source_BS = source_BS.where(mask_BS == 1, torch.tensor(pad))
    encoder, step, later = sessions(folder)
    (hidden_BSD,) = encoder.run(None, {"input_ids": source_BS.numpy(), "attention_mask": mask_BS.numpy()})
    logits, cache = [], {"encoder_hidden_states": hidden_BSD}
    for tokens in target_BT.split([2, *[1] * (NUM_TARGETS - 2)], dim=1):
        found, cache = advance(step, mask_BS.numpy(), tokens.numpy(), cache)
        logits.append(torch.from_numpy(found))
        step = later
    ours_BTV = model(input_ids=source_BS, attention_mask=mask_BS, decoder_input_ids=target_BT).logits
    apart = (torch.cat(logits, dim=1).log_softmax(-1) - ours_BTV.log_softmax(-1)).abs().max().item()
    if not apart <= TOLERANCE:
        raise ValueError(
            f"{model.name_or_path}: what ONNX Runtime makes of it gives log-probabilities up to {apart:.2g} apart: not "
            f"published; install the versions that --to onnx names where it is missing"
        )


# the README of a folder has the source of advance and greedy: they use numpy alone


def advance(
    step: InferenceSession, mask: np.ndarray, new: np.ndarray, cache: dict[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits (text, token, vocabulary) of new tokens, and the cache with these tokens in it."""
    names = [output.name for output in step.get_outputs()]
    found = dict(zip(names, step.run(None, {"input_ids": new, "encoder_attention_mask": mask, **cache}), strict=True))
    logits = found.pop("logits")
    cache = {name: each for name, each in cache.items() if name.startswith("past_key_values")}
    return logits, cache | {name.replace("present", "past_key_values"): each for name, each in found.items()}


def greedy(
    graphs: list[InferenceSession], ids: np.ndarray, mask: np.ndarray, first: list[int], ends: int | list[int],
    pad: int, never: list[int], max_new_tokens: int,
) -> np.ndarray:  # fmt: skip
    """Ids of outputs, each with its first tokens, from the ids of a batch with padding and its mask."""
    encoder, step, later = graphs
    cache = {"encoder_hidden_states": encoder.run(None, {"input_ids": ids, "attention_mask": mask})[0]}
    written = new = np.array([first] * len(ids))
    ended = np.zeros(len(ids), dtype=bool)
    while written.shape[1] <= max_new_tokens and not ended.all():
        logits, cache = advance(step, mask, new, cache)
        logits[:, -1, never] = -np.inf
        new = np.where(ended, pad, logits[:, -1].argmax(-1))[:, None]
        ended |= np.isin(new[:, 0], ends)
        written = np.concatenate([written, new], axis=1)
        step = later
    return written


def settings_of(folder: Path) -> dict[str, Any]:
    """What `greedy` is told of a folder's settings."""
    told = read(folder / CONFIG) | read(folder / GENERATION)
    forced = told.get("forced_bos_token_id")
    return {
        "first": [told["decoder_start_token_id"], *([] if forced is None else [forced])],
        "ends": told["eos_token_id"],
        "pad": told["pad_token_id"],
        "never": [ids[0] for ids in told.get("bad_words_ids") or [] if len(ids) == 1],
        "max_new_tokens": told.get("max_new_tokens") or 128,
    }


def _loading(checkpoint: Path) -> str:
    """How the folder is used: greedy decoding; a tokenizer with tokens of languages is told them first."""
    languages = []
    if language := read(checkpoint / TOKENIZER_CONFIG).get("src_lang"):
        languages = [
            f"tokenizer.src_lang = tokenizer.tgt_lang = {language!r}  # of the texts, and of what is to be written",
            "settings['first'][1:] = tokenizer(text_target='').input_ids[:1]",
        ]
    code = [
        "import numpy as np",
        "from onnxruntime import InferenceSession",
        "from transformers import AutoTokenizer\n",
        inspect.getsource(advance),
        inspect.getsource(greedy),
        'folder, texts = ".", ["a text"]  # this folder',
        f"settings = {settings_of(checkpoint)}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *languages,
        f"names = {ENCODER!r}, {FIRST!r}, {NEXT!r}",
        "graphs = [InferenceSession(f'{folder}/{name}.onnx') for name in names]",
        "batch = tokenizer(texts, padding=True, return_tensors='np')",
        "ids = greedy(graphs, batch.input_ids, batch.attention_mask, **settings)",
        "print(tokenizer.batch_decode(ids, skip_special_tokens=True))\n",
    ]
    return textwrap.indent("\n".join(code), "    ")
