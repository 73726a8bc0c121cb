"""Pieces of spoken text: streaming equals whole at every cut, lengths, empty and hostile texts."""

from __future__ import annotations

import random

import pytest

from ming_rt.errors import InvalidRequestError
from ming_rt.inputs.sentences import SentenceSplitter, cut, pieces, split_sentences

CHINESE = "今天是2025年5月28日，天气-很好，我们去公园散步吧。1. 苹果\n2. AI技术\n好！ok?\n你想一起去吗？嗯"
ENGLISH = (
    "Dr. Smith lives at 221B Baker Street, London. He paid 2.5 dollars-ish,\nand he likes tea and milk, too. "
)
LATE = "Hello! It costs $3.5, ok?\nHi 你好，这是一个测试句子，看看结果。The end, of all this text"
TEXTS = [
    CHINESE,
    ENGLISH,
    LATE,
    "",
    "。",
    "000",
    "-",
    " \n ",
    "😀" * 13 + "！然后继续说话。",
    "a\n" * 20 + "好",
]


def streamed(parts, **options):
    splitter = SentenceSplitter(**options)
    return [piece for part in parts for piece in splitter.push(part)] + splitter.flush()


@pytest.mark.parametrize("text", TEXTS)
def test_stream_is_the_whole_at_every_cut(text):
    whole = split_sentences(text)
    assert streamed(text) == whole
    for at in range(len(text) + 1):
        assert streamed([text[:at], text[at:]]) == whole


def test_random_streams():
    rng = random.Random(5)
    for _ in range(200):
        text = "".join(rng.choices("你好吗，。！a b.1\n-?,", k=rng.randrange(80)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=3))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        chinese = any(c in "你好吗" for c in text)
        assert streamed(parts, chinese=chinese) == split_sentences(text)
        assert streamed(parts) == streamed([text])


def test_pieces_come_as_soon_as_they_are_certain():
    splitter = SentenceSplitter()
    assert splitter.push("今天天气很好，我们去公园散步吧") == []
    assert [p.text for p in splitter.push("。")] == ["今天天气很好，我们去公园散步吧。"]
    assert [p.group for p in splitter.push("公园里有很多的花，")] == [1]
    words = SentenceSplitter()
    assert words.push("one two three four five six seven eight nine ten eleven twelve thirteen.") == []
    assert len(words.push(" ")) == 1


def test_chinese_after_a_finished_group_of_words():
    words = "one two three four five six seven eight nine ten eleven twelve thirteen. "
    found = streamed([words + "And 今天天气很好，我们去公园散步吧。"])
    assert [(p.text, p.group) for p in found] == [
        ("one two three four five six seven eight nine ten eleven twelve thirteen。", 0),
        ("And今天天气很好，", 1),
        ("我们去公园散步吧。", 2),
    ]


def test_silent_groups_do_not_count():
    found = streamed(["丨" * 13 + "，今天天气很好，我们去公园散步吧。"])
    assert [(p.text, p.group) for p in found] == [("今天天气很好，我们去公园散步吧。", 0)]


@pytest.mark.parametrize("length", [1, 2, 5, 50])
def test_pieces_keep_all_words(length):
    text = "今天天气很好，我们去公园散步吧。公园里有很多花！abc def，" * 3 + "没有标点的很长的句子" * 20
    found = pieces(text, length)
    assert all(found)
    assert max(map(len, found)) <= max(length, len("公园里有很多花！abc def，")) + 1

    def words(text):
        return [c for c in text if c not in "。，！ "]

    assert words("".join(found)) == words(text)


def test_nothing_to_be_spoken():
    assert cut("😀", 50) == [""]
    assert pieces("😀") == pieces("") == []
    assert split_sentences("😀😀") == []


def test_length_must_be_positive():
    with pytest.raises(InvalidRequestError, match="max_length"):
        pieces("好", 0)


@pytest.mark.parametrize(
    "text", ["好" * 100_000, "x" * 100_000, "a\n" * 50_000, "a " * 50_000 + "好", "，" * 100_000]
)
def test_long_texts(text):
    found = split_sentences(text)
    assert sum(len(p.text.replace(" ", "")) for p in found) >= len(text.strip("，").replace(" ", "")) // 2
