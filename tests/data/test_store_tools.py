"""Looking at a store, checking it, cleaning it up: what people see, and what is never removed."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opd_jax.data.records import Record, Scores
from opd_jax.data.store import create_store, open_store
from opd_jax.data.store_files import StoreFiles, encode_document
from opd_jax.data.store_gc import collect_garbage
from opd_jax.data.store_inspect import inspect_store
from opd_jax.data.store_segments import read_columns
from opd_jax.data.store_verify import verify_store
from opd_jax.data.tokenizer import load_tokenizer
from opd_jax.errors import DataError
from opd_jax.main import main

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "configs" / "quickstart" / "student"
RECORDS, VOCAB, K = 12, 28, 4
DIGEST = load_tokenizer(MODEL).fingerprint
GENERATOR = {
    "name": str(MODEL),
    "weights": "1" * 64,
    "architecture": "2" * 64,
    "tokenizer": DIGEST,
    "fingerprint": "3" * 64,
}
TEACHER = {**GENERATOR, "name": "/models/big", "fingerprint": "4" * 64}
META = {"generator": GENERATOR, "sampling": {"temperature": 1.0, "top_k": 0}}


def make_record(index, **changes):
    rng = np.random.default_rng(index)
    ids = rng.integers(3, VOCAB, 30 + 5 * index).astype(np.int32)
    values = {
        "prompt_id": f"p{index:02d}",
        "sample_index": 0,
        "prompt_ids": ids[:20],
        "response_ids": ids,
        "student_logprob": -rng.exponential(size=len(ids)).astype(np.float32),
        "finish_reason": "length" if index == 3 else "stop",
        **changes,
    }
    return Record(**values)


def make_scores(record):
    """What some teacher with a vocabulary of 28 says."""
    rng = np.random.default_rng(len(record.response_ids))
    logits = rng.normal(size=(len(record.response_ids), VOCAB))
    logprob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logprob, axis=-1)[:, :K]
    top = np.take_along_axis(logprob, ids, -1).astype(np.float16)
    chosen = np.take_along_axis(logprob, record.response_ids[:, None], -1)[:, 0]
    return Scores(chosen.astype(np.float32), ids.astype(np.int32), top)


def write(store, records, process_index=0):
    with store.writer(process_index) as writer:
        for record in records:
            writer.append(record)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Two segments, a snapshot, a pass over all of it in two segments."""
    root = tmp_path_factory.mktemp("tools") / "store"
    store = create_store(root, META)
    write(store, [make_record(i) for i in range(7)])
    write(store, [make_record(i) for i in range(7, RECORDS)])
    snapshot = store.freeze()
    scoring = store.create_pass("big", {"teacher": TEACHER, "top_k": K})
    with scoring.writer(snapshot) as writer:
        for index, record in enumerate(snapshot.read_many(range(RECORDS))):
            writer.append(index, make_scores(record))
            if index == RECORDS // 2:
                writer.flush()
    return root


@pytest.fixture
def root(sound, tmp_path):
    """A copy to damage."""
    shutil.copytree(sound, tmp_path / "store")
    return tmp_path / "store"


def findings(root):
    return verify_store(StoreFiles(root)).found


def contents(root):
    return {path: path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


# --verify


def test_a_sound_store_is_sound(sound, capsys):
    result = verify_store(StoreFiles(sound))
    assert result.found.problems == result.found.notes == []
    assert (result.records, result.segments, result.snapshots) == (RECORDS, 2, 1)
    assert result.response_tokens == sum(30 + 5 * i for i in range(RECORDS))
    assert result.passes == {"big": RECORDS}
    assert main(["--verify", str(sound)]) == 0
    assert capsys.readouterr().out == (
        "sound    12 records, 690 response tokens, 2 segments, 1 snapshot, 1 teacher pass\n"
    )


FILES = [
    "dataset.json",
    "commits/*.json",
    "snapshots/*.json",
    "data/*/records.npz",
    "data/*/student_logprob/zarr.json",
    "data/*/prompt_ids/c/0",
    "data/*/response_ids/c/0",
    "data/*/student_logprob/c/0",
    "teacher/big/pass.json",
    "teacher/big/commits/*.json",
    "teacher/big/data/*/records.npz",
    "teacher/big/data/*/topk_ids/zarr.json",
    "teacher/big/data/*/logprob/c/0",
    "teacher/big/data/*/topk_ids/c/0/0",
    "teacher/big/data/*/topk_logprob/c/0/0",
]


@pytest.mark.parametrize("harm", ["flipped", "emptied", "removed"])
@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_damage_is_named_with_its_file(root, kind, harm, capsys):
    path = sorted(root.glob(kind))[-1]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.unlink()
    if harm != "removed":
        path.write_bytes(raw if harm == "flipped" else b"")
    code, out = main(["--verify", str(root)]), capsys.readouterr().out
    if harm == "removed" and kind in ("snapshots/*.json", "teacher/big/commits/*.json"):
        assert code == 0  # what is not there is work not done, and the restart does it
        return
    assert code == 3
    lines = [line for line in out.splitlines() if line.startswith("damaged  /")]
    # A removed commit is missed by what names its segment.
    name = path.stem if harm == "removed" and kind.startswith("commits") else str(path)
    assert any(name in line for line in lines), out
    assert all(";" in line for line in lines), "no repair named"


def test_all_the_damage_is_named_not_only_the_first(root):
    kinds = [kind for kind in FILES if "commits" not in kind and "snapshots" not in kind]
    paths = [sorted(root.glob(kind))[-1] for kind in kinds]
    for path in paths:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    problems = findings(root).problems
    for path in paths:
        assert sum(line.startswith(str(path)) for line in problems) == 1, path


def test_the_damaged_records_of_a_file_are_counted(tmp_path):
    store = create_store(tmp_path, META)
    write(store, [make_record(0, prompt_id=f"p{i}") for i in range(5)])
    path = next(tmp_path.glob("data/*/response_ids/c/0"))
    raw = bytearray(path.read_bytes())
    raw[30] ^= 255
    path.write_bytes(raw)
    (problem,) = findings(tmp_path).problems
    assert problem.startswith(f"{path}: 1 of 5 records (first: prompt 'p0', sample 0) cannot be")
    assert f"delete {next(tmp_path.glob('commits/*'))} and run the stage" in problem


def test_records_in_a_wrong_place_are_told_by_their_digests(tmp_path):
    """Sound checksums and fitting lengths: only the records' own digests can tell."""
    store = create_store(tmp_path, META)
    write(store, [make_record(0)])
    write(store, [make_record(0, prompt_id="x", response_ids=make_record(0).response_ids[::-1])])
    one, two = sorted(tmp_path.glob("data/*"))
    shutil.rmtree(two / "response_ids")
    shutil.copytree(one / "response_ids", two / "response_ids")
    (problem,) = findings(tmp_path).problems
    assert problem.startswith(f"{two}: 1 of 1 records (first: prompt 'x', sample 0) are not what")


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"response_ids": np.full(30, -7, np.int32)}, "response_ids", "negative token ids"),
        ({"prompt_ids": np.full(30, -7, np.int32)}, "prompt_ids", "negative token ids"),
        ({"student_logprob": np.full(30, np.nan, np.float32)}, "student_logprob", "not finite"),
        ({"student_logprob": np.full(30, 0.1, np.float32)}, "student_logprob", "above 0"),
    ],
)
def test_impossible_values_of_records_are_named(tmp_path, changes, where, what):
    write(
        create_store(tmp_path, META),
        [make_record(0), make_record(1), make_record(0, prompt_id="x", **changes)],
    )
    (problem,) = findings(tmp_path).problems
    assert "1 of 3 records (first: prompt 'x', sample 0)" in problem
    assert f"/{where}: " in problem
    assert what in problem


def test_records_committed_twice_are_named(root):
    store = open_store(root)
    write(store, [make_record(0), make_record(1), make_record(50)], process_index=1)
    (problem,) = findings(root).problems
    commit = next(root.glob("commits/w00001-*"))
    assert problem.startswith(f"{commit}: 2 records are in w00000-000000-")
    assert "(first: prompt 'p00', sample 0)" in problem


def bad_scores(what):
    scores = make_scores(make_record(0))
    logprob, ids, top = scores.logprob.copy(), scores.topk_ids.copy(), scores.topk_logprob.copy()
    if what == "nan":
        logprob[3] = np.nan
    elif what == "positive":
        logprob[3] = 1e-3
    elif what == "id twice":
        ids[3, 1] = ids[3, 0]
    elif what == "unsorted":
        top[3] = top[3, ::-1]
    elif what == "top above 0":
        top[3, 0] = 0.5
    elif what == "too much":
        top[3] = -0.1
    elif what == "other score":
        ids[3] = make_record(0).response_ids[3] + np.arange(K)
        logprob[3] = top[3, 0] - 0.5
    elif what == "too likely":
        ids[3] = (make_record(0).response_ids[3] + 1 + np.arange(K)) % VOCAB
        logprob[3] = top[3, -1] + 0.1
    scores = with_rest(Scores(logprob, ids, top))
    if what == "other rest":
        scores.topk_rest[3] += 0.01
    elif what == "rest nan":
        scores.topk_rest[3] = np.nan
    elif what == "entropy":
        scores.entropy[3] = -0.5
    return scores


def with_rest(scores):
    rest = np.maximum(1 - np.exp(scores.topk_logprob.astype(np.float64)).sum(-1), 0)
    entropy = np.ones(len(scores.logprob), np.float32)
    return replace(scores, topk_rest=rest.astype(np.float32), entropy=entropy)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("other rest", "/topk_rest: .*do not add up to 1"),
        ("rest nan", "/topk_rest: .*topk_rest that is not finite, below 0 or above 1"),
        ("entropy", "/entropy: .*entropy that is not finite, below 0 or above inf"),
        ("nan", "/logprob: .*scores that are not finite or above 0"),
        ("positive", "/logprob: .*scores that are not finite or above 0"),
        ("id twice", "/topk_ids: .*top-k id twice at one position"),
        ("unsorted", "/topk_logprob: .*not sorted, likeliest first"),
        ("top above 0", "/topk_logprob: .*top-k log-probs that are not finite or above 0"),
        ("too much", "/topk_logprob: .*add up to more than 1"),
        ("other score", "/topk_logprob: .*contradicts the sampled token's score"),
        ("too likely", "/topk_logprob: .*contradicts the sampled token's score"),
    ],
)
def test_impossible_scores_are_named(tmp_path, what, message):
    store = create_store(tmp_path, META)
    write(store, [make_record(0), make_record(1)])
    snapshot = store.freeze()
    with store.create_pass("t", {"top_k": K}).writer(snapshot) as writer:
        writer.append(0, bad_scores(what))
        writer.append(1, with_rest(make_scores(make_record(1))))
    problems = findings(tmp_path).problems
    assert any(re.search(message, line) for line in problems), problems
    assert all("1 of 2 records" in line for line in problems)


def test_a_pass_of_another_width_is_named(root):
    path = root / "teacher/big/pass.json"
    rewrite(path, meta={"top_k": 9})
    problems = findings(root).problems
    assert len(problems) == 2
    assert "stores [4] tokens per position, its pass has top_k 9" in problems[0]


def rewrite(path, **changes):
    """A document with other content and a sound digest."""
    body = json.loads(path.read_bytes())
    body.pop("sha256")
    path.write_bytes(encode_document({**body, **changes}))


def test_scores_of_segments_that_are_gone_or_replaced_are_named(root):
    first, second = sorted(root.glob("commits/*.json"))
    first.unlink()
    rewrite(second, note="made again")
    problems = findings(root).problems
    assert any(f"scores segment {first.stem}, which has no commit" in line for line in problems)
    assert any(f"another segment {second.stem} than is there" in line for line in problems)
    (snapshot,) = root.glob("snapshots/*")
    assert any(line.startswith(f"{snapshot}: ") for line in problems)


def test_scores_of_records_that_were_sampled_again_count_no_longer_and_are_no_damage(root):
    first = min(root.glob("commits/*.json"))
    first.unlink()
    store = open_store(root)
    write(store, [make_record(i) for i in range(7)])
    snapshot = store.freeze()
    assert [path.stem for path in root.glob("snapshots/*")] == [snapshot.hash]
    scoring = store.open_pass("big")
    assert scoring.committed_records(snapshot) == set(range(7, RECORDS))
    with scoring.writer(snapshot) as writer:
        for index in range(7):
            writer.append(index, make_scores(make_record(index)))
    found = findings(root)
    assert found.problems == []
    gone = f"has scores of segment {first.stem}, whose records were sampled again; nothing reads"
    assert any(gone in note for note in found.notes)


def test_records_scored_twice_and_snapshots_that_miscount_are_named(root):
    (snapshot,) = root.glob("snapshots/*")
    rewrite(snapshot, records=RECORDS + 1)
    store = open_store(root)
    with store.open_pass("big").writer(store.view(), process_index=1) as writer:
        writer.append(5, make_scores(make_record(5)))
    counted, twice = findings(root).problems
    assert counted.startswith(f"{snapshot}: says 13 records, its segments hold 12; ")
    assert "have scores in w00000-000000-" in twice


def test_what_is_no_damage_is_noted(root, capsys):
    (root / "data/w00000-000009-0123abcd").mkdir()
    (root / "notes.txt").write_text("mine")
    (root / "commits/w00000-000009-0123abcd.json.__lock").write_text("{")
    min(root.glob("teacher/big/commits/*")).unlink()
    assert main(["--verify", str(root)]) == 0
    out = capsys.readouterr().out
    assert f"note     {root}/data/w00000-000009-0123abcd/: a segment without a commit" in out
    assert f"note     {root}/notes.txt: is no part of the store" in out
    assert f"{root}/commits/w00000-000009-0123abcd.json.__lock: left by a write that" in out
    assert "teacher/big/: has scores of 5 of the 12 records" in out


@pytest.mark.parametrize("flag", ["--verify", "--inspect", "--gc"])
def test_another_schema_version_is_refused(root, flag, capsys, monkeypatch):
    monkeypatch.setattr("opd_jax.data.store_files.SCHEMA_VERSION", 2)
    body = json.loads((root / "dataset.json").read_bytes())
    (root / "dataset.json").write_bytes(encode_document({"meta": body["meta"]}))
    monkeypatch.undo()
    before = contents(root)
    assert main([flag, str(root)]) == 2
    err = capsys.readouterr().err
    assert f"{root}/dataset.json: schema version 2, this opd_jax reads 1; install" in err
    assert err.count("\n") == 1
    assert contents(root) == before


@pytest.mark.parametrize("flag", ["--verify", "--inspect", "--gc"])
def test_where_no_store_is_one_line_says_so(sound, tmp_path, flag, capsys):
    assert main([flag, str(tmp_path / "none")]) == 2
    assert "none: no store is there; give the folder" in capsys.readouterr().err
    shutil.copytree(sound, tmp_path / "run" / "rollouts")
    assert main([flag, str(tmp_path / "run")]) == 2
    assert f"is a run folder; give one of its stores: {tmp_path}/run/rollouts\n" in (
        capsys.readouterr().err
    )


# --gc


def age(path, hours):
    """Make a folder and all in it so old."""
    then = time.time() - 3600 * hours
    for each in [*path.rglob("*"), path]:
        os.utime(each, (then, then))


def orphaned(root, base="", number=9, hours=30.0):
    """A segment whose writer was killed before its commit."""
    source = next((root / base / "data").iterdir())
    target = root / base / f"data/w00000-{number:06d}-0123abcd"
    shutil.copytree(source, target)
    age(target, hours)
    return target


def test_gc_removes_old_orphans_and_nothing_else(root, capsys):
    age(root, 1000)
    before = contents(root)
    old = [orphaned(root), orphaned(root, "teacher/big")]
    empty = root / "data/w00000-000077-0123abcd"
    empty.mkdir()
    age(empty, 30)
    young = orphaned(root, number=10, hours=23)
    (root / "data/mine").mkdir()
    (root / "data/mine/file").write_text("mine")
    assert main(["--gc", str(root), "--dry-run"]) == 0
    assert all(path.is_dir() for path in (*old, empty, young))
    assert main(["--gc", str(root)]) == 0
    told = capsys.readouterr().out
    assert not any(path.exists() for path in (*old, empty))
    assert young.is_dir()
    assert (root / "data/mine/file").is_file()
    shutil.rmtree(young)
    shutil.rmtree(root / "data/mine")
    assert contents(root) == before
    assert findings(root).problems == []
    dry, wet = told.split("would remove 3 segment folders without a commit, ")[0], told
    for path in (*old, empty):
        assert f"would remove  {path}/  " in dry
        assert f"\nremoved  {path}/  " in wet
    assert f"kept  {young}/  " in wet
    assert told.endswith(" bytes; 1 kept: younger than 24 hours\n")


def test_gc_never_removes_what_a_commit_names(root):
    age(root, 10_000)
    # Also where a reader would refuse the commit.
    next(root.glob("commits/*.json")).write_text("torn")
    next(root.glob("teacher/big/commits/*.json")).write_text("torn")
    before = contents(root)
    result = collect_garbage(StoreFiles(root), older_than_hours=0)
    assert result.removed == result.kept == []
    assert contents(root) == before


def test_gc_asks_for_the_commit_again_before_it_removes(root, monkeypatch):
    old = orphaned(root)
    commit = root / f"commits/{old.name}.json"

    def late(files, key):
        commit.write_text("{}")  # by a writer, after the store was listed
        return commit.exists() if key.endswith(commit.name) else exists(files, key)

    exists = StoreFiles.exists
    monkeypatch.setattr(StoreFiles, "exists", late)
    result = collect_garbage(StoreFiles(root), older_than_hours=0)
    assert [orphan.folder for orphan in result.kept] == [f"data/{old.name}/"]
    assert old.is_dir()


def test_gc_leaves_a_commit_on_its_way_alone(root):
    old = orphaned(root)
    (root / f"commits/{old.name}.json.__lock").write_text("{")
    assert collect_garbage(StoreFiles(root)).removed == []
    assert old.is_dir()


def test_gc_does_not_follow_links(root, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "records.npz").write_text("mine")
    (root / "data/w00000-000009-0123abcd").symlink_to(elsewhere)
    collect_garbage(StoreFiles(root), older_than_hours=0)
    assert (elsewhere / "records.npz").is_file()


def test_gc_refuses_where_ages_are_not_told(capsys):
    address = "memory://test_store_tools/gc"
    store = create_store(address, META)
    write(store, [make_record(0)])
    assert main(["--gc", address]) == 0
    store.files.write("data/w00000-000009-0123abcd/records.npz", b"torn")
    assert main(["--gc", address, "--older-than", "0"]) == 2
    assert "so nothing is removed; --dry-run lists the 1 segment folders" in capsys.readouterr().err
    assert main(["--gc", address, "--dry-run"]) == 0
    assert "data/w00000-000009-0123abcd/  size unknown, age unknown" in capsys.readouterr().out
    assert store.files.exists("data/w00000-000009-0123abcd/records.npz")


# --inspect


def test_inspect_shows_a_store_with_a_pass(sound, capsys):
    assert main(["--inspect", str(sound)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    records = [make_record(i) for i in range(RECORDS)]
    student = np.concatenate([r.student_logprob for r in records]).mean()
    teacher = np.concatenate([make_scores(r).logprob for r in records]).mean()
    (snapshot,) = (path.stem for path in sound.glob("snapshots/*"))
    for text in [
        "records 12, of 12 prompts, in 2 segments",
        "prompt tokens 240",
        "response tokens 690",
        "truncated 8.3%",
        f"{snapshot[:12]} (12 records)",
        "30 to 35 ████████████████████████████████████████ 2",
        "min 30 median 58 p95 82 max 85",
        f"generator {MODEL} (333333333333)",
        "sampling temperature 1.0, top_k 0",
        "teacher /models/big (444444444444)",
        f"scored 12 of 12 in {snapshot[:12]}",
        f"teacher log-prob {teacher:.4f} nats",
        f"student log-prob {student:.4f} of the same",
        f"difference {student - teacher:.4f}",
        "teacher/big/topk_ids",
    ]:
        assert text in out, text
    tokenizer = load_tokenizer(MODEL)
    for record in (records[0], records[5], records[11]):
        assert f"{record.prompt_id} sample 0, {len(record.response_ids)} tokens, stop" in out
        text = tokenizer.decode(record.response_ids.tolist(), skip_special=False)
        assert " ".join(text.split()) in out
        values = record.student_logprob[4], make_scores(record).logprob[4]
        token = tokenizer.decode([record.response_ids[4]], skip_special=False)
        assert f"4 {record.response_ids[4]} {token} {values[0]:.4f} {values[1]:.4f}" in out


def test_inspect_counts_the_bytes_of_every_file(sound):
    facts = inspect_store(StoreFiles(sound))
    kinds = facts.layout.kinds()
    assert sum(kinds.values()) == sum(len(raw) for raw in contents(sound).values())
    arrays = [p.stat().st_size for p in sound.glob("data/*/response_ids/**/*") if p.is_file()]
    assert kinds["response_ids"] == sum(arrays)
    assert {"other files", "segments without a commit"}.isdisjoint(kinds)


def test_inspect_works_before_the_store_is_frozen(tmp_path, capsys):
    store = create_store(tmp_path, {"kind": "rollouts"})
    write(store, [make_record(0, reward=1.0), make_record(1, reward=0.0)])
    assert main(["--inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "not all that is committed is frozen yet" in out
    assert "0.500 on average, 2 graded" in out
    assert "the generator's tokenizer is not here: --tokenizer PATH" in out
    ids = make_record(0).prompt_ids
    assert " ".join(str(i) for i in ids) in out
    assert main(["--inspect", str(tmp_path), "--tokenizer", str(MODEL)]) == 0
    assert load_tokenizer(MODEL).decode(ids.tolist()).split()[0] in capsys.readouterr().out
    assert main(["--inspect", str(tmp_path), "--tokenizer", str(tmp_path)]) == 2


def test_inspect_says_how_much_of_each_snapshot_a_pass_covers(root):
    store = open_store(root)
    (first,) = (path.stem for path in root.glob("snapshots/*"))
    write(store, [make_record(20)], process_index=1)
    second = store.freeze().hash
    (facts,) = inspect_store(StoreFiles(root)).passes
    assert facts.scored == RECORDS
    assert facts.coverage == {second: (RECORDS, RECORDS + 1), first: (RECORDS, RECORDS)}


def test_a_pass_that_was_put_aside_is_no_pass(root):
    """--force score moves it away until there is a new one; it may be killed before that."""
    (root / "teacher" / "big").rename(root / "teacher" / ".big.replaced")
    assert inspect_store(StoreFiles(root)).passes == []
    result = verify_store(StoreFiles(root))
    assert result.passes == {}
    assert result.found.problems == []
    assert {note.split(": ")[1] for note in result.found.notes} == {
        "is no part of the store; nothing here reads it"
    }


def test_inspect_warns_of_another_tokenizer(tmp_path, capsys):
    other = {**META, "generator": {**GENERATOR, "tokenizer": "5" * 64}}
    write(create_store(tmp_path, other), [make_record(0)])
    assert main(["--inspect", str(tmp_path)]) == 0
    assert "the generator's tokenizer is not here" in capsys.readouterr().out
    assert main(["--inspect", str(tmp_path), "--tokenizer", str(MODEL)]) == 0
    assert "this is not the generator's tokenizer" in capsys.readouterr().out


def test_inspect_finds_the_tokenizer_of_a_run(tmp_path, capsys):
    run = tmp_path / "run"
    meta = {"generator": {**GENERATOR, "name": "checkpoint sft"}}
    write(create_store(run / "rollouts", meta), [make_record(0)])
    (run / "config.yaml").write_text(f"model: {{student: {MODEL}, teacher: /none}}\n")
    assert main(["--inspect", str(run / "rollouts")]) == 0
    assert "tokenizer is not here" not in capsys.readouterr().out


def test_inspect_of_an_empty_store_says_what_to_do(tmp_path):
    create_store(tmp_path, META)
    with pytest.raises(DataError, match="nothing is committed; run the stage"):
        inspect_store(StoreFiles(tmp_path))


# docs/store.md


def example():
    """The code in the document."""
    text = (ROOT / "docs" / "store.md").read_text(encoding="utf-8")
    (code,) = (part.split("```")[0] for part in text.split("```python\n")[1:])
    return code


def test_the_documents_example_reads_what_our_reader_reads(sound):
    code, found = example(), {}
    assert len(code.strip().splitlines()) <= 10
    assert '"runs/quickstart/rollouts"' in code
    exec(code.replace("runs/quickstart/rollouts", str(sound)), found)
    record = open_store(sound).view().read_many([0])[0]
    np.testing.assert_array_equal(found["response"], record.response_ids)
    np.testing.assert_array_equal(found["logprob"], record.student_logprob)


@pytest.mark.parametrize("name", ["logprob", "topk_ids", "topk_logprob"])
def test_the_documents_example_reads_a_pass_alike(sound, name):
    found = {}
    code = example().replace("student_logprob", name).replace("response_ids", name)
    exec(code.replace("runs/quickstart/rollouts", str(sound / "teacher" / "big")), found)
    store = open_store(sound)
    wanted = getattr(store.open_pass("big").read_many(store.view(), [0])[0], name)
    assert found["logprob"].dtype == wanted.dtype
    np.testing.assert_array_equal(found["logprob"], wanted)


def test_a_store_of_many_segments_is_opened_without_numpy_s_parser(tmp_path, monkeypatch):
    """Segments load in several threads, and Python 3.11 compiles headers in one at a time only."""

    def refuse(*_args, **_kwargs):
        raise AssertionError

    store = create_store(tmp_path, META)
    with store.writer() as writer:
        for index in range(70):
            writer.append(make_record(index % RECORDS, prompt_id=f"p{index}"))
            writer.flush()
    wanted = store.freeze()
    monkeypatch.setattr(np.lib.format, "read_array", refuse)
    snapshot = open_store(tmp_path).open_snapshot(wanted.hash)
    assert len(snapshot.segments) == len(snapshot) == 70
    for number, (column, again) in enumerate(
        zip(wanted.lengths(), snapshot.lengths(), strict=True)
    ):
        np.testing.assert_array_equal(column, again, err_msg=str(number))


@pytest.mark.parametrize(
    "column",
    [
        np.arange(5),
        np.zeros((3, 32), np.uint8),
        np.array(["x", "y\u00e9"]),
        np.zeros((0,), np.float32),
        np.array([True, False]),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),  # NumPy itself reads this one
    ],
    ids=lambda x: f"{x.dtype}{x.shape}",
)
def test_columns_are_read_as_numpy_reads_them(tmp_path, column):
    files = StoreFiles(tmp_path)
    packed = io.BytesIO()
    np.savez(packed, column=column)
    raw = packed.getvalue()
    files.write("data/s/records.npz", raw)
    commit = {"records_sha256": hashlib.sha256(raw).hexdigest()}
    (found,) = read_columns(files, "", "s", commit).values()
    assert (found.dtype, found.shape) == (column.dtype, column.shape)
    np.testing.assert_array_equal(found, column)
    assert found.flags.writeable


# size

READER = """
    import sys
    import numpy as np
    from opd_jax.data.store import open_store

    snapshot = open_store(sys.argv[1]).open_snapshot(sys.argv[2])
    order = np.random.default_rng(0).permutation(len(snapshot))
    tokens = 0
    for start in range(0, len(order), 256):
        batch = order[start : start + 256]
        tokens += sum(len(record.response_ids) for record in snapshot.read_many(batch))
    status = open("/proc/self/status").read()
    print(tokens, status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("mean", [50, 2000])
def test_ten_million_tokens_are_read_within_500_megabytes(tmp_path, mean):
    rng = np.random.default_rng(0)
    lengths = rng.exponential(mean, 10_000_000 // mean).astype(int) + 1
    ids = rng.integers(0, 150_000, lengths.max()).astype(np.int32)
    logprob = -rng.exponential(size=lengths.max()).astype(np.float32)
    store = create_store(tmp_path, META)
    with store.writer() as writer:
        for index, length in enumerate(lengths):
            record = Record(f"p{index}", 0, ids[:20], ids[:length], logprob[:length], "stop")
            writer.append(record)
    command = [sys.executable, "-c", textwrap.dedent(READER), str(tmp_path), store.freeze().hash]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tokens, kilobytes = map(int, done.stdout.split())
    assert tokens == lengths.sum()
    assert kilobytes < 500_000
