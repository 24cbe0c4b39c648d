import json

import pytest
from tiny_gguf import write_gguf
from tiny_tokenizers import MERGES, TEMPLATE, backend, tokens, write_tokenizer
from tokenizers import processors

from opd_jax.data.tokenizer import load_tokenizer
from opd_jax.errors import DataError, ModelError

USER = ({"role": "user", "content": "hello"},)
PROBES = ["hello  12\n\n12 é 日本 🎉", "<|start|>user\n<think>x</think><|end|>", "", "\r\n\t x==1"]
END, STOP = tokens().index("<|end|>"), tokens().index("<|stop|>")


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))


def test_text_there_and_back(tokenizer):
    for text in PROBES:
        ids = tokenizer.encode(text)
        assert all(type(token) is int for token in ids)
        assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode(tokenizer.encode("<think>a<|end|>")) == "<think>a"
    assert tokenizer.encode("hello") == [tokens().index("hello")]


def test_chat_ends_with_the_generation_prompt(tokenizer):
    text = "<|start|>user\nhello<|end|>\n<|start|>assistant\n"
    assert tokenizer.encode_chat(USER, True, None) == tokenizer.encode(text)
    assert tokenizer.encode_chat(USER, False, None) == tokenizer.encode(text + "<think>\n")


def test_system_message_goes_first_unless_the_chat_has_one(tokenizer):
    assert tokenizer.render_chat(USER, True, "be brief").startswith("<|start|>system\nbe brief<|e")
    own = ({"role": "system", "content": "own"}, *USER)
    assert tokenizer.render_chat(own, True, "be brief") == tokenizer.render_chat(own, True, None)


def test_template_that_refuses(tokenizer):
    with pytest.raises(DataError, match="no tools"):
        tokenizer.encode_chat(({"role": "tool", "content": "x"},), True, None)


def test_no_template_depends_on_the_day(tmp_path):
    template = TEMPLATE + "{{ date_string if date_string is defined else strftime_now('%f') }}"
    folder = write_tokenizer(tmp_path, template=template)
    assert load_tokenizer(folder).render_chat(USER).endswith("26 Jul 2024")


@pytest.mark.parametrize(
    ("generation", "ends"),
    [(None, (END,)), ({"eos_token_id": STOP}, (END, STOP)), ({"eos_token_id": [STOP, END]}, None)],
)
def test_end_ids_join_generation_config_and_eos_token(tmp_path, generation, ends):
    loaded = load_tokenizer(write_tokenizer(tmp_path, generation=generation))
    assert loaded.end_ids == (ends or (END, STOP))


def test_template_of_its_own_file_wins(tmp_path):
    folder = write_tokenizer(tmp_path, template="old")
    (folder / "chat_template.jinja").write_text("new")
    assert load_tokenizer(folder).render_chat(USER) == "new"


def test_named_templates_and_token_objects(tmp_path):
    folder = write_tokenizer(
        tmp_path,
        template=None,
        chat_template=[{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}],
        eos_token={"content": "<|stop|>", "__type": "AddedToken"},
    )
    loaded = load_tokenizer(folder)
    assert (loaded.render_chat(USER), loaded.end_ids) == ("b", (STOP,))


def test_fingerprint_sees_merges_template_and_end_tokens(tmp_path):
    swapped = [MERGES[1], MERGES[0], *MERGES[2:]]
    variants = [
        {},
        {"merges": swapped},
        {"template": TEMPLATE + " "},
        {"generation": {"eos_token_id": STOP}},
    ]
    prints = [
        load_tokenizer(write_tokenizer(tmp_path / str(number), **variant)).fingerprint
        for number, variant in enumerate(variants)
    ]
    assert len(set(prints)) == len(variants)
    again = load_tokenizer(write_tokenizer(tmp_path / "again"))
    assert again.fingerprint == prints[0]


def test_saved_files_are_copies(tmp_path):
    source = write_tokenizer(tmp_path / "in", generation={"eos_token_id": [STOP, END]})
    (source / "model.safetensors").write_text("weights")
    loaded = load_tokenizer(source)
    out = tmp_path / "out"
    out.mkdir()
    loaded.save(out)
    names = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert load_tokenizer(out).fingerprint == loaded.fingerprint


def test_gguf_tokenizer_is_that_of_the_folder(tmp_path, tokenizer):
    write_gguf(tmp_path / "m.gguf")
    loaded = load_tokenizer(tmp_path / "m.gguf")
    for text in PROBES:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert loaded.end_ids == (END, STOP)
    assert loaded.encode_chat(USER) == tokenizer.encode_chat(USER)


def test_gguf_tokenizer_saved_and_read_back(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    loaded = load_tokenizer(tmp_path / "m.gguf")
    loaded.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == loaded.fingerprint


def test_gguf_tokenizer_of_an_unknown_kind(tmp_path):
    write_gguf(tmp_path / "m.gguf", tokenizer_pre="tekken")
    with pytest.raises(ModelError, match=r"'tekken' is not supported.*llama-bpe"):
        load_tokenizer(tmp_path / "m.gguf")


@pytest.mark.parametrize(("pre", "says"), [("", "None"), ("default", "'default'")])
def test_gguf_tokenizer_that_does_not_say_how_it_splits(tmp_path, pre, says):
    path = tmp_path / "m.gguf"
    write_gguf(path, tokenizer_pre=pre)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: tokenizer.ggml.pre={says} does not say")
    for word in ("gguf-new-metadata --pre-tokenizer", "smollm", "llama-bpe", "qwen2", "gpt-2"):
        assert word in message
    assert "\n" not in message


def test_vocabulary_must_fit_the_model(tmp_path, tokenizer):
    size = len(tokens())
    assert tokenizer.vocab_size == size
    tokenizer.check_vocabulary(size, "model")
    tokenizer.check_vocabulary(size + 9, "model")
    with pytest.raises(ModelError, match=f"vocab_size={size - 1}.*up to {size - 1}"):
        tokenizer.check_vocabulary(size - 1, "model")
    wrong = load_tokenizer(write_tokenizer(tmp_path / "w", generation={"eos_token_id": 999}))
    with pytest.raises(ModelError, match="end token id 999"):
        wrong.check_vocabulary(size, "model")


def _broken(folder, name, content):
    write_tokenizer(folder)
    path = folder / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_broken_folders_are_one_line(tmp_path):
    assert "tokenizer.json: missing" in _broken(tmp_path, "tokenizer.json", None)
    assert "tokenizer.json: broken" in _broken(tmp_path, "tokenizer.json", '{"a": 1}')
    assert "tokenizer_config.json" in _broken(tmp_path, "tokenizer_config.json", "{")
    assert "no chat template" in _broken(tmp_path, "tokenizer_config.json", "{}")
    no_end = json.dumps({"chat_template": "x"})
    assert "no end token" in _broken(tmp_path, "tokenizer_config.json", no_end)
    wrong = json.dumps({"eos_token_id": ["</s>"]})
    assert "eos_token_id" in _broken(tmp_path, "generation_config.json", wrong)
    with pytest.raises(ModelError, match="no such model folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_end_ids_of_the_model_config_where_the_generation_config_names_none(tmp_path):
    folder = write_tokenizer(tmp_path, generation={"temperature": 0.6})
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [STOP]}))
    assert load_tokenizer(folder).end_ids == (END, STOP)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert load_tokenizer(folder).end_ids == (0, END)


@pytest.mark.parametrize("generation", [None, {"temperature": 0.6, "eos_token_id": STOP}])
def test_a_saved_tokenizer_names_every_end_token(tmp_path, generation):
    loaded = load_tokenizer(write_tokenizer(tmp_path / "in", generation=generation))
    (tmp_path / "out").mkdir()
    loaded.save(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == (generation or {}) | {"eos_token_id": list(loaded.end_ids)}


def test_a_text_is_read_behind_the_beginning_token_where_the_tokenizer_puts_it(tmp_path, tokenizer):
    assert tokenizer.encode_opening("hello 1") == tokenizer.encode("hello 1")
    folder = write_tokenizer(tmp_path / "hf", bos_token="<|start|>")
    assert load_tokenizer(folder).encode_opening("hello") == tokenizer.encode("hello")
    built, start = backend(), backend().token_to_id("<|start|>")
    built.post_processor = processors.TemplateProcessing(
        "<|start|> $A <|end|>",
        special_tokens=[(text, built.token_to_id(text)) for text in ("<|start|>", "<|end|>")],
    )
    built.save(str(folder / "tokenizer.json"))
    begin = {"tokenizer.ggml.bos_token_id": start, "tokenizer.ggml.add_bos_token": True}
    write_gguf(tmp_path / "m.gguf", extra=begin)
    for path in (folder, tmp_path / "m.gguf"):
        loaded = load_tokenizer(path)
        assert loaded.encode("hello") == tokenizer.encode("hello")
        assert loaded.encode_opening("hello") == [start, *tokenizer.encode("hello")]
        assert loaded.encode_opening("<|start|>hello") == [start, *tokenizer.encode("hello")]


def test_a_tokenizer_without_a_template_encodes_texts_alone(tmp_path):
    folder = write_tokenizer(tmp_path, template=None)
    loaded = load_tokenizer(folder, chats=False)
    assert loaded.decode(loaded.encode_opening("hello")) == "hello"
    with pytest.raises(DataError, match=r"has no chat template, .* give a text, or add chat_templ"):
        loaded.encode_chat([{"role": "user", "content": "hello"}])
