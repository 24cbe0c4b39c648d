"""A tiny byte-level tokenizer: 256 bytes, a few merges, chat tokens and a chat template."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "Ġ"), ("1", "2"), ("Ċ", "Ċ")]
SPECIAL = ["<|end|>", "<|start|>", "<|stop|>"]
PLAIN = ["<think>"]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if not enable_thinking %}<think>\n{% endif %}{% endif %}"
)


def tokens() -> list[str]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*alphabet, *(a + b for a, b in MERGES), *SPECIAL, *PLAIN]


def backend(merges: list[tuple[str, str]] | None = None) -> Tokenizer:
    vocab = {token: number for number, token in enumerate(tokens())}
    built = Tokenizer(models.BPE(vocab=vocab, merges=MERGES if merges is None else merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    built.add_tokens([AddedToken(token, normalized=False) for token in PLAIN])
    return built


def write_tokenizer(
    folder: Path,
    merges: list[tuple[str, str]] | None = None,
    template: str | None = TEMPLATE,
    generation: dict | None = None,
    **config: object,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend(merges).save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"} | config
    if template is not None:
        content["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
