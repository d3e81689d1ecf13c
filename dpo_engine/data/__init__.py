"""How does a data source become tokenised trees?

    reading.py      a file, a hub id or a list  -> rows with the place they came from (origin)
    strict_json.py  text -> a JSON value, refusing what json.loads lets through
    formats.py      rows -> preference rows: which columns mean what
    shapes.py       what one understood arrangement of columns is
    unpaired.py     completions with a label each
    ranked.py       lists of completions that numbers put in order
    templates.py    preference row -> prompt text and completion texts
    tokenizing.py   texts -> token ids, with an exact boundary and a scored end token
    truncation.py   token ids -> token ids that fit max_length
    repeats.py      lists without the completions that say the same
    pairs.py        all of it in order, and the report that accounts for every row
    streaming.py    the same, a few rows at a time
    mismatched.py   another prompt's completion for each tree
    inspection.py   what training on the trees will compute, from their lengths
    token_view.py   the characters of each token
    records.py      the plain types that pass between them

Nothing here needs a model, and transformers, datasets and pyarrow are imported only where a source needs them (`streaming`,
which is torch's kind of data set, needs torch).
"""

from __future__ import annotations

from dpo_engine.data.formats import DataFormat, detect_format
from dpo_engine.data.pairs import PairSource, check_source, load_pairs, load_row, tokenize_pairs
from dpo_engine.data.reading import read_rows
from dpo_engine.data.records import DataReport, PairData, PreferenceRow, TokenizedTree

__all__ = [
    "DataFormat",
    "DataReport",
    "PairData",
    "PairSource",
    "PreferenceRow",
    "TokenizedTree",
    "check_source",
    "detect_format",
    "load_pairs",
    "load_row",
    "read_rows",
    "tokenize_pairs",
]
