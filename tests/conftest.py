"""What every test starts from.

A cache folder of the tests' own, so that no test finds what a person's runs left, or leaves it; one thread where several
processes share the tests; and a garbage collector that leaves imported modules alone.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

import pytest
import torch

from dpo_engine.ops.choice import cache_folder

LONG_FILES = (
    "test_triton_kernels.py",
    "test_trainer_ranks.py",
    "test_memory_traced.py",
    "test_linear_logps_triton.py",
    "test_triton_aot.py",
    "test_qlora_real_model.py",
    "test_trl_matrix.py",
    "test_silent_failures.py",
    "test_forest_attention.py",
    "test_packaging.py",
    "test_token_logps_ranks.py",
    "test_cli_train.py",
    "test_odd_models.py",
    "test_adapters_continued.py",
    "test_cli_cache.py",
    "test_forest_models_saved.py",
)


def pytest_configure() -> None:
    """In a worker of pytest-xdist, one thread for torch and for every process that a test starts.

    The other workers keep the other cores busy. Two threads each would wait for one another, and what tests compute is
    too small to gain from a second one.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files go out first: one that is begun last leaves the other workers idle."""
    order = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


_modules_left_alone = 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Whoever asks for a garbage collection looks at what tests made, not at a million objects of imported modules.

    transformers' trainer asks after every run, and that takes longer than a run of a tiny model.
    """
    global _modules_left_alone
    if len(sys.modules) > _modules_left_alone + 50:
        gc.unfreeze()  # what was in use the last time may be garbage by now
        gc.collect()
        gc.freeze()
        _modules_left_alone = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`DPO_ENGINE_CACHE` of this session; converted models, which take minutes to make, are those of the real folder."""
    before = os.environ.get("DPO_ENGINE_CACHE")
    folder, models = tmp_path_factory.mktemp("cache"), cache_folder() / "models"
    models.mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to(models, target_is_directory=True)
    os.environ["DPO_ENGINE_CACHE"] = str(folder)
    yield
    if before is None:
        del os.environ["DPO_ENGINE_CACHE"]
    else:
        os.environ["DPO_ENGINE_CACHE"] = before
