"""Reference log-probs as data: addressed by content, kept on disk, checked before they are trusted.

    addresses.py  tokens -> the address of a completion's log-probs
    weights.py    tensors -> a digest
    space.py      a model and how it is computed -> the address of everything it says
    files.py      one SQLite file of one writer
    store.py      the union of a space's files
    values.py     what a data set knows of its reference
    filling.py    what is missing, computed in bulk and kept
    guard.py      rows computed again and compared
    cache.py      the folder as a whole: `ReferenceCache`

`files` and `store` need the standard library alone.
"""
