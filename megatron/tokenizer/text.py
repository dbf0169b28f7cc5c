"""Text as tokenizers accept it."""


def valid_unicode(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates, which JSON can spell and UTF-8 cannot, as U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
