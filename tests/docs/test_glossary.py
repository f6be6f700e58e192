"""One meaning a word."""

import re
from pathlib import Path

GLOSSARY = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text()
SECTIONS = [re.findall(r"^\| ([^|]+) \|", section, flags=re.MULTILINE) for section in GLOSSARY.split("\n## ")[1:]]


def test_no_word_has_two_meanings():
    words = [word for section in SECTIONS for word in section if word != "word"]
    assert len(words) > 50
    assert sorted(words) == sorted(set(words))


def test_sections_are_in_alphabetical_order():
    for section in SECTIONS:
        assert section[1:] == sorted(section[1:], key=str.lower)
