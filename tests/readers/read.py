"""What a reader makes of model folders: run in a process of its own, in which this project cannot be imported.

    python -I read.py REQUEST ANSWER [PATH ...]

REQUEST is JSON: {"texts", "folders", "max_new_tokens"}; ANSWER becomes what torch.save makes of {folder: {"ids",
"logits", "greedy", "beams", "words", "told"}}, with the reader's version under "version"; "told" is what the folder's
own generation settings give. Each PATH goes first where modules are sought.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

request_path, answer_path, *paths = sys.argv[1:]
sys.path[:0] = paths
for name in ("pipeline", "data_prep", "slurm", "tests"):  # an installation in place is on every path
    sys.modules[name] = None  # type: ignore[assignment]  # then importing it raises

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer  # noqa: E402

torch.set_num_threads(1)
request = json.loads(Path(request_path).read_text(encoding="utf-8"))
answer = {"version": transformers.__version__}
for folder in request["folders"]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True).eval()
    batch = tokenizer(request["texts"], padding=True, return_tensors="pt")
    generator = torch.Generator().manual_seed(0)
    target_BT = torch.randint(model.config.vocab_size, (len(request["texts"]), 9), generator=generator)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    mask_BT = torch.ones_like(target_BT)
    mask_BT[0, -1] = 0  # with padding every model is causal
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=target_BT, decoder_attention_mask=mask_BT).logits
    told = model.generate(**inputs)
    outputs = [
        model.generate(**inputs, num_beams=num_beams, do_sample=False, max_new_tokens=request["max_new_tokens"])
        for num_beams in (1, 4)
    ]
    ids = [tokenizer(text).input_ids for text in request["texts"]]
    words = [tokenizer.batch_decode(each, skip_special_tokens=True) for each in outputs]
    answer[folder] = {
        "ids": ids, "logits": logits, "greedy": outputs[0], "beams": outputs[1], "words": words, "told": told,
    }  # fmt: skip
torch.save(answer, answer_path)
