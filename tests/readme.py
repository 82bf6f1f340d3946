"""The Python blocks of README.md, to be run as they stand there."""

import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def blocks(start, stop="## "):
    """Code of the blocks behind the line that begins with `start`, up to the next line that begins with `stop`."""
    text = README.read_text(encoding="utf-8")
    assert text.count(f"\n{start}") == 1, f"README has {text.count(start)} places {start!r}"
    part = text.split(f"\n{start}")[1].split(f"\n{stop}")[0]
    return re.findall(r"^```python\n(.*?)^```", part, flags=re.DOTALL | re.MULTILINE)


def run(code, **names):
    """Execute a block; returns its names."""
    exec(compile(code, str(README), "exec"), names)
    return names
