"""Does `install()` change what it says, and nothing else, and does `uninstall()` give everything back?"""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'dpo-engine[trl]'")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"TRL {trl.__version__} is installed; these tests name places of 1.16", allow_module_level=True)

import dpo_engine.integrations.trl as x  # noqa: E402
from dpo_engine.errors import IntegrationError  # noqa: E402
from dpo_engine.integrations import scoring  # noqa: E402
from dpo_engine.integrations.patches import Patches, Place  # noqa: E402
from dpo_engine.integrations.scored_logits import ScoredLogits  # noqa: E402
from dpo_engine.integrations.scoring import Scope, Scored  # noqa: E402
from dpo_engine.integrations.trl import installing  # noqa: E402
from dpo_engine.integrations.trl.versions import release  # noqa: E402
from support.tiny_models import tiny_model  # noqa: E402

OTHER_RELEASES = (
    "0.19.0",
    "0.24.0",
    "0.26.2",
    "0.28.0",
    "0.29.1",
    "1.0.0",
    "1.5.1",
    "1.8.0",
    "1.13.0",
    "1.14.2",
    "1.15.0",
    "1.16.0",
)


@pytest.fixture(autouse=True)
def trl_as_it_was() -> Iterator[None]:
    x.uninstall()
    yield
    x.uninstall()


def namespaces() -> dict[str, Any]:
    """Every name of every module and class that `install()` may touch, and what stands there."""
    known = release(trl.__version__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in (*(m.place for m in known.methods), *known.log_softmaxes, *known.fused, *known.classes):
            importlib.import_module(place.module)
    found = {}
    for name in sorted(name for name in sys.modules if name.split(".")[0] == "trl"):
        # Lazy modules would import everything when asked for their names.
        for key, value in list(vars(sys.modules[name]).items()):
            found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}.{key}.{attribute}": inner for attribute, inner in vars(value).items()}
    return found


def test_uninstalling_gives_the_very_objects_back() -> None:
    before = namespaces()
    x.install()
    changed = {name for name, value in namespaces().items() if before.get(name) is not value}
    places = installing._patches._before
    assert {str(place) for place, *_ in places} <= changed
    assert len(changed) == len(places), changed - {str(place) for place, *_ in places}
    x.uninstall()
    after = namespaces()
    assert after.keys() == before.keys()
    assert [name for name, value in after.items() if before[name] is not value] == []


def test_installing_twice_is_installing_once() -> None:
    before = trl.trainer.utils._ChunkedLogProbFunction
    assert x.install() is x.install()
    x.uninstall()
    assert trl.trainer.utils._ChunkedLogProbFunction is before
    x.uninstall()


def test_the_context_manager_undoes_what_it_did_and_no_more() -> None:
    before = trl.trainer.utils._ChunkedLogProbFunction
    with pytest.raises(RuntimeError, match="mine"), x.installed() as done:
        assert "DPOTrainer" in str(done) and "GRPOTrainer" in str(done)
        assert trl.trainer.utils._ChunkedLogProbFunction is not before
        raise RuntimeError("mine")
    assert trl.trainer.utils._ChunkedLogProbFunction is before
    x.install()
    with x.installed():
        pass
    assert trl.trainer.utils._ChunkedLogProbFunction is not before


@pytest.mark.parametrize("version", ["0.18.2", "0.30.0", "1.17.0", "2.0.0", "1.16.0.dev0", "1.17.0rc1", "main", ""])
def test_an_unknown_release_is_refused_and_nothing_changes(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = namespaces()
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(IntegrationError, match=r"is not known; expected 0\.19 to 0\.29 and 1\.0 to 1\.16"):
        x.install()
    monkeypatch.undo()
    assert [name for name, value in namespaces().items() if before[name] is not value] == []


@pytest.mark.parametrize("version", OTHER_RELEASES)
def test_every_known_release_has_places_for_the_trainers_it_names(version: str) -> None:
    known = release(version)
    assert {"DPO", "KTO", "CPO", "ORPO"} <= set(known.trainers())
    places = [m.place for m in known.methods] + list(known.log_softmaxes) + list(known.fused)
    assert len(places) == len(set(places))


def test_a_missing_name_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = namespaces()
    monkeypatch.delattr(trl.trainer.utils, "_use_triton")
    with pytest.raises(IntegrationError, match=r"_use_triton is not there .*nothing was changed"):
        x.install()
    monkeypatch.undo()
    assert [name for name, value in namespaces().items() if before[name] is not value] == []


def test_a_trainer_that_another_package_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpo = importlib.import_module("trl.experimental.cpo.cpo_trainer")

    def theirs(self: Any, model: Any, batch: Any) -> None: ...

    theirs.__module__ = "unsloth.models.rl"
    monkeypatch.setattr(cpo.CPOTrainer, "concatenated_forward", theirs)
    with pytest.raises(IntegrationError, match=r"was replaced by unsloth\.models\.rl"):
        x.install()


def test_a_trainers_class_that_another_package_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = type("DPOTrainer", (trl.trainer.dpo_trainer.DPOTrainer,), {"__module__": "unsloth_compiled_cache"})
    monkeypatch.setattr(trl.trainer.dpo_trainer, "DPOTrainer", theirs)
    with pytest.raises(IntegrationError, match=r"DPOTrainer was replaced by unsloth_compiled_cache before"):
        x.install()
    assert not installing.is_installed()


def test_places_are_all_looked_up_before_the_first_is_changed() -> None:
    here = Place("trl.trainer.utils", "flush_left")
    before = here.found()
    with pytest.raises(IntegrationError, match="nowhere"):
        Patches().apply({here: None, Place("trl.trainer.utils", "nowhere"): None})
    assert here.found() is before


def test_it_imports_without_what_the_trainer_needs() -> None:
    others = "peft", "bitsandbytes", "typer", "matplotlib", "liger_kernel", "psutil", "rich"
    code = f"""
import sys
sys.modules |= dict.fromkeys({others})  # each import of these fails as if it were not installed
import dpo_engine.integrations.trl as x
print([name for name in sys.modules if name.startswith("dpo_engine.train") or name == "trl"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# The models' forward while a trainer's method runs.


class Loop:
    """What the tests ask of a model: its logits, within `scoring` or not."""

    def __init__(self, **config: Any) -> None:
        self.model: Any = tiny_model("Llama", **config)
        self.input_ids = torch.randint(
            3, self.model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0)
        )
        self.mask = torch.zeros_like(self.input_ids)
        self.mask[:, 3:] = 1

    def scope(self) -> Scope:
        return Scope(batches=[Scored(input_ids=self.input_ids, mask=self.mask)])

    def logps(self) -> torch.Tensor:
        """(B, L) of the next tokens, by the model's own forward; 0 where none is scored."""
        logits = self.model(input_ids=self.input_ids).logits
        scored = torch.zeros(2, 7)
        found = logits[:, :-1].log_softmax(-1).gather(-1, self.input_ids[:, 1:, None]).squeeze(-1)
        scored[:, :-1] = found * self.mask[:, 1:]
        return scored


@pytest.fixture
def loop() -> Loop:
    return Loop()


def test_a_model_answers_with_log_probs_of_the_scored_tokens_alone(loop: Loop) -> None:
    with scoring.scoring([loop.model], loop.scope()):
        out = loop.model(loop.input_ids, attention_mask=torch.ones_like(loop.input_ids), use_cache=False)
    assert isinstance(out.logits, ScoredLogits) and out.logits.shape == (2, 7, loop.model.config.vocab_size)
    torch.testing.assert_close(out.logits.token_logps, loop.logps(), rtol=1e-5, atol=1e-5)
    assert torch.equal(out.logits.scored[:, :-1], loop.mask[:, 1:].bool()) and not out.logits.scored[:, -1].any()


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("own", ["the class's", "the instance's"])
def test_the_model_has_its_own_forward_afterwards(loop: Loop, own: str, raises: bool) -> None:
    if own == "the instance's":
        loop.model.forward = type(loop.model).forward.__get__(loop.model)
    before = dict(vars(loop.model))
    try:
        with scoring.scoring([loop.model, None, loop.model], loop.scope()):
            assert loop.model.forward != before.get("forward")
            if raises:
                raise KeyError
    except KeyError:
        pass
    assert {k: v for k, v in vars(loop.model).items() if before.get(k) is not v} == {}
    assert vars(loop.model).keys() == before.keys()


def test_columns_cut_off_on_the_right_and_rows_without_padding_are_recognised(loop: Loop) -> None:
    attention = torch.ones_like(loop.input_ids)
    attention[0, 5:] = 0
    batch = Scored(input_ids=loop.input_ids, mask=loop.mask, attention=attention)
    assert torch.equal(scoring._mask_of(batch, loop.input_ids[:, :5].clone()), loop.mask[:, :5])  # type: ignore[arg-type]
    row = loop.input_ids[attention.bool()][None]
    assert torch.equal(scoring._mask_of(batch, row), loop.mask[attention.bool()][None])  # type: ignore[arg-type]
    assert scoring._mask_of(batch, loop.input_ids + 1) is None


def test_a_mask_that_wraps_has_the_last_position_predict_the_first_token(loop: Loop) -> None:
    """TRL until 0.28 rolls its loss mask, and a completion may begin a row that was cut on the left."""
    loop.mask[0, 0] = 1
    batch = Scored(input_ids=loop.input_ids, mask=loop.mask, wraps=True)
    with scoring.scoring([loop.model], Scope(batches=[batch])):
        logits = loop.model(input_ids=loop.input_ids).logits
    assert torch.equal(logits.scored, loop.mask.roll(-1, 1).bool())
    own = loop.model(input_ids=loop.input_ids).logits.log_softmax(-1)
    torch.testing.assert_close(logits.token_logps[0, -1], own[0, -1, loop.input_ids[0, 0]], rtol=1e-5, atol=1e-5)


def test_a_copy_made_while_the_model_is_bound_is_of_its_own(loop: Loop) -> None:
    with scoring.scoring([loop.model], loop.scope()):
        copied = copy.deepcopy(loop.model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert not copied(input_ids=loop.input_ids).logits.any()
    assert loop.model(input_ids=loop.input_ids).logits.any()


def test_tokens_that_no_batch_knows_are_all_scored(loop: Loop) -> None:
    attention = torch.ones_like(loop.input_ids)
    attention[0, 5:] = 0
    with scoring.scoring([loop.model], Scope()):
        out = loop.model(input_ids=loop.input_ids, attention_mask=attention)
    assert torch.equal(out.logits.scored[:, :-1], attention[:, 1:].bool())


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"inputs_embeds": True}, "without input_ids"),
        ({"output_attentions": False, "input_ids": True}, "output_attentions"),
    ],
)
def test_what_the_engine_cannot_answer_goes_to_the_models_own_forward_and_is_said(
    loop: Loop, given: Any, why: str
) -> None:
    scoring._said.clear()
    tokens = {"inputs_embeds": loop.model.get_input_embeddings()(loop.input_ids), "input_ids": loop.input_ids}
    arguments = {name: tokens.get(name, value) for name, value in given.items()}
    own = loop.model(**arguments).logits
    with pytest.warns(UserWarning, match=why), scoring.scoring([loop.model], loop.scope()):
        assert torch.equal(loop.model(**arguments).logits, own)


def test_a_model_whose_logits_are_something_else_keeps_them_and_says_so(loop: Loop) -> None:
    class Shifted(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden).roll(1, -1)

    head = loop.model.lm_head
    loop.model.lm_head = Shifted(head.in_features, head.out_features, bias=False)
    with pytest.warns(UserWarning, match="keeps building its logits"), scoring.scoring([loop.model], loop.scope()):
        assert isinstance(loop.model(input_ids=loop.input_ids).logits, torch.Tensor)


def test_a_model_whose_weights_are_shared_out_keeps_its_logits_and_says_so(loop: Loop, tmp_path: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        sharded = fully_shard(loop.model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.warns(UserWarning, match="weights are shared out"), scoring.scoring([sharded], loop.scope()):
            assert isinstance(sharded(input_ids=loop.input_ids).logits, torch.Tensor)
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel_copies_are_left_to_the_trainer_and_that_is_said(loop: Loop) -> None:
    scoring.forget()
    wrapped = nn.DataParallel(loop.model)
    with pytest.warns(UserWarning, match="DataParallel"), scoring.scoring([wrapped, loop.model], loop.scope()):
        assert isinstance(wrapped(input_ids=loop.input_ids).logits, torch.Tensor)


@pytest.mark.parametrize("prepared", [True, False])
def test_a_model_runs_under_autocast_only_if_its_own_forward_would(loop: Loop, prepared: bool) -> None:
    """TRL precomputes a reference before accelerate prepares the model: in float32, whatever the run's precision."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    expected = loop.logps()
    AcceleratorState._reset_state(True)
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        model = accelerator.prepare(loop.model) if prepared else loop.model
        scope = loop.scope()
        scope.autocast = accelerator.autocast
        with scoring.scoring([model], scope):
            found = model(input_ids=loop.input_ids).logits.token_logps
    finally:
        AcceleratorState._reset_state(True)
    error = (found - expected).abs().max()
    assert 1e-4 < error < 0.5 if prepared else error < 1e-5


def test_a_model_that_was_refused_is_asked_again_after_a_new_installation(loop: Loop) -> None:
    x.install()
    scoring._agreed[loop.model] = id(loop.model.lm_head), "of another head"
    with pytest.warns(UserWarning, match="of another head"), scoring.scoring([loop.model], loop.scope()):
        assert isinstance(loop.model(input_ids=loop.input_ids).logits, torch.Tensor)
    x.uninstall()
    with scoring.scoring([loop.model], loop.scope()):
        assert isinstance(loop.model(input_ids=loop.input_ids).logits, ScoredLogits)


def test_what_someone_put_on_top_goes_too_and_that_is_said() -> None:
    before = trl.trainer.utils._ChunkedLogProbFunction
    x.install()
    trl.trainer.utils._ChunkedLogProbFunction = "theirs"
    with pytest.warns(UserWarning, match="_ChunkedLogProbFunction was changed by another since"):
        x.uninstall()
    assert trl.trainer.utils._ChunkedLogProbFunction is before


def test_ddp_that_looks_for_unused_parameters_finds_all_that_were_used(loop: Loop, tmp_path: Any) -> None:
    """It looks through the output for tensors that take a gradient; what it does not find it takes to be unused."""
    unused = nn.Linear(2, 2)
    loop.model.unused = unused
    weights = torch.linspace(-1, 2, loop.mask.numel()).view(loop.mask.shape)
    (loop.logps() * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in loop.model.named_parameters() if p.grad is not None}
    loop.model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(loop.model, find_unused_parameters=True)
        for _ in range(2):  # a second step fails where the first was not reduced
            loop.model.zero_grad()
            with scoring.scoring([wrapped], loop.scope()):
                out = wrapped(input_ids=loop.input_ids)
            (out["logits"].token_logps * weights).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(loop.model.named_parameters())[name].grad, gradient, rtol=1e-4, atol=1e-6)
