"""Text for people: durations, sizes, numbers and names."""

import pytest

from curvlab.tools.text import as_bytes, duration, number, size, unknown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (125, "2 min 05 s"),
        (3599.9, "1 h 00 min"),
        (12000, "3 h 20 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("amount", "text"),
    [(3, "3 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (2**50, "1024.0 TiB")],
)
def test_size(amount, text):
    assert size(amount) == text


def test_number():
    assert number(float("nan")) == "–"
    assert number(0.123456) == "0.1235"


def test_amounts_of_memory():
    assert [as_bytes(text) for text in ("512B", "1.5KiB", "2 GiB", 77)] == [512, 1536, 2**31, 77]
    for wrong in ("2GB", "lots", "", 0, "0B"):
        with pytest.raises(ValueError, match="memory is a number of bytes or text such as '2GiB'"):
            as_bytes(wrong)


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    assert unknown("structure", "blok-diagonal", ["full", "block-diagonal"]) == (
        "Unknown structure 'blok-diagonal'. Did you mean 'block-diagonal'? Known: full, block-diagonal."
    )
    assert unknown("structure", "zzz", ["full"]) == "Unknown structure 'zzz'. Known: full."
