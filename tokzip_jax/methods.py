"""Every method that a config can name, as one Markdown table made from the registries.

python -m tokzip_jax.methods            print it
python -m tokzip_jax.methods README.md  put it between the file's two markers
"""

import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

from tokzip_jax import projectors
from tokzip_jax.compress import decoder, registry

BEGIN = "<!-- methods: python -m tokzip_jax.methods README.md -->"
END = "<!-- end of methods -->"
ROWS = {
    "last": "attention of the prompt's last token",
    "prompt": "attention of the prompt",
    "text": "attention of text",
}


class Line(NamedTuple):
    """A line of the table; `cacheable`: the tokens of a picture serve whatever is asked next."""

    name: str
    file: str
    site: str
    classes: tuple[str, ...]
    trained: bool
    reads: str
    count: str
    cacheable: bool
    source: str


def lines() -> Iterator[Line]:
    """All methods, site by site."""
    for name, entry in registry.ENCODER.items():
        if name != "none":
            yield Line(
                name,
                registry.FILE_OF[name],
                "encoder",
                entry.classes,
                False,
                entry.reads,
                entry.count,
                not entry.question,
                entry.source,
            )
    for name, entry in projectors.PROJECTORS.items():
        file = projectors.FILE_OF[name]
        reads = "question, patches" if entry.question else "patches"
        yield Line(name, file, "projector", entry.classes, True, reads, entry.outputs, not entry.question, entry.source)
    for name, entry in decoder.DECODER.items():
        file = decoder.FILE_OF[name]
        yield Line(name, file, "decoder", entry.classes, False, ROWS[entry.rows], entry.count, False, entry.source)
    reads = "patches, in the language model"
    yield Line("voco", "tokzip_jax/voco.py", "bottleneck", ("query",), True, reads, "voco", True, "arXiv 2406.12275")


def table() -> str:
    """The table as Markdown, a line each, the names as links to their files."""
    head = ("method", "site", "class of the survey", "trained", "reads", "tokens out", "one cache for all questions")
    rows = [[*head, "source"], ["---"] * (len(head) + 1)]
    for line in lines():
        rows.append(
            [
                f"[{line.name}]({line.file})",
                line.site,
                ", ".join(line.classes) or "-",
                "yes" if line.trained else "no",
                line.reads,
                line.count,
                "yes" if line.cacheable else "no",
                line.source or "-",
            ]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def placed(text: str) -> str:
    """A text with the table between its markers.

    Raises:
        ValueError: it does not hold both markers, in order.
    """
    before, found, rest = text.partition(BEGIN)
    _, also, after = rest.partition(END)
    if not (found and also):
        raise ValueError(f"the markers {BEGIN!r} and {END!r} must stand in the text, in this order")
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        path = pathlib.Path(sys.argv[1])
        path.write_text(placed(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.stdout.write(table())
