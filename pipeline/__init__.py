"""Distil one encoder-decoder teacher into modular layers, then assemble checkpoints of any size.

Imports go one way (tests/unit/test_imports.py holds it):
arithmetic < formats < pieces < machinery < programs; design and vocabulary are in README.md.
"""

import data_prep  # noqa: F401 refuses an old Python
