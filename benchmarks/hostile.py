"""How long texts that mean harm take to be refused: `python benchmarks/hostile.py`.

Processor time of `surgery.check` on texts as long as one may be, in bytes or in words and signs.
"""

from __future__ import annotations

import time

import surgery
from surgery.language.parse import MAX_BYTES, MAX_WORDS

GOAL = 1.0  # seconds for any text
LONG = "x" * (MAX_BYTES - 100)
NAME = "a_name_of_some_length_"


def repeated(text: str, words: int) -> str:
    """A text of so many words and signs, as often as may be."""
    return text * ((MAX_WORDS - 20) // words)


TEXTS = {
    "a sum": "let a = " + repeated("1+", 2) + "1",
    "an unfinished sum": "let a = " + repeated("1+", 2),
    "alternatives": "match " + repeated("a|", 2) + "a apply lora()",
    "steps of a scope": "match q in " + repeated("a[0].", 5) + "a apply lora()",
    "arguments": "match q apply lora(" + repeated("r=1,", 4) + ")",
    "a chain": "match q apply lora()" + repeated(" then lora()", 4),
    "statements": repeated("match q apply lora() ", 6),
    "names": "".join(f"let {NAME}{i} = {NAME}x{i} " for i in range(MAX_WORDS // 4 - 5)),
    "methods": "".join(f"method {NAME}{i}() on matrix {{ }} " for i in range(MAX_WORDS // 8 - 5)),
    "one name": f"match q apply {LONG}()",
    "one regex": f"match /{LONG}/ apply lora()",
    "one glob": f"match {LONG} apply lora()",
    "repeats": "match /" + "(a{0,9}|b)?" * 800 + "/ apply lora()",
    "signs": "$" * (MAX_BYTES - 1),
    "brackets": "(" * (MAX_BYTES - 1),
}


def main() -> None:
    surgery.check("match q apply lora()")
    for name, text in TEXTS.items():
        before = time.process_time()
        found = surgery.check(text)
        taken = time.process_time() - before
        said = found[0].code if found else "nothing"
        note = "" if taken < GOAL else f" above {GOAL} s"
        print(f"{name:20} {taken:6.2f} s, {len(found)} found, the first {said}{note}")


if __name__ == "__main__":
    main()
