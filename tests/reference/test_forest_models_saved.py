"""Is a model with forest attention, for everyone else, still the model that it was?"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_engine.batch import build_forest
from dpo_engine.model.adapters import add_lora
from dpo_engine.model.forest_attention import forest_form, restore_attention
from dpo_engine.model.layout import choose_layout
from dpo_engine.model.scoring import bind_scoring, forest_token_logps, unbind_scoring
from support.architectures import MASKED, tiny_model
from support.forests import assert_logps_agree, one_by_one, random_ids, random_trees

IN_A_PLAIN_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 23)[None]).logits
    torch.save({"attention": model.config._attn_implementation, "logits": logits}, folder + "/answer.pt")
assert "dpo_engine" not in sys.modules
"""


def test_a_saved_model_names_nothing_of_ours_and_loads_in_a_plain_process(tmp_path: Path) -> None:
    wanted = {}
    for name in ("llama", "gpt_oss", "falcon"):
        model = tiny_model(name).eval()
        own = model.config._attn_implementation
        with torch.no_grad():
            wanted[name] = (own, model(input_ids=torch.arange(3, 23)[None]).logits)
        bind_scoring(model)
        assert choose_layout(model).name == "shared"
        assert "dpo_engine" not in model.config.to_json_string(use_diff=False)
        model.save_pretrained(tmp_path / name)
        for written in (tmp_path / name).glob("*.json"):
            assert "dpo_engine" not in written.read_text(encoding="utf-8"), written
        assert forest_form(model) is not None, "saving it does not end the training"
    folders = [str(tmp_path / name) for name in wanted]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", IN_A_PLAIN_PROCESS, *folders], check=True, env=environment, timeout=110)
    for name, (own, logits) in wanted.items():
        answer = torch.load(tmp_path / name / "answer.pt", weights_only=True)
        assert answer["attention"] == own
        torch.testing.assert_close(answer["logits"], logits, rtol=1e-5, atol=1e-5)


def test_adapters_and_merged_models_are_saved_without_our_names(tmp_path: Path) -> None:
    model = tiny_model("llama")
    bind_scoring(model)
    choose_layout(model)
    policy = add_lora(model, r=2)
    policy.save_pretrained(tmp_path / "adapter")
    merged = policy.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for written in tmp_path.glob("*/*.json"):
        assert "dpo_engine" not in written.read_text(encoding="utf-8"), written


@pytest.mark.parametrize("name", ["gemma3", *MASKED])
def test_a_deep_copy_scores_forests_and_shares_nothing_with_the_first(name: str) -> None:
    model = tiny_model(name).eval()
    bind_scoring(model)
    choose_layout(model)
    data = random_trees()
    forest = build_forest(data)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        want = forest_token_logps(model, forest)
        restore_attention(model)
        unbind_scoring(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(forest_token_logps(copied, forest), want)
        restore_attention(copied)
        unbind_scoring(copied)
        assert_logps_agree(want, one_by_one(copied, data))


@pytest.mark.parametrize("name", ["llama", "mistral with a window", "gemma3", "gpt_oss", "llama4 with chunks", "gptj"])
def test_generation_between_training_steps_gives_the_models_own_answers(name: str) -> None:
    model = tiny_model(name).train()
    prompts = torch.tensor([random_ids(9, 1), random_ids(9, 2)])
    padded = torch.ones_like(prompts)
    padded[0, :3] = 0  # left padding
    plain = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}

    def answers() -> list[torch.Tensor]:
        beams = model.generate(prompts[:1], num_beams=2, attention_mask=padded[:1], **plain)
        return [model.generate(prompts, attention_mask=padded, **plain), beams]

    model.eval()
    own = answers()
    model.train()
    bind_scoring(model)
    assert choose_layout(model).name == "shared"
    forest_token_logps(model, build_forest(random_trees())).sum().backward()
    model.eval()
    with torch.no_grad():
        assert all(map(torch.equal, answers(), own))
    model.train()
    forest_token_logps(model, build_forest(random_trees())).sum().backward()
