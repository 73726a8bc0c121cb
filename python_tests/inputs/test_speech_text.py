"""Spoken form of text: numbers read back, what may come out, texts in blocks, and hostile texts."""

from __future__ import annotations

import random
import re
import time

import pytest

from ming_rt.inputs import speech_text
from ming_rt.inputs.speech_text import HAN, han_count, normalise, number

CPU_SECONDS = 20  # for the hostile texts; the slowest takes about one
SIZE = 100_000
VALUES = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"两": 2}


def read(words):
    """The integer that Chinese number words stand for."""
    for unit, weight in (("亿", 10**8), ("万", 10**4), ("千", 1000), ("百", 100), ("十", 10)):
        if unit in words:
            above, below = words.rsplit(unit, 1)
            return (read(above) if above else 1) * weight + (read(below) if below else 0)
    return VALUES[words[-1]]


def test_integers_can_be_read_back():
    rng = random.Random(1)
    numbers = [*range(2000), *(rng.randrange(10 ** rng.randrange(1, 40)) for _ in range(500))]
    numbers += [10**k + d for k in range(1, 30) for d in (-1, 0, 1, 50)]
    for n in numbers:
        assert read(number(str(n))) == n


@pytest.mark.parametrize(
    ("digits", "words"),
    [
        ("0", "零"),
        ("007", "七"),
        ("10", "十"),
        ("110", "一百一十"),
        ("2", "二"),
        ("200", "两百"),
        ("20", "二十"),
        ("10050", "一万零五十"),
        ("100000000000000000", "十亿亿"),
        ("3.140", "三点一四"),
        (".5", "零点五"),
        ("2.0", "二"),
        (".0", ""),
        ("٢٠٠", "两百"),
    ],
)
def test_numbers(digits, words):
    assert number(digits) == words


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("02:30:00", "二点三十分"),
        ("2:30", "两点半"),
        ("-3/4", "负四分之三"),
        ("5--3", "五到负三"),
        ("-5摄氏度", "零下五摄氏度"),
        ("京A8·学B1", "京A八学B一"),
        ("1+个，2+个", "一多个，二多个"),
        ("2个,12个", "两个，一两个"),
        ("a--b", "a，b"),
        ("--你好--", "，你好，"),
        ("１００ｍｌ", "一百毫升"),
        ("٣个", "三个"),
        ("\x00\ud800\u200b", ""),
    ],
)
def test_spoken_form(text, spoken):
    assert normalise(text) == spoken


def texts(seed, count=300):
    rng = random.Random(seed)
    signs = "0123456789.,:;/-~_'%+=<>$¥ \n\t()年月日号点分元个两多几度京A万亿百x你好。！？😀m²㎡～…"
    words = [
        "ml",
        "mmHg",
        "℃",
        "°C",
        "RMB",
        "2024-03-05",
        "13812345678",
        "400-810-8888",
        "摄氏度",
        "毫米汞柱",
    ]
    for _ in range(count):
        parts = [rng.choice(words) if rng.random() < 0.1 else rng.choice(signs) for _ in range(40)]
        yield "".join(parts)


def test_nothing_else_comes_out():
    allowed = re.compile(f"[。！？，{HAN}a-zA-Z ]*")
    for text in texts(2):
        spoken = normalise(text)
        assert allowed.fullmatch(spoken)
        assert "，，" not in spoken
        assert "  " not in spoken
        assert han_count(spoken) == sum(c not in "。！？， " and not c.isascii() for c in spoken)


def test_blocks_are_cut_at_pauses(monkeypatch):
    sentences = ["价格是3.5元。", "2024-03-05那天！", "打12345?", "Call 13812345678; ", "好了。"]
    rng = random.Random(3)
    for block in (14, 25, 60):
        monkeypatch.setattr(speech_text, "BLOCK", 2 * block)
        chosen = rng.choices(sentences, k=100)
        assert normalise("".join(chosen)) == "".join(map(normalise, chosen))


def test_blocks_end_somewhere(monkeypatch):
    monkeypatch.setattr(speech_text, "BLOCK", 8)
    assert normalise("好" * 20) == "好" * 20
    assert normalise("12个" * 3) == "十二个" * 3  # cut between the digits and their quantifier or not


HOSTILE = {
    "digits": "1" * SIZE,
    "decimal": "1" * (SIZE // 2) + "." + "1" * (SIZE // 2),
    "dotted": "1." * (SIZE // 2),
    "signs": "-1" * (SIZE // 2),
    "minus": "-" * SIZE,
    "quotes": "-'" * (SIZE // 2),
    "money": "$" + "9" * SIZE,
    "prices": "1元-" * (SIZE // 3),
    "ranges": "1至" * (SIZE // 2),
    "counts": "2两" * (SIZE // 2),
    "fractions": "1/" * (SIZE // 2),
    "times": "12:30:" * (SIZE // 6),
    "dates": "2024-1-1-" * (SIZE // 9),
    "numbers": " ".join(map(str, range(SIZE // 6))),
    "plates": "".join(f"京A{n}" for n in range(SIZE // 6)),
    "emoji": "😀" * SIZE,
    "control": "\x00\x1b\n\r\t" * (SIZE // 5),
    "spaces": " " * SIZE,
    "other digits": "٣" * SIZE,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_take_bounded_time(text):
    start = time.process_time()
    normalise(text)
    assert time.process_time() - start < CPU_SECONDS
