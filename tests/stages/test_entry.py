"""Every stage through the command line, on 4 fake devices."""

import json
import shutil

import numpy as np
import pytest
from tiny_run import FRESH, arguments

from opd_jax.main import main
from opd_jax.train import loop

RUNS = "train.enabled=[opd,opd_topk,opd_online,sft_longer]"
MESH = ("mesh.fsdp=2", "mesh.tensor=2", *FRESH)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete run with every algorithm; tests that change it work on a copy."""
    run_dir = tmp_path_factory.mktemp("entry") / "run"
    assert main(arguments(run_dir, RUNS, *MESH)) == 0
    return run_dir


@pytest.fixture
def copy_of(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def error_of(capsys, words):
    """The one line that a refused command prints."""
    assert main(words) == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("opd_jax: error: ")
    assert "\n" not in text
    return text


def test_the_run_folder_holds_what_it_promises(finished):
    summary = json.loads((finished / "summary.json").read_text())
    trained = ["opd", "opd_topk", "opd_online", "sft_longer"]
    assert set(summary["eval"]) == {"base", "sft", *trained, "teacher"}
    assert set(summary["reverse_kl"]) == {"base", "sft", *trained}
    assert summary["eval"]["teacher"]["n"] == 12
    assert summary["stages"]["rollout"]["records"] == 16
    assert summary["stages"]["rollout"]["tokens"] > 16
    assert summary["lineage"]["opd"]["teacher"]["name"].endswith("quickstart/teacher")
    for name in trained:
        assert (finished / "export" / name / "model.safetensors").is_file()
    assert "<html" in (finished / "report.html").read_text()
    lines = [json.loads(x) for x in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if "loss" in x]
    assert [x["step"] for x in steps if x["run"] == "opd"] == [0, 1, 2]
    assert all(np.isfinite(x["loss"]) for x in steps)
    looks = [x for x in lines if "warnings" in x]
    assert [x["step"] for x in looks if x["run"] == "opd"] == [-1, 2]
    assert all(x["heldout_w_std"] < 0.1 for x in looks if x["run"] == "opd")


def test_a_training_state_names_its_ancestors(finished):
    last = max((finished / "checkpoints" / "opd" / "state").glob("*/complete.json"))
    lineage = json.loads(last.read_text())["meta"]["lineage"]
    kept = json.loads((finished / "checkpoints" / "opd" / "lineage.json").read_text())
    assert lineage == {name: kept[name] for name in lineage}
    assert {"student", "teacher", "rollouts", "objective"} <= lineage.keys()


def test_offline_at_step_0_has_ratio_one(finished):
    """The student still is the one that sampled: w = 1 within rounding."""
    lines = [json.loads(x) for x in (finished / "metrics.jsonl").read_text().splitlines()]
    for run in ("opd", "opd_topk"):
        first = next(x for x in lines if x["run"] == run and x["step"] == 0)
        assert first["w"] == pytest.approx(1.0, abs=1e-4)
        assert first["w_std"] < 1e-3


def test_a_second_run_does_nothing_and_changes_nothing(finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in (finished / "checkpoints").rglob("*")}
    assert main(arguments(finished, RUNS, *MESH)) == 0
    assert capsys.readouterr().out.count("done before") == 19
    assert before == {p: p.stat().st_mtime_ns for p in (finished / "checkpoints").rglob("*")}


def test_a_changed_input_is_refused_and_named(finished, capsys):
    text = error_of(capsys, arguments(finished, RUNS, *MESH, "rollout.temperature=0.8"))
    assert "stage 'rollout': settings.temperature changed from 1.0 to 0.8" in text
    assert "--force rollout" in text


def test_force_redoes_one_stage(copy_of, capsys):
    words = arguments(copy_of, RUNS, *MESH)
    record = copy_of / "stages" / "score.json"
    old, written = record.read_text(), record.stat().st_mtime_ns
    assert main([*words, "--force", "score", "--stages", "score"]) == 0
    assert json.loads(record.read_text())["outputs"] == json.loads(old)["outputs"]
    assert record.stat().st_mtime_ns > written


def plan_of(capsys, words):
    """Stage to the rest of its line, and the lines as they are."""
    assert main([*words, "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.strip()}, lines


def test_plan_says_what_is_done(copy_of, capsys):
    (copy_of / "stages" / "export.opd.json").unlink()
    states, lines = plan_of(capsys, arguments(copy_of, RUNS, *MESH))
    assert states["rollout"].startswith("done")
    assert states["export.opd"].startswith("pending")
    assert states["total"].startswith("1 to do")
    assert states["report"] == "always made anew"
    assert any("Times are guesses" in line for line in lines)
    assert not any("<= 0" in line for line in lines)


def test_plan_of_a_finished_run_guesses_nothing(finished, capsys):
    states, lines = plan_of(capsys, arguments(finished, RUNS, *MESH))
    assert states["total"].startswith("nothing to do")
    assert not any("guesses" in line for line in lines)


def test_plan_sees_a_changed_setting_and_what_follows(finished, capsys):
    words = arguments(finished, RUNS, *MESH, "rollout.temperature=0.8")
    states, _ = plan_of(capsys, words)
    expected = "changed: settings.temperature 1.0 -> 0.8 (--force rollout)"
    assert states["rollout"].startswith(expected)
    assert states["sft"].startswith("done")
    assert states["evaluate.sft"].startswith("done")
    assert states["train.sft_longer"].startswith("done")
    assert states["score"].startswith("follows rollout (--force score)")
    assert states["export.opd"].startswith("follows train.opd")
    assert states["train.opd_online"].startswith("changed: rollout.temperature 1.0 -> 0.8")
    assert states["total"].startswith("11 to do")


def test_plan_believes_a_force(finished, capsys):
    words = arguments(finished, RUNS, *MESH, "rollout.temperature=0.8", "--force", "rollout,score")
    states, _ = plan_of(capsys, [*words, "--stages", "rollout,score"])
    table = list(states)[list(states).index("stage") + 1 :]  # the title above may take two lines
    assert table[:3] == ["rollout", "score", "report"]
    assert states["rollout"].startswith("pending (--force)")
    assert states["score"].startswith("pending (--force)")


def test_plan_makes_no_folder(tmp_path, capsys):
    states, _ = plan_of(capsys, arguments(tmp_path / "new"))
    assert states["answer"].startswith("pending")
    assert list(tmp_path.iterdir()) == []


def test_a_run_says_where_and_on_what_it_works(finished, capsys, monkeypatch):
    monkeypatch.chdir(finished.parent)
    assert main(arguments(finished, RUNS, *MESH)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("run_dir run, 4 cpu devices, mesh fsdp 2, tensor 2")
    assert lines[-2].startswith("models: run/export/opd, run/export/opd_topk, ")
    assert lines[-1] == "report: run/report.html"
    assert any("accuracy %" in line for line in lines)


@pytest.mark.slow
def test_the_tables_are_for_a_run_that_asks_for_them(finished, capsys):
    words = arguments(finished, RUNS, *MESH)
    assert main([*words, "--stages", "rollout,score"]) == 0
    assert "accuracy %" not in capsys.readouterr().out
    assert main([*words, "--stages", "report"]) == 0
    assert "accuracy %" in capsys.readouterr().out


def test_samples_show_the_user_s_text(finished):
    lines = (finished / "evaluate" / "opd" / "samples.jsonl").read_text().splitlines()
    asked = json.loads(lines[0])["prompt"]
    assert asked.rstrip("=").replace("*", "").isdigit()


@pytest.mark.slow
def test_two_teachers_are_refused_and_named(copy_of, capsys):
    """SFT answers by one teacher, scores by another (here: the student's own folder)."""
    other = "model.teacher=configs/quickstart/student"
    words = arguments(copy_of, RUNS, *MESH, other)
    assert main([*words, "--stages", "score", "--force", "score"]) == 0
    shutil.rmtree(copy_of / "checkpoints" / "opd")
    (copy_of / "stages" / "train.opd.json").unlink()
    text = error_of(capsys, [*words, "--stages", "train.opd"])
    assert "quickstart/teacher" in text
    assert "quickstart/student" in text
    assert "teacher.allow_mismatch=true" in text
    assert "63.1 instead of 69.9" in text
    assert main([*words, "--stages", "train.opd", "teacher.allow_mismatch=true"]) == 0
    lineage = json.loads((copy_of / "checkpoints" / "opd" / "lineage.json").read_text())
    assert lineage["teacher_mismatch"] is True


def flip_one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_bit_in_a_checkpoint_is_an_error(copy_of, capsys):
    biggest = max((copy_of / "checkpoints/sft/model").rglob("*"), key=lambda p: p.stat().st_size)
    flip_one_bit(biggest)
    (copy_of / "stages" / "evaluate.sft.json").unlink()
    shutil.rmtree(copy_of / "evaluate" / "sft")
    text = error_of(capsys, arguments(copy_of, RUNS, *MESH, "--stages", "evaluate.sft"))
    assert "checkpoints/sft/model" in text


def test_a_flipped_bit_in_the_store_is_an_error(copy_of, capsys):
    shards = [p for p in (copy_of / "rollouts" / "data").rglob("c/*") if p.is_file()]
    for shard in shards:
        flip_one_bit(shard)
    shutil.rmtree(copy_of / "checkpoints" / "opd")
    (copy_of / "stages" / "train.opd.json").unlink()
    text = error_of(capsys, arguments(copy_of, RUNS, *MESH, "--stages", "train.opd"))
    assert "rollouts" in text


@pytest.mark.slow
def test_a_forced_stage_that_is_refused_keeps_what_it_had(copy_of, capsys):
    words = arguments(copy_of, RUNS, *MESH)
    other = [*words, "model.teacher=/no/such/model", "--stages", "answer", "--force", "answer"]
    assert "no such model folder" in error_of(capsys, other)
    other = [*words, "model.teacher=configs/quickstart/student"]
    forced = [*other, "--stages", "train.opd_online", "--force", "train.opd_online"]
    assert "teacher mismatch" in error_of(capsys, forced)
    assert main(words) == 0
    assert capsys.readouterr().out.count("done before") == 19


@pytest.mark.slow
def test_a_forced_stage_that_was_killed_leaves_nothing_of_the_old_one(copy_of):
    words = [*arguments(copy_of, RUNS, *MESH), "--stages", "export.opd"]
    assert main([*words, "--force", "export"]) == 2  # outside --stages: nothing happens
    folder, record = copy_of / "export" / "opd", copy_of / "stages" / "export.opd.json"
    folder.rename(folder.with_name(".opd.replaced"))
    record.rename(record.with_name(".export.opd.json.replaced"))
    assert main(words) == 0
    assert record.is_file()
    assert not list(copy_of.rglob(".*.replaced"))


@pytest.mark.slow
def test_the_same_forced_command_goes_on_where_it_was_ended(copy_of, capsys, monkeypatch):
    """As a queue gives it again, with `--force`: trained steps and the old model are kept."""
    words = [*arguments(copy_of, RUNS, *MESH), "--stages", "train.opd", "--force", "train.opd"]
    model = copy_of / "checkpoints" / "opd" / "model"
    lines = (copy_of / "metrics.jsonl").read_text()
    old = {path.name: path.read_bytes() for path in model.rglob("*.safetensors")}
    keep = loop._Run.keep

    def ended(self, saver, done, state):
        keep(self, saver, done, state)
        if done == 2:
            saver.finish()
            raise KeyboardInterrupt

    monkeypatch.setattr(loop._Run, "keep", ended)
    for _ in range(2):  # ends at step 2; then goes on from there, and never comes to it again
        code = main(words)
    assert code == 0
    said = capsys.readouterr()
    assert "the same command goes on from here" in said.err
    assert "train.opd           goes on: --force has begun it before" in said.out
    assert {path.name: path.read_bytes() for path in model.rglob("*.safetensors")} == old
    assert len((copy_of / "metrics.jsonl").read_text().splitlines()) == len(lines.splitlines())
    assert not list(copy_of.rglob(".*.replaced"))
    assert not (copy_of / ".forced.json").exists()


@pytest.mark.slow
def test_a_report_needs_no_prompts_and_no_models(copy_of, capsys):
    words = arguments(copy_of, RUNS, *MESH, "prompts.eval=/gone", "prompts.sft=/gone")
    assert main([*words, "--stages", "report"]) == 0
    assert "accuracy %" in capsys.readouterr().out


def test_an_export_carries_its_lineage(finished):
    exported = json.loads((finished / "export" / "opd" / "lineage.json").read_text())
    assert exported == json.loads((finished / "checkpoints" / "opd" / "lineage.json").read_text())
    assert exported["teacher"]["fingerprint"] == exported["student"]["sft_teacher"]["fingerprint"]


def test_a_stage_without_its_inputs_says_which(tmp_path, capsys):
    text = error_of(capsys, arguments(tmp_path / "new", "--stages", "rollout"))
    assert "stage 'rollout' needs stage 'sft'" in text


@pytest.mark.slow
def test_forcing_rollouts_redoes_the_scores_that_went_with_them(copy_of):
    words = [*arguments(copy_of, RUNS, *MESH), "--stages", "rollout,score"]
    old = json.loads((copy_of / "stages" / "score.json").read_text())
    assert main([*words, "--force", "rollout"]) == 0
    new = json.loads((copy_of / "stages" / "score.json").read_text())
    assert new["outputs"] == old["outputs"]
    assert (copy_of / "rollouts" / "teacher" / new["outputs"]["pass"] / "pass.json").is_file()


@pytest.mark.slow
def test_a_training_state_of_other_settings_is_not_resumed(copy_of, capsys):
    (copy_of / "stages" / "train.opd.json").unlink()
    words = arguments(copy_of, RUNS, *MESH, "--stages", "train.opd", "train.runs.opd.tau=5.0")
    assert "was trained with other settings" in error_of(capsys, words)
    assert main([*words, "--force", "train.opd"]) == 0


@pytest.mark.slow
def test_an_evaluation_of_an_older_model_is_left_out_of_the_summary(copy_of):
    words = arguments(copy_of, RUNS, *MESH, "train.runs.opd.tau=5.0", "train.runs.opd.steps=2")
    assert main([*words, "--stages", "train.opd", "--force", "train.opd"]) == 0
    summary = json.loads((copy_of / "summary.json").read_text())
    assert "opd" not in summary["eval"]
    assert "opd_topk" in summary["eval"]


def test_precision_is_an_input(finished, capsys):
    text = error_of(capsys, arguments(finished, RUNS, *MESH, "model.compute_dtype=bfloat16"))
    assert "numerics.compute_dtype changed from float32 to bfloat16" in text


def test_force_outside_the_chosen_stages_is_refused(finished, capsys):
    words = [*arguments(finished, RUNS, *MESH), "--stages", "score", "--force", "rollout"]
    assert "--force rollout is outside --stages" in error_of(capsys, words)


def test_the_control_s_card_claims_no_scores(finished):
    control = (finished / "export" / "sft_longer" / "README.md").read_text()
    assert "a control" in control
    assert "scored" not in control
    assert "scored the rollouts" in (finished / "export" / "opd" / "README.md").read_text()
