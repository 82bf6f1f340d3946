"""Who sees whom: literal matrices, an independent statement of the rules, and the official implementation's mask."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokzip_jax.masks import TABLES, predecessors, visibility
from tokzip_jax.types import PAD, PREFIX, TEACHER, TEXT, VISION, VOCO, TokenStream

DATA = pathlib.Path(__file__).parent / "data"
LETTERS = {".": PAD, "p": PREFIX, "v": VISION, "c": VOCO, "t": TEXT, "T": TEACHER}
see = jax.jit(visibility)
chain = jax.jit(predecessors)


def stream(kinds, segments="", threads="", samples=""):
    """One row of 8 slots from strings: kinds by letter, digits for the rest; padding has sample 0."""
    kinds, segments, threads = kinds.ljust(8, "."), segments.ljust(8, "0"), threads.ljust(8, "0")
    samples = samples or "".join("01"[letter != "."] for letter in kinds)
    kind = np.array([[LETTERS[letter] for letter in kinds]], np.int32)

    def digits(text):
        return np.array([[int(digit) for digit in text.ljust(8, "0")]], np.int32)

    order = np.arange(kind.shape[1], dtype=np.int32)[None]
    # Position ids decide nothing: give nonsense.
    return TokenStream(
        kind=kind,
        segment=digits(segments),
        thread=digits(threads),
        sample=digits(samples),
        position=np.int32(7 - order),
        order=order,
    )


def matrix(drawing):
    drawn = np.array([[word == "x" for word in line.split()] for line in drawing.strip().splitlines()])
    return np.pad(drawn, (0, 8 - len(drawn)))


PICTURE = stream("pvvctt", "011100")
DRAWN = {
    "visible": (
        PICTURE,
        """x . . . . .
           x x . . . .
           x x x . . .
           x x x x . .
           x x x x x .
           x x x x x x""",
    ),
    "voco": (
        PICTURE,
        """x . . . . .
           x x . . . .
           x x x . . .
           x x x x . .
           . . . x x .
           . . . x x x""",
    ),
    "prefix_visible": (
        PICTURE,
        """x . . . . .
           x x . . . .
           x x x . . .
           x x x x . .
           x . . x x .
           x . . x x x""",
    ),
    "voco: two frames": (
        stream("pvcvct", "011220"),
        """x . . . . .
           x x . . . .
           x x x . . .
           x . . x . .
           x . . x x .
           . . x . x x""",
    ),
    "prefix_visible: a separator behind each image has read it, and text does not see it": (
        stream("pvpcvpct", "01112220"),
        """x . . . . . . .
           x x . . . . . .
           x x x . . . . .
           x x x x . . . .
           x . . . x . . .
           x . . . x x . .
           x . . . x x x .
           x . . x . . x x""",
    ),
    "voco: text between two images": (
        stream("vctvct", "110220"),
        """x . . . . .
           x x . . . .
           . x x . . .
           . . . x . .
           . . . x x .
           . x x . x x""",
    ),
    "voco: two questions share the VoCo token only": (
        stream("ctttt", "10000", "01122"),
        """x . . . .
           x x . . .
           x x x . .
           x . . x .
           x . . x x""",
    ),
    "voco: two samples, the second one text only": (
        stream("pvcttt", "011000", samples="111122"),
        """x . . . . .
           x x . . . .
           x x x . . .
           . . x x . .
           . . . . x .
           . . . . x x""",
    ),
    "voco: text only": (stream("ttt"), "x . .\nx x .\nx x x"),
    "voco: left padding and an unused VoCo slot": (
        stream(".pvc.t", "011100"),
        """. . . . . .
           . x . . . .
           . x x . . .
           . x x x . .
           . . . . . .
           . . . x . x""",
    ),
    "voco: one text twice": (
        stream("pvcttTT", "0110000"),
        """x . . . . . .
           x x . . . . .
           x x x . . . .
           . . x x . . .
           . . x x x . .
           x x . . . x .
           x x . . . x x""",
    ),
    "prefix_visible: one text twice, behind a separator": (
        stream("pvpctTT", "0111000"),
        """x . . . . . .
           x x . . . . .
           x x x . . . .
           x x x x . . .
           x . . x x . .
           x x x . . x .
           x x x . . x x""",
    ),
    "voco: two questions twice": (
        stream("vcttTT", "110000", "001212"),
        """x . . . . .
           x x . . . .
           . x x . . .
           . x . x . .
           x . . . x .
           x . . . . x""",
    ),
    "voco: right padding": (
        stream("vct..", "11000"),
        """x . . . .
           x x . . .
           . x x . .
           . . . . .
           . . . . .""",
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_matrices(name):
    row, drawing = DRAWN[name]
    table = TABLES[name.split(":")[0]]
    np.testing.assert_array_equal(see(row, row, table)[0], matrix(drawing))


@pytest.mark.parametrize("mode", TABLES)
@given(
    kind=hnp.arrays(np.int32, (1, 8), elements=st.integers(0, 5)),
    segment=hnp.arrays(np.int32, (1, 8), elements=st.integers(0, 2)),
    thread=hnp.arrays(np.int32, (1, 8), elements=st.integers(0, 2)),
    sample=hnp.arrays(np.int32, (1, 8), elements=st.integers(0, 2)),
    order=hnp.arrays(np.int32, (1, 8), elements=st.integers(0, 5)),
)
def test_rules_in_words(mode, kind, segment, thread, sample, order):
    row = TokenStream(kind=kind, segment=segment, thread=thread, sample=sample, position=order * 0, order=order)
    found = np.asarray(see(row, row, TABLES[mode]))[0]
    columns = zip(kind[0], segment[0], thread[0], sample[0], order[0])
    tokens = [dict(zip(("k", "g", "t", "s", "o"), values)) for values in columns]

    def sees(query, key):
        if PAD in (query["k"], key["k"]) or key["o"] > query["o"] or key["s"] != query["s"]:
            return False
        if key["t"] and key["t"] != query["t"]:
            return False
        if TEACHER in (query["k"], key["k"]):  # reads pictures and itself, and is read by nobody else
            return query["k"] == TEACHER and key["k"] in (PREFIX, VISION, TEACHER)
        if mode == "visible":
            return True
        if query["k"] == TEXT:  # the VoCo tokens of every image, text, and perhaps the prefix before all images
            shared_prefix = key["k"] == PREFIX and key["g"] in (0, query["g"])
            return key["k"] in (TEXT, VOCO) or (mode == "prefix_visible" and shared_prefix)
        # Nothing before the text sees text, or another image; and only VoCo tokens see VoCo tokens.
        if key["k"] == TEXT or (key["k"] == VOCO and query["k"] != VOCO):
            return False
        return key["g"] in (0, query["g"])

    expected = [[sees(query, key) for key in tokens] for query in tokens]
    np.testing.assert_array_equal(found, expected)


def test_a_copied_text_has_the_order_of_what_it_copies():
    """It stands behind everything, and sees of two pictures the one that its original stands behind."""
    row = stream("vctvctTT", "11022000")
    row = dataclasses.replace(row, order=np.array([[0, 1, 2, 3, 4, 5, 2, 5]], np.int32))
    found = see(row, row, TABLES["voco"])[0]
    np.testing.assert_array_equal(found[6:], [[1, 0, 0, 0, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0, 1, 1]])
    np.testing.assert_array_equal(found[:6, :6], matrix(DRAWN["voco: text between two images"][1])[:6, :6])
    assert not found[:6, 6:].any()


def test_queries_over_other_keys():
    """A decoded token over a cache: the last row of the whole matrix; and order decides, wherever the query stands."""
    row, drawing = DRAWN["voco"]
    last = jax.tree.map(lambda leaf: leaf[:, 5:6], row)
    np.testing.assert_array_equal(see(last, row, TABLES["voco"])[0], matrix(drawing)[5:6])
    earlier = dataclasses.replace(last, order=last.order - 2)
    np.testing.assert_array_equal(see(earlier, row, TABLES["voco"])[0, 0], [0, 0, 0, 1, 0, 0, 0, 0])


def test_official_mask():
    """VoCo-LLaMA's own masks: one row, and a left-padded batch. Its padding rows see everything; ours see nothing."""
    golden = np.load(DATA / "voco_masks.npz")
    for name in ("single", "leftpad"):
        theirs, allowed = golden[f"{name}/token_kind"], golden[f"{name}/allow"]
        voco = theirs == 3
        before = np.cumsum(voco, axis=1) == 0
        kind = np.select([theirs == 2, voco, (theirs == 1) & before, theirs == 1], [VISION, VOCO, PREFIX, TEXT], PAD)
        # The separator between image and VoCo tokens belongs to the image, as `layout.expand` has it.
        behind = (kind == PREFIX) & (np.cumsum(kind == VISION, axis=1) > 0)
        segment = np.where((kind == VISION) | (kind == VOCO) | behind, 1, 0)
        zero = np.zeros_like(kind)
        order = np.broadcast_to(np.arange(kind.shape[1]), kind.shape)
        row = TokenStream(kind=kind, segment=segment, thread=zero, sample=zero + 1, position=zero, order=order)
        found = np.asarray(see(row, row, TABLES["voco"]))
        real = kind != PAD
        assert real.sum() < real.size or name == "single"
        np.testing.assert_array_equal(found[real], allowed[real])
        assert not found[~real].any()


@given(
    kind=hnp.arrays(np.int32, (2, 9), elements=st.sampled_from([PAD, TEXT, VOCO])),
    thread=hnp.arrays(np.int32, (2, 9), elements=st.integers(0, 2)),
    sample=hnp.arrays(np.int32, (2, 9), elements=st.integers(1, 2)),
)
def test_predecessors_walk_back_along_the_thread(kind, thread, sample):
    position, previous = (np.asarray(value) for value in chain(kind, thread, sample))
    for row in range(2):
        for i in range(9):
            behind = [
                j
                for j in range(i)
                if kind[row, j] != PAD != kind[row, i]
                and sample[row, j] == sample[row, i]
                and thread[row, j] in (0, thread[row, i])
            ]
            assert position[row, i] == len(behind)
            assert previous[row, i] == (behind[-1] if behind else -1)


def test_predecessors_of_two_questions():
    row = stream("pvctttt", threads="0001122")
    position, previous = chain(row.kind, row.thread, row.sample)
    np.testing.assert_array_equal(position, [[0, 1, 2, 3, 4, 3, 4, 0]])
    np.testing.assert_array_equal(previous, [[-1, 0, 1, 2, 3, 2, 5, -1]])
