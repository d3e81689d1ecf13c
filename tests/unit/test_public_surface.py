"""Which names may users rely on? A change here is a change of the public surface: say so in CHANGELOG.md."""

from __future__ import annotations

import inspect
import re

import pytest

import dpo_engine
from support.imports import ROOT

PUBLIC = [
    "DPOConfig",
    "DPOTrainer",
    "FusedLinearDPOLoss",
    "PreferenceForest",
    "ReferenceCache",
    "Tree",
    "build_forest",
    "dpo_loss",
    "forest_token_logps",
    "linear_kl",
    "linear_logps",
    "linear_logps_head",
    "linear_preference_loss",
    "prepare_model",
    "remove_linear_logps_head",
]

# Parameters with their defaults, as a caller sees them. Adding one at the end, with a default, breaks nobody.
SIGNATURES = {
    "build_forest": "(trees, layout='shared')",
    "forest_token_logps": "(model, forest)",
    "prepare_model": "(model, share_prompt='auto')",
    "linear_logps_head": "(model, *, extras=(), backend='auto')",
    "remove_linear_logps_head": "(model)",
    "FusedLinearDPOLoss": (
        "(ignore_index=-100, beta=0.1, alpha=1.0, compute_nll_loss=False, compiled=True, use_ref_model=True, "
        "average_log_prob=False, chunk_size=1, loss_type='sigmoid', label_smoothing=0.0, discopop_tau=0.05, *, "
        "logit_scale=1.0, softcap=None, backend='auto', **parameters)"
    ),
    "linear_logps": (
        "(hidden, weight, labels, bias=None, logit_scale=1.0, softcap=None, ignore_index=-100, backend='auto', *, "
        "temperature=1.0, lora=None, extras=())"
    ),
    "linear_preference_loss": (
        "(hidden, weight, labels, lengths, loss, reference_chosen_logps=None, reference_rejected_logps=None, *, "
        "bias=None, logit_scale=1.0, softcap=None, temperature=1.0, tile_budget=536870912, backend='auto', "
        "with_logps=False)"
    ),
    "linear_kl": (
        "(hidden, weight, labels, reference_hidden, reference_weight, *, bias=None, reference_bias=None, "
        "logit_scale=1.0, softcap=None, temperature=1.0, ignore_index=-100)"
    ),
    "dpo_loss": (
        "(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, "
        "beta, label_smoothing=0.0)"
    ),
}


def test_the_public_names_are_these() -> None:
    assert sorted(dpo_engine.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_found_where_it_is_defined(name: str) -> None:
    value = getattr(dpo_engine, name)
    assert value.__name__ == name
    assert value.__module__.startswith("dpo_engine.")
    assert value.__doc__, f"{name} has no docstring"


def test_dir_and_star_import_show_the_public_names() -> None:
    assert set(PUBLIC) <= set(dir(dpo_engine))
    names: dict[str, object] = {}
    exec("from dpo_engine import *", names)
    assert set(PUBLIC) <= set(names)


def test_an_unknown_name_is_refused_with_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'DPOTrainr'.*DPOTrainer"):
        dpo_engine.DPOTrainr  # noqa: B018
    assert not hasattr(dpo_engine, "__path_that_is_not_there__")


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_as_promised(name: str) -> None:
    signature = inspect.signature(getattr(dpo_engine, name))
    bare = [entry.replace(annotation=entry.empty) for entry in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_the_version_is_a_semantic_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", dpo_engine.__version__)


def test_the_changelog_has_a_place_for_what_is_next() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert len(headings) == len(set(headings))


def test_type_checkers_see_the_annotations() -> None:
    assert (ROOT / "dpo_engine" / "py.typed").is_file()
