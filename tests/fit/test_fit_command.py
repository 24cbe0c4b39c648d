"""`--fit` as a user meets it: tables, `fit.json` and exit codes."""

import dataclasses
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from rich.console import Console

from opd_jax.config_load import load_config
from opd_jax.errors import ConfigError, MeshError
from opd_jax.fit import worker
from opd_jax.fit.assess import drawn_with, stages_of
from opd_jax.fit.changes import ACTIVATIONS, Case, changed, room_share, steps_of
from opd_jax.fit.collectives import Collective
from opd_jax.fit.driver import judge
from opd_jax.fit.results import FitReport, ProgramReport, StepTime, Try
from opd_jax.fit.show import print_report
from opd_jax.main import main

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
LAYERS, WIDTH, FFN, HEADS, KV_HEADS, HEAD, TOKENS = 2, 64, 192, 4, 2, 16, 24  # the student
WEIGHTS = WIDTH * HEAD * (2 * HEADS + 2 * KV_HEADS) + 3 * WIDTH * FFN  # of a layer's products
NORMS = LAYERS * (2 * WIDTH + 2 * HEAD) + WIDTH


def fit(tmp_path, target, *words):
    """Exit code and `fit.json`."""
    command = ["--config", QUICKSTART, f"run_dir={tmp_path}", "--fit", target]
    code = main([*command, *words])
    found = tmp_path / "fit.json"
    return code, json.loads(found.read_text()) if found.exists() else None


@pytest.mark.parametrize(
    ("target", "words", "said"),
    [
        ("v9:4x4", [], "unknown TPU 'v9'"),
        ("auto:v9", [], "after 'auto:' comes one of"),
        ("h100:8", ["--plan"], "--fit and --plan do not go together"),
        ("h100:8", ["--force", "sft"], "--fit and --force do not go together"),
    ],
)
def test_a_bad_target_or_flag_is_one_line_and_exit_code_2(tmp_path, capsys, target, words, said):
    assert fit(tmp_path, target, *words) == (2, None)
    out, errors = capsys.readouterr()
    assert out == ""
    assert said in errors
    assert errors.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mesh.tensor=3"], "mesh: data=1, fsdp=-1, tensor=3"),
        (["sft.batch_size=33", "mesh.fsdp=2"], "sft.batch_size=33 is not divisible over 2 devices"),
        (["model.student=nowhere"], "no such model folder"),
        (["--stages", "evaluate"], "--stages: evaluate: no program to compile; choose from"),
    ],
)
def test_a_bad_config_is_one_line_and_exit_code_2(tmp_path, capsys, words, said):
    assert fit(tmp_path, "h100:2", *words) == (2, None)
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("target", "ways"), [("v5e:2x2", 4), ("h100:2", 2)])
def test_the_quickstart_fits_and_its_figures_are_those_of_a_hand_count(tmp_path, target, ways):
    words = ("train.enabled=[opd]", "mesh.fsdp=-1", "--stages", "train")  # not in copies
    code, report = fit(tmp_path, target, *words)
    assert code == 0
    assert report["fits"]
    assert report["devices"] == ways
    (step,) = report["programs"]
    assert step["name"] == "train.opd"
    shared = LAYERS * WEIGHTS + TOKENS * WIDTH
    parameters = 4 * (shared // ways + NORMS)
    assert step["parts"]["parameters"] == parameters
    assert step["parts"]["moments"] == pytest.approx(2 * parameters, abs=64)  # and counters
    assert step["beside"] == {}
    assert sum(step["parts"].values()) == pytest.approx(step["peak_bytes"], abs=1024)
    # 128 rows of 96: 32 + 56 tokens, one less as input, in buckets of 16.
    rows, length = 128, 96
    products = 6 * (LAYERS * WEIGHTS + TOKENS * WIDTH) * rows * length
    attention = LAYERS * 7 * 2 * HEADS * HEAD * rows * length**2  # 2 forward, 5 backward
    assert step["flops"] == pytest.approx(products + attention, rel=0.05)
    gathers = [x for x in step["collectives"] if x["kind"] == "all-gather"]
    assert all(x["axes"] == "fsdp" for x in gathers)
    assert step["time"]["seconds"] == max(step["time"][x] for x in ("compute", "memory", "links"))
    assert set(report["hours"]) == {"train.opd"}


@pytest.mark.slow
def test_the_sampler_and_the_teacher_are_compiled_too(tmp_path):
    words = ("model.param_dtype=bfloat16", "--stages", "rollout,score")
    code, report = fit(tmp_path, "h100:1", *words)
    assert code == 0
    prefill, decode, score = report["programs"]
    assert [x["name"] for x in report["programs"]] == ["rollout.prefill", "rollout.decode", "score"]
    assert decode["tokens"] == 64 * 250  # in a round, slots at each of its steps
    assert decode["runs"] == pytest.approx(4000 * 56 / 250 / 64)
    cache = decode["parts"]["KV cache"]
    assert cache >= 2 * 2 * LAYERS * KV_HEADS * HEAD * 250 * (32 + 56)
    assert prefill["beside"]["KV cache"] == cache
    assert prefill["parts"]["parameters"] == 2 * (LAYERS * WEIGHTS + TOKENS * WIDTH + NORMS)
    assert score["flops"] == pytest.approx(score["model_flops"], rel=0.25)
    assert set(report["hours"]) == {"rollout", "score"}


@pytest.mark.slow
def test_auto_takes_the_best_mesh_of_a_config_that_names_none():
    config = load_config(QUICKSTART, ["train.enabled=[opd]"])
    report = FitReport.from_json(judge(config, "h100:2", ["train"], auto=True).to_json())
    assert report.fits
    assert [mesh.mesh["fsdp"] for mesh in report.meshes] == [2, 1, 1]
    assert [mesh.mesh["tensor"] for mesh in report.meshes] == [1, 2, 1]
    best = min(report.meshes, key=lambda mesh: mesh.hours)
    assert report.mesh == best.mesh
    assert sum(report.hours.values()) == best.hours
    console = Console(width=200, record=True, file=io.StringIO())
    print_report(report, console)
    assert f"mesh tensor 2: {report.meshes[1].hours:,.3g} device-hours" in console.export_text()


@pytest.mark.slow
def test_what_is_too_large_exits_with_3_and_says_so(tmp_path, capsys):
    """Two wide layers without any weights: their parameters and moments alone take 150 GB."""
    model = tmp_path / "model"
    model.mkdir()
    sizes = json.loads(
        Path(QUICKSTART).with_name("quickstart").joinpath("student/config.json").read_text()
    )
    sizes |= {"hidden_size": 16384, "intermediate_size": 98304, "num_attention_heads": 128}
    (model / "config.json").write_text(json.dumps(sizes | {"head_dim": 128}))
    words = (f"model.student={model}", "train.enabled=[opd]", "train.runs.opd.batch_size=2")
    more = ("model.remat=full", "train.runs.opd.heldout=0", "--stages", "train")
    code, report = fit(tmp_path, "h100:1", *words, *more)
    assert code == 3
    assert not report["fits"]
    (step,) = report["programs"]
    assert step["free_bytes"] < 0
    assert step["needed_bytes"] > 12 * 2 * 3 * 16384 * 98304
    smaller, _, more = report["tries"]
    assert smaller["change"] == "train.runs.opd.micro_batch_size=1"
    assert not smaller["fits"]
    assert more["change"].endswith("optim.offload=true, on h100:2")
    said = capsys.readouterr().out
    assert "does not fit" in said
    assert "h100:1: does not fit" in said


@pytest.mark.slow
def test_a_compiler_that_refuses_says_what_it_would_take(tmp_path, capsys):
    """TPUs': 21 GiB of parameters and moments alone on a chip with 16."""
    student = Path(QUICKSTART).parent / "quickstart" / "student" / "config.json"
    sizes = json.loads(student.read_text()) | {"hidden_size": 8192, "intermediate_size": 32768}
    sizes |= {"num_attention_heads": 64, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    words = (f"model.student={tmp_path}", "train.enabled=[opd]", "train.runs.opd.batch_size=2")
    more = ("model.remat=full", "train.runs.opd.micro_batch_size=1", "--stages", "train")
    code, report = fit(tmp_path, "v5e-1", *words, *more)
    assert code == 3
    (step,) = report["programs"]
    assert step["problem"].startswith("RESOURCE_EXHAUSTED")
    assert step["peak_bytes"] >= 4 * 7.0 * 2**30  # parameters, two moments, gradients
    assert step["time"] is None
    assert report["hours"] == {}
    assert "RESOURCE_EXHAUSTED" in capsys.readouterr().out


@pytest.mark.slow
def test_a_change_that_makes_it_fit_is_found(tmp_path):
    """At 262,144 rows activations take 200 GiB; full rematerialisation alone does not do."""
    words = ("train.enabled=[opd]", "train.runs.opd.batch_size=262144", "--stages", "train")
    code, report = fit(tmp_path, "h100:1", *words)
    assert code == 3
    first, last = report["tries"]
    assert first["change"] == "model.remat=full"
    assert not first["fits"]
    assert first["needed_bytes"] < report["programs"][0]["needed_bytes"]
    assert last["change"] == "model.remat=full, train.runs.opd.micro_batch_size=65536"
    assert last["fits"]


@pytest.mark.slow
def test_the_worker_ends_with_whoever_asked(tmp_path):
    command = [sys.executable, "-m", "opd_jax.main", "--config", QUICKSTART, "--fit", "v5e-4"]
    pipe = subprocess.PIPE
    process = subprocess.Popen([*command, f"run_dir={tmp_path}"], stdout=pipe, text=True)
    assert process.stdout is not None
    assert "compiling" in process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{children[0]}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_stages_are_those_that_run_a_model():
    config = load_config(QUICKSTART)
    runs = ["train.opd", "train.opd_topk"]
    assert stages_of(config, None) == ["answer", "sft", "rollout", "score", *runs]
    assert stages_of(config, ["train", "score"]) == ["score", *runs]
    assert stages_of(config, ["train.opd_topk"]) == ["train.opd_topk"]
    assert stages_of(config, ["score", "evaluate", "export", "report"]) == ["score"]
    with pytest.raises(ConfigError, match="--stages: 'scores' is no stage; choose from answer"):
        stages_of(config, ["score", "scores"])


def test_a_run_that_draws_is_compiled_with_sampling_and_scoring():
    config = load_config(QUICKSTART)
    assert drawn_with(config, ["train.opd"]) == ()
    assert drawn_with(config, ["sft", "train.opd_online"]) == ("rollout", "score")


def tried(config, case):
    """Words of all changes, and the config that they end in."""
    said = []
    for step in steps_of(case.name):
        if found := step(config, case):
            said.append(found[0])
            config = changed(config, found[1])
    return said, config


def test_changes_go_from_gentle_to_large_and_keep_the_batch():
    config = load_config(QUICKSTART, ["mesh.tensor=2"])
    micro = "train.runs.opd.micro_batch_size"
    said, last = tried(config, Case("train.opd", ways=2, devices=4, share=0.0))
    offload = "train.runs.opd.optim.offload=true"
    assert said == ["model.remat=full", f"{micro}=2", offload, f"mesh.fsdp=-1 alone, {micro}=4"]
    assert last.train.runs["opd"].optim.offload
    assert last.model.remat == "full"
    assert last.train.runs["opd"].micro_batch_size == 4
    assert last.train.runs["opd"].batch_size == 128
    assert (last.mesh.fsdp, last.mesh.tensor) == (-1, 1)
    smallest = load_config(QUICKSTART, ["model.remat=full", f"{micro}=2", offload])
    assert tried(smallest, Case("train.opd", 2, 2, 0.0)) == ([], smallest)
    said, _ = tried(config, Case("rollout.decode", 2, 4, 0.0))
    assert said == ["rollout.slots=62", "mesh.fsdp=-1 alone"]
    said, _ = tried(config, Case("score", 2, 4, 0.0))
    assert said == ["score.batch_tokens=2048", "mesh.fsdp=-1 alone"]


def test_slices_keep_data_between_them():
    config = load_config(QUICKSTART, ["mesh.data=4", "mesh.tensor=2"])
    case = Case("rollout.decode", 8, 16, 0.0, slices=2)
    said, last = tried(config, case)
    assert said == ["rollout.slots=62", "mesh.data=2, mesh.fsdp=-1 alone"]
    assert (last.mesh.data, last.mesh.fsdp, last.mesh.tensor) == (2, -1, 1)
    assert tried(last, case)[0] == ["rollout.slots=15"]


def test_a_micro_batch_has_as_many_rows_as_there_is_room_for():
    config = load_config(QUICKSTART, ["model.remat=full"])
    for share, rows in ((0.99, 64), (0.5, 32), (0.1, 8), (0.001, 2)):
        said, _ = tried(config, Case("train.opd", 2, 2, share))
        wanted = [rows] if rows == 2 else [rows, 2]  # the fewest, where the guess was too many
        assert said[: len(wanted)] == [f"train.runs.opd.micro_batch_size={x}" for x in wanted]


def test_the_room_is_what_is_left_beside_what_does_not_shrink():
    report = report_of(9 * 2**30).programs[0]
    parts = {"parameters": 3 * 2**30, ACTIVATIONS: 6 * 2**30}
    report = dataclasses.replace(report, parts=parts, room_bytes=7 * 2**30)  # 1 lies beside
    assert room_share(report) == pytest.approx(0.5)


def report_of(needed):
    time = StepTime(1.0, 0.5, 0.25)
    sent = [Collective("all-gather", "fsdp", 4, 2.0**30, 2.0**20)]
    program = ProgramReport(
        *("train.opd", "8 rows of 16", "train.opd", 100, 128, 3e12, 2e12),
        needed,
        {"parameters": needed},
        {"teacher": 2**30},
        10 * 2**30,
        12.5,
        2**31,
        sent,
        time,
        0.4,
    )
    tries = [Try("train.opd", "model.remat=full", True, 2**30, 3.0)]
    return FitReport(
        "h100:8",
        "NVIDIA H100",
        8,
        {"fsdp": 8},
        80 * 2**30,
        [program],
        {"train.opd": 2.0},
        tries,
        [],
    )


def test_a_report_survives_its_json_and_counts_what_lies_beside():
    fits, does_not = report_of(9 * 2**30), report_of(9 * 2**30 + 1)
    assert fits.fits
    assert not does_not.fits
    assert FitReport.from_json(json.loads(json.dumps(fits.to_json()))) == fits
    entry = does_not.to_json()["programs"][0]
    assert entry["free_bytes"] == -1
    assert entry["tokens_per_second"] == 128
    assert entry["time"]["bound"] == "compute"


def test_the_tables_show_what_matters(capsys):
    print_report(report_of(9 * 2**30 + 1))
    said = capsys.readouterr().out
    for text in (
        "train.opd",
        "10.00 GiB",
        "parameters 9.00 GiB",
        "all-gather",
        "1.00 MiB",
        "40.0%",
        "1.50",
    ):
        assert text in said
    assert "tried train.opd with model.remat=full: fits, 1.00 GiB a device" in said
    assert said.rstrip().endswith("h100:8: does not fit")


@pytest.mark.parametrize(
    ("answers", "code", "kept"),
    [
        ({"v5e:1x1": None, "v5e:2x2": False, "v5e:2x4": True, "v5e:4x4": True}, 0, "v5e:2x4"),
        ({"v5e:1x1": False, "v5e:2x2": False}, 3, "v5e:2x2"),
        ({"v5e:1x1": False, "v5e:2x2": None}, 3, "v5e:1x1"),
        ({"v5e:1x1": None, "v5e:2x2": None}, 2, None),
    ],
)
def test_auto_goes_on_until_a_target_fits(tmp_path, monkeypatch, capsys, answers, code, kept):
    """`None`: the config's batches or mesh are for another number of devices."""
    asked = []

    def judged(_config, target, _stages, *, auto):
        assert auto
        asked.append(target)
        if answers[target] is None:
            raise MeshError(f"its batches do not suit {target}")
        report = report_of(9 * 2**30 + (0 if answers[target] else 1))
        return dataclasses.replace(report, target=target)

    monkeypatch.setattr("opd_jax.fit.driver.judge", judged)
    monkeypatch.setattr("opd_jax.fit.driver.candidates", lambda _: list(answers))
    found, report = fit(tmp_path, "auto")
    said = capsys.readouterr()
    assert found == code
    assert asked == (list(answers)[:3] if code == 0 else list(answers))
    refused = [target for target in asked if answers[target] is None]
    assert all(f"{target}: its batches do not suit" in said.out for target in refused)
    if kept is None:
        assert report is None
        assert "its batches do not suit v5e:2x2" in said.err
    else:
        assert report["target"] == kept


def test_auto_stops_at_an_error_that_no_number_of_devices_mends(tmp_path, monkeypatch, capsys):
    """Through the worker: it tells its other half which errors those are."""
    asked = []

    def answered(folder, target):
        asked.append(target)
        worker.main(folder)
        return json.loads(Path(folder, worker.ANSWER).read_text())

    monkeypatch.setattr("opd_jax.fit.driver._answer", answered)
    monkeypatch.setattr("opd_jax.fit.worker.logging.disable", lambda _: None)
    monkeypatch.setattr("opd_jax.fit.setup.devices_of", lambda _: jax.devices()[:1])
    monkeypatch.setattr("opd_jax.fit.driver.candidates", lambda _: ["h100:1", "h100:2", "h100:4"])
    assert fit(tmp_path, "auto", "mesh.fsdp=1", "model.student=nowhere") == (2, None)
    assert asked == ["h100:1"]
    assert "nowhere: no such model folder" in capsys.readouterr().err
    asked.clear()
    assert fit(tmp_path, "auto", "mesh.fsdp=3") == (2, None)
    assert asked == ["h100:1", "h100:2", "h100:4"]
    assert "needs 3 devices, 1 are here" in capsys.readouterr().err
