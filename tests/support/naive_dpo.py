"""What does DPO do, in forty plain lines? Full logits, a padded rectangle, float32, two models; nothing of the engine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class NaiveRun:
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)


def completion_logps(model: nn.Module, pairs: Sequence[Any]) -> Tensor:
    """Summed completion log-probs of every pair, (2B,): chosen, rejected, chosen, ..."""
    rows = [(list(pair.prompt_ids), list(completion)) for pair in pairs for completion in pair.completions]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, mask, scored = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for row, (prompt, completion) in enumerate(rows):
        length = len(prompt) + len(completion)
        ids[row, :length] = torch.tensor(prompt + completion)
        mask[row, :length] = 1
        scored[row, len(prompt) : length] = 1
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logps * scored[:, 1:]).sum(-1)


def train_naively(model: nn.Module, batches: Sequence[Sequence[Any]], *, beta: float, lr: float) -> NaiveRun:
    """One AdamW step per batch with a constant learning rate; the reference is a copy of the model as it was."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.0)
    run = NaiveRun()
    for pairs in batches:
        log_ratio = completion_logps(model, pairs) - completion_logps(reference, pairs)
        margins = beta * (log_ratio[0::2] - log_ratio[1::2])
        loss = -torch.nn.functional.logsigmoid(margins).mean()
        optimizer.zero_grad()
        loss.backward()
        run.losses.append(loss.item())
        run.gradients.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        optimizer.step()
    return run
