"""Names of files and classes as they are written: on one line, and without what moves a terminal."""

import re

# What ends a line or a column somewhere, and what stands for a byte that is not UTF-8.
_UNSAFE = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\udc80-\udcff]")
_ESCAPED = re.compile(r"\\(\\|t|n|r|x[0-9a-f]{2}|u[0-9a-f]{4})")
_SHORT = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}


def escape(path: str) -> str:
    r"""A path as it is written: backslashes, control characters and bytes not of UTF-8 as ``\\ \t \n \u0085 \xe9``."""

    def one(found: re.Match) -> str:
        mark = found.group()
        code = ord(mark)
        if code < 0x80:
            return _SHORT.get(mark) or f"\\x{code:02x}"
        return f"\\x{code - 0xDC00:02x}" if code >= 0xDC80 else f"\\u{code:04x}"

    return _UNSAFE.sub(one, path)


def unescape(text: str) -> str:
    """What `escape` made of a path, back."""

    def one(found: re.Match) -> str:
        mark = found.group(1)
        if mark[0] in "xu":
            code = int(mark[1:], 16)
            return chr(code + 0xDC00) if mark[0] == "x" and code >= 0x80 else chr(code)
        return {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}[mark]

    return _ESCAPED.sub(one, text)
