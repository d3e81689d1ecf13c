"""What takes the place of Liger's `LigerFusedLinearDPOLoss` in a loop that calls it?

`FusedLinearDPOLoss` has its call shape, its layout (chosen rows first, then the rejected ones in the same order) and its
results, computed by `linear_logps` and the losses of `dpo_engine.losses`.
"""

from __future__ import annotations

import difflib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dpo_engine.errors import ConfigError
from dpo_engine.losses import LOSSES, PairStats, get_method
from dpo_engine.ops import linear_logps
from dpo_engine.ops.linear_logps import gathered
from dpo_engine.ops.mean_logits import mean_logits

# Liger's names of losses that the table has under another one.
_LIGER_NAMES = {"sigmoid": "dpo", "bco_pair": "bco"}
_DISCOPOP_TAU = 0.05


class FusedLinearDPOLoss(nn.Module):
    """`alpha * nll + mean over pairs of loss(...)`, of hidden states and a head, without logits.

    Called as Liger's class of liger-kernel 0.8: `loss_function(lin_weight, _input, target, bias, ref_input, ref_weight,
    ref_bias)`. As there nothing is shifted: `_input[b, t]` predicts `target[b, t]`, so the caller passes `hidden[:, :-1]` and
    `labels[:, 1:]`. What differs: log-probs and gradients are those of `linear_logps`; a "sigmoid" loss heeds
    `label_smoothing` (conservative DPO), where Liger's ignores it; and what the call does not use is refused.

    Args:
        ignore_index: label of tokens that are not scored.
        beta: how strongly the policy is held to the reference.
        alpha: what the chosen completions' NLL counts in the loss, where `compute_nll_loss` is on.
        compute_nll_loss: add the NLL of the chosen rows, a mean over all their labels that are not `ignore_index`: over
            the prompt too, if the labels hold it.
        compiled, chunk_size: accepted and unused: nothing is compiled, and memory is a tile whatever the number of pairs.
        use_ref_model: whether a reference is compared with; without one its log-probs are 0. A loss that needs none
            (`dpo_engine.losses.LOSSES`) takes none, whatever this says; a loss whose reference moves is given the one of now.
        average_log_prob: give the loss means over a sequence's scored tokens in place of sums.
        loss_type: a name of `dpo_engine.losses.LOSSES`, or Liger's "sigmoid" ("dpo") or "bco_pair" ("bco" with its
            baseline at 0). "bco" takes as its baseline the mean reward of the pairs in the call.
        label_smoothing, discopop_tau: parameters of losses that have them.
        logit_scale, softcap, backend: as for `linear_logps`; of the reference's head too.
        parameters: other parameters of the loss, such as `ld_alpha` or `ipo_reduction`; its own defaults where not given.

    Raises:
        ConfigError: an unknown loss, or a parameter that the loss does not have, or needs and was not given.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = _DISCOPOP_TAU,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        backend: str = "auto",
        **parameters: Any,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        name = _LIGER_NAMES.get(loss_type, loss_type)
        if name not in LOSSES:
            known = ", ".join((*_LIGER_NAMES, *sorted(LOSSES)))
            near = difflib.get_close_matches(name, LOSSES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"loss_type={loss_type!r} is not built{hint}; expected one of {known}")
        self.method = get_method(name)
        self.use_ref_model = use_ref_model and self.method.needs_reference
        self.head: dict[str, Any] = {"logit_scale": logit_scale, "softcap": softcap, "backend": backend}
        self.config = self._config(label_smoothing, discopop_tau, parameters)

    def _config(self, label_smoothing: float, discopop_tau: float, parameters: dict[str, Any]) -> SimpleNamespace:
        """What the loss reads its parameters from."""
        uses, name = self.method.uses, self.loss_type
        if self.method.needs is not PairStats or self.method.token_kl:
            can = sorted(key for key, method in LOSSES.items() if method.needs is PairStats and not method.token_kl)
            what = "is no loss of pairs" if self.method.needs is not PairStats else "needs whole distributions"
            raise ConfigError(f"loss_type={name!r} {what}; expected one of {', '.join(can)}")
        given = {**parameters}
        if label_smoothing != 0:
            given["label_smoothing"] = label_smoothing
        if discopop_tau != _DISCOPOP_TAU:
            given["discopop_tau"] = discopop_tau
        for key, value in given.items():
            if key not in uses:
                has = ", ".join(sorted(uses - {"beta"})) or "none beside beta"
                raise ConfigError(
                    f"{key}={value!r} is no parameter of loss_type={name!r}; expected one of its own: {has}"
                )
        if name == "r_dpo" and self.average_log_prob:
            raise ConfigError(
                "average_log_prob=True with loss_type='r_dpo', which reads lengths, and of means there are none; expected False"
            )
        config = SimpleNamespace(beta=self.beta, **given)
        self.method.check(config)
        return config

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        *,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        lora: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and what Liger's class reports beside it.

        Args:
            lin_weight: (V, D), as for `linear_logps`; frozen, trained or quantised.
            _input: (2B, T, D) hidden states, the chosen rows first.
            target: (2B, T) the token that each predicts, or `ignore_index`.
            bias: (V,).
            ref_input, ref_weight, ref_bias: the same of the reference, which takes no gradient.
            ref_chosen_logps, ref_rejected_logps: in their place, what the reference was found to say before: (B,) sums of
                scored tokens (means with `average_log_prob`), or (B, T) for each token, of which those of ignored ones do
                not count.
            lora: as for `linear_logps`, `(lora_hidden (2B, T, r), lora_weight (V, r))` of an adapter on the policy's head.

        Returns:
            `(loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards,
            rejected_rewards))`, (B,) or () each, without gradient but for the loss. The means are over all positions and the
            vocabulary, as Liger's; with a softcap or a quantised weight they are NaN, since they would need the logits.

        Raises:
            ValueError: shapes that do not fit, no reference where one is needed, or one where none is.
        """
        self._check(_input, target, ref_input, ref_weight, ref_bias, ref_chosen_logps, ref_rejected_logps)
        pairs, scored = len(target) // 2, target != self.ignore_index
        options: dict[str, Any] = {"ignore_index": self.ignore_index, **self.head}
        asked: Any = self.method.extras
        found: Any = linear_logps(_input, lin_weight, target, bias=bias, lora=lora, extras=asked, **options)
        token_logps, extras = found if asked else (found, None)
        lengths = scored.sum(-1)  # (2B,)
        chosen, rejected = self._sequences(token_logps, lengths).split(pairs)
        fields: dict[str, Tensor] = {}
        if extras is not None:
            of_sequences = (token_logps.detach() - extras.log_sum_squares).sum(-1) / lengths
            fields |= zip(("chosen_confidence", "rejected_confidence"), of_sequences.split(pairs), strict=True)
        if self.method.public_part:
            fields |= zip(
                ("chosen_public_logps", "rejected_public_logps"),
                self._public(token_logps, scored, lengths).split(pairs),
                strict=True,
            )
        reference: tuple[Tensor | None, ...] = (None, None)
        if ref_chosen_logps is not None and ref_rejected_logps is not None:
            halves = zip((ref_chosen_logps, ref_rejected_logps), scored.split(pairs), lengths.split(pairs), strict=True)
            reference = tuple(self._given(*half) for half in halves)
            if self.method.public_part:
                tokens = torch.cat([ref_chosen_logps, ref_rejected_logps]).detach()
                fields |= _reference_public(self._public(tokens, scored, lengths), pairs)
        elif ref_input is not None and ref_weight is not None:
            with torch.no_grad():
                ref_logps = linear_logps(ref_input, ref_weight, target, bias=ref_bias, **options)
                reference = self._sequences(ref_logps, lengths).split(pairs)
                if self.method.public_part:
                    fields |= _reference_public(self._public(ref_logps, scored, lengths), pairs)
        elif self.method.needs_reference:
            reference = chosen.new_zeros(pairs), chosen.new_zeros(pairs)
            if self.method.public_part:
                fields |= _reference_public(chosen.new_zeros(2 * pairs), pairs)
        counts = lengths.to(chosen.dtype) if not self.average_log_prob else torch.ones_like(lengths, dtype=chosen.dtype)
        stats = PairStats(
            chosen_logps=chosen,
            rejected_logps=rejected,
            reference_chosen_logps=reference[0],
            reference_rejected_logps=reference[1],
            chosen_lengths=counts[:pairs],  # of means, 1: they are not divided again
            rejected_lengths=counts[pairs:],
            baseline=chosen.new_zeros(()) if self.loss_type == "bco_pair" else None,
            **fields,
        )
        loss, nll = self.method(stats, self.config).mean(), chosen.new_zeros(())
        if self.compute_nll_loss:
            nll = -token_logps[:pairs].sum() / lengths[:pairs].sum()
            loss = loss + self.alpha * nll
        with torch.no_grad():
            means = [self._logits_mean(half, lin_weight, bias, lora, i) for i, half in enumerate(_input.split(pairs))]
            rewards = [
                self.beta * (value if under is None else value - under)
                for value, under in zip((chosen, rejected), reference, strict=True)
            ]
        return loss, tuple(part.detach() for part in (chosen, rejected, *means, nll, *rewards))

    def _sequences(self, token_logps: Tensor, lengths: Tensor) -> Tensor:
        """(B,) what a loss is given of each sequence: a sum, or a mean."""
        sums = token_logps.sum(-1)
        return sums / lengths if self.average_log_prob else sums

    def _given(self, logps: Tensor, scored: Tensor, lengths: Tensor) -> Tensor:
        """(B,) of reference log-probs that were passed, of sequences or of tokens."""
        logps = logps.detach()
        if logps.ndim == 2:
            return self._sequences(logps.masked_fill(~scored, 0.0), lengths)
        if self.method.public_part:
            raise ValueError(
                f"loss_type={self.loss_type!r} weighs tokens; expected reference log-probs of tokens (B, T), not of sequences"
            )
        return logps

    def _public(self, token_logps: Tensor, scored: Tensor, lengths: Tensor) -> Tensor:
        """(2B,) the same of as many tokens of each sequence as the shorter one of its pair has."""
        places = scored.cumsum(-1) - 1
        public = torch.minimum(*lengths.chunk(2)).repeat(2)[:, None]
        return self._sequences(token_logps.masked_fill(~scored | (places >= public), 0.0), lengths)

    def _logits_mean(
        self, hidden: Tensor, weight: Any, bias: Tensor | None, lora: tuple[Tensor, Tensor] | None, half: int
    ) -> Tensor:
        """() over every position and the whole vocabulary."""
        of_half = None if lora is None else (lora[0].chunk(2)[half], lora[1])
        scale, softcap = self.head["logit_scale"], self.head["softcap"]
        return mean_logits(hidden, gathered(weight), bias, scale, softcap, lora=of_half).mean()

    def _check(
        self,
        hidden: Tensor,
        target: Tensor,
        ref_input: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        ref_chosen: Tensor | None,
        ref_rejected: Tensor | None,
    ) -> None:
        if target.ndim != 2 or len(target) % 2 or not len(target) or hidden.shape[:-1] != target.shape:
            raise ValueError(
                f"_input is {tuple(hidden.shape)} and target {tuple(target.shape)}; expected (2B, T, D) and (2B, T), chosen first"
            )
        of_model = {"ref_input": ref_input, "ref_weight": ref_weight}
        of_values = {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
        given = [k for k, v in {**of_model, "ref_bias": ref_bias, **of_values}.items() if v is not None]
        if not self.use_ref_model:
            if given:
                raise ValueError(f"{', '.join(given)} came to a loss without a reference; expected none: leave it out")
            return
        if given not in (list(of_values), list(of_model), [*of_model, "ref_bias"]):
            raise ValueError(
                f"the reference is {', '.join(given) or 'missing'}; expected ref_input and ref_weight, or ref_chosen_logps and "
                "ref_rejected_logps, or use_ref_model=False"
            )
        pairs = len(target) // 2
        for name, logps in of_values.items():
            if logps is not None and logps.shape not in ((pairs,), (pairs, target.shape[1])):
                raise ValueError(
                    f"{name} is {tuple(logps.shape)}; expected {(pairs,)}, a sequence each, or {(pairs, target.shape[1])}"
                )
        if ref_input is not None and ref_input.shape[:-1] != target.shape:
            raise ValueError(
                f"ref_input is {tuple(ref_input.shape)}; expected {tuple(target.shape)} and its hidden size"
            )


def _reference_public(public: Tensor, pairs: int) -> dict[str, Tensor]:
    chosen, rejected = public.split(pairs)
    return {"reference_chosen_public_logps": chosen, "reference_rejected_public_logps": rejected}
