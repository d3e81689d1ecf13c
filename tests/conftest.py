"""What every test starts from: a cache folder of the tests' own, so that no test finds what a person's runs left, or leaves it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from dpo_engine.ops.choice import cache_folder


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
