"""Do the losses agree with TRL 1.16's own code, run on the same log-probs, and differ where they mean to?

TRL computes its losses inside `_compute_loss` of its trainers. A trainer is made without its `__init__`, with the attributes that
method reads and, for models, tables of log-probs: what runs from there on is TRL's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo_engine.losses import ALIASES, LOSSES, PairStats, UnpairedStats, get_method, kto_baseline
from support.loss_formulas import Numbers, unpaired

trl = pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("transformers")

from dpo_engine.train.trl_names import LOSS_TYPES  # noqa: E402

if tuple(int(part) for part in trl.__version__.split(".")[:2]) < (1, 16):
    pytest.skip("written against what TRL 1.16's trainers read", allow_module_level=True)

PAIRS = 12


class Accelerator:
    """One process on the CPU."""

    device = torch.device("cpu")

    def gather(self, values: Tensor) -> Tensor:
        return values

    gather_for_metrics = gather

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model


class Table(nn.Module):
    """A model that is asked for row `i` by the first token of a sequence, and answers with what is written there."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: Tensor, log_sum_sq_probs: Tensor | None = None) -> None:
        super().__init__()
        self.rows, self.squares = log_probs, log_sum_sq_probs

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        rows = input_ids[:, 0]
        found = self.rows[rows][:, : input_ids.size(1) - 1]
        zeros = torch.zeros_like(found)
        squares = zeros if self.squares is None else self.squares[rows][:, : input_ids.size(1) - 1]
        return SimpleNamespace(
            log_probs=found, log_sum_sq_probs=squares, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )


class Case:
    """Pairs of completions, each token with its log-prob: what TRL reads, and what the engine does."""

    def __init__(self, *, hard: bool, count: int = PAIRS, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        numbers = Numbers(seed)
        longest = 2000 if hard else 30
        lengths = [numbers.shuffled(numbers.spread(count, 1, longest)).long() for _ in range(2)]
        self.lengths = torch.cat(lengths)
        places = torch.arange(longest)
        self.mask = places < self.lengths[:, None]
        if hard:
            sums = [-numbers.shuffled(numbers.spread(2 * count, 1e-3, 800)) for _ in range(2)]
        else:
            first = numbers.uniform(2 * count, -60, -20)
            sums = [first, first + numbers.uniform(2 * count, -5, 5)]
        self.policy, self.reference = (self._tokens(total, numbers).to(dtype) for total in sums)
        apart = numbers.uniform(2 * count, -2.0, -0.1)  # mean of log pi - log sum pi^2
        self.squares = (self.policy - apart[:, None].to(dtype)) * self.mask
        self.count = count

    def _tokens(self, sums: Tensor, numbers: Numbers) -> Tensor:
        parts = numbers.uniform(self.mask.numel(), 0.1, 1).view(self.mask.shape) * self.mask
        return sums[:, None] * parts / parts.sum(1, keepdim=True)

    def only(self, pair: int) -> Case:
        """A batch of one of the pairs."""
        one = object.__new__(Case)
        rows = [pair, self.count + pair]
        for name in ("lengths", "mask", "policy", "reference", "squares"):
            setattr(one, name, getattr(self, name)[rows])
        one.count = 1
        return one

    @property
    def batch(self) -> dict[str, Tensor]:
        """A prompt of one token, which says whose row it is, and the completion."""
        rows = torch.arange(2 * self.count)[:, None]
        ids = torch.cat([rows, torch.zeros_like(self.mask, dtype=torch.int64)], 1)
        mask = torch.cat([torch.zeros_like(rows), self.mask.long()], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}

    @property
    def stats(self) -> PairStats:
        shorter = torch.minimum(*self.lengths.chunk(2)).repeat(2)
        is_public = torch.arange(self.mask.size(1)) < shorter[:, None]
        chosen, rejected = self.policy.sum(1).chunk(2)
        reference_chosen, reference_rejected = self.reference.sum(1).chunk(2)
        public, reference_public = ((rows * is_public).sum(1).chunk(2) for rows in (self.policy, self.reference))
        lengths = self.lengths.to(chosen.dtype)
        confidence = ((self.policy - self.squares) * self.mask).sum(1) / lengths
        return PairStats(
            chosen_logps=chosen,
            rejected_logps=rejected,
            reference_chosen_logps=reference_chosen,
            reference_rejected_logps=reference_rejected,
            chosen_lengths=lengths[: self.count],
            rejected_lengths=lengths[self.count :],
            chosen_public_logps=public[0],
            rejected_public_logps=public[1],
            reference_chosen_public_logps=reference_public[0],
            reference_rejected_public_logps=reference_public[1],
            chosen_confidence=confidence[: self.count],
            rejected_confidence=confidence[self.count :],
        )


def trls(case: Case, loss_type: str | list[str], **settings: Any) -> Tensor:
    """() TRL's DPO loss of a batch."""
    trainer = object.__new__(trl.DPOTrainer)
    given = {
        "beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None, "use_weighting": False, "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5, "loss_weights": None,
    } | settings  # fmt: skip
    given["loss_types"] = [loss_type] if isinstance(loss_type, str) else loss_type
    given["loss_weights"] = given["loss_weights"] or [1.0] * len(given["loss_types"])
    arguments = SimpleNamespace(discopop_tau=given.pop("discopop_tau", 0.05), gradient_checkpointing_kwargs=None)
    trainer.__dict__ |= given | _trainer(Table(case.policy, case.squares), Table(case.reference), arguments)
    return trainer._compute_loss(trainer.model, case.batch, False)


def _trainer(policy: nn.Module, reference: nn.Module, arguments: Any) -> dict[str, Any]:
    """What `_compute_loss` reads that is no setting."""
    return {
        "model": policy, "ref_model": reference, "args": arguments, "accelerator": Accelerator(), "aux_loss_enabled": False,
        "precompute_ref_logps": False, "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1,
    }  # fmt: skip


def ours(case: Case, name: str, **settings: Any) -> Tensor:
    """(B,) of the method that TRL's name or ours stands for."""
    return get_method(name)(case.stats, SimpleNamespace(**settings))


def assert_agree(case: Case, theirs: dict[str, Any], mine: dict[str, Any], rtol: float = 1e-6) -> None:
    """Each pair by itself, and the batch."""
    losses = ours(case, **mine)
    for pair, loss in enumerate(losses):
        torch.testing.assert_close(trls(case.only(pair), **theirs).to(loss), loss, rtol=rtol, atol=1e-6)
    torch.testing.assert_close(trls(case, **theirs).to(losses), losses.mean(), rtol=rtol, atol=1e-6)


SAME: list[tuple[str, dict[str, Any]]] = [
    ("sigmoid", {}),
    ("hinge", {}),
    ("ipo", {"beta": 0.3}),
    ("robust", {"label_smoothing": 0.1}),
    ("exo_pair", {"label_smoothing": 1e-3}),
    ("exo_pair", {"label_smoothing": 0.2, "beta": 0.5}),
    ("nca_pair", {"beta": 0.01}),
    ("sppo_hard", {"beta": 1e-3}),
    ("sppo_hard", {}),
    ("apo_zero", {}),
    ("apo_down", {}),
    ("discopop", {"beta": 0.05}),
    ("discopop", {"beta": 0.05, "discopop_tau": 0.2}),
    ("sigmoid_norm", {"beta": 5.0}),
]
COUPLED = ["aot"]
DIFFERENT = ["sft"]


def test_every_loss_of_trls_that_is_a_method_here_is_compared() -> None:
    assert {name for name, _ in SAME} | {*COUPLED, *DIFFERENT} == {n for n, entry in LOSS_TYPES.items() if entry.method}
    assert all(ALIASES.get(name, name) == entry.method for name, entry in LOSS_TYPES.items() if entry.method)


@pytest.mark.parametrize("hard", [False, True], ids=["easy", "hard"])
@pytest.mark.parametrize(("name", "settings"), SAME, ids=lambda x: str(x))
def test_a_loss_is_trls(name: str, settings: dict[str, Any], hard: bool) -> None:
    given = {"beta": 0.1} | settings  # TRL's default, said to both
    assert_agree(Case(hard=hard), {"loss_type": name, **given}, {"name": name, **given})


@pytest.mark.parametrize("name", ["sigmoid", "nca_pair", "sppo_hard", "ipo", "sigmoid_norm", "apo_down"])
def test_a_losss_gradient_by_every_token_is_trls(name: str) -> None:
    case = Case(hard=False)
    case.policy.requires_grad_()
    theirs = torch.autograd.grad(trls(case, name), case.policy)[0] * case.mask
    mine = torch.autograd.grad(ours(case, name, beta=0.1).mean(), case.policy)[0] * case.mask
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_aot_is_trls_over_a_batch(smoothing: float) -> None:
    for hard in (False, True):
        case = Case(hard=hard)
        found = ours(case, "aot", beta=0.1, label_smoothing=smoothing).mean()
        torch.testing.assert_close(found, trls(case, "aot", label_smoothing=smoothing), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js_divergence"])
def test_a_divergence_is_trls(kind: str) -> None:
    given = {"beta": 0.1, "f_divergence_type": kind}
    assert_agree(Case(hard=False), {"loss_type": "sigmoid", **given}, {"name": "f_dpo", **given})


@pytest.mark.parametrize("alpha", [0.5, 2.0, -1.0])
def test_the_alpha_divergence_is_trls_in_float32_which_is_what_it_takes(alpha: float) -> None:
    given = {"beta": 0.1, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
    case = Case(hard=False, dtype=torch.float32)
    assert_agree(case, {"loss_type": "sigmoid", **given}, {"name": "f_dpo", **given}, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_alpha_is_trls(alpha: float) -> None:
    for hard in (False, True):
        given = {"beta": 0.1, "ld_alpha": alpha}
        assert_agree(Case(hard=hard), {"loss_type": "sigmoid", **given}, {"name": "ld_dpo", **given})


def test_weighting_is_trls_where_the_weight_is_below_one_and_bounded_beyond() -> None:
    case = Case(hard=False)
    assert_agree(case, {"loss_type": "sigmoid", "beta": 0.01, "use_weighting": True}, {"name": "wpo", "beta": 0.01})
    sure = Case(hard=False)
    sure.squares = (sure.policy - 0.5) * sure.mask  # a weight of e
    theirs = trls(sure, "sigmoid", beta=0.01, use_weighting=True)
    torch.testing.assert_close(theirs, math.e * ours(sure, "wpo", beta=0.01).mean())


def test_a_mixture_is_trls() -> None:
    case = Case(hard=True)
    theirs = trls(case, ["sigmoid", "apo_zero", "ipo"], loss_weights=[0.8, 0.2, 1.5], beta=0.3)
    mixed = get_method("sigmoid+apo_zero+ipo", [0.8, 0.2, 1.5])
    torch.testing.assert_close(mixed(case.stats, SimpleNamespace(beta=0.3)).mean(), theirs)


# ---- where the two differ ----


def test_trl_ignores_label_smoothing_in_the_sigmoid_loss_where_it_is_cdpo_here() -> None:
    case = Case(hard=False)
    assert trls(case, "sigmoid", label_smoothing=0.2) == trls(case, "sigmoid")
    smoothed = ours(case, "sigmoid", label_smoothing=0.2).mean()
    h = (case.policy - case.reference).sum(1)
    z = 0.1 * (h[: case.count] - h[case.count :])
    expected = 0.8 * torch.log1p(torch.exp(-z)) + 0.2 * torch.log1p(torch.exp(z))
    torch.testing.assert_close(smoothed, expected.mean())
    assert abs(smoothed - trls(case, "sigmoid", label_smoothing=0.2)) > 1e-3


def test_trls_sft_is_a_mean_over_the_batchs_tokens_where_each_sequence_counts_the_same_here() -> None:
    case = Case(hard=False)
    chosen, lengths = case.policy[: case.count], case.lengths[: case.count]
    torch.testing.assert_close(trls(case, "sft"), -chosen.sum() / lengths.sum())
    torch.testing.assert_close(ours(case, "sft"), -chosen.sum(1) / lengths)
    assert abs(trls(case, "sft") - ours(case, "sft").mean()) > 1e-2
    for pair in range(case.count):  # of one sequence they are the same
        torch.testing.assert_close(trls(case.only(pair), "sft"), ours(case, "sft")[pair])


def test_trls_bco_has_no_baseline() -> None:
    case = Case(hard=False)
    theirs = trls(case, "bco_pair", beta=0.1)
    without = replace(case.stats, baseline=torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(LOSSES["bco"](without, SimpleNamespace(beta=0.1)).mean(), theirs)
    assert abs(ours(case, "bco", beta=0.1).mean() - theirs) > 1e-6


def test_trls_exo_without_smoothing_is_infinite_and_discopop_of_a_lost_pair_is_no_number() -> None:
    assert trls(Case(hard=False), "exo_pair").item() == math.inf
    case = Case(hard=False, dtype=torch.float32)
    case.policy = torch.where(torch.arange(2 * PAIRS)[:, None] < PAIRS, 40 * case.policy, case.policy)
    assert trls(case, "discopop", beta=0.1).isnan()
    assert ours(case, "discopop", beta=0.1).isfinite().all()


# ---- other trainers ----


def means(stats: PairStats) -> tuple[Tensor, Tensor]:
    return stats.chosen_logps / stats.chosen_lengths, stats.rejected_logps / stats.rejected_lengths


def cpo_trainer(loss_type: str, **settings: Any) -> Any:
    cpo = pytest.importorskip("trl.experimental.cpo", reason="this TRL has no CPO")
    trainer = object.__new__(cpo.CPOTrainer)
    trainer.__dict__ |= {
        "alpha": 0.0, "accelerator": Accelerator(), "loss_type": loss_type, "label_smoothing": 0.0, "simpo_gamma": 0.5,
    } | settings  # fmt: skip
    return trainer


@pytest.mark.parametrize("hard", [False, True], ids=["easy", "hard"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cpo_is_trls_and_its_likelihood_beside(smoothing: float, hard: bool) -> None:
    stats = Case(hard=hard).stats
    trainer = cpo_trainer("sigmoid", beta=0.1, label_smoothing=smoothing)
    preference = trainer.cpo_loss(stats.chosen_logps, stats.rejected_logps)[0]
    given = {"beta": 0.1, "label_smoothing": smoothing}
    found = LOSSES["cpo"](stats, SimpleNamespace(**given, cpo_alpha=0.0))
    torch.testing.assert_close(found, preference, rtol=1e-6, atol=1e-6)
    with_nll = LOSSES["cpo"](stats, SimpleNamespace(**given, cpo_alpha=0.7))
    torch.testing.assert_close(with_nll, preference - 0.7 * means(stats)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("hard", [False, True], ids=["easy", "hard"])
def test_simpo_is_trls_whose_gamma_is_beta_times_ours(hard: bool) -> None:
    stats = Case(hard=hard).stats
    for beta, ratio in ((2.0, 0.5), (10.0, 0.3)):
        theirs = cpo_trainer("simpo", beta=beta, simpo_gamma=beta * ratio).cpo_loss(*means(stats))[0]
        mine = LOSSES["simpo"](stats, SimpleNamespace(beta=beta, gamma_beta_ratio=ratio))
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("hard", [False, True], ids=["easy", "hard"])
def test_orpos_odds_ratio_is_trls(hard: bool) -> None:
    orpo = pytest.importorskip("trl.experimental.orpo", reason="this TRL has no ORPO")
    stats = Case(hard=hard).stats
    trainer = object.__new__(orpo.ORPOTrainer)
    trainer.__dict__ |= {"beta": 0.3, "accelerator": Accelerator()}
    theirs = -trainer.odds_ratio_loss(*means(stats))[0]  # in float32
    likelihood = LOSSES["sft"](stats, None)
    mine = LOSSES["orpo"](stats, SimpleNamespace(beta=0.3)) - likelihood
    torch.testing.assert_close(mine, theirs.double(), rtol=1e-5, atol=1e-5)


def trls_kto(stats: UnpairedStats, mismatched: Tensor, reference_mismatched: Tensor, **settings: Any) -> Tensor:
    """() TRL's KTO loss."""
    count = len(stats)
    assert stats.reference_logps is not None
    trainer = object.__new__(trl.KTOTrainer)
    policy = Table(torch.cat([stats.logps, mismatched])[:, None])
    reference = Table(torch.cat([stats.reference_logps, reference_mismatched])[:, None])
    trainer.__dict__ |= {"loss_type": "kto", "calculate_KL": True} | settings
    trainer.__dict__ |= _trainer(policy, reference, SimpleNamespace(gradient_checkpointing_kwargs=None))
    ids = torch.stack([torch.arange(count), torch.zeros(count, dtype=torch.int64)], 1)
    mask = torch.tensor([[0, 1]]).expand(count, 2)
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask, "label": stats.desirable,
        "KL_input_ids": ids + torch.tensor([count, 0]), "KL_attention_mask": torch.ones_like(ids), "KL_completion_mask": mask,
    }  # fmt: skip
    return trainer._compute_loss(policy, batch, False)


@pytest.mark.parametrize("apart", [0.8, -0.8], ids=["baseline above 0", "clamped"])
@pytest.mark.parametrize("labels", ["both", "desirable only", "undesirable only"])
def test_kto_is_trls(labels: str, apart: float) -> None:
    numbers = Numbers(9)
    for hard in (False, True):
        stats = unpaired(hard=hard)
        if labels != "both":
            stats = replace(stats, desirable=torch.full_like(stats.desirable, labels == "desirable only"))
        under = numbers.uniform(len(stats), -50, -20)
        own = under + apart + numbers.uniform(len(stats), -3, 3)
        stats = replace(stats, baseline=kto_baseline((own - under).mean()))
        assert stats.baseline is not None and (stats.baseline > 0) == (apart > 0)
        settings = {"beta": 0.1, "desirable_weight": 1.2, "undesirable_weight": 0.9}
        theirs = trls_kto(stats, own, under, **settings)
        mine = LOSSES["kto"](stats, SimpleNamespace(**settings))
        torch.testing.assert_close(mine.mean(), theirs, rtol=1e-6, atol=1e-6)
