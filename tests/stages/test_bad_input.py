"""What a user can get wrong: one line, exit code 2, naming what, where and the repair."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_run import ROOT, arguments

from opd_jax.core.run_lock import run_lock
from opd_jax.main import main

MODELS = ROOT / "configs" / "quickstart"


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs a tiny config with overrides; returns the one line that it prints."""

    def run(*overrides):
        assert main(arguments(tmp_path / "run", *overrides)) == 2
        text = capsys.readouterr().err.strip()
        assert text.startswith("opd_jax: error: ")
        assert "\n" not in text
        return text

    return run


@pytest.fixture
def teacher(tmp_path):
    """A copy of the teacher's folder to break."""
    return shutil.copytree(MODELS / "teacher", tmp_path / "broken")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_model_folder(refused):
    text = refused("model.teacher=/no/such/model")
    assert "/no/such/model" in text
    assert "no such model folder" in text


def test_unknown_architecture(refused, teacher):
    edit_config(teacher, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    text = refused(f"model.teacher={teacher}")
    assert "gpt2" in text.lower()
    assert "qwen3" in text.lower()  # what is supported


def test_truncated_safetensors(refused, teacher):
    path = teacher / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    text = refused(f"model.teacher={teacher}")
    assert f"{path}" in text
    assert "truncated" in text


def test_missing_and_misshapen_tensor(refused, teacher):
    path = teacher / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    kept = tensors.pop(name)
    save_file(tensors, path)
    assert name in refused(f"model.teacher={teacher}")
    save_file({**tensors, name: np.ascontiguousarray(kept[:-1])}, path)
    text = refused(f"model.teacher={teacher}")
    assert name in text
    assert str(kept.shape[0] - 1) in text
    assert str(kept.shape[0]) in text


def test_a_vocabulary_too_small_for_the_tokenizer(refused, teacher):
    path = teacher / "model.safetensors"
    tensors = load_file(path)
    small = np.ascontiguousarray(tensors["model.embed_tokens.weight"][:10])
    save_file({**tensors, "model.embed_tokens.weight": small}, path)
    edit_config(teacher, vocab_size=10)
    assert "tokenizer" in refused(f"model.teacher={teacher}")


def test_another_chat_template_than_the_student_s(refused, teacher, tmp_path):
    template = teacher / "chat_template.jinja"
    template.write_text(template.read_text() + ".")
    text = refused(f"model.teacher={teacher}")
    assert "tokenizer mismatch" in text
    assert str(teacher) in text
    assert not (tmp_path / "run" / "answers").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no prompts"),
        ('{"id": "1", "prompt": "1*2="}\n{"id": \n', ":2: not a line of JSON"),
        ('{"id": "1", "prompt": "' + "1" * 40 + '"}\n', "prompt '1' has"),
    ],
    ids=["empty", "broken", "too long"],
)
def test_prompt_files(refused, tmp_path, content, words):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    text = refused(f"prompts.sft={path}")
    assert words in text
    assert "prompts" in text


def test_evaluation_prompts_without_answers_are_refused_before_any_work(refused, tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text('{"id": "first", "prompt": "11111*2="}\n')
    text = refused(f"prompts.eval={path}")
    assert "prompt 'first' has no answer" in text
    assert not (tmp_path / "run" / "answers").exists()


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("eval", "prompt '0' has"),
        ("opd", "train.runs.opd.batch_size=8 is more than the 4 samples of 4 prompts"),
        ("sft", "sft.batch_size=4 is more than the 1 samples of 1 prompts"),
    ],
)
def test_unusable_prompts_are_refused_before_any_work(refused, tmp_path, split, words):
    path = tmp_path / "prompts.jsonl"
    size = {"eval": 40, "opd": 2, "sft": 2}[split]
    rows = {"eval": 1, "opd": 4, "sft": 1}[split]
    path.write_text(
        "".join(f'{{"id": "{i}", "prompt": "{"1" * size}", "answer": 7}}\n' for i in range(rows))
    )
    assert words in refused(f"prompts.{split}={path}")
    assert not (tmp_path / "run" / "answers").exists()


def test_an_online_run_s_prompts_are_counted_before_any_work(refused, tmp_path):
    text = refused("train.enabled=[opd_online]", "train.runs.opd_online.batch_size=64")
    assert "train.runs.opd_online.batch_size=64 is more than the 15 samples of 16 prompts" in text
    assert not (tmp_path / "run" / "answers").exists()


def test_saturation_that_nothing_can_show_is_refused(refused):
    text = refused("sft.heldout=0", "sft.stop_when_saturated=true")
    assert "stop_when_saturated needs held-out answers, and heldout is 0" in text


def test_a_prompt_longer_than_the_context_is_refused_before_any_work(refused, teacher, tmp_path):
    edit_config(teacher, max_position_embeddings=74)
    text = refused(f"model.teacher={teacher}", "evaluate.max_new_tokens=60")
    assert "with max_new_tokens=60 that exceeds the 74 positions of the teacher" in text
    assert "prompts_eval.jsonl: prompt '" in text
    assert not (tmp_path / "run" / "answers").exists()


def test_a_top_k_beyond_the_vocabulary_is_refused_before_any_work(refused, tmp_path):
    assert "score.top_k=25 is more than the teacher's vocabulary of 24" in refused("score.top_k=25")
    assert not (tmp_path / "run" / "answers").exists()


def test_a_checkpoint_with_nan_stops_with_the_prompt_and_the_position(refused, teacher, tmp_path):
    path = teacher / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: np.full_like(tensors[name], np.nan)}, path)
    text = refused(f"model.teacher={teacher}")
    assert re.search(
        r"prompt 'sft-\d+', sample 0: the logits at response position 0 are not fin", text
    )
    assert not list((tmp_path / "run" / "answers" / "commits").glob("*"))


def test_a_corrected_command_goes_on_after_a_stage_that_wrote_nothing(refused, tmp_path):
    long_prompt = tmp_path / "prompts.jsonl"
    long_prompt.write_text('{"id": "1", "prompt": "' + "1" * 40 + '"}\n')
    assert "prompt '1' has" in refused(f"prompts.sft={long_prompt}")
    long_prompt.write_text('{"id": "1", "prompt": "' + "2" * 40 + '"}\n')
    assert "prompt '1' has" in refused(f"prompts.sft={long_prompt}")  # not: "changed since"


def test_batches_that_the_devices_cannot_share(refused):
    text = refused("mesh.fsdp=-1", "sft.batch_size=6")
    assert "sft.batch_size=6 is not divisible over 4 devices" in text
    balance = "train.runs.opd.router_balance=0.1"  # that of each micro-batch
    text = refused("mesh.fsdp=4", "train.runs.opd.micro_batch_size=2", balance)
    assert "train.runs.opd.micro_batch_size=2 is not divisible over 4 devices" in text


def test_rows_that_the_devices_cannot_cut(refused):
    mesh = ("mesh.fsdp=1", "mesh.context=4")
    text = refused(*mesh, "sft.row_tokens=90")
    assert "sft.row_tokens=90 is not divisible over 4 devices (mesh.context); set it to 92" in text
    text = refused(*mesh, "sft.row_tokens=96", "train.runs.opd.row_tokens=98")
    assert "train.runs.opd.row_tokens=98 is not divisible over 4 devices" in text


def test_run_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(arguments(tmp_path / "file" / "run")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_second_run_in_the_same_folder(refused, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with run_lock(run_dir):
        text = refused()
        assert str(run_dir) in text
        assert "is in use by process" in text
    assert not (run_dir / "answers").exists()
    with run_lock(run_dir):
        pass  # let go of, though the file is still there


def test_more_devices_than_there_are_and_a_mesh_that_does_not_divide(refused):
    assert "needs 8 devices, 4 are here" in refused("mesh.fsdp=8")
    assert "is not divisible by mesh axis 'tensor'=4" in refused("mesh.fsdp=1", "mesh.tensor=4")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.optim.warmupsteps=3", "did you mean 'warmup_steps'"),
        ("sft.steps=many", "sft.steps"),
        ("rollout.top_p=1.5", "rollout.top_p: must be less than or equal to 1, but is 1.5"),
        ("rollout.top_p=0", "rollout.top_p: must be greater than 0, but is 0"),
        ("rollout.temperature=-1", "temperature: must be greater than or equal to 0, but is -1"),
        ("rollout.temperature=.nan", "rollout.temperature"),
        ("rollout.samples_per_prompt=0", "must be greater than or equal to 1, but is 0"),
        ("train.enabled=[opdd]", "opdd"),
    ],
)
def test_config_mistakes(refused, override, words):
    assert words in refused(override)


def test_an_unknown_stage(refused):
    assert "--stages rollouts: no such stage" in refused("--stages", "rollouts")
