"""Do TRL's trainers do the same with `dpo_engine.integrations.trl` as without, release by release, and what does it save?

    make integrations                 every release; `make integrations TRL=1.16` one
    python -m benchmarks.integrations --only 1.16 --cases dpo kto     some cases
    python -m benchmarks.integrations --real 0                        equality alone; by default what is saved is measured too
    python -m benchmarks.integrations --table                         writes the newest results into docs/trl.md

Each release has an environment of its own (`releases.py`). Equality: all cases of a release on tiny random models,
in one process without the integration and one with it, compared by `compare.py`. What is saved: SmolLM2-135M in
float32 with LoRA, every run in a fresh process, without and with in turn. Exits with 1 where anything differs or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, OverLimit, describe_machine, last_json, quantile, run_watched, table, write_results
from benchmarks.integrations import recipes as integrations_recipes
from benchmarks.integrations.releases import RECIPES, RELEASES, engine_folder, environment
from benchmarks.integrations.table import write_page

SIDES = ("without", "with")
STEPS, BATCH = 10, 4
REAL_CASE, REAL_STEPS, REAL_BATCH, REAL_LENGTH, PAIRS_A_ROW = "dpo", 4, 2, 512, 6
Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parsed(arguments)
    if asked.table:
        print(f"written: {write_page()}")
        return 0
    engine = engine_folder()
    machine = describe_machine()
    records: list[Record] = []
    for release in asked.only or list(RELEASES):
        python = environment(release)
        runner = Runner(release, python, engine, threads=asked.threads)
        if release in RECIPES:
            records += runner.recipes(release, asked.cases)
        else:
            records += runner.equality(asked.cases)
            if asked.real and (not asked.cases or REAL_CASE in asked.cases):
                records += runner.cost(rounds=asked.real)
        _print([record for record in records if record["release"] == release])
    if asked.save:
        print(f"kept: {write_results('integrations', records, machine=machine).relative_to(ROOT)}")
    failed = [record for record in records if record["status"] not in ("equal", "measured")]
    for record in failed:
        for line in record["why"]:
            print(f"TRL {record['release']}, {record['case']}: {line}", file=sys.stderr)
    return 1 if failed else 0


class Runner:
    """One release's runs."""

    def __init__(self, release: str, python: Path, engine: Path, *, threads: int) -> None:
        self.release, self.python, self.engine, self.threads = release, python, engine, threads
        self.env = {"PYTHONPATH": str(engine), "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}

    def equality(self, wanted: Sequence[str] | None) -> list[Record]:
        """A record a case: equal, differs or failed."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            cases = [case for case in self._cases() if not wanted or case in wanted]
            failed: dict[str, str] = {}
            for side in SIDES:
                failed.update(self._train_all(cases, side, folder))
            return [
                self._failed("equality", case, failed[case]) if case in failed else self._compared(case, folder)
                for case in cases
            ]

    def cost(self, rounds: int) -> list[Record]:
        """A record a side of each round, without and with in turn, each in a process of its own."""
        model, rows, what = _real_input()
        records = []
        for number in range(rounds):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                with tempfile.TemporaryDirectory() as name:
                    one = {"case": REAL_CASE, "engine": side == "with", "steps": REAL_STEPS, "batch": REAL_BATCH}
                    one |= {"model_path": model, "rows": rows, "max_length": REAL_LENGTH}
                    one["outcome"] = f"{name}/outcome.pt"
                    try:
                        done = self._run({"runs": [one], "witness": False}, Path(name))
                    except (RuntimeError, OverLimit) as error:
                        records.append(self._failed("cost", REAL_CASE, str(error)) | {"side": side, "round": number})
                        continue
                records.append(
                    {
                        **self._common("cost", REAL_CASE, "measured"),
                        **{key: done[key] for key in ("losses", "step_seconds", "before_mb", "peak_mb", "packages")},
                        "side": side,
                        "round": number,
                        "model": what,
                        "steps": REAL_STEPS,
                        "batch": REAL_BATCH,
                        "max_length": REAL_LENGTH,
                    }
                )
        return records

    def recipes(self, tool: str, wanted: Sequence[str] | None) -> list[Record]:
        """A record a case of LLaMA-Factory or Axolotl, by its own command."""
        records = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            integrations_recipes.make_inputs(self.python, folder, self.engine, self.env)
            for case in integrations_recipes.CASES[tool]:
                if wanted and case not in wanted:
                    continue
                set_up = {"python": self.python, "folder": folder, "env": self.env}
                try:
                    logs = [integrations_recipes.train(tool, case, engine=side == "with", **set_up) for side in SIDES]
                except (RuntimeError, OverLimit) as error:
                    records.append(self._failed("recipe", case, str(error)))
                    continue
                differ = integrations_recipes.differences(tool, *logs)
                records.append({**self._common("recipe", case, "differs" if differ else "equal"), "why": differ})
                records[-1]["steps"] = integrations_recipes.STEPS
        return records

    def _cases(self) -> list[str]:
        """Those of the release, asked of its own Python: the table of cases imports torch, and this process does not."""
        code = "import sys, json, benchmarks.integrations.case as c; print(json.dumps({k: v.releases for k, v in c.CASES.items()}))"
        command = [str(self.python), "-c", code]
        said = run_watched(command, cwd=self.engine, env=self.env).stdout
        return [case for case, releases in json.loads(said).items() if self.release in releases]

    def _train_all(self, cases: Sequence[str], side: str, folder: Path) -> dict[str, str]:
        """Outcomes as files; returns why, of those cases that failed. What comes after one that did is run in a new process."""
        failed: dict[str, str] = {}
        left = list(cases)
        while left:
            runs = [
                {
                    "case": case,
                    "engine": side == "with",
                    "steps": STEPS,
                    "batch": BATCH,
                    "outcome": str(self._outcome(case, side, folder)),
                }
                for case in left
            ]
            try:
                self._run({"runs": runs, "witness": True}, folder)
                return failed
            except (RuntimeError, OverLimit) as error:
                stopped = next((case for case in left if not self._outcome(case, side, folder).exists()), left[-1])
                failed[stopped] = f"{side} the integration: {error}"
                left = left[left.index(stopped) + 1 :]
        return failed

    def _compared(self, case: str, folder: Path) -> Record:
        files = [str(self._outcome(case, side, folder)) for side in SIDES]
        command = [str(self.python), "-m", "benchmarks.integrations.compare", *files]
        found = last_json(run_watched(command, cwd=self.engine, env=self.env).stdout)
        record = self._common("equality", case, "differs" if found["differs"] else "equal")
        return {**record, "why": found["differs"], "worst": found["worst"]}

    def _run(self, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
        path = folder / "spec.json"
        path.write_text(json.dumps({**spec, "threads": self.threads}), encoding="utf-8")
        command = [str(self.python), "-m", "benchmarks.integrations.case", str(path)]
        return last_json(run_watched(command, env=self.env, limit_s=1800, cwd=self.engine).stdout)

    def _outcome(self, case: str, side: str, folder: Path) -> Path:
        return folder / f"{case}-{side}.pt"

    def _common(self, kind: str, case: str, status: str) -> Record:
        return {"kind": kind, "release": self.release, "case": case, "status": status, "steps": STEPS}

    def _failed(self, kind: str, case: str, why: str) -> Record:
        return {**self._common(kind, case, "failed"), "why": why.splitlines()[-6:]}


def _real_input() -> tuple[str, list[dict[str, str]], str]:
    """The demo's model and its pairs, six to a row."""
    from dpo_engine.model.smollm2 import smollm2_folder

    source = ROOT / "examples" / "concise_train.jsonl"
    pairs = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    return str(smollm2_folder()), _in_groups(pairs), "SmolLM2-135M-Instruct"


def _in_groups(pairs: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Short pairs, several to a row, so that a row is as long as real ones are."""

    def numbered(group: Sequence[dict[str, str]], key: str) -> str:
        return "\n".join(f"{number}. {pair[key]}" for number, pair in enumerate(group, 1))

    groups = [pairs[start : start + PAIRS_A_ROW] for start in range(0, len(pairs) - PAIRS_A_ROW + 1, PAIRS_A_ROW)]
    return [
        {
            "prompt": f"Answer each of these questions.\n{numbered(group, 'prompt')}\n\nAnswers:\n",
            "chosen": numbered(group, "chosen"),
            "rejected": numbered(group, "rejected"),
        }
        for group in groups
    ]


def _print(records: Sequence[Record]) -> None:
    rows = []
    for record in records:
        if record["kind"] == "recipe":
            rows.append([record["release"], record["case"], record["status"], " ".join(record["why"])[:100]])
        elif record["kind"] == "equality":
            worst = ", ".join(f"{kind} {share:.2g}" for kind, (share, _) in record.get("worst", {}).items())
            rows.append([record["release"], record["case"], record["status"], worst or record["why"][-1][:100]])
        elif record["status"] == "measured":
            seconds = quantile(record["step_seconds"], 0.5)
            said = f"{seconds:.2f} s a step, {record['peak_mb']:.0f} MB at most"
            rows.append([record["release"], f"{record['case']}, SmolLM2, {record['side']}", "measured", said])
    print(table(["TRL", "case", "status", "largest error as a share of what is allowed"], rows), flush=True)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(RELEASES), help="releases; default: all")
    parser.add_argument("--cases", nargs="+", help="cases; default: all that a release has")
    parser.add_argument("--real", type=int, default=1, metavar="ROUNDS", help="rounds on a real model; 0: none")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no_save", dest="save", action="store_false", help="print only")
    parser.add_argument(
        "--table", action="store_true", help="write the newest results into docs/trl.md, and run nothing"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
