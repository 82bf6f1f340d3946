"""The table of methods in README is the one that the registries give."""

import pytest
from small_run import ROOT

from tokzip_jax import methods
from tokzip_jax.compress.decoder import DECODER
from tokzip_jax.compress.registry import ENCODER
from tokzip_jax.projectors import PROJECTORS


def test_readme_has_the_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert methods.placed(text) == text, "run: python -m tokzip_jax.methods README.md"


def test_every_method_has_a_line_a_class_and_a_file():
    lines = list(methods.lines())
    assert [line.name for line in lines] == [
        *(name for name in ENCODER if name != "none"),
        *PROJECTORS,
        *DECODER,
        "voco",
    ]
    for line in lines:
        assert (ROOT / line.file).is_file() and line.reads and line.count and line.source
        assert set(line.classes) <= {"transformation", "similarity", "attention", "query"}
    by_name = {line.name: line for line in lines}
    assert methods.table().count("\n") == len(lines) + 2
    assert by_name["fastv"] == methods.Line(
        *("fastv", "tokzip_jax/compress/fastv.py", "decoder", ("attention",), False),
        *("attention of the prompt's last token", "the budget", False, "arXiv 2403.06764"),
    )
    assert by_name["llamavid"].reads == "question, patches" and not by_name["llamavid"].cacheable
    assert by_name["visionzip"].cacheable and not by_name["cdpruner"].cacheable


def test_a_text_without_markers_is_refused():
    with pytest.raises(ValueError, match=r"the markers .* must stand in the text"):
        methods.placed(f"{methods.END} {methods.BEGIN}")
    assert methods.placed(f"a {methods.BEGIN} old {methods.END} b").endswith("b")
