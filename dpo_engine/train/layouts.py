"""On which kernels do the models of a run compute, and in which layout? Policy and reference alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from dpo_engine.batch import LAYOUTS
from dpo_engine.model.layout import Layout, choose_layout
from dpo_engine.model.liger import LigerUse, choose_liger
from dpo_engine.train.config import DPOConfig


def run_liger(models: Sequence[PreTrainedModel], config: DPOConfig, device: torch.device) -> LigerUse:
    """Liger's kernels in all models that can have them, before layouts are probed; what to say of the first."""
    choice, parts = str(config.use_liger_kernel), config.liger_kernel_config
    found = [choose_liger(model, choice, device, share_prompt=config.share_prompt, parts=parts) for model in models]
    return found[0]


def run_layout(models: Sequence[PreTrainedModel], share_prompt: str) -> Layout:
    """The layout that all models are right on; what to say is of the one that decides."""
    layouts = [choose_layout(model, share_prompt) for model in models]
    longest = [layout.longest for layout in layouts if layout.longest is not None]
    decides = max(layouts, key=lambda layout: LAYOUTS.index(layout.name))
    return replace(decides, longest=min(longest, default=None))
