"""The sampler that people import: its samples, its streams of text, and what it refuses."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import write_gguf
from tiny_models import write_model
from tiny_tokenizers import backend, write_tokenizer

from opd_jax.config import MeshConfig, SamplingConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.errors import ConfigError, DataError, ModelError
from opd_jax.sampling import Sample, Sampler, TextStream, engine
from opd_jax.sampling.queue import Request
from opd_jax.sampling.sampler import SamplingJob, generate
from opd_jax.sampling.stops import stop_length

README = Path(__file__).resolve().parents[2] / "README.md"
CHAT = [{"role": "user", "content": "hello"}]
SIZES = {"vocab_size": 280, "max_position_embeddings": 2048}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("api") / "model"
    write_model(path, **SIZES)
    return write_tokenizer(path)


@pytest.fixture(scope="module")
def sampler(folder):
    return Sampler.load(folder)


def test_samples_are_those_of_generate(sampler):
    prompts = ["hello 12", [5, 6, 7], CHAT]
    bends = {"temperature": 0.9, "top_k": 50, "max_new_tokens": 7}
    samples = sampler.sample(prompts, 2, seed=3, ids=["a", "b", "c"], **bends)
    tokenizer = sampler.tokenizer
    encoded = [tokenizer.encode("hello 12"), [5, 6, 7], tokenizer.encode_chat(CHAT)]
    requests = [
        Request(name, i, np.array(ids, np.int32))
        for name, ids in zip("abc", encoded, strict=True)
        for i in range(2)
    ]
    sampling = SamplingConfig(slots=4, **bends)
    job = SamplingJob(sampler.model, sampler.params, sampling, tokenizer.end_ids, 3)
    wanted = {(s.request.prompt_id, s.request.sample_index): s for s in generate(job, requests)}
    order = [(s.request.prompt_id, s.request.sample_index) for s in samples]
    assert order == [(r.prompt_id, r.sample_index) for r in requests]
    for sample in samples:
        other = wanted[sample.request.prompt_id, sample.request.sample_index]
        assert sample.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(sample.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_allclose(sample.drawn_logprobs, other.drawn_logprobs, atol=1e-5)
        assert sample.finish_reason == other.finish_reason
        assert sample.text == tokenizer.decode(sample.token_ids.tolist())


def test_samples_of_a_prompt_share_its_prefill(sampler, monkeypatch):
    read = []

    def noting(program, params, tokens_pt, length_p):
        read.extend(row for row in np.asarray(tokens_pt) if row.any())
        return prefill(program, params, tokens_pt, length_p)

    prefill = engine.prefill
    monkeypatch.setattr(engine, "prefill", noting)
    samples = sampler.sample(["hello 12", "hell"], 5, max_new_tokens=3)
    assert len({s.token_ids.tobytes() for s in samples}) > 5
    assert len(read) == 2


def test_a_sample_depends_on_seed_and_prompt_id(sampler):
    def drawn(**changes):
        (sample,) = sampler.sample([CHAT], max_new_tokens=12, **changes)
        return sample.token_ids.tolist()

    assert drawn() == drawn(ids=["0"], seed=0)
    assert len({tuple(drawn(**c)) for c in ({}, {"seed": 1}, {"ids": ["1"]})}) == 3


@pytest.mark.slow
def test_without_a_limit_a_response_may_fill_the_positions(sampler):
    stream = sampler.stream([5] * 2040, min_new_tokens=8)
    "".join(stream)
    assert len(stream.token_ids) == 8


@pytest.mark.slow
def test_without_a_limit_a_long_prompt_beside_it_does_not_cut_a_response(sampler):
    (alone,) = sampler.sample([[5] * 1990])
    assert len(alone.token_ids) > 8
    short, long = sampler.sample([[5] * 1990, [5] * 2040])
    assert short.token_ids.tolist() == alone.token_ids.tolist()
    assert len(long.token_ids) <= 8


@pytest.mark.slow
def test_prompts_have_settings_of_their_own(sampler):
    each = [{}, {"max_new_tokens": 3}, {"temperature": 0.0, "stop": "never said"}]
    prompts, shared = ["one", "two", "three"], {"max_new_tokens": 9, "min_new_tokens": 2}
    together = sampler.sample(prompts, 2, each=each, slots=3, **shared)
    for i, (prompt, more) in enumerate(zip(prompts, each, strict=True)):
        alone = sampler.sample([prompt], 2, ids=[str(i)], **{**shared, **more})
        for a, b in zip(together[2 * i : 2 * i + 2], alone, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            assert a.text == b.text
    assert together[4].token_ids.tolist() == together[5].token_ids.tolist()


@pytest.mark.first_by_default
@pytest.mark.parametrize("bend", [{}, {"temperature": 0}, {"min_new_tokens": 9}])
def test_a_stream_is_the_text_of_its_sample(sampler, bend):
    bend = {"max_new_tokens": 30, **bend}
    (sample,) = sampler.sample([CHAT], seed=5, **bend)
    stream = sampler.stream(CHAT, seed=5, **bend)
    assert isinstance(stream, TextStream)
    assert stream.sample is None
    assert "".join(stream) == sample.text
    assert isinstance(stream.sample, Sample)
    assert stream.sample.token_ids.tolist() == sample.token_ids.tolist()
    assert stream.token_ids.tolist() == sample.token_ids.tolist()


def test_a_stop_string_is_never_shown(sampler):
    (free,) = sampler.sample([CHAT], max_new_tokens=60, min_new_tokens=40)
    clean = next(m for m in re.finditer(r"[ -~]{2}", free.text) if m.start() > 3)
    stop = clean.group()
    least = {"max_new_tokens": 60}
    (sample,) = sampler.sample([CHAT], stop=stop, **least)
    assert sample.text == free.text[: free.text.index(stop)]
    assert sample.finish_reason == "stop"
    pieces = list(sampler.stream(CHAT, stop=[stop, "never said"], **least))
    assert "".join(pieces) == sample.text
    assert len(pieces) > 1


def test_a_stream_comes_in_pieces_and_can_be_left(sampler):
    stream = sampler.stream(CHAT, max_new_tokens=1000, min_new_tokens=1000)
    next(stream)
    assert 0 < len(stream.token_ids) < 20


TOKENIZER = backend()


def scripted(tokens, stops, least, cuts):
    """A stream whose tokens are told at these counts, and end as the sampler would end them."""
    n = stop_length(tokens, 0, stops, least, decode)
    tokens = np.array(tokens[:n], np.int32)
    empty = np.zeros(len(tokens), np.float32)
    request = Request("0", 0, tokens)
    sample = Sample(request, tokens, empty, empty, "length" if n is None else "stop", None)

    def begin(on_tokens):
        for cut in sorted(cut for cut in cuts if 0 < cut < len(tokens)):
            on_tokens(request, tokens[:cut])
            yield []
        on_tokens(request, tokens)
        yield [sample]

    return TextStream(begin, decode, stops)


def decode(ids):
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)


def test_an_unfinished_character_is_held_back():
    tokens = TOKENIZER.encode("aé€🦊b").ids
    pieces = list(scripted(tokens, (), 0, range(len(tokens))))
    assert pieces == ["a", "é", "€", "🦊", "b"]


def test_what_may_become_a_stop_string_is_held_back():
    tokens = TOKENIZER.encode("a STOP, STORY STOP").ids
    for stops in (("STOP",), ("OP", "STOP"), ("STOP", "OP")):
        assert "".join(scripted(tokens, stops, 0, range(99))) == "a "
    pieces = list(scripted(tokens, ("STORE", "STOP"), 8, range(99)))
    assert "".join(pieces) in ("a ", "a STOP, STORY ")
    assert not any(piece.endswith("S") for piece in pieces)


@settings(max_examples=200)
@given(
    text=st.text(alphabet="abé🦊\n", max_size=40),
    noise=st.lists(st.integers(0, 258), max_size=3),
    stops=st.lists(st.text(alphabet="abé🦊", min_size=1, max_size=3), max_size=2),
    least=st.integers(0, 30),
    cuts=st.sets(st.integers(0, 60)),
)
def test_pieces_make_up_the_text_without_its_stop_string(text, noise, stops, least, cuts):
    tokens = [*TOKENIZER.encode(text).ids, *noise]
    least = min(least, len(tokens))
    stream = scripted(tokens, tuple(stops), least, cuts)
    said = "".join(stream)
    assert said == stream.sample.text
    assert decode(stream.token_ids).startswith(said)
    if stream.sample.finish_reason == "length":
        assert said == decode(tokens)
    elif least == 0:
        assert not any(stop in said for stop in stops)


@pytest.mark.slow
def test_a_growing_chat_compiles_few_programs(sampler):
    programs = (engine.prefill, engine.start, engine.decode_round, engine.empty_state)
    before = [program._cache_size() for program in programs]
    for tokens in (90, 100, 128, 200, 250, 700, 800, 1000, 1100, 1500, 1900):
        "".join(sampler.stream([5] * tokens, max_new_tokens=5, top_p=0.9))
    new = [program._cache_size() - b for program, b in zip(programs, before, strict=True)]
    # Prompts of 128, 256, 1024 and 2048 tokens, and room for 1024 and 2048.
    assert new == [4, 4, 2, 2]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"temperature": -1}, ConfigError, "temperature: must be greater than .* 0, but is -1"),
        ({"top_p": 0}, ConfigError, "top_p: must be greater than 0, but is 0"),
        ({"top_p": 1.5}, ConfigError, "top_p: must be less than or equal to 1, but is 1.5"),
        ({"top_k": 2**40}, ConfigError, "top_k: must be less than or equal to 2147483647"),
        ({"top_k": 2.5}, ConfigError, "top_k: must be a whole number, but is 2.5"),
        ({"stop": ""}, ConfigError, r"stop\[0\]: must not be empty"),
        ({"temprature": 1}, ConfigError, "unknown key 'temprature'; did you mean 'temperature'?"),
        ({"seeds": 1}, ConfigError, "unknown key 'seeds'; the keys here are temperature, top_k"),
        ({"samples_per_prompt": 2}, ConfigError, "unknown key 'samples_per_prompt'; give n"),
        ({"max_new_tokens": 2, "min_new_tokens": 3}, ConfigError, "min_new_tokens 3 is above"),
        ({"n": 0}, ConfigError, "n=0; ask for at least 1 sample"),
        ({"n": True}, ConfigError, "n=True; ask for at least 1 sample"),
        ({"prompts": "hello"}, DataError, "prompts='hello' is one prompt; give a list"),
        ({"prompts": CHAT}, DataError, "is one prompt; give a list"),
        ({"prompts": [1, 2]}, DataError, r"prompts=\[1, 2\] is one prompt; give a list"),
        ({"prompts": [""]}, DataError, "prompt '0' is empty; give it at least one token"),
        ({"prompts": [[]]}, DataError, "prompt '0' is empty"),
        ({"prompts": ["a", [1, 280]]}, DataError, "prompt '1': token 280 is outside"),
        ({"prompts": [[2**40]]}, DataError, "prompt '0': token .* is outside the vocabulary"),
        ({"prompts": [[2**70]]}, DataError, "prompt '0': token .* is outside the vocabulary"),
        ({"prompts": [[1, "a"]]}, DataError, r"prompt '0' is \[1, 'a'\]; give a text, a list of"),
        ({"prompts": [[{"role": "user"}]]}, DataError, "messages with 'role' and 'content'"),
        ({"prompts": [None]}, DataError, "prompt '0' is None; give a text"),
        ({"prompts": [[5] * 2049]}, DataError, "2049 prompt tokens .* exceed the model's 2048"),
        ({"prompts": [[5] * 2000], "max_new_tokens": 49}, DataError, "exceed the model's 2048"),
        ({"each": []}, ConfigError, "each has settings for 0 prompts, there are 1; give {}"),
        ({"each": [{"slots": 2}]}, ConfigError, "each: slots are shared"),
        ({"each": [{"top_p": 2}]}, ConfigError, "top_p: must be less than or equal to 1"),
        ({"ids": [0]}, DataError, r"ids=\[0\]; give every prompt a text as its id"),
        ({"ids": ["a", "b"]}, DataError, "2 ids, 2 different ones, for 1 prompts"),
        ({"ids": ["a", "a"], "prompts": ["x", "y"]}, DataError, "2 ids, 1 different ones"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(sampler, changes, error, message):
    arguments = {"prompts": ["hello"], **changes}
    with pytest.raises(error, match=f"^sampling: .*{message}") as caught:
        sampler.sample(**arguments)
    assert "\n" not in str(caught.value)


def test_a_stream_refuses_before_it_is_read(sampler):
    with pytest.raises(ConfigError, match="temperature"):
        sampler.stream("hello", temperature=-1)
    with pytest.raises(DataError, match="prompt '0' is empty"):
        sampler.stream("")


def test_no_prompts_no_samples(sampler):
    assert sampler.sample([]) == []


def test_what_cannot_be_loaded_is_one_line(tmp_path, folder):
    with pytest.raises(ModelError, match="no such"):
        Sampler.load(tmp_path / "none")
    with pytest.raises(ConfigError, match="compute_dtype='int8'; give auto, float32 or bfloat16"):
        Sampler.load(folder, compute_dtype="int8")


@pytest.mark.slow
def test_a_mesh_and_other_parameters(sampler, folder):
    spread = Sampler.load(folder, mesh=make_mesh(MeshConfig(fsdp=2, tensor=2)))
    wanted = sampler.sample([CHAT, "hello"], max_new_tokens=6)
    found = spread.sample([CHAT, "hello"], max_new_tokens=6)
    assert [s.token_ids.tolist() for s in found] == [s.token_ids.tolist() for s in wanted]
    louder = {**sampler.params, "final_norm": sampler.params["final_norm"] * 9}
    other = dataclasses.replace(sampler, params=louder)
    (sharp,), (flat,) = (
        s.sample([CHAT], max_new_tokens=1, temperature=0) for s in (other, sampler)
    )
    assert sharp.token_ids.tolist() == flat.token_ids.tolist()
    assert sharp.logprobs[0] > flat.logprobs[0] + 0.1


def test_the_example_of_the_readme(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "from opd_jax.sampling import" in block]
    assert len(code.splitlines()) <= 10
    write_gguf(tmp_path / "model.gguf", max_position_embeddings=512)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})
    assert capsys.readouterr().out.count("\n") >= 4
