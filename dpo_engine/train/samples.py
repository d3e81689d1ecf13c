"""What does the model answer, before and after? Greedy answers to a few held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Answer:
    prompt: str
    before: str
    after: str


def answers_to(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """The model's greedy completion of each prompt, `…` at the end where it was cut at `max_new_tokens`.

    Args:
        prompts: token ids, as the data holds them: special tokens and template included.
    """
    was_training = model.training
    model.eval()
    texts = []
    for prompt in prompts:
        input_ids = torch.tensor([list(prompt)], device=model.device)
        with torch.no_grad():
            output = model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
        new = output[0, input_ids.shape[1] :]
        text = str(tokenizer.decode(new, skip_special_tokens=True))
        texts.append(text + (" …" if len(new) == max_new_tokens else ""))
    model.train(was_training)
    return texts
