"""Spoken form of written text for the talkers of v1 and v1.5: numbers, dates and units as Chinese words.

What comes out holds nothing but Chinese characters, ASCII letters, spaces and ``。！？，``, which is what
these talkers were trained on. The rules, their order and their oddities are those of the original
implementation; English text goes through them too, so its numbers are read in Chinese.
"""

from __future__ import annotations

import re
from collections.abc import Callable

HAN = "\u4e00-\u4e27\u4e29-\u4e3e\u4e42-\u9fa4"
"""Characters that are spoken and counted, as ranges of a regular expression."""

BLOCK = 10_000
"""Characters that are put into words together; see ``normalise``."""

_DIGITS = "零一二三四五六七八九"
_UNITS = ((4, "万"), (3, "千"), (2, "百"), (1, "十"))  # exponent, word; 亿 is handled in ``_cardinal``

# Words that follow a counted number; the first one that fits is taken, so their order matters.
_QUANTIFIERS = (
    "种|次|所|朵|匹|张|座|回|场|尾|条|个|首|阙|阵|网|炮|顶|丘|棵|只|支|袭|辆|挑|担|颗|壳|窠|曲|墙|群|"
    "腔|砣|客|贯|扎|捆|刀|令|打|手|罗|坡|山|岭|江|溪|钟|队|单|双|对|出|口|头|脚|板|跳|枝|件|贴|针|线|"
    "管|名|位|身|堂|课|本|页|家|户|层|丝|毫|厘|分|钱|两|斤|铢|石|钧|锱|忽|千克|毫克|微克|克|公分|寸|"
    "尺|丈|里|寻|常|铺|程|千米|分米|厘米|毫米|微米|米|撮|勺|合|升|斗|盘|碗|碟|叠|桶|笼|盆|盒|杯|斛|"
    "锅|簋|篮|罐|瓶|壶|卮|盏|箩|箱|煲|啖|袋|钵|年|月|日|季|刻|时|周|天|秒|小时|点|旬|纪|岁|世|更|夜|"
    "春|夏|秋|冬|代|伏|辈|丸|泡|粒|幢|堆|根|道|面|片|块|元|亿|千万|百万|万|千|百|亿元|千万元|百万元|"
    "万元|千元|百元|美元|亿块|千万块|百万块|万块|千块|百块|角|毛|公顷|平方|cm²|m²|cm|m|人"
)

_WIDE = {0x3000: " "} | {c: chr(c - 0xFEE0) for c in range(0xFF00, 0xFF5F)}
_BREAKS = str.maketrans(dict.fromkeys("\t\n\f\r", "，"))
_MARKS = str.maketrans(
    {"!": "！", "?": "？"} | dict.fromkeys("…;；﹔｡", "。") | dict.fromkeys(",:：﹐、", "，")
)

# "Not after a digit" in front of a run of digits only keeps the search from trying every part of a long run.
_RUN = r"(?<!\d)\d+"
_NUMBER = rf"{_RUN}(?:\.\d+)?"
_SIGNED = rf"(?:-?{_NUMBER}|\.\d+)"
_COUNTED = rf"(?!\d)[多余几来+]?(?:{_QUANTIFIERS})"


def normalise(text: str) -> str:
    """The words to be spoken for ``text``; may be empty.

    A number is replaced wherever its characters stand, also inside a longer number ("2个,12个" becomes
    "两个，一两个"), as in the original. The time is linear in the length: texts longer than ``BLOCK`` are put
    into words block by block, cut at a pause where there is one, and such replacements stay in their block.
    """
    text = _prepare(text)
    words, start = [], 0
    while start < len(text):
        end = _block_end(text, start)
        words.append(_verbalise(text[start:end]))
        start = end
    return _finish("".join(words))


def han_count(text: str) -> int:
    """The number of Chinese characters, which is how the length of spoken text is measured."""
    return len(_HAN.findall(text))


def number(digits: str) -> str:
    """``"2050.10"`` -> ``"两千零五十点一"``: digits with at most one point, read as a quantity."""
    whole, _, fraction = _ascii(digits).partition(".")
    words = _cardinal(whole)
    if words[:1] == "二" and words[1:2] in ("亿", "万", "千", "百"):
        words = "两" + words[1:]
    fraction = fraction.rstrip("0")
    return f"{words or '零'}点{_each(fraction)}" if fraction else words


def _prepare(text: str) -> str:
    """Plain forms of characters and units, before numbers are read."""
    text = text.translate(_WIDE)
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text).translate(_BREAKS)
    text = text.replace("㎡", "m²").replace("cm²", "平方厘米").replace("m²", "平方米")
    text = re.sub(r">(?=\d)", "大于", text)
    text = re.sub(r"<(?=\d)", "小于", text).replace("=", "等于")
    text = re.sub(r"(?<=\d)ml(?![A-Za-z])", "毫升", text)
    text = re.sub(r"(?<=\d)mmHg(?![A-Za-z])", "毫米汞柱", text)
    return re.sub(r"(?<![\d.])([\d.]+元)-([\d.]+元)", r"\1至\2", text)


def _finish(text: str) -> str:
    """Signs to the few that are spoken as pauses; everything that cannot be spoken goes."""
    text = re.sub("。+", "。", text.translate(_MARKS))
    text = re.sub("~+", "。", text.replace("/", "每").replace("_", " "))
    text = re.sub("(?<=[^a-zA-Z])[-']+", "，", text)
    text = re.sub("[-']+(?=[^a-zA-Z])", "，", text)
    return re.sub(" +", " ", re.sub("，+", "，", _UNSPOKEN.sub("", text)))


def _block_end(text: str, start: int) -> int:
    """Where the block from ``start`` ends: after its last pause, if that is not in its first half."""
    end = start + BLOCK
    if end >= len(text):
        return len(text)
    pause = max(text.rfind(mark, start + BLOCK // 2, end) for mark in "。！？，!?; ")
    return end if pause < 0 else pause + 1


def _verbalise(text: str) -> str:
    if not re.search(r"\d", text):
        return text
    for pattern, spoken in _RULES:
        if isinstance(spoken, str):
            text = pattern.sub(spoken, text)
            continue
        for written, words in [(m.group(), spoken(m)) for m in pattern.finditer(text)]:
            text = text.replace(written, words)
    return text


def _ascii(digits: str) -> str:
    """Decimal digits of any script as 0-9; other characters stay."""
    return digits if digits.isascii() else "".join(str(int(c)) if c.isdecimal() else c for c in digits)


def _each(digits: str, one: str = "一") -> str:
    """Digit by digit; other characters stay."""
    names = _DIGITS.replace("一", one)
    return "".join(names[int(c)] if c.isdecimal() else c for c in digits)


def _cardinal(digits: str) -> str:
    """An integer read as a quantity; ``""`` stays empty."""
    if not digits:
        return ""
    digits = _ascii(digits).lstrip("0")
    # From the right in groups of eight, the weight of 亿; each group in the words below it.
    ends = range(len(digits), 0, -8)
    groups = [_group(digits[max(end - 8, 0) : end]) for end in ends]
    words = "亿".join(reversed(groups)) or "零"
    return words[1:] if words.startswith("一十") else words


def _group(digits: str) -> str:
    """Up to eight digits; a single one after zeros is led in by 零."""
    bare = digits.lstrip("0")
    if len(bare) < 2:
        return "零" * (0 < len(bare) < len(digits)) + _each(bare)
    exponent, unit = next(u for u in _UNITS if u[0] < len(bare))
    return _group(digits[:-exponent]) + unit + _group(digits[-exponent:])


def _minutes(digits: str) -> str:
    """Two digits of a time, 05 read as 零五."""
    return "零" * digits.startswith("0") + number(digits.lstrip("0"))


def _minus(sign: str | None, words: str = "负") -> str:
    return words if sign else ""


def _signed(digits: str) -> str:
    return _minus(digits.startswith("-")) + number(digits.lstrip("-"))


def _date(m: re.Match) -> str:
    month = f"{_cardinal(m[2])}月" if m[2] else ""
    return f"{_each(m[1])}年{month}{_cardinal(m[3]) + m[4] if m[3] else ''}"


def _time(m: re.Match) -> str:
    hour, minute, second = m.groups()
    words = ("两" if hour == "2" else number(hour)) + "点"
    if minute == "30" and second is None:
        words += "半"
    elif minute != "00":
        words += f"{_minutes(minute)}分"
    return words if second in (None, "00") else f"{words}{_minutes(second)}秒"


def _fraction(m: re.Match) -> str:
    sign, above, below, unit = m.groups()
    above, below = number(above), number(below)
    return _minus(sign) + (f"{above}每{below}{unit}" if unit else f"{below}分之{above}")


def _temperature(m: re.Match) -> str:
    return _minus(m[1], "零下") + number(m[2]) + (m[3] if m[3] == "摄氏度" else "度")


def _count(m: re.Match) -> str:
    digits, more, unit = m.groups()
    words = "两" if digits == "2" and not more else number(digits)
    return words + ("多" if more == "+" else more) + unit


def _digits(m: re.Match) -> str:
    return _each(m[0], one="幺")


def _phone(m: re.Match) -> str:
    return _each(m[0].lstrip("+").replace(" ", "，").replace("-", "，"), one="幺")


_HAN = re.compile(f"[{HAN}]")
_UNSPOKEN = re.compile(f"[^。！？，{HAN}a-zA-Z ]")

_DAY = "[12][0-9]|3[01]|0?[1-9]"
_RULES: list[tuple[re.Pattern, str | Callable[[re.Match], str]]] = [
    (re.compile(pattern), spoken)
    for pattern, spoken in (
        # Dates and times.
        (r"(\d{4})年(?:(0?[1-9]|1[0-2])月)?(?:(0?[1-9]|[12][0-9]|30|31)([日号]))?", _date),
        (
            rf"(\d{{4}})([- _/.])(0?[1-9]|1[012])\2({_DAY})",
            lambda m: f"{_each(m[1])}年{_cardinal(m[3])}月{_cardinal(m[4])}日",
        ),
        (r"(?<=[\d%])[-~](?=\d)", "至"),
        ("([0-1]?[0-9]|2[0-3]):([0-5][0-9])(?::([0-5][0-9]))?", _time),
        # Money, temperature, plates, ratios.
        (rf"([¥$])({_NUMBER})", lambda m: number(m[2]) + ("人民币" if m[1] == "¥" else "美元")),
        (rf"({_NUMBER})(?:RMB|rmb)", lambda m: number(m[1]) + "人民币"),
        (rf"(-?)({_NUMBER})(°C|℃|度|摄氏度)", _temperature),
        (
            "[京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼使领][0-9A-Za-z]+",
            _digits,
        ),
        (rf"(-?)({_RUN})/(\d+)(mmHg|毫米汞柱)?", _fraction),
        (rf"(-?)({_NUMBER})%", lambda m: f"{_minus(m[1])}百分之{number(m[2])}"),
        # Telephone numbers: mobile, landline, service line.
        (r"(?<!\d)(?:\+?86 ?)?1(?:[38]\d|5[0-35-9]|7[678]|9[89])\d{8}(?!\d)", _phone),
        (r"(?<!\d)(?:0(?:10|2[1-3]|[3-9]\d{2})-?)?[1-9]\d{7,8}(?!\d)", _phone),
        (r"400-?\d{3}-?\d{4}", _phone),
        # Ranges, signs, decimals, counts, and whatever is left.
        (rf"({_SIGNED})[-~](-?\d+(?:\.\d+)?|\.\d+)", lambda m: f"{_signed(m[1])}到{_signed(m[2])}"),
        (r"-\d+", lambda m: _signed(m[0])),
        (rf"-?{_RUN}\.\d+|\.\d+", lambda m: _signed(m[0])),
        (rf"({_RUN})[至~-](\d+{_COUNTED})", lambda m: f"{number(m[1])}至{m[2]}"),
        (rf"({_RUN})(?!\d)([多余几来+]?)({_QUANTIFIERS})", _count),
        (r"\d{3,}", _digits),
        (_NUMBER, lambda m: number(m[0])),
    )
]
