"""How much memory will a training run take, before any weight is fetched? Arithmetic on a model's config.

    shapes.py   a config.json becomes the sizes that memory depends on
    step.py     those sizes and the run's settings become bytes, part by part
    cards.py    what a card has
    plan.py     what fits a card, and what to change where nothing does
    recipe.py   a plan as a YAML file that `dpo-engine train` takes

Nothing here imports torch or transformers: a plan takes milliseconds. The arithmetic is held against a trace of the real
step, storage by storage (`tests/support/memory_trace.py`).
"""
