"""Do YAML and flags give the same typed, checked configuration, and is everything else refused in one line?"""

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from dpo_engine.cli.options import parse
from dpo_engine.errors import ConfigError
from dpo_engine.train.run import TrainConfig

BASE = ["--model", "m", "--data", "d.jsonl", "--output_dir", "out"]


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_yaml_and_flags_name_the_same_keys_and_flags_win(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "model: m\ndata: d.jsonl\noutput_dir: out\nbeta: 0.3\nmax_steps: 7\nlora_target_modules: [q_proj, v_proj]\n",
    )
    config = parse(TrainConfig, [file, "--beta", "0.5", "--seed=3"])
    assert (config.beta, config.max_steps, config.seed) == (0.5, 7, 3)
    assert config.lora_target_modules == ["q_proj", "v_proj"]


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    file = write(tmp_path, "model: m\ndata: d.jsonl\noutput_dir: out\nlearning_rate: 5e-6\nskip_bad_rows: no\n")
    config = parse(TrainConfig, [file])
    assert config.learning_rate == 5e-6 and config.skip_bad_rows is False


def test_a_bare_flag_is_true_and_none_is_none() -> None:
    config = parse(TrainConfig, [*BASE, "--skip-bad-rows", "--max_length", "none"])
    assert config.skip_bad_rows is True and config.max_length is None


@pytest.mark.parametrize("name", ["bfloat16", "bf16"])
def test_both_names_of_bfloat16_turn_it_on(name: str) -> None:
    config = parse(TrainConfig, [*BASE, "--dtype", name])
    assert config.bf16 and not config.fp16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bta", "0.1"], "bta is not an option; did you mean beta"),
        (["--learning-rat", "1"], "learning_rat is not an option; did you mean learning_rate"),
        (["--bet", "0.1"], "bet is not an option"),
        (["--beta", "0"], "beta=0.0 is out of range; expected a finite number above 0"),
        (["--beta", "-1"], "beta=-1.0 is out of range"),
        (["--beta", "nan"], "beta=nan is out of range"),
        (["--beta", "abc"], "--beta.*invalid float value: 'abc'"),
        (["--max_steps", "1.5"], "--max_steps.*invalid int value"),
        (["--label_smoothing", "0.5"], "label_smoothing=0.5 is out of range"),
        (["--max_length", "1"], "max_length=1 is out of range"),
        (["--truncation", "left"], "truncation='left' is out of range; expected one of keep_start"),
        (["--method", "dop"], "method='dop' is not known; did you mean 'dpop'"),
        (["--dtype", "bf61"], "dtype='bf61' is out of range"),
        (["--report_to", "nosuchlogger"], "report_to='nosuchlogger' is not installed"),
        (["--lora_r", "-1"], "lora_r=-1 is out of range"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0 is out of range"),
        (["--beta", "0.1", "--beta", "0.2"], "--beta is given twice"),
        (["--eval_strategy", "steps"], "needs held-out rows"),
        (["--skip_bad_rows", "maybe"], "skip_bad_rows"),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(TrainConfig, [*BASE, *flags])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "holds list; expected lines of `key: value`"),
        ("", "holds NoneType"),
        ("beta: 0.1\nbeta: 0.2\n", "run.yaml:2: the key 'beta' stands twice"),
        ("beta: [0.1\n", "run.yaml:2"),
        ("beta: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("lora_target_modules: [[a]]\nmodel: m\n", "is nested; expected a flat list"),
        ("lerning_rate: 1\n", "did you mean learning_rate"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(TrainConfig, [write(tmp_path, text), *BASE])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        parse(TrainConfig, [str(tmp_path / "none.yaml")])
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        parse(TrainConfig, [str(tmp_path / "latin.yaml")])


@pytest.mark.parametrize("missing", ["model", "data", "output_dir"])
def test_what_a_run_cannot_do_without_is_asked_for(missing: str) -> None:
    index = BASE.index(f"--{missing}")
    with pytest.raises(ConfigError, match=f"{missing}=None is out of range"):
        parse(TrainConfig, BASE[:index] + BASE[index + 2 :])
