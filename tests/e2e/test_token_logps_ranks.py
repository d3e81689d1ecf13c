"""Does a model with `linear_logps_head` train over two ranks as one process does that builds logits?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from support import token_logps_ranks
from support.token_logps_ranks import CASES, RANKS, Found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[torch.Tensor, Found]]]:
    return token_logps_ranks.run(tmp_path_factory.mktemp("ranks"), list(CASES))


@pytest.mark.parametrize("name", CASES)
def test_log_probs_are_each_ranks_own_and_gradients_the_mean_of_both(name: str, two_ranks: Any) -> None:
    apart = [token_logps_ranks.alone(name, rank) for rank in range(RANKS)]
    for (logps, gradients), (expected_logps, _) in zip(two_ranks[name], apart, strict=True):
        torch.testing.assert_close(logps, expected_logps, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == apart[0][1].keys()
        for key, gradient in gradients.items():
            expected = torch.stack([grads[key] for _, grads in apart]).mean(0)
            assert expected.any(), key
            assert (gradient - expected).norm() <= 2e-5 * expected.norm(), key
