"""How much reward does a method get for how much KL? DPO and PPO, with a learned and with the true reward, and the exact frontier.

    python -m benchmarks.frontier                       all of it: 3 seeds, under 15 minutes on two cores
    python -m benchmarks.frontier --seeds 0 --no_save   a look

`world.py` says what is asked, `train.py` how it is trained. A point is a policy, along its training or at
its end: KL(pi || ref) and E_pi[r], sums over all 1555 responses to each of the prompts; neither is sampled. The frontier is
that of pi* = ref * exp(r / beta) / Z over all beta: no policy has more reward at its KL.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.harness import describe_machine, table, write_results

METHODS = {"dpo": "DPO", "ppo_learned": "PPO, learned reward", "ppo_true": "PPO, true reward"}
_PPO_BETAS = (0.1, 0.3, 0.6, 1.0, 3.0)
BETAS = {"dpo": (0.03, 0.1, 0.3, 1.0, 3.0), "ppo_learned": _PPO_BETAS, "ppo_true": _PPO_BETAS}
KLS = (0.3, 0.9, 2.0, 4.0)  # where the methods are compared
Record = dict[str, Any]
_known: dict[str, Any] = {}  # in a worker: the world and the settings, which all jobs share


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    import torch

    from benchmarks.frontier.train import Settings
    from benchmarks.frontier.world import make_space, make_world

    torch.set_num_threads(1)
    machine = describe_machine()
    begin = time.perf_counter()
    space = make_space(prompts=args.prompts, longest=args.longest)
    world = make_world(args.world, space, pretrain_steps=args.pretrain_steps)
    settings = Settings(epochs=args.epochs, rollouts=args.rollouts)
    frontier = world.frontier()
    jobs = []
    for seed in args.seeds:
        jobs += [("ppo_learned", BETAS["ppo_learned"], seed, args.pairs)]  # of one reward model
        jobs += [(method, (beta,), seed, args.pairs) for method in ("dpo", "ppo_true") for beta in BETAS[method]]
    records, left_out = [], []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, context, initializer=_remember, initargs=(world, settings)) as pool:
        running = {pool.submit(run_job, job): job for job in jobs}
        for future in as_completed(running):
            if time.perf_counter() - begin > args.limit_s:
                left_out = [running[other][:3] for other in running if other.cancel()]
            if not future.cancelled():
                records += _said(future.result(), frontier)
    seconds = time.perf_counter() - begin
    shares = compared(records, frontier)
    print(shown(shares))
    if left_out:
        print(f"left out, for want of time: {left_out}")
    print(f"{len(records)} points in {seconds:.0f} s, {args.processes} processes of one thread")
    if not args.no_save:
        common = {
            "world": args.world,
            "prompts": len(space.prompts),
            "responses": len(space.responses),
            "parameters": sum(parameter.numel() for parameter in world.reference.parameters()),
            "pairs": args.pairs,
            "settings": vars(settings),
            "processes": args.processes,
            "left_out": left_out,
            "seconds_in_all": round(seconds),
            "load_after": round(os.getloadavg()[0], 2),
        }
        rows: list[Record] = [{"what": "frontier", "kl": kl, "reward": reward} for kl, reward in frontier[::8]]
        rows += [{"what": "point", **record} for record in records] + [{"what": "share", **share} for share in shares]
        path = write_results("frontier", [{**common, **row} for row in rows], machine=machine)
        draw(records, frontier, path.with_suffix(".png"))
        print(f"written to {path} and {path.with_suffix('.png').name}")
    return 0


def run_job(job: tuple[str, Sequence[float], int, int]) -> list[Record]:
    """Some betas of one method with one seed, which the pairs, their labels, their order and PPO's samples come from."""
    import torch

    from benchmarks.frontier.train import train_dpo, train_ppo, train_reward_model
    from benchmarks.frontier.world import sample_pairs

    torch.set_num_threads(1)
    method, betas, seed, count = job
    world, settings = _known["world"], _known["settings"]
    pairs = sample_pairs(world, count, seed)
    reward, reward_seconds = world.reward, 0.0
    if method == "ppo_learned":
        begin = time.perf_counter()
        reward = train_reward_model(world, pairs, seed, settings)
        reward_seconds = time.perf_counter() - begin
    records = []
    for beta in betas:
        begin, cpu_begin = time.perf_counter(), time.process_time()
        if method == "dpo":
            run = train_dpo(world, pairs, beta, seed, settings)
        else:
            run = train_ppo(world, reward, beta, seed, settings)
        points = [(updates, *world.place(logps)) for updates, logps in run]
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
        for updates, kl, gained in points:
            records.append(
                {
                    "method": method,
                    "beta": beta,
                    "seed": seed,
                    "updates": updates,
                    "is_last": updates == points[-1][0],
                    "kl": round(kl, 5),
                    "reward": round(gained, 5),
                    "seconds": round(seconds, 1),
                    "cpu_seconds": round(cpu_seconds, 1),
                    "reward_model_seconds": round(reward_seconds, 1),
                }
            )
        if method == "ppo_learned":  # what PPO could reach at best with that reward model
            kl, gained = world.place(world.optimum(beta, reward))
            records[-1] |= {"kl_of_optimum": round(kl, 5), "reward_of_optimum": round(gained, 5)}
    return records


def compared(records: Iterable[Record], frontier: Sequence[tuple[float, float]]) -> list[Record]:
    """The share of the frontier's reward that each method has at each of `KLS`, by seed.

    A method's reward at a KL is that of the upper concave hull of its points with that seed and of the reference, (0, 0): a mixture
    of two policies has the mean of their rewards, and at most the mean of their KLs. None beyond its largest KL.
    """
    records = list(records)
    found = []
    for method in METHODS:
        for kl in KLS:
            by_seed = []
            for seed in sorted({record["seed"] for record in records}):
                points = [(r["kl"], r["reward"]) for r in records if r["method"] == method and r["seed"] == seed]
                by_seed.append(at(kl, hull(points)))
            known = [reward / reward_at(kl, frontier) for reward in by_seed if reward is not None]
            found.append({"method": method, "at_kl": kl, "shares": [round(share, 4) for share in known]})
    return found


def hull(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the upper concave hull of points and (0, 0), by ascending KL, as far as the most reward."""
    corners: list[tuple[float, float]] = []
    for x, y in sorted({(0.0, 0.0), *points}):
        while len(corners) > 1 and _turn(corners[-2], corners[-1], (x, y)) >= 0:
            corners.pop()
        corners.append((x, y))
    best = max(range(len(corners)), key=lambda index: corners[index][1])
    return corners[: best + 1]


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    """Above 0 where a, b, c turn to the left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def at(kl: float, line: Sequence[tuple[float, float]]) -> float | None:
    """A line's height at `kl`, straight between its points; None where it has ended."""
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        if x0 <= kl <= x1:
            return y0 + (y1 - y0) * (kl - x0) / (x1 - x0)
    return None


def reward_at(kl: float, frontier: Sequence[tuple[float, float]]) -> float:
    """The frontier's reward at a KL; beyond its last point, where pi* is greedy, that point's."""
    found = at(kl, [(0.0, 0.0), *frontier])
    return frontier[-1][1] if found is None else found


def shown(shares: Sequence[Record]) -> str:
    """A table: mean over seeds, and their least and most."""
    rows = []
    for method, name in METHODS.items():
        cells = []
        for kl in KLS:
            (of,) = [s["shares"] for s in shares if s["method"] == method and s["at_kl"] == kl]
            cells.append(f"{statistics.mean(of):.3f} ({min(of):.3f}-{max(of):.3f})" if of else "not reached")
        rows.append([name, *cells])
    return table(["share of the frontier's reward", *[f"KL {kl:g}" for kl in KLS]], rows)


def draw(records: Sequence[Record], frontier: Sequence[tuple[float, float]], path: Path) -> None:
    """Points and frontier as a PNG: ends of training large, what lies before them small."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(
        [kl for kl, _ in frontier],
        [reward for _, reward in frontier],
        color="black",
        linewidth=1.5,
        label="exact frontier: ref · exp(r/β) / Z",
    )
    looks = {"dpo": ("#0b5cad", "o"), "ppo_learned": ("#d1610a", "s"), "ppo_true": ("#3a8f3a", "^")}
    for method, (colour, marker) in looks.items():
        for is_last, size, alpha in ((False, 12, 0.4), (True, 46, 0.9)):
            points = [r for r in records if r["method"] == method and r["is_last"] is is_last]
            axes.scatter(
                [point["kl"] for point in points],
                [point["reward"] for point in points],
                s=size,
                color=colour,
                marker=marker,
                alpha=alpha,
                linewidths=0,
                label=METHODS[method] if is_last else None,
            )
    largest = max([frontier[-1][0], *[record["kl"] for record in records]])
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks([0, 0.5, 1, 2, 5, 10, 20], ["0", "0.5", "1", "2", "5", "10", "20"])
    axes.set_xlim(0, largest * 1.05)
    axes.set_ylim(0)
    axes.set_xlabel("KL(policy || reference), nats (linear up to 1, logarithmic beyond)")
    axes.set_ylabel("expected true reward, standard deviations under the reference")
    axes.set_title("Large: the end of a run; small: along the way", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(path, dpi=150)


def _remember(world: Any, settings: Any) -> None:
    _known.update(world=world, settings=settings)


def _said(found: list[Record], frontier: Sequence[tuple[float, float]]) -> list[Record]:
    """The same, after a line on each run's end."""
    for record in found:
        if record["is_last"]:
            share = record["reward"] / reward_at(record["kl"], frontier)
            print(
                f"{METHODS[record['method']]:20} beta {record['beta']:<5g} seed {record['seed']}: KL {record['kl']:6.3f}, reward "
                f"{record['reward']:6.3f}, {share:.3f} of the frontier's, {record['seconds']:.0f} s",
                flush=True,
            )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--world", type=int, default=0, help="seed of the reference model and of the true reward")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--longest", type=int, default=4, help="letters of a response; 4 make 1555 responses")
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--pretrain_steps", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=5, help="over the pairs, of DPO and of the reward model")
    parser.add_argument("--rollouts", type=int, default=60, help="times that PPO samples")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--limit_s", type=float, default=840, help="no run is begun after this; it is said which are left out"
    )
    parser.add_argument("--no_save", action="store_true", help="print only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
