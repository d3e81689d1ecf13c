"""Can the frontier's figures be believed? Exact probabilities, the comparison, and every trainer for a few updates."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from support.benchmark_scripts import load


@pytest.fixture(scope="module")
def world():
    worlds = load("frontier.world")
    return worlds.make_world(0, worlds.make_space(prompts=4, longest=2), pretrain_steps=20)


def test_probabilities_of_all_responses_are_the_models_and_add_up_to_one(world) -> None:
    assert len(world.space.responses) == 1 + 6 + 36
    assert world.reference_logps.exp().sum(-1) == pytest.approx(torch.ones(4), abs=1e-5)
    prompt, response = world.space.prompts[2], world.space.responses[20]
    logits = world.reference(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    logps = logits.double().log_softmax(-1)
    expected = sum(float(logps[1 + place, word]) for place, word in enumerate(response))
    assert float(world.reference_logps[2, 20]) == pytest.approx(expected, abs=1e-5)


def test_no_policy_is_above_the_frontier(world) -> None:
    frontier, script = world.frontier(), load("frontier.run")
    draw = torch.Generator().manual_seed(1)
    for scale in (0.1, 1.0, 3.0):
        noise = torch.randn(world.reward.shape, generator=draw, dtype=torch.float64)
        kl, reward = world.place((world.reference_logps + scale * (noise + world.reward)).log_softmax(-1))
        assert 0 < reward < script.reward_at(kl, frontier)


def test_a_hull_is_what_mixtures_of_policies_reach() -> None:
    script = load("frontier.run")
    assert script.hull([(1, 1), (2, 1.2), (1.5, 1.0), (3, 0.5)]) == [(0, 0), (1, 1), (2, 1.2)]
    assert script.at(1.5, [(0, 0), (1, 1), (2, 1.2)]) == pytest.approx(1.1)
    assert script.at(2.5, [(0, 0), (1, 1), (2, 1.2)]) is None


@pytest.mark.parametrize("method", ["dpo", "ppo_learned", "ppo_true"])
def test_every_method_gains_reward(method: str, world) -> None:
    script, train = load("frontier.run"), load("frontier.train")
    script._remember(world, train.Settings(epochs=2, rollouts=6))
    records = script.run_job((method, (1.0,), 0, 2000))
    last = records[-1]
    assert last["is_last"] and last["kl"] > 0.01
    assert 0.15 < last["reward"] < script.reward_at(last["kl"], world.frontier())
