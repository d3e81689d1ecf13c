"""How does a policy train on pairs? A `transformers.Trainer` whose batches are forests and whose model scores tokens."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, get_last_checkpoint, set_seed

from dpo_engine.batch import (
    ForestCollator,
    PreferenceBatch,
    PreferenceForest,
    TokenTree,
    pack_trees,
    packed_cost,
)
from dpo_engine.data.streaming import PairStream
from dpo_engine.errors import ConfigError, DataError
from dpo_engine.model.adapters import has_reference_adapter, is_peft_model, refuse_prompt_learning
from dpo_engine.model.existing_adapters import (
    add_reference_adapter,
    freeze_reference_adapter,
    starts_at_reference,
    without_reference_adapter,
)
from dpo_engine.model.head import head_of
from dpo_engine.model.probe import probe_head
from dpo_engine.model.scoring import bind_scoring
from dpo_engine.reference.cache import ReferenceCache, by_tree
from dpo_engine.train.backend import RunBackend, resumed_backend, run_backend
from dpo_engine.train.budget import Budget, forest_budget, run_budget
from dpo_engine.train.config import DPOConfig
from dpo_engine.train.datasets import (
    all_parts,
    each_part,
    is_text,
    knows_reference,
    present,
    tokenized,
    warn_of_rows_left_out,
)
from dpo_engine.train.gradients import check_gradients, check_graph
from dpo_engine.train.health import Health
from dpo_engine.train.judge import Judge
from dpo_engine.train.layouts import run_layout, run_liger
from dpo_engine.train.metrics import MetricSums, stats_metrics
from dpo_engine.train.mismatched import baseline_over_ranks, split_mismatched
from dpo_engine.train.moving_reference import moving_reference
from dpo_engine.train.offload import offload_lines
from dpo_engine.train.opening import (
    ADAPTER_WARNING,
    checked_args,
    open_models,
    open_tokenizer,
    refuse_arguments,
    say_of_routers,
    set_pad_token,
    without_dropout,
)
from dpo_engine.train.ranks import (
    EvenRows,
    even_sampler,
    gradients_are_apart,
    idle_forest,
    sum_and_most,
)
from dpo_engine.train.reference import RunReference, cache_for, made_by
from dpo_engine.train.refusals import check_token_kl, refuse_reference
from dpo_engine.train.scoring import Scorer, causal_model, make_reference
from dpo_engine.train.second_model import check_token_ids, check_vocabularies
from dpo_engine.train.start import check_start
from dpo_engine.train.state import RunningMean, RunState, read_state, write_state
from dpo_engine.train.statistics import weighted_sum
from dpo_engine.train.trl_settle import say_once
from dpo_engine.train.whole_step import StepPart, generators_at

logger = logging.getLogger(__name__)


class DPOTrainer(Trainer):
    """Preference optimisation with `args.method`, scoring completions without building logits.

    Arguments have the names and, up to `optimizers`, the places that TRL's trainer gives them.

    Args:
        model: a causal language model, a `PeftModel` around one, or a name, which `args.model_init_kwargs` are for.
        ref_model: the reference or its name; None means the starting policy: for LoRA the adapter named "reference" if there is
            one, else the adapters switched off; a frozen copy otherwise. Always in eval mode, without gradient.
        args: a `DPOConfig`.
        data_collator, compute_metrics, preprocess_logits_for_metrics: refused: batches are forests, and there are no logits.
        train_dataset, eval_dataset: `datasets.Dataset` or list of dicts with preference columns, or tokenised
            `PairData`. Of held-out data sets a dict too.
        processing_class: the tokenizer; if not given, the one beside the model.
        callbacks, optimizers, optimizer_cls_and_kwargs: as for `transformers.Trainer`.
        quantization_config: for a model that is given by its name.
        peft_config: wrap `model` in these adapters first.
        reference_cache: where reference log-probs are kept, a `ReferenceCache` or its folder; instead of `args.reference_cache`.

    Raises:
        ConfigError: `ref_model` would change with the model, or has another vocabulary, in `__init__`.
        ModelError: the model's head cannot be reproduced (probe), in `__init__`.
        DataError: no pair is left, or one does not fit `max_tokens_per_forest`, memory or the vocabulary, in `__init__`.
        CacheError: the reference cache cannot be used, or its rows are not what the reference says, in `train` and `evaluate`.
        TrainingError: the loss before the first step is not the method's start value, or a parameter that is to train gets no
            gradient in it, in `train`.
    """

    # compute_loss already divides by the trees of the whole step (`num_items_in_batch`).
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        ref_model: PreTrainedModel | nn.Module | str | None = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        reference_cache: ReferenceCache | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        refused = {
            "data_collator": data_collator,
            "compute_metrics": compute_metrics,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        refuse_arguments(refused | kwargs)
        args = checked_args(args, model)
        args.settle()  # what was set on it since it was made counts too
        self.method = args.entry
        policy, given_reference = open_models(model, ref_model, args, quantization_config)
        if peft_config is not None:
            if is_peft_model(policy):
                raise ConfigError(
                    "DPOTrainer: model has adapters already, and peft_config asks for others on top, which would hide them; leave "
                    "peft_config out to train those, or merge them first (model.merge_and_unload())"
                )
            from peft import get_peft_model

            set_seed(args.seed)  # transformers' Trainer does so too, but adapters are drawn before there is one
            policy = get_peft_model(policy, peft_config)
        refuse_prompt_learning(policy)
        freeze_reference_adapter(policy)
        refuse_reference(self.method, given_reference, reference_cache, args)
        causal = causal_model(policy)
        bind_scoring(causal)
        if self.method.moving_reference and is_peft_model(policy) and given_reference is None:
            add_reference_adapter(policy)
        self.reference = make_reference(policy, given_reference) if self.method.needs_reference else None
        self._starts_at_reference = given_reference is None and (
            not is_peft_model(policy) or starts_at_reference(policy)
        )
        if given_reference is None and not self._starts_at_reference and not has_reference_adapter(policy):
            say_once(ADAPTER_WARNING)
        if args.disable_dropout and (count := without_dropout(policy, self.reference)):
            say_once(f"dropout is switched off in {count} layers; disable_dropout=False leaves it on")
        say_of_routers(causal)
        self._start_checked = self._gradients_checked = False
        self._reference_backend: str | None = None  # which one the log-probs in memory are of
        self._train_metrics = MetricSums()
        if processing_class is None and any(is_text(data) for data in (train_dataset, *all_parts(eval_dataset))):
            processing_class = open_tokenizer(causal)
        set_pad_token(processing_class, args.pad_token)
        train_data = tokenized(train_dataset, processing_class, args, "train_dataset")
        eval_data = tokenized(eval_dataset, processing_class, args, "eval_dataset")
        if isinstance(train_data, PairStream):
            args.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]  # it would look for tensors in what a stream yields
        super().__init__(
            model=policy,
            args=args,
            data_collator=present,  # type: ignore[arg-type]  # trees are packed a step at a time
            train_dataset=train_data,
            eval_dataset=eval_data,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        if self.reference is not None:
            self.reference.to(args.device)
        self.scorer = Scorer(self.method, args, self.reference, self.accelerator)
        self.judge = Judge(self.method, args, self.scorer, self.accelerator)
        self.moving_reference = None
        if self.method.moving_reference:
            self.moving_reference = moving_reference(self.method, args, policy, self.reference, self.accelerator)
            self.add_callback(self.moving_reference)
        self.health = Health(self.method, logger.warning if self.accelerator.is_main_process else lambda line: None)
        models = [causal, *([] if self.reference is None else [causal_model(self.reference)])]
        self.liger = run_liger(models, args, args.device)
        self.layout = run_layout(models, args.share_prompt)
        logger.info(self.layout.line)
        self._use_backend(run_backend(args.backend, causal, args.device, self._head_dtype()))
        probe_head(causal)
        second = None if self.reference is None or given_reference is None else causal_model(self.reference)
        if second is not None:
            probe_head(second)
        if self.method.token_kl:
            check_token_kl(causal, second, self.accelerator)
        check_vocabularies(causal, second)
        self._known_words = {"the model": causal} | ({} if second is None else {"ref_model": second})
        in_memory = [None if isinstance(data, PairStream) else data for data in (train_data, *all_parts(eval_data))]
        check_token_ids(self._known_words, in_memory, processing_class)
        self._use_budget(run_budget(args, causal, [train_data, *all_parts(eval_data)], self.layout, args.device))
        self.references = RunReference(
            method=self.method,
            reference=causal if self.reference is None else self.reference,
            is_policy=self.reference is None,
            cache=cache_for(reference_cache or args.reference_cache, is_lora=is_peft_model(policy)),
            is_default=reference_cache is None and args.reference_cache == "auto",
            in_bulk=args.precompute_ref_log_probs,
            accelerator=self.accelerator,
            score=self._reference_scores,
            pack=self._forests_of,
            dtype=lambda: self._head_dtype(self.reference),
            made=lambda: made_by(args.device, self.backend.name, self.layout.name),
            quiet=bool(args.disable_tqdm),
            say=logger.info if args.disable_tqdm else partial(tqdm.write, file=sys.stderr),
        )

    # ---- what a resumed run has in common with its checkpoint ----

    def restore_run(self, resume_from_checkpoint: str | bool | None) -> None:
        """Score with the backend of a checkpoint, pack to its budget and go on with its running mean; `train` does this too.

        Call it before evaluating where a run that goes on is to have the same bits. A budget that is asked for by number
        is used instead of the checkpoint's.

        Args:
            resume_from_checkpoint: as for `train`.

        Raises:
            ConfigError, BackendError: the checkpoint's backend is not the one asked for, or cannot run here.
        """
        if not resume_from_checkpoint:
            return
        found = (
            get_last_checkpoint(str(self.args.output_dir)) if resume_from_checkpoint is True else resume_from_checkpoint
        )
        state = read_state(Path(found)) if found else None
        if state is None:
            if found and (self.moving_reference is not None or self.method.baseline is not None):
                raise ConfigError(
                    f"{found} has no dpo_engine_state.json, and the method {self.method.name} cannot be gone on from without; "
                    "take a checkpoint of this engine"
                )
            return
        if state.method and state.method != self.method.name:
            raise ConfigError(
                f"{found} is of a run with method {state.method}, and this one has {self.method.name}; go on with the same, or "
                "give the checkpoint's weights as the model of a new run"
            )
        self.health.restore(state.health)
        name = Path(str(found))
        self._use_backend(resumed_backend(self.config.backend, state, name, self.args.device, self._head_dtype()))
        self.judge.running = RunningMean(state.baseline_count, state.baseline_sum)
        if self.moving_reference is not None:
            self.moving_reference.load(Path(str(found)))
        if self.config.max_tokens_per_forest is None:
            both: list[Any] = [self.train_dataset, *all_parts(self.eval_dataset)]
            datasets = [None if isinstance(data, PairStream) else data for data in both]
            budget = forest_budget(state.max_tokens_per_forest, datasets, self.layout.name, self.layout.longest)
            self._use_budget(replace(budget, why=f"as in {name.name}"))

    def _use_backend(self, backend: RunBackend) -> None:
        """Every rank and both models score with the backend that the first rank found."""
        if self.args.world_size > 1:
            [backend] = broadcast_object_list([backend])
        if getattr(self, "backend", None) != backend:
            logger.info(backend.line())
        self.backend = backend
        for model in (self.model, self.reference):
            if model is not None:
                causal_model(model).scoring_backend = backend.name  # type: ignore[assignment]

    def _head_dtype(self, of: nn.Module | None = None) -> torch.dtype:
        """What the head of a model, by default the policy, multiplies: the autocast dtype, or that of its weight; of a quantised
        one, the model's."""
        assert self.model is not None
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        model = causal_model(self.model if of is None else of)
        head = head_of(model)
        return autocast or (model.dtype if head.is_quantised else head.weight.dtype)

    def _use_budget(self, budget: Budget) -> None:
        if self.args.world_size > 1:
            [budget] = broadcast_object_list([budget])
        logger.info(budget.line())
        self.budget = budget

    def lines(self) -> list[str]:
        """How this run computes, for people: layout, forests, backend, and what else was asked for."""
        offload = offload_lines(self.config.activation_offload, self.args.device)
        liger = [self.liger.line] if self.liger.line else []
        return [self.layout.line, self.budget.line(), self.backend.line(), *liger, *offload]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`transformers.Trainer.save_model`, and the run's state beside the weights: in checkpoints too."""
        if self.args.should_save:
            state = RunState(
                backend=self.backend.name,
                max_tokens_per_forest=self.budget.tokens,
                baseline_count=self.judge.running.count,
                baseline_sum=float(self.judge.running.total),
                health=self.health.state(),
                method=self.method.name,
            )
            write_state(Path(output_dir or str(self.args.output_dir)), state)
            if self.moving_reference is not None and _internal_call:  # of a checkpoint
                self.moving_reference.save(Path(str(output_dir)))
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As transformers', without an adapter that is the reference."""
        with without_reference_adapter(self.model):
            super()._save(output_dir, state_dict)

    def packed(self, trees: Sequence[TokenTree]) -> PreferenceBatch:
        """Trees in forests of this run's layout and budget, on the CPU."""
        return ForestCollator(self.budget.tokens, self.layout.name, self.layout.longest)(trees)

    # ---- training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """`transformers.Trainer.train`, after the reference's log-probs if those are wanted beforehand.

        A checkpoint is gone on from with the backend and the budget it was trained with.
        """
        self.restore_run(resume_from_checkpoint)
        self.know_reference()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self.references.check_still()
        if isinstance(self.train_dataset, PairStream):
            warn_of_rows_left_out(self.train_dataset.report)
        return output

    def know_reference(self) -> None:
        """Have the reference's log-probs of both data sets at hand, where that is wanted before the first step.

        Rows that the cache has are read, the others computed in bulk, forward only, and kept. Of a run that is too short to
        see all rows, and of a stream, rows follow as they arrive (`get_batch_samples`).
        """
        if self.is_in_train:
            self.references.check_still()
        elif self.references.is_another() or (
            self._reference_backend != self.backend.name and not self.references.cache
        ):
            for name in (
                "train_dataset",
                "eval_dataset",
            ):  # what is known is of another reference or backend: ask again
                setattr(self, name, each_part(getattr(self, name), self.references.as_it_came))
        self._reference_backend = self.backend.name
        for name in ("train_dataset", "eval_dataset"):
            data = getattr(self, name)
            if name == "train_dataset" and self._sees_few_rows():
                if not isinstance(data, PairStream):
                    self.references.check_brought(data, name)
            elif data is not None:
                setattr(self, name, each_part(data, partial(self.references.known, name=name)))

    def _sees_few_rows(self) -> bool:
        """Whether the run ends before it has seen each row, so that not all of them are asked for."""
        if isinstance(self.train_dataset, PairStream):
            return True
        if self.train_dataset is None:
            return False
        rows = len(self.train_dataset)  # type: ignore[arg-type]
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seen = self.args.max_steps * per_step if self.args.max_steps > 0 else self.args.num_train_epochs * rows
        return self.references.cache is not None and self.args.world_size == 1 and seen < rows

    def _forests_of(self, trees: Sequence[TokenTree]) -> list[list[TokenTree]]:
        """The trees of each forest that the reference is asked about."""
        return pack_trees(trees, self.budget.tokens, self.layout.name, self.layout.longest)

    def _reference_scores(self, trees: Sequence[TokenTree]) -> list[list[Tensor]]:
        """The reference's log-probs of the trees of one forest."""
        assert self.model is not None
        (forest,) = self.packed(trees).to(self.args.device).forests
        return by_tree(trees, self.scorer.reference_token_logps(self.model, forest))

    def _get_dataloader(  # type: ignore[override]
        self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None, **kwargs: Any
    ) -> DataLoader:
        """As transformers', over rows that the ranks can share evenly, so that accelerate repeats none."""
        if self.args.world_size > 1 and not self.args.dataloader_drop_last:
            dataset = EvenRows(dataset, batch_size * self.args.world_size)
            if sampler_fn is not None:
                seed = self.args.data_seed
                sampler_fn = partial(even_sampler, order=sampler_fn, seed=seed)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn=sampler_fn, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[TokenTree]], num_batches: int, device: torch.device
    ) -> tuple[list[PreferenceBatch], int | None]:
        """The trees of a whole optimiser step, packed together.

        Returns:
            `(batches, trees)`: as many batches as micro-batches were read, all of them empty but the last, which has every
            forest of this rank's; and the trees of the step over all ranks.
        """
        read = list(itertools.islice(epoch_iterator, num_batches))
        if not read:
            return [], None
        trees: Sequence[TokenTree] = [tree for trees in read for tree in trees]
        if isinstance(self.train_dataset, PairStream):
            self._check_fits(trees)
        trees = self.references.of(trees)
        batch, step_trees = self._evened_batch(trees)
        nothing = PreferenceBatch(forests=(), trees=0)
        return [nothing] * (len(read) - 1) + [batch], step_trees

    def _check_fits(self, trees: Sequence[TokenTree]) -> None:
        """Refuse a tree of a stream that is larger than a forest may be, or has tokens that a model does not know."""
        check_token_ids(self._known_words, [trees], self.processing_class)  # type: ignore[arg-type]
        for tree in trees:
            cost = packed_cost(tree, self.layout.name, self.layout.longest)
            if cost > self.budget.tokens:
                raise DataError(
                    f"{getattr(tree, 'origin', 'a tree')}: the pair takes {cost} tokens, and forests are of up to "
                    f"{self.budget.tokens}; raise max_tokens_per_forest, or set max_length to truncate"
                )

    def _evened_batch(self, trees: Sequence[TokenTree]) -> tuple[PreferenceBatch, int]:
        """This rank's forests, with as many as the other ranks have, and the trees of all ranks."""
        if not self.method.mismatched:
            return self._evened(self.packed(trees))
        own, others = split_mismatched(trees)
        batch, count = self._evened(self.packed(own))
        return replace(batch, mismatched=self._evened(self.packed(others))[0]), count

    def _evened(self, batch: PreferenceBatch) -> tuple[PreferenceBatch, int]:
        """The batch with as many idle forests as make all ranks have the same number, and the trees of all ranks."""
        trees, most = sum_and_most(self.accelerator, batch.trees, len(batch.forests))
        return replace(batch, idle=most - len(batch.forests)), trees

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: PreferenceBatch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward, forest by forest; gradients are reduced over ranks with the last one only.

        Args:
            inputs: the forests of a step; nothing is done for none.
            num_items_in_batch: trees of the step over all ranks; those of `inputs` if not given.

        Returns:
            () this rank's part of the step's mean loss, times the number of ranks (which average their gradients).
        """
        if not inputs.forests and not inputs.idle:
            return torch.zeros((), device=self.args.device)
        model.train()
        batch = inputs.to(self.args.device)
        forests = self._with_idle(batch, bool(batch.idle) and knows_reference(self.train_dataset))
        if not self._start_checked:
            self._check_start(model, forests)
        scale = self.args.world_size / (num_items_in_batch or batch.trees * self.args.world_size)
        baseline = None
        if batch.mismatched is not None:
            others = self._with_idle(
                batch.mismatched, bool(batch.mismatched.idle) and knows_reference(self.train_dataset)
            )
            baseline = self.judge.baseline(model, others)
        is_apart = len(forests) > 1 or self.args.world_size > 1
        parts: Sequence[StepPart | None] = [None] * len(forests)
        if self.method.whole_step and is_apart:
            parts = self.judge.whole_step(model, forests, scale)
        total = torch.zeros((), device=self.args.device)
        for index, (forest, part) in enumerate(zip(forests, parts, strict=True)):
            with self._reducing_if(model, index == len(forests) - 1), self.scorer.as_trained(model):
                if part is None:
                    losses, by_part, objective, stats = self.judge(self.scorer.stats(model, forest), scale, baseline)
                else:
                    losses, by_part, stats = part.losses, part.by_part, part.stats
                    with generators_at(part.generators, self.args.device):
                        objective = part.objective(self.scorer.stats(model, part.forest))
                check_graph(objective, model)
                self.accelerator.backward(objective)
            total += weighted_sum(losses.detach(), stats) * scale
            self._train_metrics.add(stats_metrics(self.method, stats, losses, self.config, by_part))
        if not self._gradients_checked and not gradients_are_apart(self.accelerator):
            check_gradients(model)
        self._gradients_checked = True
        return total

    def _with_idle(self, batch: PreferenceBatch, knows_reference: bool) -> list[PreferenceForest]:
        """The batch's forests, then the idle ones; all of them ask the reference, or none does."""
        if not batch.idle:
            return list(batch.forests)
        idle = idle_forest(self.layout.name, 2, knows_reference).to(self.args.device)
        return [*batch.forests, *[idle] * batch.idle]

    @contextlib.contextmanager
    def _reducing_if(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """Ranks add up their gradients in the backward of a step's last forest, and in no other."""
        state = self.accelerator.gradient_state
        syncs = state.sync_gradients
        if is_last and syncs:
            yield
            return
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(syncs)

    def floating_point_ops(self, inputs: PreferenceBatch) -> int:  # type: ignore[override]
        """6 operations per token and parameter, as transformers counts them; for `total_flos` in the logs only."""
        tokens = sum(forest.tokens for forest in inputs.forests)
        return 6 * tokens * sum(parameter.numel() for parameter in self.model_wrapped.parameters())

    @property
    def reference_seconds(self) -> float:
        """Time spent so far on having the reference's log-probs at hand before they are used."""
        return self.references.filled.seconds

    @property
    def config(self) -> DPOConfig:
        """`args`, by the type it was checked to be."""
        assert isinstance(self.args, DPOConfig)
        return self.args

    def _check_start(self, model: nn.Module, forests: Sequence[PreferenceForest]) -> None:
        """Refuse to train where the reference is the starting policy but the numbers say otherwise."""
        self._start_checked = True
        if self.state.global_step > 0 or not (self.method.needs_reference and self._starts_at_reference):
            return
        model.eval()
        with torch.no_grad():
            check_start(self.scorer, model, forests, self._head_dtype())
        model.train()

    # ---- evaluation and logs ----

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`transformers.Trainer.evaluate`; the reference is asked only for what is not known of it."""
        is_sharded = bool(self.accelerator._models) and (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if not is_sharded:  # else every rank must take part in every forward: rows are scored as they come
            self.know_reference()
        is_name = isinstance(eval_dataset, str)  # of one of those the trainer was given
        if eval_dataset is not None and not is_name:
            eval_dataset = tokenized(eval_dataset, self.processing_class, self.config, "eval_dataset")  # type: ignore[arg-type]
            check_token_ids(self._known_words, all_parts(eval_dataset), self.processing_class)  # type: ignore[arg-type]
            if not is_sharded:
                eval_dataset = each_part(eval_dataset, lambda part: self.references.known(part, "eval_dataset"))
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: what transformers' `predict` returns are logits, and there are none."""
        raise ConfigError(
            "DPOTrainer.predict gives logits, which the engine does not build; use evaluate(dataset) for loss and metrics"
        )

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **kwargs: Any
    ) -> None:
        """transformers' card, `README.md` in the output folder, by the arguments that TRL's trainer takes."""
        own = {"dpo-engine", *self.config.method.split("+"), *([tags] if isinstance(tags, str) else tags or [])}
        dataset = {"dataset": dataset_name, "dataset_tags": dataset_name} if dataset_name else {}
        super().create_model_card(model_name=model_name, tags=sorted(own), **(dataset | kwargs))

    @property
    def ref_model(self) -> nn.Module | None:
        """The frozen second model; None where the reference lies under the policy's adapters, or the method has none."""
        return self.reference

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Means over all pairs of the loss and of every metric that training logs."""
        # Before training there is nothing to reduce, and a model that accelerate had prepared for evaluation would not be
        # wrapped for training any more: ranks would train apart.
        model = self.model_wrapped if self.accelerator._models else self.model
        assert model is not None
        was_training = model.training
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        is_known = knows_reference(dataloader.dataset)
        scored: list[Any] = []
        ratios: list[Tensor] = []
        with torch.no_grad():
            for trees in dataloader:
                batch = self._evened_batch(trees)[0].to(self.args.device)
                for forest in self._with_idle(batch, is_known):
                    scored.append(self.scorer.stats(model, forest))
                if batch.mismatched is not None:
                    beside = self._with_idle(batch.mismatched, is_known)
                    ratios += [self.scorer.log_ratios(model, forest) for forest in beside]
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            metrics = self.judge.held_out(scored, baseline_over_ranks(ratios, self.accelerator) if ratios else None)
        model.train(was_training)
        means = self._read(metrics)
        self.health.judged(means, metric_key_prefix)
        named = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None,
            metrics=named,
            num_samples=len(dataloader.dataset),  # type: ignore[arg-type]
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was summed since the last log to a training log."""
        if "loss" in logs:
            self.references.check_still()
        if "loss" in logs and self._train_metrics.sums:
            means = self._read(self._train_metrics)
            self.health.trained(means)
            logs |= {name: value for name, value in means.items() if name != "loss"}
            self._train_metrics = MetricSums()
        super().log(logs, start_time)

    def _read(self, metrics: MetricSums) -> dict[str, float]:
        sums = metrics.stacked()
        return metrics.means(self.accelerator.reduce(sums, "sum") if self.args.world_size > 1 else sums)
