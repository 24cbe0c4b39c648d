"""What is known of a program before it is compiled, on a mesh of fake CPU devices."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import pytest

from opd_jax.config_load import load_config
from opd_jax.errors import ConfigError
from opd_jax.fit import assess
from opd_jax.fit.assess import within_evaluations, within_training
from opd_jax.fit.evaluation import evaluation_drafts
from opd_jax.fit.results import ProgramReport
from opd_jax.fit.sampling import sampling_drafts
from opd_jax.fit.scoring import scoring_draft
from opd_jax.fit.setup import Setup
from opd_jax.fit.targets import parse_target
from opd_jax.fit.training import training_draft
from opd_jax.model.attention import ROW_BLOCK
from opd_jax.model.experts import in_groups_anywhere
from opd_jax.train.mesh_choice import mesh_of
from opd_jax.train.probes import fresh_sampling

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
STUDENT = (2, 64, 192, 4, 2, 16, 24)  # layers, width, ffn, heads, kv heads, head dim, tokens
TEACHER = (3, 128, 384, 4, 2, 32, 24)


def setup_of(*overrides):
    config = load_config(QUICKSTART, list(overrides))
    return Setup(config, parse_target("h100:2"), mesh_of(config, jax.devices()[:2]))


@functools.cache
def train_flops(name, *overrides):
    return training_draft(setup_of(*overrides), name).count()


def weights(sizes):
    """Of all layers' products, and of the head."""
    layers, d, f, n, k, h, v = sizes
    return layers * (d * h * (2 * n + 2 * k) + 3 * d * f), v * d


def norms(sizes):
    layers, d, _, _, _, h, _ = sizes
    return layers * (2 * d + 2 * h) + d


def parameter_bytes(sizes, width=4, ways=2):
    return width * (sum(weights(sizes)) // ways + norms(sizes))


def test_the_arguments_of_a_train_step_are_counted_by_hand():
    draft = training_draft(setup_of(), "train.opd")
    parts = draft.parts()
    assert parts["parameters"] == parameter_bytes(STUDENT)
    assert parts["moments"] == pytest.approx(2 * parts["parameters"], abs=32)
    # 64 rows of a device: 4 arrays of int32, 3 of float32, a mask.
    assert parts["batch"] == 64 * 96 * (7 * 4 + 1)
    assert draft.beside() == {}
    assert draft.tokens == 128 * 87
    assert draft.runs == 60


def pairs(length):
    """Of queries and keys, in the tiles that the attention of a CPU computes of a row."""
    blocks = -(-length // ROW_BLOCK)
    side = -(-length // blocks // 8) * 8
    return blocks * (blocks + 1) // 2 * side**2


@pytest.mark.parametrize(("name", "rows", "length"), [("train.opd", 128, 96), ("sft", 32, 136)])
def test_the_flops_of_a_train_step_are_a_hand_count(name, rows, length):
    layers, head = weights(STUDENT)
    depth, _, _, n, _, h, _ = STUDENT
    products = 6 * (layers + head) * rows * length
    attention = depth * 7 * 2 * n * h * rows * pairs(length)  # 2 products forward, 5 backward
    assert train_flops(name) == pytest.approx(products + attention, rel=0.05)


def test_micro_batches_change_neither_work_nor_tokens():
    whole = training_draft(setup_of(), "train.opd")
    cut = training_draft(setup_of("train.runs.opd.micro_batch_size=32"), "train.opd")
    assert (cut.loops, whole.loops) == (4, 1)
    assert "in 4 micro-batches" in cut.what
    assert cut.count() == pytest.approx(train_flops("train.opd"), rel=0.01)
    assert cut.tokens == whole.tokens
    assert cut.parts()["batch"] == whole.parts()["batch"]


def test_rematerialisation_computes_a_forward_pass_again():
    draft = training_draft(setup_of("model.remat=full"), "train.opd")
    plain = training_draft(setup_of(), "train.opd")
    depth, d, f, n, k, h, v = STUDENT
    # Not a layer's last product; queries and keys are computed again anyway, for their norms. The
    # head is: its logits are kept only without rematerialisation.
    products = (depth * (d * h * (k + n) + 2 * d * f) + v * d) * 2 * 128 * 96
    attention = depth * 2 * 2 * n * h * 128 * 96**2
    assert draft.count() - train_flops("train.opd") == pytest.approx(products + attention, rel=0.01)
    assert draft.model_flops == plain.model_flops


def test_the_teachers_support_is_part_of_the_batch():
    plain, topk = (training_draft(setup_of(), f"train.{x}") for x in ("opd", "opd_topk"))
    more = topk.parts()["batch"] - plain.parts()["batch"]
    assert more == 64 * 96 * (24 * 8 + 4)  # ids and log-probs, and the mass outside them


def test_adapters_have_the_moments_and_the_weights_stay_frozen():
    draft = training_draft(setup_of("train.runs.opd.lora={rank: 4}"), "train.opd")
    parts = draft.parts()
    assert parts["frozen parameters"] == parameter_bytes(STUDENT)
    assert parts["parameters"] < parts["frozen parameters"] / 4
    assert parts["moments"] == pytest.approx(2 * parts["parameters"], abs=32)
    assert draft.beside() == {}
    assert draft.count() < 0.9 * train_flops("train.opd")


def test_moments_on_the_host_take_no_memory_of_the_device():
    plain = training_draft(setup_of(), "train.opd")
    draft = training_draft(setup_of("train.runs.opd.optim={offload: true}"), "train.opd")
    parts = draft.parts()
    assert parts["moments"] == 8  # counters
    assert draft.host == {"moments": 2 * parts["parameters"]}
    assert plain.host == {}
    assert plain.parts()["moments"] == parts["moments"] + draft.host["moments"]


def test_scoring_meets_the_head_with_response_tokens_only():
    draft = scoring_draft(setup_of("score.batch_tokens=1408"))
    layers, head = weights(TEACHER)
    rows, length = 8, 176
    assert draft.what == "8 rows of 176, top-k 24"
    depth, _, _, n, _, h, _ = TEACHER
    attention = depth * 2 * 2 * n * h * rows * pairs(length)
    counted = 2 * layers * rows * length + 2 * head * rows * 2 * 56 + attention
    assert draft.count() == pytest.approx(counted, rel=0.05)
    assert draft.parts() == {"parameters": parameter_bytes(TEACHER)}
    assert draft.runs == pytest.approx(4000 / 16)


def test_a_round_of_decoding_multiplies_all_weights_and_every_page_at_each_step():
    _, draft = sampling_drafts(setup_of(), "rollout")
    layers, head = weights(STUDENT)
    depth, _, _, n, _, h, _ = STUDENT
    slots, page = 250, 96  # a page holds 32 + 56 tokens, on CPUs in steps of 16
    attention = depth * 2 * 2 * n * h * slots * page
    step = 2 * (layers + head) * slots + attention
    assert draft.count() == pytest.approx(64 * step, rel=0.05)
    assert draft.loops == 64
    assert draft.tokens == 64 * slots
    assert draft.runs == pytest.approx(4000 * 56 / slots / 64)


def test_the_head_of_scoring_ends_with_the_responses(tmp_path):
    """Of 64 rows 16 columns at a time: 7 times that are two responses of 56."""
    teacher = QUICKSTART.parent / "quickstart" / "teacher" / "config.json"
    sizes = json.loads(teacher.read_text()) | {"vocab_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    draft = scoring_draft(setup_of(f"model.teacher={tmp_path}", "score.batch_tokens=11264"))
    depth, d, _, n, _, h, _ = TEACHER
    layers, _ = weights(TEACHER)
    rows, length = 64, 176
    attention = depth * 2 * 2 * n * h * rows * pairs(length)
    counted = 2 * layers * rows * length + 2 * 4096 * d * rows * 112 + attention
    assert draft.what == "64 rows of 176, top-k 24"
    assert draft.loops == 7
    assert draft.count() == pytest.approx(counted, rel=0.02)


def test_half_the_weights_take_half_the_memory():
    draft = scoring_draft(setup_of("model.param_dtype=bfloat16"))
    assert draft.parts() == {"parameters": parameter_bytes(TEACHER, width=2)}


def test_without_prompts_and_tokenizer_training_says_how_much_there_is(tmp_path):
    for role in ("student", "teacher"):
        (tmp_path / role).mkdir()
        config = QUICKSTART.parent / "quickstart" / role / "config.json"
        (tmp_path / role / "config.json").write_text(config.read_text())
    models = [f"model.{role}={tmp_path / role}" for role in ("student", "teacher")]
    missing = [f"prompts.{split}={tmp_path / split}" for split in ("sft", "opd", "eval")]
    setup = setup_of(*models, *missing)
    assert setup.tokenizer("teacher") is None
    assert setup.prompts("opd") == 60 * 128
    assert setup.prompts("sft") == 40 * 32
    assert setup_of(*models, *missing, "prompts.opd_limit=7").prompts("opd") == 7
    assert scoring_draft(setup).parts() == {"parameters": parameter_bytes(TEACHER)}


def test_rows_that_cannot_hold_a_response_are_refused():
    with pytest.raises(ConfigError, match="row_tokens=40 is too short"):
        training_draft(setup_of("train.runs.opd.row_tokens=40"), "train.opd")


def program(name, parts, beside):
    sizes = ("", name, 10.0, 1, 1.0, 1.0, sum(parts.values()), parts, beside, 100, 1.0)
    return ProgramReport(name, *sizes)


def test_sampling_while_a_run_trains_has_its_state_beside_it():
    setup = setup_of("train.enabled=[opd_online]")
    state = {"parameters": 4, "moments": 8, "batch": 1}
    step = program("train.opd_online", state, {"teacher": 16})
    prefill = program("rollout.prefill", {"parameters": 4, "x": 3}, {"KV cache": 5})
    decode = program("rollout.decode", {"KV cache": 5}, {"parameters": 4, "waiting": 2})
    score = program("score", {"parameters": 16}, {})
    found = {x.name: x for x in within_training(setup, [step, prefill, decode, score])}
    names = [f"{x} in train.opd_online" for x in ("rollout.prefill", "rollout.decode", "score")]
    assert list(found) == names
    assert found[names[0]].beside == {"KV cache": 5, "teacher": 16, "training state": 8}
    assert found[names[1]].beside == {"waiting": 2, "teacher": 16, "training state": 12}
    assert found[names[2]].beside == {"training state": 12}
    assert found[names[0]].runs == pytest.approx(10 * 60 * 128 / 4000)
    assert {x.stage for x in found.values()} == {"train.opd_online"}


def test_runs_on_stored_rollouts_sample_nothing():
    step = program("train.opd", {"parameters": 4}, {})
    decode = dataclasses.replace(step, name="rollout.decode")
    assert list(within_training(setup_of(), [step, decode])) == []


def mixture(folder, chosen):
    """A folder with the `config.json` of a small mixture of experts."""
    folder.mkdir()
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 24,
        "hidden_size": 64,
        "intermediate_size": 192,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": chosen,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_pair_of_token_and_expert_is_counted_once_whatever_the_router_does(tmp_path):
    found = []
    for chosen in (1, 2):
        student = mixture(tmp_path / str(chosen), chosen)
        draft = training_draft(
            setup_of(f"model.student={student}", "model.remat=none"), "train.opd"
        )
        with pytest.raises(ValueError, match="trip count"):
            draft.count()  # by blocks it depends on the routing
        with in_groups_anywhere():
            found.append(draft.count())
    rows, length = (int(x) for x in re.findall(r"(\d+) rows of (\d+)", draft.what)[0])
    layers, width, hidden = 2, 64, 32
    # Three products forward; all but the last again in the backward pass, which keeps nothing of
    # experts; and two gradients of each.
    products = 3 + 2 + 2 * 3
    assert found[1] - found[0] == 2 * products * width * hidden * layers * rows * length


def test_a_change_that_is_no_config_is_left_out_and_the_next_ones_are_tried(monkeypatch):
    """As where a quarter of the slots cannot be cut over the devices."""
    setup, said = setup_of("mesh.fsdp=1", "mesh.tensor=2"), []
    failing = program("rollout.decode", {"KV cache": 150}, {})

    def opened(config, target):
        if config.rollout.slots != setup.config.rollout.slots:
            raise ConfigError("no such slots")
        return dataclasses.replace(setup, config=config, target=parse_target(target))

    monkeypatch.setattr(assess, "open_setup", opened)
    monkeypatch.setattr(assess, "_again", lambda *_: failing)
    tries = list(assess._tries(setup, failing, None, said.append))
    assert [tried.change for tried in tries] == [
        "mesh.fsdp=-1 alone",
        "mesh.fsdp=-1 alone, on h100:4",
    ]
    assert "that is no config: no such slots" in said


def test_fresh_samples_of_an_evaluation_are_compiled_as_it_takes_them():
    guard = "train.runs.opd.guard"
    sizes = ("rollout.slots=250", "rollout.samples_per_prompt=4", "train.runs.opd.heldout=80")
    setup = setup_of(*sizes, f"{guard}.teacher=true", "score.top_k=4")
    run = setup.config.train.runs["opd"]
    prefill, decode, score = evaluation_drafts(setup, run)
    names = ["evaluation.prefill", "evaluation.decode", "evaluation.score"]
    assert [prefill.name, decode.name, score.name] == names
    assert fresh_sampling(setup.config.rollout, 20).slots == 32
    assert decode.what.startswith("32 slots, ")
    steps = int(re.findall(r"(\d+) steps", decode.what)[0])
    assert decode.runs == pytest.approx(20 * setup.config.rollout.max_new_tokens / (32 * steps))
    assert score.what.endswith("top-k 0")
    for nothing in ("train.runs.opd.heldout=0", f"{guard}.fresh=0"):
        without = setup_of(nothing)
        assert evaluation_drafts(without, without.config.train.runs["opd"]) == []
    assert evaluation_drafts(setup, setup.config.train.runs["opd_online"]) == []


def test_an_evaluation_has_the_training_state_beside_it(monkeypatch):
    setup, said = setup_of("train.enabled=[opd,opd_topk]", "train.runs.opd.guard.teacher=true"), []
    compiled = {
        "evaluation.prefill": program("evaluation.prefill", {"parameters": 4}, {"KV cache": 5}),
        "evaluation.decode": program("evaluation.decode", {"KV cache": 5}, {"parameters": 4}),
        "evaluation.score": program("evaluation.score", {"parameters": 16}, {}),
    }
    monkeypatch.setattr(assess, "compile_draft", lambda _, draft: compiled[draft.name])
    state = {"parameters": 4, "moments": 8, "batch": 1}
    step, topk = program("train.opd", state, {"teacher": 16}), program("train.opd_topk", state, {})
    found = {x.name: x for x in within_evaluations(setup, [step, topk], said.append)}
    assert len(said) == 3  # the second run takes the same samples
    assert {name: x.beside for name, x in found.items()} == {
        "evaluation.prefill in train.opd": {"KV cache": 5, "teacher": 16, "training state": 8},
        "evaluation.decode in train.opd": {"teacher": 16, "training state": 12},
        "evaluation.score in train.opd": {"training state": 12},
        "evaluation.prefill in train.opd_topk": {"KV cache": 5, "training state": 8},
        "evaluation.decode in train.opd_topk": {"training state": 12},
    }
    assert {x.runs for x in found.values()} == {0.0}
