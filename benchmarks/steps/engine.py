"""How long does the engine take for given pairs, in a given layout? One run in a process of its own.

    python -m benchmarks.steps.engine SPEC.json        prints one JSON object; `run.py` writes SPEC.json

The layouts `packed` and `shared` are what `share_prompt` gives. `padded` is what the trainer falls back to for models that
are right on nothing else; no option asks for it, so the trainer's `layout` is replaced after it has been made.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from benchmarks.steps.watch import Refused, StepWatch, peak_cuda_mb
from dpo_engine import DPOConfig, DPOTrainer
from dpo_engine.batch import TokenTree, tree_cost
from dpo_engine.data import DataReport, PairData, TokenizedTree
from dpo_engine.model.adapters import add_lora
from dpo_engine.model.forest_attention import restore_attention
from dpo_engine.model.loading import load_model

SHARE_PROMPT = {"padded": "off", "packed": "off", "shared": "auto"}


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train as `spec` says.

    Returns:
        Step times and tokens, what was logged, and the seconds of the reference pass.
    """
    model = load_model(spec["model_path"], dtype=getattr(torch, spec["dtype"]), trainable=False)
    watch = StepWatch(model.get_input_embeddings())
    set_seed(spec["seed"])
    trainer = DPOTrainer(
        model=add_lora(model, r=spec["lora_r"], alpha=spec["lora_alpha"]),
        args=config(spec),
        train_dataset=pair_data(spec["pairs"]),
        callbacks=[watch],
    )
    force_layout(trainer, spec["layout"])
    trainer.train()
    watch.close()
    check_ids(trainer.train_dataset, spec["pairs"])
    check_layout(trainer.train_dataset, spec["layout"], sum(watch.tokens))
    return {
        "step_seconds": watch.seconds,
        "step_tokens": watch.tokens,
        "pairs_per_s": watch.pairs_per_s(spec["batch"]),
        "reference_s": trainer.reference_seconds,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "peak_cuda_mb": peak_cuda_mb(),
        "forest_tokens": trainer.budget.tokens,
        "lines": trainer.lines(),
    }


def config(spec: dict[str, Any]) -> DPOConfig:
    on_cpu = not torch.cuda.is_available()
    return DPOConfig(
        output_dir=spec["output_dir"],
        precompute_ref_log_probs=spec["precompute"],
        reference_cache="off",  # nothing of an earlier run is to be found: both sides compute it
        share_prompt=SHARE_PROMPT[spec["layout"]],
        max_length=spec["max_length"],
        beta=spec["beta"],
        learning_rate=spec["learning_rate"],
        per_device_train_batch_size=spec["batch"],
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        seed=spec["seed"],
        bf16=spec["dtype"] == "bfloat16",
        fp16=spec["dtype"] == "float16",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )


def pair_data(pairs: list[dict[str, Any]]) -> PairData:
    """The token ids as the trainer takes them; their text is not needed any more."""
    trees = [
        TokenizedTree(prompt_ids=p["prompt_ids"], completions=(p["chosen_ids"], p["rejected_ids"]), origin=f"pair {i}")
        for i, p in enumerate(pairs)
    ]
    report = DataReport(source="benchmark", format="token ids", rows_read=len(trees), rows_used=len(trees))
    return PairData(trees=trees, rows=[], report=report)


def force_layout(trainer: DPOTrainer, layout: str) -> None:
    """Lay out in `padded` whatever the model is right on; the other layouts are left to the trainer's own choice."""
    if layout != "padded":
        return
    trainer.layout = replace(trainer.layout, name=layout, line="layout: padded (forced by the benchmark)")
    restore_attention(trainer.model.get_base_model())


def check_ids(trees: Any, pairs: list[dict[str, Any]]) -> None:
    """Refuse to report unless the trees that were trained on are the specification's, row by row."""
    found = [(list(t.prompt_ids), *map(list, t.completions)) for t in trees]
    wanted = [(p["prompt_ids"], p["chosen_ids"], p["rejected_ids"]) for p in pairs]
    differ = [i for i, (mine, its) in enumerate(zip(wanted, found, strict=False)) if mine != its]
    if len(found) != len(wanted) or differ:
        raise Refused(f"the engine trained on other tokens: {len(found)} rows of {len(wanted)}, {differ[:8]} differ")


def check_layout(trees: Any, layout: str, computed: int) -> None:
    """Refuse to report unless as many tokens were computed as the layout takes at least, and no fewer than a layout below."""
    least = _tokens(trees, "shared" if layout == "shared" else "packed")
    most = _tokens(trees, "packed") if layout == "shared" else float("inf")
    if not least <= computed <= most:
        raise Refused(
            f"{computed} tokens were computed, but layout {layout} takes {least} to {most}: it was not in use"
        )


def _tokens(trees: list[TokenTree], layout: str) -> int:
    return sum(tree_cost(tree, layout) for tree in trees)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    print(json.dumps(run(spec)))


if __name__ == "__main__":
    main()
