"""Decoding of many assemblies in one batch with caches, token for token as transformers' generate.

plain.py: transformers' own generate, and batches of like length; views.py: assemblies as paths through one pool of
layers; rules.py: the settings of generate; decoder.py: one step of the decoder; greedy.py, beams.py: the two searches;
pending.py: rows of several assemblies that go through one decoder together; together.py: all of it over one batch.
"""

from pipeline.decoding.plain import MAX_EXAMPLES_PER_BATCH, batches_of, generate, load, losses_of, padded_sources
from pipeline.decoding.rules import Rules, generation_settings, refuse_unknown, rules_of
from pipeline.decoding.together import Member, Outputs, decode_together
from pipeline.decoding.views import Pool, load_pool
