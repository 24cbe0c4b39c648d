"""`--chat` and `--prompt`: what a person types, and what comes back."""

import io
import json
import shutil
import sys

import pytest
from tiny_run import CONFIG, ROOT, arguments

from opd_jax.config_load import load_config
from opd_jax.main import main
from opd_jax.sampling.api import Sampler
from opd_jax.stages import chat
from opd_jax.stages.records import StageRecords

ASKED = "47243*8="


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run as far as its first student."""
    folder = tmp_path_factory.mktemp("chat") / "run"
    assert main(arguments(folder, "--stages", "answer,sft")) == 0
    return folder


@pytest.fixture
def typed(monkeypatch):
    """Puts lines on stdin; with `terminal`, both sides claim to be one."""

    def put(text, terminal=False):
        stdin = io.StringIO(text)
        if terminal:
            stdin.isatty = sys.stdout.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", stdin)

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return put


def output(capsys, words, code=0):
    """What a command prints; of one that is refused, its one line."""
    capsys.readouterr()
    assert main(words) == code
    out, err = capsys.readouterr()
    if code == 0:
        return out
    assert err.startswith("opd_jax: error: ")
    assert err.count("\n") == 1
    return err


def test_a_prompt_is_answered_as_the_library_answers_it(run_dir, capsys):
    greedy = ("--checkpoint", "base", "rollout.temperature=0")
    said = output(capsys, arguments(run_dir, "--prompt", ASKED, *greedy))
    student = Sampler.load(ROOT / "configs/quickstart/student")
    (sample,) = student.sample(
        [[{"role": "user", "content": ASKED}]], temperature=0, max_new_tokens=56
    )
    assert said == sample.text + "\n"


def test_each_checkpoint_answers_and_overrides_are_heard(run_dir, capsys):
    def answer(*more):
        return output(capsys, arguments(run_dir, "--prompt", ASKED, *more))

    assert answer() == answer("--checkpoint", "sft")
    teacher = answer("--checkpoint", "teacher", "answer.temperature=0")
    assert teacher.rstrip().endswith("377944")
    cut = answer("--checkpoint", "teacher", "answer.temperature=0", "answer.max_new_tokens=5")
    assert teacher.startswith(cut.rstrip("\n"))
    assert len(cut) < len(teacher)


def test_lines_on_stdin_are_answered_in_turn(run_dir, capsys, typed):
    words = arguments(run_dir, "--chat", "--checkpoint", "teacher", "answer.temperature=0")
    typed(f"{ASKED}\n\n/reset\n22222*7=\n/exit\n1*1=\n")
    first, second = output(capsys, words).splitlines()
    assert first.endswith("377944")
    assert second.endswith("155554")


def test_a_terminal_is_told_how_it_went(run_dir, capsys, typed, monkeypatch):
    words = arguments(run_dir, "--chat", "--checkpoint", "teacher")
    typed(f"{ASKED}\n", terminal=True)
    lines = output(capsys, words).splitlines()
    assert lines[0].startswith("\x1b[2mloading teacher; ")
    assert lines[1].startswith("\x1b[2mteacher, temperature 1 (answer.temperature=... changes it)")
    assert lines[2].startswith("> <think>")
    assert lines[3].startswith("\x1b[2m")
    assert "tokens, " in lines[3]
    assert "tokens/s, first after " in lines[3]
    monkeypatch.setenv("NO_COLOR", "1")
    typed(f"{ASKED}\n", terminal=True)
    plain = output(capsys, words)
    assert "tokens/s" in plain
    assert "\x1b" not in plain


def test_ctrl_c_ends_the_answer_and_not_the_chat(run_dir, capsys, typed, monkeypatch):
    typed(f"{ASKED}\n/reset\n{ASKED}\n", terminal=True)
    write, pieces = chat._write, []

    def interrupted(piece):
        write(piece)
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "_write", interrupted)
    words = arguments(run_dir, "--chat", "--checkpoint", "teacher", "answer.temperature=0")
    answers = [line.strip("> ") for line in output(capsys, words).splitlines() if "<think" in line]
    assert answers[1].endswith("377944")
    assert answers[1].startswith(answers[0])
    assert len(answers[0]) < len(answers[1])


def test_ctrl_c_ends_a_prompt_with_its_exit_code(run_dir, capsys, monkeypatch):
    def interrupted(self, ids, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(Sampler, "stream", interrupted)
    assert main(arguments(run_dir, "--prompt", ASKED, "--checkpoint", "base")) == 130
    assert capsys.readouterr().err == "opd_jax: interrupted\n"


def test_the_conversation_is_kept_until_it_no_longer_fits(run_dir, capsys, typed, monkeypatch):
    asked = []
    stream = Sampler.stream

    def noting(self, ids, **settings):
        asked.append(self.tokenizer.decode(ids, skip_special=False))
        return stream(self, ids, **settings)

    monkeypatch.setattr(Sampler, "stream", noting)
    typed("".join(f"1111{i}*2=\n" for i in range(6)), terminal=True)
    out = output(capsys, arguments(run_dir, "--chat", "--checkpoint", "teacher"))
    turns = [text.count("*2=<|im_end|>") for text in asked]
    assert turns[:3] == [1, 2, 3]
    assert max(turns) < 6
    assert all(f"1111{i}*2=" in text for i, text in enumerate(asked))
    assert "no longer fit 256 positions)" in out


def test_a_message_that_cannot_be_answered_does_not_end_a_chat(run_dir, capsys, typed):
    typed(f"{'1' * 250}\n{ASKED}\n", terminal=True)
    words = arguments(run_dir, "--chat", "--checkpoint", "teacher", "answer.temperature=0")
    capsys.readouterr()
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err.startswith("opd_jax: error: the message has ")
    assert "256 positions" in err
    assert "377944" in out
    typed(f"{'1' * 250}\n{ASKED}\n")
    assert "shorten it" in output(capsys, words, 2)


def test_the_last_trained_student_answers(run_dir, tmp_path):
    copy = shutil.copytree(run_dir / "stages", tmp_path / "stages")
    ctx = FakeContext(tmp_path)
    assert chat.checkpoint_name(ctx, None) == "sft"
    (copy / "train.opd.json").write_text(json.dumps({"outputs": {}}))
    assert chat.checkpoint_name(ctx, None) == "opd"
    assert chat.checkpoint_name(ctx, "sft") == "sft"


class FakeContext:
    """What `checkpoint_name` asks of a run."""

    def __init__(self, run_dir):
        self.run_dir, self.records = run_dir, StageRecords(run_dir)
        self.config = load_config(CONFIG)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chat"], "holds no trained student; run --stages answer,sft first, or take another"),
        (["--prompt", "x", "--checkpoint", "opd"], "stage 'train.opd' is not complete in run_dir"),
        (["--chat", "--checkpoint", "tacher"], "no such checkpoint; did you mean 'teacher'?"),
        (["--chat", "--checkpoint", "x"], "there are base, sft, opd, opd_topk"),
        (["--chat", "--prompt", "x"], "--chat and --prompt do not go together"),
        (["--chat", "--plan"], "--chat and --plan do not go together"),
        (["--prompt", "x", "--stages", "sft"], "--prompt and --stages do not go together"),
        (["--prompt", "x", "--force", "sft"], "--prompt and --force do not go together"),
        (["--checkpoint", "base"], "--checkpoint is for --chat and --prompt; give one of them"),
        (["--chat", "--processes", "2"], "--chat runs in one process; leave out --processes"),
        (["--prompt", "", "--checkpoint", "base"], "--prompt is empty"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, capsys, words, message):
    assert message in output(capsys, arguments(tmp_path / "new", *words), 2)
    assert not (tmp_path / "new").exists()
