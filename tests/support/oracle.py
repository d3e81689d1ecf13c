"""What is the truth about a log-prob and its gradients, and how far from it may an implementation be?

The truth is float64 from the *same rounded inputs*. The numeric standard, with e_u the error of plain torch in the
dtype of the inputs, G the true gradient, g the upstream gradient, b_i the bound of `support.row_bound` and eps the
spacing of the dtype at 1:

    logps       |e_i| <= b_i in every row and every dtype; + max|e_u| only where the GEMM can only return bfloat16
    gradients   ||e||  <= 1.25 ||e_u|| + eps / 4 ||G|| + F / 4
                max|e| <= 2 max|e_u| + eps max|G| + F / 4
    dH, row i   ||e_i|| <= 2 ||e_u_i|| + 2 eps ||G_i|| + b_i |g_i| max_v ||W_v||

F is the norm over rows of `b_i |g_i| r_i`, with r_i what the row's softmax error is multiplied by: `max_v ||W_v||` for
dH, `||h_i||` for dW, 1 for the bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpo_engine.ops import linear_logps
from support.row_bound import row_bound

EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of one call, and the upstream gradient to pull back."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (N,) int64
    upstream: Tensor  # (N,) float32
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """The same case, rounded, on `device`; with the strides that it had."""
        return replace(
            self,
            hidden=_rounded(self.hidden, dtype, device),
            weight=_rounded(self.weight, dtype, device),
            labels=self.labels.to(device),
            upstream=self.upstream.to(device),
            bias=None if self.bias is None else self.bias.to(device, dtype),
        )

    def rows(self, index: Tensor | slice) -> Case:
        return replace(self, hidden=self.hidden[index], labels=self.labels[index], upstream=self.upstream[index])

    @property
    def head(self) -> dict[str, object]:
        """The keyword arguments of `linear_logps` that say what the head is."""
        head = {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}
        return {**head, "temperature": self.temperature}

    def bound(self) -> Tensor:
        """`b_i`, (N,) float64."""
        return row_bound(self.hidden, self.weight, self.bias, self.logit_scale / self.temperature)


def _rounded(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device).copy_(tensor)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Log-probs and the gradients of `sum_i upstream_i * logp_i`; None where one was not asked for."""

    logps: Tensor  # (N,)
    d_hidden: Tensor | None = None  # (N, D)
    d_weight: Tensor | None = None  # (V, D)
    d_bias: Tensor | None = None  # (V,)


def truth(case: Case) -> Answer:
    """By hand in float64, arranged so that a row which is sure of its label cancels nothing.

    With `o = logsumexp_{v != y} z_v - z_y`: `logp = -log(1 + exp(o))`, and `dlogp/dz` is `-p_v`, at the label `1 - p_y =
    sigmoid(o)`.
    """
    rows, vectors = case.hidden.double(), case.weight.double()
    at_label = case.labels[:, None]
    x = rows @ vectors.T
    if case.bias is not None:
        x += case.bias.double()
    x *= case.logit_scale
    z, slope = x, torch.ones(())
    if case.softcap is not None:
        z, slope = case.softcap * torch.tanh(x / case.softcap), torch.cosh(x / case.softcap) ** -2
    z, slope = z / case.temperature, slope / case.temperature
    others = z.scatter(1, at_label, float("-inf")).logsumexp(1) - z.gather(1, at_label).squeeze(1)
    logps = -(others.clamp(min=0) + (-others.abs()).exp().log1p())
    d_z = -torch.exp(z - z.logsumexp(1, keepdim=True))
    d_z.scatter_(1, at_label, torch.sigmoid(others)[:, None])
    d_x = case.upstream.double()[:, None] * d_z * slope * case.logit_scale
    d_bias = None if case.bias is None else d_x.sum(0)
    return Answer(logps=logps, d_hidden=d_x @ vectors, d_weight=d_x.T @ rows, d_bias=d_bias)


def plain(case: Case) -> Answer:
    """Ordinary torch in the dtype of the inputs, logits and all: what everybody would write first."""
    hidden, weight, bias = leaves(case, trains=True)
    z = torch.nn.functional.linear(hidden, weight, bias).float() * case.logit_scale
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    logps = (z / case.temperature).log_softmax(-1).gather(-1, case.labels[:, None]).squeeze(-1)
    logps.backward(case.upstream)
    return Answer(logps=logps.detach(), d_hidden=hidden.grad, d_weight=weight.grad, d_bias=_grad(bias))


def computed(case: Case, *, trains: bool, backend: str = "tiled") -> Answer:
    """`linear_logps` and its backward, with a head that trains or a frozen one."""
    hidden, weight, bias = leaves(case, trains=trains)
    options = {**case.head, "bias": bias}
    logps = linear_logps(hidden, weight, case.labels, backend=backend, **options)
    logps.backward(case.upstream.to(logps.dtype))
    return Answer(logps=logps.detach(), d_hidden=hidden.grad, d_weight=weight.grad, d_bias=_grad(bias))


def leaves(case: Case, *, trains: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(hidden, weight, bias)` as leaves with strides kept; weight and bias take a gradient if the head trains."""
    hidden = case.hidden.detach().requires_grad_()
    weight = case.weight.detach().requires_grad_(trains)
    return hidden, weight, None if case.bias is None else case.bias.detach().requires_grad_(trains)


def _grad(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.grad


def assert_logps_within_bound(ours: Tensor, exact: Tensor, bound: Tensor, unfused: Tensor | None = None) -> None:
    """Each row within `b_i`; and plain torch's largest error, where `unfused` (its log-probs) says that it counts."""
    assert ours.dtype == torch.float32
    allowed = bound if unfused is None else bound + (unfused.double() - exact).abs().max()
    error = (ours.double() - exact).abs()
    row = int(torch.nan_to_num(error / allowed, nan=torch.inf).argmax())
    assert bool((error <= allowed).all()), (
        f"row {row}: logp {ours[row]:.9g}, truth {exact[row]:.9g}, off by {error[row]:.3g} where {allowed[row]:.3g} is "
        "allowed"
    )


def assert_gradients_within_bound(ours: Answer, exact: Answer, unfused: Answer, case: Case, bound: Tensor) -> None:
    """Every gradient that `ours` has, by the rules at the top of this file."""
    weighted = bound * case.upstream.double().abs()  # (N,) b_i |g_i|
    reach = case.weight.double().norm(dim=1).max()
    epsilon = EPSILON[case.hidden.dtype]
    floors = {
        "d_hidden": (weighted * reach).norm(),
        "d_weight": (weighted * case.hidden.double().norm(dim=1)).norm(),
        "d_bias": weighted.norm(),
    }
    for name, floor in floors.items():
        given, want, peer = getattr(ours, name), getattr(exact, name), getattr(unfused, name)
        if given is None:
            continue
        error, peer_error = given.double() - want, peer.double() - want
        _at_most(
            f"{name}, L2",
            error.norm(),
            1.25 * peer_error.norm() + epsilon / 4 * want.norm() + floor / 4,
        )
        _at_most(
            f"{name}, largest",
            error.abs().max(),
            2 * peer_error.abs().max() + epsilon * want.abs().max() + floor / 4,
        )
        if name == "d_hidden":
            rows = 2 * peer_error.norm(dim=1) + 2 * epsilon * want.norm(dim=1) + weighted * reach
            excess = error.norm(dim=1) - rows
            row = int(torch.nan_to_num(excess, nan=torch.inf).argmax())
            _at_most(f"{name}, row {row}", error[row].norm(), rows[row])


def _at_most(what: str, error: Tensor, allowed: Tensor) -> None:
    assert bool(error <= allowed), f"{what}: off by {error:.3g} where {allowed:.3g} is allowed"
