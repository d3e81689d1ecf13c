"""Does `linear_logps` do what torch expects of an operator: compiled, checkpointed, distributed, transformed?

`aot_eager` traces forward and backward as the default compiler does and generates no code, so most tests take that one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpo_engine.errors import BackendError
from dpo_engine.ops import linear_logps
from dpo_engine.ops.registered import backward_op, forward_op
from support import ranks
from support.call_cost import Products
from support.head_distributions import normal, random_labels, upstream
from support.imports import ROOT

D, V = 16, 50
ALL = ("entropy", "log_sum_squares", "is_top1")


class Model(nn.Module):
    """An embedding, a layer and a head; what the head is, and what is asked of it, is given."""

    def __init__(
        self, *, frozen: bool = False, lora: bool = False, extras: tuple[str, ...] = (), tied: bool = False, **head: Any
    ) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V)
        self.lora_a = nn.Parameter(torch.empty(3, D)) if lora else None
        self.lora_b = nn.Parameter(torch.empty(V, 3)) if lora else None
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=60 + seed, scale=0.5))
        if tied:
            self.head.weight = self.embedding.weight
        self.head.requires_grad_(not frozen)
        self.extras, self.options = extras, head

    def forward(self, tokens: Tensor, labels: Tensor) -> Any:
        hidden = torch.tanh(self.layer(self.embedding(tokens)))
        lora = None if self.lora_a is None else (2.0 * hidden @ self.lora_a.T, self.lora_b)
        return linear_logps(
            hidden, self.head.weight, labels, bias=self.head.bias, lora=lora, extras=self.extras, **self.options
        )  # fmt: skip


def batch(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(tokens, labels, upstream)`, some labels to be ignored."""
    count = rows * columns
    tokens, labels = torch.arange(count) * 7 % V, random_labels(count, V)
    labels[::4] = -100
    return tuple(t.view(rows, columns) for t in (tokens, labels, upstream(count)))


def results(
    call: Callable[..., Any], model: nn.Module, rows: int = 4, columns: int = 7, *, autocast: bool = False
) -> list[Tensor]:
    """Log-probs, extras and every parameter's gradient of one step."""
    tokens, labels, g = batch(rows, columns)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        given = call(tokens, labels)
    logps, extras = given if isinstance(given, tuple) else (given, ())
    assert logps.shape == labels.shape and logps.requires_grad
    logps.backward(g)
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and bool((grad != 0).any()) for grad in grads)
    return [t.detach().clone() for t in (logps, *(e for e in extras if e is not None), *grads)]


def assert_same(ours: list[Tensor], want: list[Tensor], tolerance: float = 1e-5) -> None:
    for given, expected in zip(ours, want, strict=True):
        torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance)


MODELS: dict[str, dict[str, Any]] = {
    "frozen": {"frozen": True},
    "trainable": {},
    "tied": {"tied": True},
    "LoRA on a frozen head": {"frozen": True, "lora": True, "logit_scale": 0.5},
    "extras": {"frozen": True, "extras": ALL, "softcap": 5.0, "temperature": 1.5},
    "everything": {"lora": True, "extras": ("entropy",), "softcap": 5.0},
}


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MODELS)
def test_traced_whole_it_gives_the_same_numbers(name: str) -> None:
    """`fullgraph`: a graph break would be an error."""
    model = Model(**MODELS[name])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, model), results(model, model))


def test_traced_under_autocast_it_gives_the_same_numbers() -> None:
    model = Model(lora=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, model, autocast=True), results(model, model, autocast=True))


def test_another_number_of_rows_needs_no_other_code_than_the_second() -> None:
    """Rows are as many as a batch has scored tokens: a graph for each number would be compiled anew all the time."""
    model = Model(frozen=True, lora=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows, columns in ((4, 7), (3, 9), (5, 11), (2, 30), (6, 4)):
        assert_same(results(compiled, model, rows, columns), results(model, model, rows, columns))
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default compiler needs g++")
@pytest.mark.parametrize("name", MODELS)
def test_compiled_it_gives_the_same_numbers(name: str) -> None:
    model = Model(**MODELS[name])
    compiled = torch.compile(model, fullgraph=True)
    for rows, columns in ((4, 7), (3, 9), (5, 5)):
        assert_same(results(compiled, model, rows, columns), results(model, model, rows, columns), 1e-4)
    if "extras" not in MODELS[name]:
        assert_same(results(compiled, model, autocast=True), results(model, model, autocast=True), 2e-2)


def operator_inputs(
    keep: str, *, lora: bool = False, quantised: bool = False, backend: str = "tiled"
) -> tuple[Any, ...]:
    """Arguments of both registered operators, by what takes a gradient where the forward keeps `keep`."""
    rows = keep != "nothing"
    hidden = normal(6, D, seed=1).requires_grad_(rows)
    weight: Any = normal(V, D, seed=2).requires_grad_(keep == "statistics" and not quantised)
    lora_hidden = normal(6, 3, seed=3).requires_grad_(rows) if lora else None
    lora_weight = normal(V, 3, seed=4).requires_grad_(rows) if lora else None
    parts: list[Tensor] = []
    layout = ""
    if quantised:
        bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        from dpo_engine.ops.weights import quantised_weight

        packed = quantised_weight(bnb.nn.Params4bit(weight.clone(), requires_grad=False, blocksize=D, quant_type="nf4"))
        weight, parts, layout = packed.packed, packed.parts(), packed.layout()
    labels = torch.tensor([3, -100, 0, V - 1, 3, 7])
    bias = normal(V, seed=5).requires_grad_(keep == "statistics")
    return (
        hidden, weight, labels, bias, lora_hidden, lora_weight, parts, layout,
        1.5, 4.0, -100, torch.float32, backend, keep,
    )  # fmt: skip


@pytest.mark.parametrize("with_extras", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("keep", ["nothing", "unit", "statistics"])
def test_torch_finds_nothing_wrong_with_the_registered_forward(keep: str, lora: bool, with_extras: bool) -> None:
    """Schema, aliasing, shapes without data, and the derivative under AOT autograd with dynamic shapes."""
    torch.library.opcheck(forward_op, (*operator_inputs(keep, lora=lora), with_extras))


@pytest.mark.parametrize("lora", [False, True])
def test_torch_finds_nothing_wrong_with_the_registered_backward(lora: bool) -> None:
    inputs = operator_inputs("statistics", lora=lora)
    statistics = forward_op(*inputs, False)[3].detach()
    detached = [t.detach() if isinstance(t, Tensor) else t for t in inputs]
    want = "hidden weight bias lora_hidden lora_weight" if lora else "hidden weight bias"
    torch.library.opcheck(backward_op, (*detached, statistics, normal(6, seed=9), want))
    torch.library.opcheck(backward_op, (*detached, statistics, normal(6, seed=9), "weight"))


def test_shapes_without_data_are_those_with_data() -> None:
    """What a compiler is told before anything runs, for every output and every word that says what is kept."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for keep in ("nothing", "unit", "statistics"):
        for lora in (False, True):
            for with_extras in (False, True):
                inputs = operator_inputs(keep, lora=lora)
                real = forward_op(*inputs, with_extras)
                with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                    fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in inputs]
                    told = forward_op(*fakes, with_extras)
                described = [[(t.shape, t.dtype, t.stride()) for t in given] for given in (real, told)]
                assert described[0] == described[1], (keep, lora, with_extras)


@pytest.mark.parametrize("name", ["frozen", "trainable", "everything"])
def test_checkpointed_it_gives_the_same_gradients(name: str) -> None:
    model = Model(**MODELS[name])
    assert_same(
        results(lambda *given: checkpoint(model, *given, use_reentrant=False), model), results(model, model), 0.0
    )


def test_checkpointing_a_frozen_head_costs_two_products_more() -> None:
    """So it is not to be wrapped; this says what it costs if it is."""
    model = Model(frozen=True)
    hidden, labels = normal(64, D, seed=1), random_labels(64, V)
    gemm = 2 * 64 * D * V

    def step(wrapped: bool) -> float:
        leaf = hidden.clone().requires_grad_()

        def score(h: Tensor) -> Tensor:
            return linear_logps(h, model.head.weight, labels, backend="tiled")

        with Products() as seen:
            logps = checkpoint(score, leaf, use_reentrant=False) if wrapped else score(leaf)
            logps.sum().backward()
        return round(seen.flops / gemm)

    assert step(False) == 2 and step(True) == 4


def test_without_autograd_at_all_it_gives_the_same_log_probs() -> None:
    model = Model(lora=True)
    tokens, labels, _ = batch(4, 7)
    want = model(tokens, labels).detach()
    with torch.inference_mode():
        logps = model(tokens, labels)
    assert logps.is_inference() and torch.equal(logps, want)


def test_torch_func_is_refused_by_torch_and_takes_the_definition() -> None:
    """torch gives no such derivative to operators that are registered with one; it says so, and nothing is wrong."""
    hidden, weight, labels, g = normal(9, D, seed=1), normal(V, D, seed=2), random_labels(9, V), upstream(9)

    def objective(h: Tensor, w: Tensor, backend: str) -> Tensor:
        return (linear_logps(h, w, labels, backend=backend) * g).sum()

    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(objective)(hidden, weight, "tiled")
    found = torch.func.grad(objective, argnums=(0, 1))(hidden, weight, "reference")
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    objective(*leaves, "tiled").backward()
    for given, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(given, leaf.grad)


def test_vmap_is_refused_with_one_line() -> None:
    hidden, weight, labels = normal(3, 6, D, seed=1), normal(V, D, seed=2), random_labels(6, V)
    with pytest.raises(
        BackendError, match=r"linear_logps does not run under vmap; .*: pass hidden \(\.\.\., D\)"
    ) as refusal:
        torch.vmap(lambda h: linear_logps(h, weight, labels, backend="tiled"))(hidden)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["frozen", "trainable", "LoRA on a frozen head"])
def test_a_penalty_on_the_gradient_is_refused_not_taken_for_a_constant(name: str) -> None:
    model = Model(**MODELS[name])
    tokens, labels, g = batch(2, 5)
    grads = torch.autograd.grad((model(tokens, labels) * g).sum(), model.layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r'differentiable once.*use backend="reference"'):
        grads[0].square().sum().backward()


def test_the_definition_has_second_derivatives() -> None:
    """As the refusal says."""
    hidden = normal(4, 3, seed=1).double().requires_grad_()
    weight, labels = normal(7, 3, seed=2).double(), random_labels(4, 7)
    assert torch.autograd.gradgradcheck(lambda h: linear_logps(h, weight, labels, backend="reference"), hidden)


@pytest.fixture(scope="module")
def found_by_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, ranks.Found]]:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests"))
        return ranks.run(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("way", ranks.WAYS)
def test_over_two_ranks_a_gradient_is_the_mean_over_them(
    way: str, found_by_ranks: list[dict[str, ranks.Found]]
) -> None:
    alone = [ranks.alone(rank) for rank in range(ranks.RANKS)]
    for found, by_itself in zip(found_by_ranks, alone, strict=True):
        torch.testing.assert_close(found[way]["logps"], by_itself["logps"])
        for name in ("layer", "head"):
            if name in found[way]:
                mean = torch.stack([one[name] for one in alone]).mean(0)
                assert (alone[0][name] - mean).abs().max() > 1e-2  # ranks differ, or this would prove nothing
                torch.testing.assert_close(found[way][name], mean)


def test_a_sharded_weight_leaves_each_rank_its_own_gradient_of_hidden(
    found_by_ranks: list[dict[str, ranks.Found]],
) -> None:
    for rank, found in enumerate(found_by_ranks):
        ours = found["sharded weight"]
        torch.testing.assert_close(ours["frozen logps"], ranks.alone(rank)["logps"])
        torch.testing.assert_close(ours["frozen hidden"], ours["hidden"])
        inputs, labels, g = ranks.rows_of(rank)
        model = ranks.Model()
        hidden = torch.tanh(model.layer(inputs)).detach().requires_grad_()
        z = hidden @ model.head.weight.T
        z.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1).backward(g)
        torch.testing.assert_close(ours["hidden"], hidden.grad, rtol=1e-4, atol=1e-5)
