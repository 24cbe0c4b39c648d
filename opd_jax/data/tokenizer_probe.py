"""Whether two tokenizers give a model the same input: compared on tables, texts and chats.

Two tokenizers are the same if they have the same tokens with the same ids, the same merges, special
tokens and end tokens, cut the probe texts alike and render the probe chats alike. Their files may
differ otherwise: in a template's comments, or because one of them comes out of a GGUF file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd_jax.core.lineage import TokenizerParts, fingerprint_json
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.errors import DataError

TEXTS = (
    "The quick brown fox doesn't jump; it's 3,141.59 dogs' HE'LL they're I'd.",
    "0 1 12 123 1234 12345 3.14159265 1e-9 0x7FFF 2024-07-26 1/2 50% $9.99 47243*8=",
    "  two  three   four    \t\ttabs \n\n\nlines\r\n \n end  ",
    "",
    " ",
    "\n",
    "def f(x: int) -> list[str]:\n    return [f'{x!r}' for _ in range(10)]  # a comment\n\n\n",
    "#include <vector>\nint main() { std::vector<int> v{1,2}; return v[0]<<1 != 3 ? -1 : 0; }",
    "\\frac{a}{b} = \\sum_{i=0}^{n} x_i^2, \\boxed{42} $\\le$ ≤ ∞ ∑ √2 × 10⁻³",
    '{"key": [1, null, true], "a\\"b": "\\u00e9"} <b>x</b> http://a.b/c?d=e&f=%20',
    "ÀÉÎõü ß ﬁ ① Å e\u0301 n\u0303 naïve Ⅻ ½",  # some change under NFC or NFKC
    "日本語のテキスト。中文，汉字！ 한국어 문장 ภาษาไทย",
    "Привет мир Ελληνικά עברית العربية हिन्दी বাংলা",
    "🎉 👩‍👩‍👧 🇩🇪 ❤️ \u200b\u200d\ufeff\u00a0\u3000",
    "don’t “quote” – dash — … CamelCaseWord snake_case UPPER lowerUPPER",
    "aaaaaaaaaaaaaaaaaaaa --------- ======== ........ !!!???",
    "<think>\nHm.\n</think>\n\nThe answer is 7.",
    "\x00\x07\x1b[0m\x7f",
)
"""Prose, numbers, white space, code, mathematics, other scripts, emoji, control characters."""

_USER = {"role": "user", "content": "What is 6*7?"}
_REPLY = {"role": "assistant", "content": "<think>\n6*7\n</think>\n\n42"}
CHATS: tuple[tuple[tuple[dict[str, str], ...], bool, str | None], ...] = (
    ((_USER,), True, None),
    ((_USER,), False, None),
    ((_USER,), True, "Think first."),
    ((_USER, _REPLY, {"role": "user", "content": "  And 7*8?\n"}), True, None),
)
"""Messages, thinking on or off, system prompt."""
REFUSED = "(refused)"
SHOWN = 8


@dataclass(frozen=True)
class _Tables:
    """What a tokenizer's files list."""

    tokens: dict[str, int]
    merges: Any
    special: dict[str, int]


def parts_of(tokenizer: Tokenizer) -> TokenizerParts:
    """Fingerprints of a tokenizer's parts."""
    tables = _tables(tokenizer)
    texts = [*TEXTS, *_special_texts(tables)]
    chats = [rendered(tokenizer, number) for number in range(len(CHATS))]
    return TokenizerParts(
        vocabulary=fingerprint_json([tables.tokens, tables.merges, tables.special]),
        texts=fingerprint_json([tokenizer.encode(text) for text in texts]),
        chat_template=fingerprint_json(tokenizer.chat_template),
        chats=fingerprint_json([[chat, tokenizer.encode(chat)] for chat in chats]),
        end_tokens=fingerprint_json(tokenizer.end_ids),
    )


def first_difference(first: Tokenizer, second: Tokenizer) -> str | None:
    """What reaches a model differently, in words with both values; `None` if nothing does."""
    if first.fingerprint == second.fingerprint:
        return None
    one, two = _tables(first), _tables(second)
    return (
        _texts_differ(first, second, [*TEXTS, *_special_texts(one)])
        or _tokens_differ(first, second, one.tokens, two.tokens, "token")
        or _tokens_differ(first, second, one.special, two.special, "special token")
        or _merges_differ(first, second, one.merges, two.merges)
        or _ends_differ(first, second)
        or _chats_differ(first, second)
    )


def rendered(tokenizer: Tokenizer, number: int) -> str:
    """A probe chat as the template renders it, or that it refuses to."""
    messages, thinking, system = CHATS[number]
    try:
        return tokenizer.render_chat(messages, thinking, system)
    except DataError:
        return REFUSED


def _tables(tokenizer: Tokenizer) -> _Tables:
    content = tokenizer.content()
    model, added = content["model"], content["added_tokens"]
    listed = not isinstance(model["vocab"], dict)  # with scores: there are no merges
    tokens: dict[str, int] = (
        {entry[0]: number for number, entry in enumerate(model["vocab"])}
        if listed
        else dict(model["vocab"])
    )
    return _Tables(
        tokens | {token["content"]: token["id"] for token in added},
        model["vocab"] if listed else model.get("merges"),
        {token["content"]: token["id"] for token in added if token["special"]},
    )


def _special_texts(tables: _Tables) -> list[str]:
    return [f"a {token} b{token}" for token in tables.special]


def _texts_differ(first: Tokenizer, second: Tokenizer, texts: Sequence[str]) -> str | None:
    for text in texts:
        one, two = first.encode(text), second.encode(text)
        if one != two:
            at = _parting(one, two)
            return (
                f"the text {text!r:.80} becomes {_ids(one, at)} in {first.source} and "
                f"{_ids(two, at)} in {second.source}"
            )
    return None


def _tokens_differ(
    first: Tokenizer, second: Tokenizer, one: dict[str, int], two: dict[str, int], what: str
) -> str | None:
    differing = {token for token, _ in one.items() ^ two.items()}
    if not differing:
        return None
    token = min(differing, key=lambda token: one.get(token, two.get(token, 0)))
    ids = [f"id {found[token]}" if token in found else "no id" for found in (one, two)]
    return (
        f"the {what} {token!r:.60} has {ids[0]} in {first.source} and {ids[1]} in {second.source}"
    )


def _merges_differ(first: Tokenizer, second: Tokenizer, one: Any, two: Any) -> str | None:
    if one == two:
        return None
    one, two = one or [], two or []
    at = _parting(one, two)
    shown = [f"{found[at]!r:.60}" if at < len(found) else "absent" for found in (one, two)]
    return f"merge {at} is {shown[0]} in {first.source} and {shown[1]} in {second.source}"


def _ends_differ(first: Tokenizer, second: Tokenizer) -> str | None:
    if first.end_ids == second.end_ids:
        return None
    one, two = (_end_texts(found) for found in (first, second))
    return f"the end tokens are {one} in {first.source} and {two} in {second.source}"


def _end_texts(tokenizer: Tokenizer) -> str:
    ends = ((end, tokenizer.decode([end], skip_special=False)) for end in tokenizer.end_ids)
    return ", ".join(f"{text!r} ({end})" for end, text in ends)


def _chats_differ(first: Tokenizer, second: Tokenizer) -> str | None:
    if first.chat_template == second.chat_template:
        return None
    for number in range(len(CHATS)):
        one, two = rendered(first, number), rendered(second, number)
        if one != two:
            at = max(0, _parting(one, two) - 20)
            return (
                f"the chat template renders ...{one[at : at + 60]!r} in {first.source} and "
                f"...{two[at : at + 60]!r} in {second.source}"
            )
    return None


def _parting(one: Sequence[Any], two: Sequence[Any]) -> int:
    """Where two sequences begin to differ."""
    pairs = enumerate(zip(one, two, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(two)))


def _ids(ids: Sequence[int], at: int) -> str:
    """A few ids from shortly before `at` on."""
    start = max(0, at - 2)
    shown = ", ".join(map(str, ids[start : at + SHOWN]))
    return f"[{'..., ' * (start > 0)}{shown}{', ...' * (at + SHOWN < len(ids))}]"
