"""Does the operator behave as promised where only a card can tell: repeats, graphs, compiled models, memory?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dpo_engine.ops import linear_logps
from support.devices import DEVICE, ON_CUDA, captured, peak_bytes, possible_backends

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
MIB = 2**20
PATHS = ("no gradient", "frozen", "trainable")
TILED = [name for name in possible_backends() if name != "reference"]
# What promises the same bits whatever rows stand beside a row.
ROWWISE = [name for name in TILED if name != "tiled" or not ON_CUDA]
# (N, D, V) for races: many programs in flight at once. For memory: the shape of an 8B model's head.
BUSY = (4096, 512, 32768) if ON_CUDA else (48, 16, 500)
HEAD_8B = (8192, 4096, 128256) if ON_CUDA else (2048, 16, 9000)
REPEATS = 250 if ON_CUDA else 3
# float32 on the CPU, where bfloat16 may be emulated
DTYPE = BF16 if ON_CUDA else torch.float32


def inputs(n: int, d: int, v: int, path: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(hidden, weight, labels, upstream)`; logits of standard deviation 4."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, device=DEVICE).to(DTYPE).requires_grad_(path != "no gradient")
    weight = torch.randn(v, d, generator=generator, device=DEVICE).mul_(4 * d**-0.5).to(DTYPE)
    labels = torch.randint(v, (n,), generator=generator, device=DEVICE)
    upstream = torch.randn(n, generator=generator, device=DEVICE)
    upstream[1::3] = 0
    return hidden, weight.requires_grad_(path == "trainable"), labels, upstream


def results(
    hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, backend: str, **options: object
) -> tuple[Tensor, ...]:
    """Log-probs, and the gradients of what takes one."""
    logps = linear_logps(hidden, weight, labels, backend=backend, ignore_index=None, **options)
    wanted = [t for t in (hidden, weight) if t.requires_grad]
    grads = torch.autograd.grad(logps, wanted, upstream) if wanted else ()
    return (logps.detach(), *grads)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("backend", TILED)
def test_the_same_call_gives_the_same_bits_every_time(backend: str, path: str) -> None:
    """A race shows as a bit that moves."""
    given = inputs(*BUSY, path)
    first = results(*given, backend)
    moved = torch.zeros(len(first), dtype=torch.int64, device=DEVICE)
    for _ in range(REPEATS):
        again = results(*given, backend)
        moved += torch.stack([(a != b).any() for a, b in zip(first, again, strict=True)])
    assert moved.tolist() == [0] * len(first), f"repeats of {REPEATS} in which logps, gradients differed"


@pytest.mark.parametrize("backend", ROWWISE)
def test_a_row_has_the_same_bits_in_any_order_and_company(backend: str) -> None:
    hidden, weight, labels, upstream = inputs(*BUSY, "no gradient")
    (whole,) = results(hidden, weight, labels, upstream, backend)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    (shuffled,) = results(hidden[order], weight, labels[order], upstream, backend)
    assert torch.equal(shuffled, whole[order])
    for rows in (slice(0, 1), slice(5, 22), slice(7, 40), slice(0, len(labels) // 2)):
        (part,) = results(hidden[rows], weight, labels[rows], upstream[rows], backend)
        assert torch.equal(part, whole[rows]), rows


@pytest.mark.parametrize("path", ["no gradient", "frozen"])
@pytest.mark.parametrize("backend", TILED)
def test_a_call_can_be_captured_and_replayed_on_other_inputs(backend: str, path: str) -> None:
    n, d, v = (300, 256, 9000) if ON_CUDA else BUSY
    given = inputs(n, d, v, path)
    replay, static = captured(lambda: results(*given, backend))
    fresh = inputs(n, d, v, path, seed=1) if ON_CUDA else given
    with torch.no_grad():
        for mine, new in zip(given, fresh, strict=True):
            mine.copy_(new.detach().clone())
    replay()
    for one, other in zip(static, results(*fresh, backend), strict=True):
        assert torch.equal(one, other)


def ceiling_cases() -> list[tuple[str, str]]:
    return [(backend, path) for backend in TILED for path in ("no gradient", "frozen")]


@pytest.mark.parametrize("backend,path", ceiling_cases())
def test_memory_stays_below_what_is_promised(backend: str, path: str) -> None:
    """16 MiB without gradients where the kernel stores nothing, 64 MiB with; what backward needs, (N, D), comes on top."""
    hidden, weight, labels, upstream = inputs(*HEAD_8B, path)
    unit = hidden.numel() * hidden.element_size() if path == "frozen" else 0
    ceiling = (16 if path == "no gradient" and backend != "tiled" else 64) * MIB
    call: Callable[[], Tensor] = lambda: linear_logps(hidden, weight, labels, backend=backend, ignore_index=None)  # noqa: E731
    call()  # the library's own workspace
    forward, logps = peak_bytes(call)
    assert forward <= unit + ceiling, f"{forward / MIB:.1f} MiB in forward, {unit / MIB:.1f} of them kept"
    if path == "frozen":
        kept_again, _ = peak_bytes(lambda: torch.autograd.grad(logps, hidden, upstream))
        assert kept_again <= unit + ceiling, f"{kept_again / MIB:.1f} MiB in backward"


class TinyModel(torch.nn.Module):
    """Embedding, one layer, and the operator on top of a head that may be frozen."""

    def __init__(self, backend: str, *, trains: bool) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 32)
        self.layer = torch.nn.Linear(32, 32)
        self.head = torch.nn.Parameter(torch.randn(300, 32) / 4, requires_grad=trains)
        self.backend = backend

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.embedding(tokens)))
        return -linear_logps(hidden, self.head, labels, ignore_index=None, backend=self.backend).mean()


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("backend", TILED)
def test_a_model_compiles_into_one_graph_and_agrees(backend: str, trains: bool) -> None:
    torch.manual_seed(0)
    model = TinyModel(backend, trains=trains).to(DEVICE)
    tokens, labels = torch.randint(50, (3, 20), device=DEVICE), torch.randint(300, (3, 20), device=DEVICE)
    wanted = [p for p in model.parameters() if p.requires_grad]
    torch._dynamo.reset()
    losses, grads = [], []
    for run in (model, torch.compile(model, fullgraph=True)):
        loss = run(tokens, labels)
        losses.append(loss.detach())
        grads.append(torch.autograd.grad(loss, wanted))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
