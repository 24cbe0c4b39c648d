"""Reading configs: types, overrides, paths, and the one line that each mistake gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.config import Config
from opd_jax.config_load import dump_config, load_config
from opd_jax.errors import ConfigError

MINIMAL = """\
run_dir: runs/demo
model: {student: models/student, teacher: /models/teacher}
prompts: {sft: a.jsonl, opd: b.jsonl, eval: c.jsonl}
"""
CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = MINIMAL + "score: {top_k: 4}\ntrain: {runs: {opd: {}, opd_topk: {objective: topk}}}\n"


@pytest.fixture
def write(tmp_path):
    def write_text(text: str) -> Path:
        path = tmp_path / "demo.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


def refusal(path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_minimal_file_takes_every_default_from_the_classes(write):
    config = load_config(write(MINIMAL))
    assert config.train.runs["opd"].optim.learning_rate == 2e-6
    assert config.train.enabled == ("opd",)


@pytest.mark.parametrize(
    "text", ["1e-5", "8e-5", "1.0e-5", "2E-6", "1.e-5", "+1e-05", ".5e-5", "2e3"]
)
def test_floats_without_a_dot_are_numbers_in_files_and_overrides(write, text):
    from_file = load_config(write(MINIMAL + f"sft: {{optim: {{learning_rate: {text}}}}}\n"))
    from_override = load_config(write(MINIMAL), [f"sft.optim.learning_rate={text}"])
    assert from_file.sft.optim.learning_rate == float(text)
    assert from_override.sft.optim.learning_rate == float(text)


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_every_float_that_python_prints_is_read_back(number):
    assert yaml.load(repr(number), _loader()) == number


def _loader():
    from opd_jax import config_load

    return config_load._Loader


@pytest.mark.parametrize("text", ["e5", "1e", "v5e-64", "1e5x", "2026-11-01"])
def test_text_that_only_resembles_a_float_stays_text(text):
    assert not isinstance(yaml.load(text, _loader()), float)


def test_overrides_are_typed_by_yaml_and_the_last_one_wins(write):
    overrides = [
        "seed=3",
        "seed=4",
        "train.enabled=[opd, opd_topk]",
        "train.runs.opd.steps=10",
        "prompts.system=a=b",
        "prompts.sft_limit=null",
        "evaluate.greedy=false",
    ]
    config = load_config(write(RUNS), overrides)
    assert config.seed == 4
    assert config.train.enabled == ("opd", "opd_topk")
    assert config.train.runs["opd"].steps == 10
    assert config.train.runs["opd_topk"].steps == 150
    assert config.prompts.system == "a=b"
    assert config.prompts.sft_limit is None
    assert config.evaluate.greedy is False


def test_a_block_that_may_be_absent(write):
    path = write(MINIMAL + "sft: {lora: null}\n")
    assert load_config(path).sft.lora is None
    assert load_config(path, ["sft.lora={}"]).sft.lora.rank == 16
    config = load_config(write(RUNS), ["train.runs.opd.lora.targets=[wq, w_up]"])
    assert config.train.runs["opd"].lora.targets == ("wq", "w_up")
    assert load_config(write(dump_config(config))) == config


def test_a_whole_new_run_can_be_given_and_then_tuned(write):
    overrides = ["train.runs.slow={steps: 7}", "train.runs.slow.tau=2", "train.enabled=[slow]"]
    run = load_config(write(MINIMAL), overrides).train.runs["slow"]
    assert (run.steps, run.tau) == (7, 2.0)


def test_an_empty_block_is_its_defaults(write):
    config = load_config(write(MINIMAL + "sft:\ntrain:\n  runs:\n    opd:\n"))
    assert config == load_config(write(MINIMAL))


def test_paths_are_relative_to_where_they_are_written(write, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(write(MINIMAL), ["prompts.opd=mine.jsonl", "model.teacher=../t"])
    assert config.model.student == str(tmp_path / "models/student")
    assert config.model.teacher == str(tmp_path / "t")
    assert config.prompts.sft == str(tmp_path / "a.jsonl")
    assert config.prompts.opd == str(elsewhere / "mine.jsonl")
    assert config.run_dir == str(elsewhere / "runs/demo")


@pytest.mark.parametrize(
    ("given", "expected"),
    [("null", None), ("far", "HERE/far"), ("/far", "/far"), ("s3://far/a b", "s3://far/a b")],
)
def test_a_store_is_a_folder_from_here_or_an_address(write, tmp_path, monkeypatch, given, expected):
    monkeypatch.chdir(tmp_path)
    config = load_config(write(MINIMAL), [f"store={given}"])
    assert config.store == (expected and expected.replace("HERE", str(tmp_path)))
    assert load_config(write(dump_config(config))).store == config.store


def test_a_package_can_carry_a_file(write):
    import numpy

    config = load_config(write(MINIMAL), ["model.teacher=package:numpy/a.gguf"])
    assert config.model.teacher == str(Path(numpy.__file__).parent / "a.gguf")
    message = refusal(write(MINIMAL), "model.teacher=package:llm_no_such/a.gguf")
    assert "pip install llm-no-such" in message


def test_the_dump_gives_the_same_config_from_any_folder(write, tmp_path, monkeypatch):
    config = load_config(write(RUNS), ["sft.optim.learning_rate=8e-5", "prompts.system='é: x'"])
    dumped = tmp_path / "deep" / "config.yaml"
    dumped.parent.mkdir()
    dumped.write_text(dump_config(config), encoding="utf-8")
    monkeypatch.chdir(dumped.parent)
    assert load_config(dumped) == config


def test_the_dump_writes_every_key_out(write):
    dumped = yaml.safe_load(dump_config(load_config(write(MINIMAL))))
    assert set(dumped) == set(Config.model_fields)
    assert dumped["train"]["runs"]["opd"]["tau"] == 10.0


UNKNOWN = [
    (
        "sft.optim.warmupsteps=3",
        "sft.optim: unknown key 'warmupsteps'; did you mean 'warmup_steps'?",
    ),
    ("trian.enabled=[opd]", "unknown key 'trian'; did you mean 'train'?"),
    ("learning_rate=1", "unknown key 'learning_rate'; did you mean 'sft.optim.learning_rate' or"),
    ("train.runs.opd.tua=1", "train.runs.opd: unknown key 'tua'; did you mean 'tau'?"),
    ("mesh.zzz=1", "mesh: unknown key 'zzz'; the keys here are data, fsdp, tensor, expert"),
    ("train.runs.opd_tpk.steps=3", "no run named 'opd_tpk'; did you mean 'opd_topk'?"),
]


@pytest.mark.parametrize(("override", "expected"), UNKNOWN)
def test_an_unknown_key_gets_a_suggestion(write, override, expected):
    message = refusal(write(RUNS), override)
    assert expected in message
    assert message.startswith(f"override '{override}': ")


def test_an_unknown_key_in_a_file_names_the_file(write):
    path = write(MINIMAL + "sft: {optim: {warmupsteps: 3}}\n")
    assert refusal(path) == (
        f"{path}: sft.optim: unknown key 'warmupsteps'; did you mean 'warmup_steps'?"
    )


WRONG = [
    ("sft.steps=ten", "sft.steps: must be a whole number, but is 'ten'"),
    ("sft.steps=true", "sft.steps: must be a whole number, but is True"),
    ("sft.steps=1.5", "sft.steps: must be a whole number, but is 1.5"),
    ("sft.steps=0", "sft.steps: must be greater than or equal to 1, but is 0"),
    ("sft=3", "sft: must be a block of keys, but is 3"),
    ("seed.x=3", "seed: must be a whole number"),
    ("train.enabled=opd", "train.enabled: must be a list such as [a, b], but is 'opd'"),
    ("train.enabled=[1]", "train.enabled[0]: must be text"),
    ("train.enabled=[opd2]", "train.enabled names 'opd2', but train.runs has opd, opd_topk"),
    ("train.enabled=[opd, opd]", "train.enabled names a run twice"),
    ("train.runs.teacher={}", "train.runs has a run named 'teacher'"),
    ("train.runs.a/b={}", "train.runs has a run named 'a/b'"),
    ("sft.optim.b1=1", "sft.optim.b1: must be less than 1, but is 1"),
    ("sft.optim.clip_norm=.inf", "sft.optim.clip_norm: must be a finite number, but is inf"),
    ("sft.lora.rnk=3", "sft.lora: unknown key 'rnk'; did you mean 'rank'?"),
    ("sft.lora.targets=[wqq]", "sft.lora.targets[0]: must be 'wq', 'wk'"),
    ("sft.optim.schedule=cosin", "but is 'cosin'; did you mean 'cosine'?"),
    ("evaluate.greedy=1", "evaluate.greedy: must be true or false, but is 1"),
    ("prompts.sft=3", "prompts.sft: must be text"),
    ("run_dir=''", "run_dir: must not be empty"),
    ("mesh={data: -1}", "mesh.data and fsdp are -1; at most one"),
    ("mesh.fsdp=0", "mesh.fsdp is 0"),
    ("sft.micro_batch_size=7", "sft.micro_batch_size 7 does not divide batch_size 256"),
    ("sft.optim.warmup_steps=151", "sft.optim.warmup_steps 151 is above steps 150"),
    ("nonsense", "not of the form key=value"),
    ("a..b=1", "not of the form key=value"),
    ("seed=[1", "broken YAML"),
]


@pytest.mark.parametrize(("override", "expected"), WRONG)
def test_a_wrong_value_is_named_with_its_override(write, override, expected):
    message = refusal(write(RUNS), override)
    assert expected in message
    assert f"override '{override}'" in message


BLAMED = [
    (("steps=2", "batch_size=4"), "optim.warmup_steps 5 is above steps 2", 0),
    (("optim.warmup_steps=9", "steps=8"), "optim.warmup_steps 9 is above steps 8", 0),
    (("optim={warmup_steps: 9}", "steps=8"), "optim.warmup_steps 9 is above steps 8", 0),
    (("batch_size=6", "micro_batch_size=4", "tau=1"), "micro_batch_size 4 does not divide", 1),
    (("tau=1",), "micro_batch_size 7 does not divide", None),
]


@pytest.mark.parametrize(("overrides", "expected", "culprit"), BLAMED)
def test_the_override_of_the_key_that_is_named_is_blamed(write, overrides, expected, culprit):
    micro = 7 if culprit is None else "null"
    opd = f"opd: {{algorithm: sft, micro_batch_size: {micro}, optim: {{warmup_steps: 5}}}}"
    path = write(MINIMAL + f"train: {{runs: {{{opd}}}}}\n")
    texts = [f"train.runs.opd.{override}" for override in overrides]
    source = path if culprit is None else f"override '{texts[culprit]}'"
    assert refusal(path, *texts).startswith(f"{source}: train.runs.opd.{expected}")


def test_an_override_below_a_plain_value_in_the_file_is_refused(write):
    message = refusal(write(MINIMAL + "seed: 3\n"), "seed.x=1")
    assert message == "override 'seed.x=1': seed is 3, which has no keys of its own"


def test_a_topk_run_needs_stored_teacher_tokens(write):
    enabled = "train.enabled=[opd_topk]"
    message = refusal(write(RUNS), enabled, "score.top_k=0")
    assert "train.runs.opd_topk.objective is 'topk', but score.top_k is 0" in message
    message = refusal(write(RUNS), enabled, "train.runs.opd_topk.support=5")
    assert "train.runs.opd_topk.support 5 is above score.top_k 4" in message
    load_config(write(RUNS), ["score.top_k=0"])


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("algorithm: sft, tau: 3.0", "tau is no option of algorithm 'sft'; leave it out"),
        ("algorithm: sft, guard: {fresh: 4}", "guard is no option of algorithm 'sft'"),
        ("support: 4", "support 4 is for objective 'topk' alone"),
        ("ratio_clip: 0.2", "ratio_clip 0.2 is for algorithm 'opd' alone, here it is 'lightning_"),
        (
            "algorithm: opd, batch_tokens: 9",
            "batch_tokens 9 is for algorithm 'lightning_opd'",
        ),
        ("steps_per_batch: 4", "steps_per_batch 4 is for algorithm 'opd' alone"),
        (
            "objective: topk, reward_scale: 1.2",
            "reward_scale 1.2 is for objective 'sampled' alone, here it is 'topk'; leave it out",
        ),
        ("algorithm: opd, reward_scale: 1.2", "reward_scale 1.2 is for algorithm 'lightning_opd'"),
        ("algorithm: opd, kl_anchor: 0.1", "kl_anchor 0.1 is for algorithm 'lightning_opd' alone"),
        (
            "algorithm: opd, save_every: 5, steps_per_batch: 2",
            "save_every 5 is no multiple of steps_per_batch 2, and only then",
        ),
        (
            "algorithm: opd, refresh: {every: 2}",
            "refresh every=2 on_drift=False rounds=None is for",
        ),
        ("refresh: {rounds: 2}", "refresh.every is not given and on_drift is false; set one"),
        ("batch_tokens: 9, refresh: {every: 2}", "batch_tokens 9 leaves open how many responses"),
        ("guard: {action: 'off'}, refresh: {on_drift: true}", "guard.action is 'off', and refresh"),
        ("heldout: 0, refresh: {on_drift: true}", "heldout is 0, and refresh.on_drift sees"),
    ],
)
def test_options_of_another_algorithm_are_refused(write, run, expected):
    text = MINIMAL + f"score: {{top_k: 4}}\ntrain: {{runs: {{opd: {{{run}}}}}}}\n"
    assert f"train.runs.opd.{expected}" in refusal(write(text))


def test_a_missing_key_says_how_to_give_it(write):
    path = write("run_dir: x\nprompts: {sft: a, opd: b, eval: c}\nmodel: {student: s}\n")
    expected = f"{path}: model.teacher: missing; add it to the file or give model.teacher=VALUE"
    assert refusal(path) == expected
    load_config(path, ["model.teacher=t"])


def test_several_problems_are_counted(write):
    assert refusal(write("")).endswith("run_dir=VALUE (and 2 more)")


BROKEN = [
    (MINIMAL + "sft: {steps: [}\n", ":4: broken YAML: "),
    ("a: 1\n\tb: 2\n", ":2: broken YAML: "),
    (MINIMAL + "seed: 1\nseed: 2\n", ":5: broken YAML: key 'seed' is given twice; delete one"),
    ("? [a, b]\n: 1\n", ":1: broken YAML: key ['a', 'b'] is a list or a block; write a word"),
    ("- a\n- b\n", ": holds list ['a', 'b'], not 'key: value' lines"),
]


@pytest.mark.parametrize(("text", "expected"), BROKEN)
def test_broken_yaml_names_the_line(write, text, expected):
    path = write(text)
    assert refusal(path).startswith(f"{path}{expected}")


def test_unreadable_files_are_named(tmp_path):
    assert "no such config file" in refusal(tmp_path / "none.yaml")
    assert "cannot be read (Is a directory)" in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: caf\xe9\n")
    assert "byte 12 is not UTF-8" in refusal(tmp_path / "latin.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load(path):
    assert "/runs/" in load_config(path, []).run_dir
