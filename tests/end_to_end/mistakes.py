"""What people get wrong, by name: in a recipe, in folders, in data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.breaking import (
    LINES,
    ROOT,
    Mistake,
    begun,
    cut_gzip,
    metricx_alone,
    text,
    write_jsonl,
)
from tests.end_to_end.broken_folders import BROKEN_FOLDERS

RECIPE = {
    "stage": Mistake("unknown stage 'distil'", stage="distil"),
    "no recipe": Mistake("no recipe 'nosuch'", "--config nosuch"),
    "not yaml": Mistake("recipe.yaml", break_it=text("recipe.yaml", "name: [")),
    "nested without end": Mistake("recipe.yaml: not valid YAML", break_it=text("recipe.yaml", "a: " + 2000 * "[")),
    "in UTF-16": Mistake("recipe.yaml: not valid YAML", break_it=text("recipe.yaml", "name: a".encode("utf-16"))),
    "a list": Mistake("recipe.yaml", break_it=text("recipe.yaml", "- name\n")),
    "unknown key": Mistake("did you mean distill.losses.hidden?", "--distill.lossses.hidden 3"),
    "unknown key in the file": Mistake(
        "did you mean distill.optim.num_steps?", break_it=text("recipe.yaml", "distill: {optim: {num_step: 1}}")
    ),
    "wrong type": Mistake("num_steps", "--distill.optim.num_steps many"),
    "negative steps": Mistake("distill.optim.num_steps is -1: choose at least 0", "--distill.optim.num_steps -1"),
    "no steps": Mistake("there would be no modular layers", "--distill.optim.num_steps 0 --distill.local_steps 0"),
    "learning rate": Mistake("optim.learning_rate is 0.0: choose more than 0", "--distill.optim.learning_rate 0"),
    "init": Mistake("distill.init is 'sideways': choose one of first, middle, last", "--distill.init sideways"),
    "granularity 1": Mistake("distill.granularities is 1: choose at least 2", "--distill.granularities [1,2]"),
    "no granularity": Mistake("at least one granularity", "--distill.granularities []"),
    "local steps": Mistake("choose at most distill.optim.num_steps, which is 4", "--distill.local_steps 5"),
    "temperature": Mistake("temperature is 0.0: choose more than 0", "--distill.losses.temperature 0"),
    "loss weight": Mistake("task has a weight below 0: -1.0", "--distill.losses.task -1"),
    "preset": Mistake("assemble.presets is 'fast': choose one of size-first, speed-first", "--assemble.presets [fast]"),
    "ratio under 1": Mistake("assemble.ratios is 0.5: choose at least 1", "--assemble.ratios [0.5]"),
    "no checkpoint kept": Mistake("keep_checkpoints is 0: choose at least 1", "--distill.loop.keep_checkpoints 0"),
    "no tokenizer": Mistake("data.tokenizer is empty", "--data.tokenizer="),
    "no teacher": Mistake("give one of the two", "--teacher.folder="),
    "vocabulary size": Mistake("data.vocab_size is 3: choose at least 64 and at most 1000000", "--data.vocab_size 3"),
    "one file where a list goes": Mistake("data.train is train.jsonl: it must be a list, such as [train.jsonl]",
                                          "--data.train train.jsonl"),
    "steps as 1e3": Mistake("num_steps is 1000.0: it must be a whole number", "--distill.optim.num_steps 1e3"),
    "no ranks": Mistake("launch.num_ranks is 0: choose at least 1", "--launch.num_ranks 0"),
    "no beams": Mistake("evaluate.num_beams is 0: choose at least 1", "--evaluate.num_beams 0"),
    "decay of a moment": Mistake("distill.optim.beta1 is 1.5: choose at least 0 and less", "--distill.optim.beta1 1.5"),
    "no heads": Mistake("architecture.num_heads is 0", "--teacher.architecture.num_heads 0"),
    "name of a folder": Mistake("name is '../x'", "--name ../x"),
    "a key twice": Mistake("'name' is there twice", break_it=text("recipe.yaml", "name: a\nname: b\n")),
    "an empty section": Mistake("section data holds no fields", break_it=text("recipe.yaml", "name: a\ndata:\n")),
    "an open quote": Mistake("not valid YAML", break_it=text("recipe.yaml", 'name: "a\n')),
    "source and target mixed up": Mistake("target_field are both 'source'", "--data.target_field source"),
    "corpus": Mistake("data.corpus is 'web': choose one of demo, files", "--data.corpus web"),
}  # fmt: skip

BEFORE_ANY_WORK = {
    **BROKEN_FOLDERS,
    "granularity": Mistake("has 8, but the teacher has 6+6 layers", "--distill.granularities [2,8]"),
    "nothing to train": Mistake(
        "leave all of 1+6 layers as they are",
        "--teacher.folder= --teacher.optim.num_steps 1 --teacher.architecture.num_layers 1 "
        "--distill.decoder_granularities []",
    ),
    "granularity of a stack": Mistake(
        "distill.decoder_granularities has 7, but the teacher has 6+6 layers", "--distill.decoder_granularities [7]"
    ),
    "budget": Mistake("layers=1 is beyond the coarsest assembly, which takes 2", "--search.budgets [layers=1]"),
    "bytes": Mistake("bytes=1k is beyond the coarsest assembly", "--search.budgets [bytes=1k]"),
    "ratio": Mistake("ratio 12 asks for 1 of 12 layers", "--assemble.ratios [12]"),
    "assembly text": Mistake("'e2-x' is not an assembly", "--assemble.assemblies [e2-x]"),
    "assembly": Mistake("e5.1-d6 does not fit", "--assemble.assemblies [e5.1-d6]"),
    "no validation texts": Mistake("data.validation is empty", "--data.validation []"),
    "no test texts": Mistake("data.test is empty", "--data.test []"),
    "home": Mistake("~ is not expanded", "--run_dir ~/run"),
    "recover a misfit": Mistake("e5.1-d6 does not fit", "--recover.assembly e5.1-d6"),
    "recover no assembly": Mistake("'e2-x' is not an assembly", "--recover.assembly e2-x"),
    "recover without steps": Mistake(
        "recover.optim.num_steps is 0", "--recover.assembly e2x3-d6 --recover.optim.num_steps 0"
    ),
    "baseline of two granularities": Mistake(
        "baseline theseus has one granularity",
        "--baseline.methods [theseus] --baseline.optim.num_steps 2 --baseline.ratios [1.2]",
    ),
    "tokenizer of BLEU": Mistake(
        "evaluate.bleu_tokenizer is ko-mecab, which cannot be made here", "--evaluate.bleu_tokenizer ko-mecab",
        lambda: sys.modules.update({"mecab_ko": None}),
    ),
    "MetricX missing": Mistake("nowhere holds no model: it needs", "--evaluate.metricx nowhere"),
    "MetricX of another kind": Mistake("is of no MetricX model (model_type t5", "--evaluate.metricx teacher"),
    "MetricX without a tokenizer": Mistake(
        "peer has no tokenizer: copy that of google/mt5-xl", "--evaluate.metricx peer", metricx_alone
    ),
    "another test part that is missing": Mistake("new.jsonl: no such file", "--evaluate.test [new.jsonl]"),
    "another test part without targets": Mistake(
        "new.jsonl:1: no field 'target'", "--evaluate.test [new.jsonl]", text("new.jsonl", '{"source": "a"}\n')
    ),
    "another test part for a mixture": Mistake(
        "evaluate.test cannot go with data.sets",
        '--data.train [] --data.validation [] --data.test [] --evaluate.test [test.jsonl] --data.sets '
        '[{"name":"a","train":["train.jsonl"],"validation":["validation.jsonl"],"test":["test.jsonl"]}]',
    ),
    "other model": Mistake("nowhere is not a Hugging Face folder", "--evaluate.folders [nowhere]"),
    "ds_config not json": Mistake(
        "ds.json is not valid JSON", "--distill.loop.ds_config ds.json", text("ds.json", "{")
    ),
    "tokenizer missing": Mistake("nowhere holds no tokenizer", "--data.tokenizer nowhere"),
    "tokenizer of another model": Mistake("is not the teacher's", "--data.tokenizer other_tokenizer"),
    "tokenizer too large": Mistake("the teacher's embedding only 48", "--data.tokenizer large_tokenizer"),
    "not fetched": Mistake("run `python -m pipeline fetch`", "--teacher.folder hub:nobody/nothing"),
    "not a repository": Mistake("write hub:owner/name", "--teacher.folder hub:nothing"),
    "ranks": Mistake("launch.num_ranks 3 does not divide", "--launch.num_ranks 3"),
    "run_dir is a file": Mistake("is a file", "--run_dir recipe.yaml"),
    "run_dir not writable": Mistake("cannot write to /proc", "--run_dir /proc/run"),
    "ds_config": Mistake("no DeepSpeed configuration 'zero9'", "--distill.loop.ds_config zero9"),
    "ds_config with a typing error": Mistake(
        "ds.json: zero_optimization.overlap_com: Extra inputs are not permitted", "--distill.loop.ds_config ds.json",
        text("ds.json", '{"zero_optimization": {"stage": 3, "overlap_com": true}}'),
    ),
    "ds_config decides": Mistake(
        "sets gradient_clipping", "--distill.loop.ds_config ds.json",
        text("ds.json", '{"gradient_clipping": 1.0, "zero_optimization": {"stage": 3}}'),
    ),
    "begun with another teacher": Mistake(
        "is half finished with other settings (teacher.optim.weight_decay: 0.5 -> 0.0)",
        break_it=lambda: begun("teacher", "--teacher.optim.weight_decay", "0.5"),
    ),
    "begun with another schedule": Mistake(
        "give --extend to continue", break_it=lambda: begun("teacher", "--teacher.optim.num_steps", "7")
    ),
}  # fmt: skip

DATA = {
    "file missing": Mistake("nowhere.jsonl: no such file", "--data.train [nowhere.jsonl]"),
    "no file": Mistake("data.train is empty", "--data.train []"),
    "field": Mistake("present: source, target; set data.source_field", "--data.source_field text"),
    "empty": Mistake("train.jsonl: the file holds no record", break_it=text("train.jsonl", "\n")),
    "not utf-8": Mistake("train.jsonl:1: not UTF-8", break_it=text("train.jsonl", b'{"source": "\xfc"}\n')),
    "not json": Mistake("train.jsonl:1: not a JSON object", break_it=text("train.jsonl", "hello\n")),
    "a list a line": Mistake("a JSON list, not an object", break_it=text("train.jsonl", "[1]\n")),
    "no target": Mistake(
        "test.jsonl:61: no field 'target'",
        break_it=lambda: write_jsonl(Path("test.jsonl"), [*LINES, {"source": "lonely"}]),
    ),
    "cut gzip": Mistake("truncated or damaged", "--data.train [train.jsonl.gz]", cut_gzip),
    "not gzip": Mistake(
        "truncated or damaged", "--data.train [train.jsonl.gz]", lambda: shutil.copy("train.jsonl", "train.jsonl.gz")
    ),
    "sheet with semicolons": Mistake(
        "the header is one cell, 'source;target'", "--data.train [a.csv]", text("a.csv", "source;target\na;b\n")
    ),
    "utf-16": Mistake("not UTF-8", "--data.train [a.jsonl]", text("a.jsonl", "\ufeff{}".encode("utf-16"))),
    "other settings": Mistake(
        "begun with other data settings (max_source_tokens 9 -> 512)",
        break_it=lambda: subprocess.run(
            [sys.executable, "-m", "data_prep", "build", "--config", "recipe.yaml", "--out", "run/data",
             "--data.max_source_tokens", "9"],
            check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        ),
    ),
}  # fmt: skip

TOO_EARLY = {
    "assemble first": Mistake("stage assemble needs the output of stage teacher", stage="assemble"),
    "evaluate first": Mistake("run stage data first", stage="evaluate"),
    "report first": Mistake("stage evaluate", stage="report"),
}

MISTAKES = {**RECIPE, **BEFORE_ANY_WORK, **DATA, **TOO_EARLY}
