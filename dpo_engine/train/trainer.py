"""How does a policy train on pairs? A `transformers.Trainer` whose batches are forests and whose model scores tokens."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, get_last_checkpoint

from dpo_engine.batch import (
    LAYOUTS,
    ForestCollator,
    PreferenceBatch,
    PreferenceForest,
    ScoredTree,
    TokenTree,
    pack_trees,
    sum_by_completion,
    tree_cost,
)
from dpo_engine.data import PairData, tokenize_pairs
from dpo_engine.errors import ConfigError, DataError, TrainingError
from dpo_engine.losses import PairStats, get_method
from dpo_engine.model.adapters import adapters_are_zero, is_peft_model, reference_of
from dpo_engine.model.head import head_of
from dpo_engine.model.layout import Layout, choose_layout
from dpo_engine.model.probe import probe_head
from dpo_engine.model.scoring import bind_scoring, forest_token_logps
from dpo_engine.train.backend import RunBackend, resumed_backend, run_backend, write_state
from dpo_engine.train.config import DPOConfig
from dpo_engine.train.metrics import MetricSums, pair_metrics

logger = logging.getLogger(__name__)
_FOREST_TOKENS = {"cpu": 1024, "cuda": 8192}


class DPOTrainer(Trainer):
    """Preference optimisation with `args.method`, scoring completions without building logits.

    Args:
        model: a causal language model, or a `PeftModel` around one.
        ref_model: the reference; None means the starting policy: the adapters switched off for LoRA, a frozen copy
            otherwise. Always in eval mode, without gradient.
        args: a `DPOConfig`.
        train_dataset, eval_dataset: `datasets.Dataset` or list of dicts with preference columns, or tokenised
            `PairData`.
        processing_class: the tokenizer; needed unless the data is tokenised.
        peft_config: wrap `model` in these adapters first.

    Raises:
        ModelError: the model's head cannot be reproduced (probe), in `__init__`.
        DataError: no pair is left, or one does not fit `max_tokens_per_forest`, in `__init__`.
        TrainingError: the loss before the first step is not the method's start value, in `train`.
    """

    # compute_loss already divides by the trees of the whole step (`num_items_in_batch`).
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        ref_model: PreTrainedModel | nn.Module | None = None,
        args: DPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"DPOTrainer: model is {model!r}; expected a model object, "
                f"e.g. AutoModelForCausalLM.from_pretrained({model!r})"
            )
        args = DPOConfig(output_dir="dpo_output") if args is None else args
        if not isinstance(args, DPOConfig):
            raise ConfigError(f"DPOTrainer: args is a {type(args).__name__}; expected a DPOConfig")
        self.method = get_method(args.method)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        causal = _causal_model(model)
        bind_scoring(causal)
        self.reference = self._make_reference(model, ref_model)
        self._starts_at_reference = ref_model is None and (not is_peft_model(model) or adapters_are_zero(model))
        self._start_checked = False
        self.reference_seconds = 0.0
        self._reference_backend: str | None = None  # which one the precomputed log-probs are of
        self._train_metrics = MetricSums()
        train_data = _tokenized(train_dataset, processing_class, args, "train_dataset")
        eval_data = _tokenized(eval_dataset, processing_class, args, "eval_dataset")
        super().__init__(
            model=model,
            args=args,
            data_collator=ForestCollator(0),  # type: ignore[arg-type]  # until the model has been asked how to lay out
            train_dataset=train_data,
            eval_dataset=eval_data,
            processing_class=processing_class,
            **kwargs,
        )
        if self.reference is not None:
            self.reference.to(args.device)
        self.layout = self._choose_layout(causal)
        self.max_tokens_per_forest = _forest_budget(args, [train_data, eval_data], self.layout.name)
        self.data_collator = ForestCollator(self.max_tokens_per_forest, self.layout.name, self.layout.longest)  # type: ignore[assignment]
        self._use_backend(run_backend(args.backend, causal, args.device, self._head_dtype()))
        probe_head(causal)
        if self.reference is not None and ref_model is not None:
            probe_head(_causal_model(self.reference))

    def _make_reference(self, model: nn.Module, ref_model: nn.Module | None) -> nn.Module | None:
        """The frozen second model, or None where switching the adapters off gives the reference."""
        if not self.method.needs_reference:
            return None
        if ref_model is None:
            if is_peft_model(model):
                return None
            ref_model = copy.deepcopy(model)
        elif ref_model is model:
            raise ConfigError("DPOTrainer: ref_model is the model being trained; pass None for a frozen copy of it")
        else:
            bind_scoring(_causal_model(ref_model))
        return ref_model.requires_grad_(False).eval()

    def _choose_layout(self, causal: PreTrainedModel) -> Layout:
        """The layout that the policy, and a reference of its own, are right on."""
        layout = choose_layout(causal, self.config.share_prompt)
        if self.reference is not None:
            other = choose_layout(_causal_model(self.reference), self.config.share_prompt)
            layout = max(layout, other, key=lambda layout: LAYOUTS.index(layout.name))
        logger.info(layout.line)
        return layout

    # ---- the backend ----

    def restore_backend(self, resume_from_checkpoint: str | bool | None) -> None:
        """Score with the backend that a checkpoint was trained with; `train` does this too.

        Call it before evaluating where a run that goes on is to have the same bits.

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
        if found:
            backend = resumed_backend(self.config.backend, Path(found), self.args.device, self._head_dtype())
            self._use_backend(backend or self.backend)

    def _use_backend(self, backend: RunBackend) -> None:
        """Every rank and both models score with the backend that the first rank found."""
        if self.args.world_size > 1:
            [backend] = broadcast_object_list([backend])
        if getattr(self, "backend", None) != backend:
            logger.info(backend.line())
        self.backend = backend
        for model in (self.model, self.reference):
            if model is not None:
                _causal_model(model).scoring_backend = backend.name  # type: ignore[assignment]

    def _head_dtype(self) -> torch.dtype:
        """What the head multiplies: the autocast dtype, or that of its weight; of a quantised one, the model's."""
        assert self.model is not None
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        model = _causal_model(self.model)
        head = head_of(model)
        return autocast or (model.dtype if head.is_quantised else head.weight.dtype)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`transformers.Trainer.save_model`, and the backend's name beside the weights: in checkpoints too."""
        if self.args.should_save:
            write_state(Path(output_dir or str(self.args.output_dir)), self.backend.name)
        super().save_model(output_dir, _internal_call)

    # ---- scoring ----

    def _token_logps(self, model: nn.Module, forest: PreferenceForest) -> Tensor:
        """(N,) log-probs of the forest's scored tokens under `model`."""
        with self.accelerator.autocast():
            return forest_token_logps(model, forest).float()

    def _reference_token_logps(self, model: nn.Module, forest: PreferenceForest) -> Tensor:
        """The same under the reference: eval mode, no gradient, adapters off."""
        if self.reference is not None:
            with torch.no_grad():
                return self._token_logps(self.reference, forest)
        with reference_of(self.accelerator.unwrap_model(model)):
            return self._token_logps(model, forest)

    def _pair_stats(self, model: nn.Module, forest: PreferenceForest) -> PairStats:
        """Sums per completion of both models; completions alternate chosen, rejected."""
        reference: tuple[Tensor | None, Tensor | None] = None, None
        if self.method.needs_reference:
            known = forest.reference_token_logps
            token_logps = self._reference_token_logps(model, forest) if known is None else known
            reference = _alternating(sum_by_completion(token_logps, forest.lengths))
        chosen, rejected = _alternating(sum_by_completion(self._token_logps(model, forest), forest.lengths))
        lengths = torch.tensor(forest.lengths, dtype=torch.float32).to(chosen.device, non_blocking=True)
        chosen_lengths, rejected_lengths = _alternating(lengths)
        return PairStats(
            chosen_logps=chosen,
            rejected_logps=rejected,
            reference_chosen_logps=reference[0],
            reference_rejected_logps=reference[1],
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
        )

    # ---- training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """`transformers.Trainer.train`, after the reference's log-probs if those are wanted beforehand.

        A checkpoint is gone on from with the backend it was trained with.
        """
        self.restore_backend(resume_from_checkpoint)
        self._precompute_reference()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _precompute_reference(self) -> None:
        """Replace the trees of both data sets by trees that know their reference log-probs, once for each backend.

        Every rank computes all of them. They are kept in memory, 4 bytes a scored token.
        """
        if not (self.config.precompute_ref_log_probs and self.method.needs_reference):
            return
        begin = time.perf_counter()
        for name in ("train_dataset", "eval_dataset"):
            data = getattr(self, name)
            if data is not None and not (
                isinstance(data[0], ScoredTree) and self._reference_backend == self.backend.name
            ):
                setattr(self, name, self._scored_trees(data, name))
        self._reference_backend = self.backend.name
        self.reference_seconds += time.perf_counter() - begin

    def _scored_trees(self, data: Sequence[TokenTree], name: str) -> list[ScoredTree]:
        """`data`, in its order, with reference log-probs; forward only, in forests of like lengths."""
        assert self.model is not None
        collator: Any = self.data_collator
        forests = pack_trees(data, self.max_tokens_per_forest, self.layout.name, self.layout.longest)
        scored: dict[int, ScoredTree] = {}
        with tqdm(total=len(data), desc=f"reference, {name}", unit="pair", disable=self.args.disable_tqdm) as bar:
            for trees in forests:
                (forest,) = collator(trees).to(self.args.device).forests
                by_completion = iter(self._reference_token_logps(self.model, forest).cpu().split(list(forest.lengths)))
                for tree in trees:
                    scored[id(tree)] = ScoredTree(
                        prompt_ids=tree.prompt_ids,
                        completions=tree.completions,
                        reference_token_logps=[next(by_completion).clone() for _ in tree.completions],
                    )
                bar.update(len(trees))
        return [scored[id(tree)] for tree in data]

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: PreferenceBatch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward, forest by forest; gradients are reduced over ranks with the last one only.

        Returns:
            () this rank's part of the step's mean loss, times the number of ranks (which average their gradients).
        """
        model.train()
        batch = inputs.to(self.args.device)
        if not self._start_checked:
            self._check_start(model, batch)
        trees = batch.trees * self.args.world_size if num_items_in_batch is None else num_items_in_batch
        total = torch.zeros((), device=self.args.device)
        for index, forest in enumerate(batch.forests):
            is_last = index == len(batch.forests) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                stats = self._pair_stats(model, forest)
                losses = self.method(stats, self.config)
                loss = losses.sum() * (self.args.world_size / trees)
                self._train_metrics.add(pair_metrics(stats, losses, self.config.beta), forest.trees)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _get_num_items_in_batch(self, batch_samples: list[PreferenceBatch], device: torch.device) -> int:
        """Trees of one optimiser step, over its micro-batches and all ranks."""
        trees = sum(batch.trees for batch in batch_samples)
        if self.args.world_size == 1:
            return trees
        return int(self.accelerator.reduce(torch.tensor(trees, device=device), "sum"))

    def floating_point_ops(self, inputs: PreferenceBatch) -> int:  # type: ignore[override]
        """6 operations per token and parameter, as transformers counts them; for `total_flos` in the logs only."""
        tokens = sum(forest.tokens for forest in inputs.forests)
        return 6 * tokens * sum(parameter.numel() for parameter in self.model_wrapped.parameters())

    @property
    def config(self) -> DPOConfig:
        """`args`, by the type it was checked to be."""
        assert isinstance(self.args, DPOConfig)
        return self.args

    def _check_start(self, model: nn.Module, batch: PreferenceBatch) -> None:
        """Refuse to train where the reference is the starting policy but the loss says otherwise."""
        self._start_checked = True
        if self.state.global_step > 0 or not (self.method.needs_reference and self._starts_at_reference):
            return
        expected = self.method.start(self.config)
        tolerance = 1e-3 if self.accelerator.mixed_precision != "no" else 1e-4
        model.eval()
        with torch.no_grad():
            # Asked anew also where it was computed before: in the same forest both are the same to the last bits.
            forests = [replace(forest, reference_token_logps=None) for forest in batch.forests]
            losses = torch.cat([self.method(self._pair_stats(model, forest), self.config) for forest in forests])
        model.train()
        worst = losses[(losses - expected).abs().argmax()].item()
        if not abs(worst - expected) <= tolerance:
            raise TrainingError(
                f"before the first step the policy is the reference, so every {self.config.method} loss must be "
                f"{expected:.6f} (within {tolerance:g}), but a pair of the first batch has {worst:.6f}: policy and "
                "reference are not computed alike (weights changed in memory, or a layer that is random in eval mode?)"
            )

    # ---- evaluation and logs ----

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`transformers.Trainer.evaluate`; the reference is asked once where `precompute_ref_log_probs` says so."""
        self._precompute_reference()
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Means over all pairs of the loss and of every metric that training logs."""
        model = self.model_wrapped
        if not self.accelerator._models:
            model = self.model_wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        was_training = model.training
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        metrics = MetricSums()
        with torch.no_grad():
            for inputs in dataloader:
                for forest in inputs.to(self.args.device).forests:
                    stats = self._pair_stats(model, forest)
                    metrics.add(pair_metrics(stats, self.method(stats, self.config), self.config.beta), forest.trees)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        means = self._read(metrics)
        named = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None,
            metrics=named,
            num_samples=len(dataloader.dataset),  # type: ignore[arg-type]
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was summed since the last log to a training log."""
        if "loss" in logs and self._train_metrics.count:
            means = self._read(self._train_metrics)
            logs |= {name: value for name, value in means.items() if name != "loss"}
            self._train_metrics = MetricSums()
        super().log(logs, start_time)

    def _read(self, metrics: MetricSums) -> dict[str, float]:
        stacked = metrics.stacked(self.args.device)
        return metrics.means(self.accelerator.reduce(stacked, "sum") if self.args.world_size > 1 else stacked)


def _alternating(by_completion: Tensor) -> tuple[Tensor, Tensor]:
    """(2T,) in the order chosen, rejected, chosen, ... -> two of (T,)."""
    chosen, rejected = by_completion.view(-1, 2).unbind(-1)
    return chosen, rejected


def _causal_model(model: nn.Module) -> PreTrainedModel:
    """The model without adapters around it."""
    return model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator,return-value]


def _tokenized(dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: DPOConfig, name: str) -> PairData | None:
    """Trees, from whatever a user passes as a data set."""
    if dataset is None or isinstance(dataset, PairData):
        return dataset
    if tokenizer is None:
        raise ConfigError(f"DPOTrainer: {name} is text, but processing_class is None; pass the model's tokenizer")
    return tokenize_pairs(dataset, tokenizer, **args.pair_options())


def _forest_budget(args: DPOConfig, datasets: Sequence[PairData | None], layout: str) -> int:
    """`max_tokens_per_forest`, or this device's default raised to the largest tree."""
    trees = [tree for data in datasets if data is not None for tree in data]
    largest = max(trees, key=lambda tree: tree_cost(tree, layout), default=None)
    most = tree_cost(largest, layout) if largest else 0
    if args.max_tokens_per_forest is None:
        return max(_FOREST_TOKENS.get(args.device.type, 8192), most)
    if largest and most > args.max_tokens_per_forest:
        raise DataError(
            f"{largest.origin}: the pair takes {most} tokens, more than "
            f"max_tokens_per_forest={args.max_tokens_per_forest}; raise it, or set max_length to truncate"
        )
    return args.max_tokens_per_forest
