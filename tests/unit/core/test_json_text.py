"""JSON objects are read whole and unambiguous, or refused in one line."""

import pytest

from megatron.core.json_text import parse_object


def test_an_object_is_read():
    assert parse_object('{"a": {"b": [1, 2.5]}, "c": null}') == {"a": {"b": [1, 2.5]}, "c": None}
    assert parse_object('{"ä": 1}'.encode()) == {"ä": 1}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "Expecting value"),
        ("[1]", "it holds list, and an object is needed"),
        ('{"a": 1, "b": 2, "b": 2}', "it has the key 'b' twice"),
        ('{"a": {"b": 1, "b": 2}}', "it has the key 'b' twice"),
        ('{"a": ' * 100_000, "brackets are nested too deep"),
        ("[" * 100_000, "brackets are nested too deep"),
        (b"\xff\xfe{", "codec can't decode"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
    ],
)
def test_what_is_no_object_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_object(text)
