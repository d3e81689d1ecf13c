"""Where do a run's reference log-probs come from? Columns of the data, the reference cache, or the reference, asked in bulk.

known = reference.known(data, "train_dataset")       the whole data set, before the first step
trees = reference.of(trees)                          trees as they arrive, of a stream or of a run shorter than its data
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from dpo_engine.batch import TokenTree, Tree
from dpo_engine.errors import CacheError, ConfigError, DataError
from dpo_engine.losses import Method
from dpo_engine.model.adapters import REFERENCE, has_reference_adapter, is_peft_model
from dpo_engine.reference.cache import ReferenceCache, no_bar
from dpo_engine.reference.filling import Filled, Pack, Score, fill
from dpo_engine.reference.guard import GUARDED_ROWS, Mismatch, check_rows, check_sums, refuse, some_rows
from dpo_engine.reference.space import ReferenceSpace, reference_space
from dpo_engine.reference.store import ReferenceStore
from dpo_engine.reference.values import ReferenceValues, with_reference

logger = logging.getLogger(__name__)

CACHE_WORDS = ("auto", "on", "off")


def cache_for(wanted: ReferenceCache | str | Path, *, is_lora: bool) -> ReferenceCache | None:
    """The cache that a setting means: `auto` is the default folder for LoRA and none otherwise."""
    if isinstance(wanted, ReferenceCache):
        return wanted
    if not isinstance(wanted, str | Path):
        raise ConfigError(
            f"reference_cache is a {type(wanted).__name__}; expected a folder, a ReferenceCache, on, off or auto"
        )
    if wanted == "off" or (wanted == "auto" and not is_lora):
        return None
    return ReferenceCache(None if wanted in ("auto", "on") else wanted)


class RunReference:
    """The reference log-probs of one run.

    Args:
        method: whether a reference is needed at all, and whether its log-probs are needed by token.
        reference: the model that is asked: a second one, or the policy, whose adapters are switched off.
        is_policy: whether it is the policy.
        cache: where log-probs are kept; None: in memory only.
        is_default: whether nobody asked for this very cache, so that a folder that cannot be used is announced and done without.
        in_bulk: whether the reference is asked before the first step although there is no cache.
        score, pack: compute trees with the reference, forest by forest.
        dtype: asked for what the reference computes in.
        made: asked for what is noted beside values that are kept.
        say: gets a line for each data set.
    """

    def __init__(
        self,
        *,
        method: Method,
        reference: nn.Module,
        is_policy: bool,
        cache: ReferenceCache | None,
        is_default: bool,
        in_bulk: bool,
        accelerator: Accelerator,
        score: Score,
        pack: Pack,
        dtype: Callable[[], torch.dtype],
        made: Callable[[], dict[str, str]],
        quiet: bool,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        self.method = method
        self.reference = reference
        self.is_policy = is_policy
        self.cache = cache if method.known_beforehand else None
        self.is_default = is_default
        self.in_bulk = method.known_beforehand and (in_bulk or cache is not None)
        self.accelerator = accelerator
        self.score, self.pack = score, pack
        self.dtype, self.made = dtype, made
        self.quiet = quiet
        self.say = say
        self.filled = Filled()
        """What was reused and computed so far, all data sets together."""
        self.space: ReferenceSpace | None = None
        self._store: ReferenceStore | None = None
        self._guarded = self._sums_guarded = False  # of rows that arrive
        self._seen: _Seen | None = None

    # ---- a whole data set ----

    def is_known(self, data: Any) -> bool:
        """Whether nothing of a data set is left to ask, or to check."""
        return isinstance(data, _Sums) or (isinstance(data, ReferenceValues) and not data.missing)

    def as_it_came(self, data: Any) -> Any:
        """The data set without what was found out about it."""
        return data.trees if isinstance(data, _Sums | ReferenceValues) else data

    def known(self, data: Sequence[TokenTree], name: str, guard: int = GUARDED_ROWS) -> Sequence[TokenTree]:
        """The data set, with reference log-probs wherever they are wanted beforehand, or brought by the data.

        Args:
            name: what to call the data set.
            guard: how many rows that were known before are computed again and compared.

        Raises:
            CacheError: the folder cannot be used, a log-prob is not finite, or known rows are not what the reference says.
            DataError: the data brings log-probs that the method cannot use.
        """
        if not self.method.needs_reference or self.is_known(data):
            return data
        if not self.method.known_beforehand:
            self._refuse_brought(data, name)
            return data
        if any(map(_has_sums, data)):
            return self._with_sums(data, name, guard)
        if self.in_bulk:
            self.open()  # which may find that it cannot be
        brought = [index for index, tree in enumerate(data) if _is_known(tree)]
        if not self.in_bulk and not brought:
            return data
        values = ReferenceValues(data)
        for index in brought:
            values.set_logps(index, data[index].reference_token_logps)  # type: ignore[attr-defined]
        self._fill(values, name, guard, brought=brought)
        return values

    def _fill(
        self,
        values: ReferenceValues,
        name: str,
        guard: int,
        only: Sequence[int] | None = None,
        brought: Sequence[int] = (),
    ) -> None:
        filled = fill(values, self.open(), self.score, self.pack, bar=self._bar(name), ranks=self._ranks(), only=only)
        self.filled += filled
        if self.accelerator.is_main_process:
            self.say(self.line(filled, name))
        self._guard(values, some_rows([*filled.found, *brought], guard))

    def _guard(self, values: ReferenceValues, rows: Sequence[int]) -> None:
        """Compute rows again, and stop on every rank if what is known of them is something else."""
        found = self.mismatches(values, rows) if rows and self.accelerator.is_main_process else []
        refuse(self._of_first_rank(found), self._place(), self._causes())

    def mismatches(
        self, values: ReferenceValues, rows: Sequence[int], progress: Callable[[int], object] | None = None
    ) -> list[Mismatch]:
        """The completions of these rows that are not what the reference says now."""
        return check_rows(values, rows, self.score, self.pack, dtype=self.dtype(), progress=progress)

    # ---- sums that the data brings ----

    def sum_mismatches(self, trees: Sequence[TokenTree]) -> list[Mismatch]:
        """The completions whose sums, brought by these trees, are not what the reference says now."""
        sums = [tree.reference_logps for tree in trees]  # type: ignore[attr-defined]
        return check_sums(trees, sums, self.score, self.pack, dtype=self.dtype())

    def check_brought(self, data: Sequence[TokenTree], name: str, guard: int = GUARDED_ROWS) -> None:
        """Stop where sums that a data set brings cannot be used, or are not the reference's.

        Raises:
            DataError: the method, or the data itself, weighs tokens one by one.
            CacheError: the reference says something else now.
        """
        given = [tree for tree in data if _has_sums(tree)]
        if not given or not self.method.needs_reference:
            return
        self._refuse_brought(data, name)
        if any(getattr(tree, "token_weights", None) is not None for tree in data):
            raise DataError(
                f"{name} brings token_weights and sums of reference log-probs, and a sum does not say what it weighed; give "
                "reference_token_logps, or leave the sums out and the reference will be asked"
            )
        if self.method.public_part:
            raise DataError(
                f"{name} brings reference_chosen_logps and reference_rejected_logps, sums over tokens, but the method weighs "
                "tokens one by one and so needs each of them; remove these columns, and the reference will be asked"
            )
        some = [given[index] for index in some_rows(range(len(given)), guard)]
        found = self.sum_mismatches(some) if self.accelerator.is_main_process else []
        refuse(
            self._of_first_rank(found),
            f"what {name} brings as reference_chosen_logps and reference_rejected_logps",
            [
                "They must be sums over the scored tokens of the rows as they are tokenised, templated and cut here, of this "
                "reference: compute them anew, or remove the columns."
            ],
        )
        self._sums_guarded = True

    def _refuse_brought(self, data: Sequence[TokenTree], name: str) -> None:
        """Refuse log-probs of a reference that a method cannot know beforehand."""
        if not self.method.known_beforehand and any(map(_is_known, data)):
            why = "moves with the policy" if self.method.moving_reference else "is asked for whole distributions"
            raise DataError(
                f"{name} brings reference log-probs, but the reference of method {self.method.name} {why}; remove these columns"
            )

    def _with_sums(self, data: Sequence[TokenTree], name: str, guard: int) -> Sequence[TokenTree]:
        """Trees of which each has sums: those that the data brings, and those of the reference where it brings none."""
        given = [index for index, tree in enumerate(data) if _has_sums(tree)]
        self.check_brought(data, name, guard)
        self.filled += Filled(rows=len(given), reused=len(given), entries=sum(len(data[i].completions) for i in given))
        self.say(
            f"reference, {name}: {len(given)} of {len(data)} rows bring sums, {min(guard, len(given))} of them checked"
        )
        values = ReferenceValues(data)
        others = sorted(set(range(len(data))) - set(given))
        if others:
            self._fill(values, name, guard, only=others)
        return _Sums(
            data, [tree if _has_sums(tree) else _as_sums(tree, values.logps(i)) for i, tree in enumerate(data)]
        )

    # ---- trees as they arrive ----

    def of(self, trees: Sequence[TokenTree]) -> Sequence[TokenTree]:
        """These trees with their reference log-probs: those that they bring, or of the cache, or computed and kept now."""
        if not self.method.needs_reference:
            return trees
        if not self.method.known_beforehand:
            self._refuse_brought(trees, "train_dataset")
            return trees
        given = [tree for tree in trees if _has_sums(tree)]
        if given and not self._sums_guarded:
            self.check_brought(trees, "train_dataset")
        missing = [index for index, tree in enumerate(trees) if not _is_known(tree)]
        if not missing or (self.cache is None and not given):
            return trees
        self.check_still()
        values = ReferenceValues([trees[index] for index in missing])
        filled = fill(values, self.open(), self.score, self.pack, bar=no_bar)
        self.filled += filled
        if filled.found and not self._guarded:
            self._guarded = True
            self._guard(values, some_rows(filled.found, GUARDED_ROWS))
        known = {
            index: _as_sums(tree, values.logps(place)) if given else tree
            for place, (index, tree) in enumerate(zip(missing, values, strict=True))
        }
        return [known.get(index, tree) for index, tree in enumerate(trees)]

    # ---- a reference that moves ----

    def is_another(self) -> bool:
        """Whether the reference was changed since its log-probs were first asked for; then they are forgotten here."""
        seen, before = self._look() if self.in_bulk else None, self._seen
        changed = seen is not None and before is not None and seen.differs_from(before)
        self._seen = seen
        if changed:
            if self._store is not None:
                self._store.close()
            self._store = self.space = None
            self._guarded = self._sums_guarded = False
        return changed

    def _look(self) -> _Seen | None:
        """What the reference is made of, by a few numbers; None where it is sharded over ranks."""
        # Under adapters, what is frozen: the base, and an adapter that is the reference.
        model: Any = self.reference
        parameters = [p for p in model.parameters() if not (self.is_policy and p.requires_grad)]
        if any(type(parameter).__name__ == "DTensor" for parameter in parameters):
            return None
        # DDP writes every parameter of the policy anew when it wraps it, which says nothing.
        is_replicated = self.is_policy and self.accelerator.num_processes > 1
        counted = (
            [] if is_replicated else [p for p in parameters if not p.is_inference()]
        )  # of which nothing is counted
        return _Seen(_sample(parameters), tuple(p._version for p in counted))

    def check_still(self) -> None:
        """Refuse to go on with log-probs of what the reference was, or to keep log-probs under an address that was its own.

        Raises:
            CacheError: a second model's weights are not what they were at the last `is_another`.
        """
        if self.is_policy or self._seen is None:
            return
        if not torch.equal(self._seen.sample, _sample(self.reference.parameters())):
            raise CacheError(
                "the reference changed while training, and its log-probs were asked for before: a reference that moves cannot be "
                "known beforehand; set reference_cache: off and precompute_ref_log_probs: false, or leave it as it is"
            )

    # ---- what is said ----

    def line(self, filled: Filled, name: str) -> str:
        """What was reused and computed, for people."""
        if self.cache is None or self.space is None:
            return f"reference, {name}: {filled.computed} rows computed in {filled.seconds:.1f} s, kept in memory"
        rate = f" ({filled.computed / filled.seconds:.1f} rows/s)" if filled.computed and filled.seconds else ""
        ranks = (
            f" by {self.accelerator.num_processes} ranks"
            if filled.computed and self.accelerator.num_processes > 1
            else ""
        )
        return (
            f"reference, {name}: {filled.reused} of {filled.rows} rows ({filled.entries} entries) from {self._place()}, "
            f"{filled.computed} computed{ranks} in {filled.seconds:.1f} s{rate}"
        )

    def _place(self) -> str:
        if self.cache is None or self.space is None:
            return "what is in memory"
        return f"the cache {self.cache.folder}/{self.space.address[:8]}"

    def _causes(self) -> list[str]:
        causes = [
            "Likely cause: the model in memory is not the one that its config, weights and buffers describe (an attribute such as "
            "rope's attention_scaling, a hook or a layer changed after loading, or a library that patches layers)"
        ]
        here = self.made()
        others = [made for made in (self._store.makers() if self._store else []) if made and made != here]
        if others:
            names = sorted({name for made in others for name in made if made[name] != here.get(name)})
            then = "; ".join(", ".join(f"{name} {made[name]}" for name in names if name in made) for made in others[:3])
            now = ", ".join(f"{name} {here[name]}" for name in names if name in here)
            causes.append(f"or that they were computed elsewhere: {then}; here it is {now}")
        space = self.space.address[:8] if self.space else ""
        folder = f" --reference_cache {self.cache.folder}" if self.cache else ""
        return [
            ", ".join(causes) + ".",
            f"`dpo-engine cache verify --all{folder}` with the same options checks every row; "
            f"`dpo-engine cache prune --space {space}{folder}` forgets these, and reference_cache: off does without.",
        ]

    # ---- the store ----

    def open(self, *, to_write: bool = True) -> ReferenceStore | None:
        """The store of this reference, whose weights are read for it; None without a cache.

        Args:
            to_write: prove now that the folder can be written, and note what the space is.
        """
        if self.cache is None or self._store is not None:
            return self._store
        alone = self.accelerator.num_processes == 1
        try:
            self.space = self._shared_space()
        except CacheError as error:  # on every rank
            if not self.is_default:
                raise
            self._do_without(error, in_bulk=alone)
            return None
        store = self.cache.store(self.space, self.made())
        try:
            if to_write and self.accelerator.is_main_process:
                store.describe(self.space)
                store.touch()
        except CacheError as error:
            if not self.is_default or not alone:
                raise
            self._do_without(error, in_bulk=True)
            return None
        self._store = store
        return store

    def _do_without(self, error: CacheError, *, in_bulk: bool) -> None:
        """Go on without a cache that nobody asked for by name."""
        where = "kept in memory only" if in_bulk else "asked for at every step"
        logger.warning("reference log-probs are %s: %s", where, error)
        self.cache, self.in_bulk = None, in_bulk

    def _shared_space(self) -> ReferenceSpace:
        """What every rank's weights say; they must all say the same.

        Raises:
            CacheError: on every rank, if on one the weights cannot be read, or are others: loaders that spare memory leave those of
                all but the first rank empty until they are sharded.
        """
        mine: tuple[dict[str, Any] | None, str] = None, ""
        model: Any = self.reference.get_base_model() if is_peft_model(self.reference) else self.reference  # type: ignore[operator]
        try:
            precision = self.accelerator.mixed_precision
            adapter = REFERENCE if self.is_policy and has_reference_adapter(model) else None
            has_adapters = not self.is_policy or adapter is not None
            space = reference_space(model, mixed_precision=precision, with_adapters=has_adapters, adapter=adapter)
            mine = space.parts, ""
        except CacheError as error:
            mine = None, str(error)
        found = gather_object([mine]) if self.accelerator.num_processes > 1 else [mine]
        for parts, why in found:
            if parts is None:
                raise CacheError(why)
            if parts != found[0][0]:
                raise CacheError(
                    "the ranks hold different weights before they are sharded (as FSDP's cpu_ram_efficient_loading leaves them), "
                    "so the reference cannot be asked beforehand; set reference_cache: off, or load whole weights on every rank"
                )
        return ReferenceSpace(found[0][0])  # type: ignore[arg-type]

    def _of_first_rank(self, found: list[Mismatch]) -> list[Mismatch]:
        """What the first rank found, on every rank, so that none waits for one that stopped."""
        if self.accelerator.num_processes == 1:
            return found
        return broadcast_object_list([found])[0]

    def _ranks(self) -> _Ranks | None:
        return _Ranks(self.accelerator) if self.accelerator.num_processes > 1 else None

    def _bar(self, name: str) -> Callable[[int], Any]:
        quiet = self.quiet or not self.accelerator.is_main_process
        return lambda total: tqdm(total=total, desc=f"reference, {name}", unit="row", disable=quiet)


class _Ranks:
    """The processes of a distributed run, through accelerate."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank, self.world = accelerator.process_index, accelerator.num_processes

    def union(self, missing: list[int]) -> list[int]:
        return sorted({index for of_rank in gather_object([missing]) for index in of_rank})

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def made_by(device: torch.device, backend: str, layout: str) -> dict[str, str]:
    """What is noted beside values: how they came to be, for whoever asks why others differ."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "torch": str(torch.__version__),
        "transformers": importlib.metadata.version("transformers"),
        "device": name,
        "backend": backend,
        "layout": layout,
    }


@dataclass(frozen=True)
class _Seen:
    """What a model's parameters were."""

    sample: Tensor
    writes: tuple[int, ...]
    """How often each was written to, as torch counts; not through `.data`, which the sample may show."""

    def differs_from(self, other: _Seen) -> bool:
        """Whether they were changed in between; shapes that changed (DeepSpeed's partitions) say nothing."""
        if self.sample.shape != other.sample.shape:
            return False
        return self.writes != other.writes or not torch.equal(self.sample, other.sample)


def _sample(parameters: Iterable[Tensor]) -> Tensor:
    """A few numbers of each."""
    some = []
    for parameter in parameters:
        flat = parameter.detach().reshape(-1)
        some.append(flat[:: max(1, flat.numel() // 16)][:16].float())
    return torch.cat(some)


class _Sums(list[TokenTree]):
    """Trees of which each has sums, some of which were checked; and the trees as they came."""

    def __init__(self, trees: Sequence[TokenTree], with_sums: Sequence[TokenTree]) -> None:
        super().__init__(with_sums)
        self.trees = trees


def _has_sums(tree: TokenTree) -> bool:
    return getattr(tree, "reference_logps", None) is not None


def _is_known(tree: TokenTree) -> bool:
    return _has_sums(tree) or getattr(tree, "reference_token_logps", None) is not None


def _as_sums(tree: TokenTree, logps: Sequence[Tensor]) -> Tree:
    """The tree with the sums of its log-probs instead of them, since a forest has either."""
    return with_reference(tree, None, [values.double().sum().item() for values in logps])
