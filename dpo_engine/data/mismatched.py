"""Which completion of another prompt does each row get, for a baseline that compares prompts with answers not meant for them?

The choice depends on the rows' ids alone: not on a run's seed, nor on the order of the rows, and a row that is added changes the
choice of few others, so what a reference model said of it before can be used again.

Rows stand in a circle, in the order of a hash of their ids, and each gets from the next. Where the next has the same prompt, two
rows far enough apart change their givers, after which both get another prompt's:

    A -> A, B -> C    becomes    A -> C, B -> A

That is possible as long as no prompt has more than half of the rows; so every row gives once. Beyond that the other rows give
in turn, more than once.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

from dpo_engine.data.records import TokenizedTree
from dpo_engine.errors import DataError

logger = logging.getLogger(__name__)


def with_mismatched(trees: Sequence[TokenizedTree], max_length: int | None) -> list[TokenizedTree]:
    """Each tree with one more completion at its end, which is another prompt's; `mismatched` says so.

    Args:
        trees: Of a whole data set. A tree of several completions gives one of them, by its hash.
        max_length: The completion is cut at its end so that it fits behind its new prompt; None for no bound. One of which
            nothing scored would be left is passed over for that of the next row with another prompt.

    Returns:
        The trees in their order. Their `desirable` is that of their own completions. Sums under the reference that the data
        brought are dropped, since they lack the one of the new completion; a warning says of how many rows.

    Raises:
        DataError: All rows have the same prompt, or no other row's completion fits behind one of the prompts.
    """
    if taken := next((tree for tree in trees if tree.mismatched), None):
        raise DataError(f"{taken.origin} has a mismatched completion already; expected the rows as they were read")
    prompts = [_digest(tree.prompt_ids) for tree in trees]
    if len(set(prompts)) < 2:
        held = f"{len(trees)} rows of one and the same prompt" if len(trees) > 1 else f"{len(trees)} row"
        raise DataError(
            f"the data holds {held}, but the baseline takes the answer to another prompt for each row; give rows of at least two "
            "different prompts"
        )
    keys = [prompt + _digest(*tree.completions) for prompt, tree in zip(prompts, trees, strict=True)]
    keys = [blake2b(key, digest_size=16).digest() for key in keys]  # or rows of one prompt would stand together
    circle = sorted(range(len(trees)), key=keys.__getitem__)
    lent = [_lent(tree, key) for tree, key in zip(trees, keys, strict=True)]
    givers = _givers([prompts[index] for index in circle])
    found = list(trees)
    for place, giver in enumerate(givers):
        index = circle[place]
        tree = trees[index]
        room = None if max_length is None else max_length - len(tree.prompt_ids)
        ids, mask = _cut(*lent[circle[giver]], room)
        if not (ids if mask is None else any(mask)):
            ids, mask = _next_that_fits(place, giver, circle, prompts, lent, room, tree.origin)
        scored = None if tree.scored is None and mask is None else (*tree.scored_masks, mask or [True] * len(ids))
        found[index] = replace(
            tree, completions=(*tree.completions, ids), scored=scored, reference_logps=None, mismatched=True
        )
    if dropped := sum(tree.reference_logps is not None for tree in trees):
        logger.warning(
            "%d %s log-probs of the reference, but none of another prompt's answer, which the baseline needs: theirs are not used, "
            "and all are computed",
            dropped,
            "row brings" if dropped == 1 else "rows bring",
        )
    return found


def _digest(*parts: Sequence[int]) -> bytes:
    """Of token ids: the same in every process."""
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        ids = array("q", part)
        digest.update(ids.tobytes())
    return digest.digest()


Lent = tuple[list[int], list[bool] | None]
"""A completion, and which of its ids are scored; None: all of them."""


def _lent(tree: TokenizedTree, key: bytes) -> Lent:
    """The completion that a row gives."""
    which = key[-1] % len(tree.completions)
    return tree.completions[which], None if tree.scored is None else tree.scored[which]


def _cut(ids: list[int], mask: list[bool] | None, room: int | None) -> Lent:
    if room is None or len(ids) <= room:
        return ids, mask
    return ids[: max(room, 0)], mask and mask[: max(room, 0)]


def _givers(prompts: list[bytes]) -> list[int]:
    """From which place each place on the circle gets, one of another prompt; `prompts` holds two or more different ones."""
    count = len(prompts)
    givers = [(place + 1) % count for place in range(count)]
    alike: dict[bytes, list[int]] = {}
    for place, prompt in enumerate(prompts):
        if prompts[givers[place]] == prompt:
            alike.setdefault(prompt, []).append(place)
    for prompt, places in alike.items():
        # An exchange for this prompt only takes away others that could be exchanged with, so one walk around finds them all.
        walk = iter([*range(places[0] + 1, count), *range(places[0])])
        for place in places:
            if prompts[givers[place]] != prompt:
                continue
            other = next((o for o in walk if prompt not in (prompts[o], prompts[givers[o]])), None)
            if other is None:
                _in_turn(places, prompt, prompts, givers)
                break
            givers[place], givers[other] = givers[other], givers[place]
    return givers


def _in_turn(places: list[int], prompt: bytes, prompts: list[bytes], givers: list[int]) -> None:
    """Lets the rows with other prompts give in turn to the places that still get from their own prompt."""
    others = [place for place, other in enumerate(prompts) if other != prompt]
    left = [place for place in places if prompts[givers[place]] == prompt]
    for turn, place in enumerate(left):
        givers[place] = others[turn % len(others)]


def _next_that_fits(
    place: int,
    giver: int,
    circle: list[int],
    prompts: list[bytes],
    lent: list[Lent],
    room: int | None,
    origin: str,
) -> Lent:
    """The first completion after the giver's, around the circle, of which something scored is left."""
    own, count = prompts[circle[place]], len(circle)
    for step in range(1, count):
        index = circle[(giver + step) % count]
        if prompts[index] == own:
            continue
        ids, mask = _cut(*lent[index], room)
        if ids if mask is None else any(mask):
            return ids, mask
    raise DataError(
        f"{origin}: room={room}: no other prompt's completion has a scored token that fits behind its prompt; raise max_length, "
        "or bound prompts with max_prompt_length"
    )
