"""Placeholders to slots: drawn rows, and a plain Python expansion of random rows on either padding side."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokzip_jax import layout
from tokzip_jax.types import IMAGE_ID, PAD, PREFIX, TEXT, VISION, VOCO, VOCO_ID

LETTERS = {PAD: ".", PREFIX: "p", VISION: "v", VOCO: "c", TEXT: "t"}
LENGTH, IMAGES, VISUAL, SLOTS = 9, 2, 3, 2
expand = jax.jit(layout.expand, static_argnames="voco")
text_stream = jax.jit(layout.text_stream)


def make_batch(tokens, left=False):
    """One row from (id, thread, sample, supervised) tuples; ids may be "i" and "c" for the placeholders."""
    batch = {name: np.zeros((1, LENGTH), np.int32) for name in ("ids", "thread", "sample")}
    batch["supervised"] = np.zeros((1, LENGTH), bool)
    start = LENGTH - len(tokens) if left else 0
    for at, (token, thread, sample, supervised) in enumerate(tokens, start=start):
        batch["ids"][0, at] = {"i": IMAGE_ID, "c": VOCO_ID}.get(token, token)
        batch["thread"][0, at], batch["sample"][0, at], batch["supervised"][0, at] = thread, sample, supervised
    return batch


def shared(*tokens, sample=1):
    return [(token, 0, sample, False) for token in tokens]


def draw(slots, row=0):
    """A layout in letters: kinds, segments and so on, one character a slot."""
    s = slots.stream
    return {
        "kind": "".join(LETTERS[int(kind)] for kind in s.kind[row]),
        "segment": "".join(str(int(x)) for x in s.segment[row]),
        "sample": "".join(str(int(x)) for x in s.sample[row]),
        "position": [int(x) for x in s.position[row]],
        "ids": [int(x) for x in slots.ids[row]],
        "visual": [int(x) for x in slots.visual[row]],
        "voco": [int(x) for x in slots.voco[row]],
        "previous": [int(x) for x in slots.previous[row]],
        "supervised": [bool(x) for x in slots.supervised[row]],
    }


def drawn(tokens, count=SLOTS, valid=None, left=False):
    valid = np.ones((1, IMAGES, VISUAL), bool) if valid is None else np.array([valid], bool)
    return draw(expand(make_batch(tokens, left), valid, voco=SLOTS, voco_count=np.int32(count)))


def test_one_image_and_a_question():
    found = drawn([*shared(1, "i", "c"), (5, 1, 1, False), (6, 1, 1, True)])
    assert found["kind"] == "pvvvcctt" + "." * 7
    assert found["segment"] == "01111100" + "0" * 7
    assert found["ids"] == [1, 0, 0, 0, 0, 0, 5, 6] + [0] * 7
    assert found["visual"] == [-1, 0, 1, 2] + [-1] * 11
    assert found["voco"] == [-1] * 4 + [0, 1] + [-1] * 9
    assert found["position"] == [*range(8), *[0] * 7]
    assert found["previous"] == [*range(-1, 7), *[-1] * 7]
    assert found["supervised"] == [i == 7 for i in range(15)]


def test_left_padding_moves_everything_and_counts_nothing():
    found = drawn([*shared(1, "i", "c"), (5, 1, 1, False), (6, 1, 1, True)], left=True)
    # Four ids of padding, then the row; the slots of the second image, which is not there, follow.
    assert found["kind"] == "....pvvvcctt..."
    assert found["position"][4:12] == [*range(8)]
    assert found["previous"][4:12] == [-1, *range(4, 11)]
    assert found["visual"][5:8] == [0, 1, 2] and found["supervised"].index(True) == 11


def test_unused_voco_slots_and_invalid_visual_tokens_are_padding():
    found = drawn([*shared(1, "i", "c"), (5, 1, 1, True)], count=1, valid=[[1, 0, 1], [1, 1, 1]])
    assert found["kind"] == "pv.vc.t" + "." * 8
    assert found["segment"] == "0101100" + "0" * 8 and found["sample"] == "1101101" + "0" * 8
    assert found["position"] == [0, 1, 0, 2, 3, 0, 4] + [0] * 8
    # What stands behind a hole continues from the last real token.
    assert found["previous"] == [-1, 0, -1, 1, 3, -1, 4] + [-1] * 8
    assert found["visual"] == [-1, 0, -1, 2] + [-1] * 11


def test_a_caption_directly_behind_the_image_is_predicted_by_the_image():
    """No VoCo token in use: the first supervised token of each thread follows the last visual token."""
    found = drawn([*shared(1, "i", "c"), (5, 1, 1, True), (6, 1, 1, True), (7, 2, 1, True)], count=0)
    assert found["kind"] == "pvvv..ttt" + "." * 6
    assert found["previous"][6:9] == [3, 6, 3]
    assert found["position"][6:9] == [4, 5, 4]
    assert found["supervised"] == [6 <= i <= 8 for i in range(15)]


def test_two_images_with_separators_and_text_between():
    found = drawn(shared(1, "i", 4, "c", 9, "i", 4, "c", 5))
    assert found["kind"] == "pvvvpcctvvvpcct"
    # A separator belongs to its image; BOS and text to none.
    assert found["segment"] == "011111102222220"
    assert found["visual"] == [-1, 0, 1, 2, -1, -1, -1, -1, 3, 4, 5, -1, -1, -1, -1]
    assert found["voco"] == [-1, -1, -1, -1, -1, 0, 1, -1, -1, -1, -1, -1, 0, 1, -1]
    assert found["position"] == [*range(15)]


def test_raster_positions_by_hand():
    """Two pictures of ten patches; of the first, tokens for patches 4 and (out of order) 1, of the second CLS and 9."""
    tokens = [*shared(1, "i", 3, "i"), (5, 1, 1, False), (6, 2, 1, False), *shared("i", sample=2)]
    valid = np.array([[[True, True, False], [True, False, True], [True, True, True]]])
    place = np.array([[4, 1, 7, -1, 3, 9, 0, 5, 9]])
    batch = {name: np.array([values]) for name, values in zip(("ids", "thread", "sample", "supervised"), zip(*tokens))}
    batch["ids"] = np.array([[{"i": IMAGE_ID}.get(token, token) for token, *_ in tokens]])
    batch = {**batch, "supervised": np.zeros((1, len(tokens)), bool)}
    slots = expand(batch, valid, voco=0, voco_count=0)
    found = np.asarray(jax.jit(layout.raster_positions, static_argnums=2)(slots, place, 10).position)[0]
    seen = [(LETTERS[int(kind)], int(at)) for kind, at in zip(slots.stream.kind[0], found) if kind != PAD]
    first, second = [("v", 5), ("v", 2)], [("v", 12), ("v", 21)]
    # Text behind the second picture stands on 22 in either thread; the second sample counts on its own.
    expected = [("p", 0), *first, ("p", 11), *second, ("t", 22), ("t", 22), ("v", 0), ("v", 5), ("v", 9)]
    assert [at for _, at in seen] == [at for _, at in expected]
    assert [kind == "v" for kind, _ in seen] == [kind == "v" for kind, _ in expected]
    # With every patch at its place nothing changes.
    whole = np.tile(np.arange(3), 3)[None]
    slots = expand(batch, np.ones((1, 3, 3), bool), voco=0, voco_count=0)
    found = jax.jit(layout.raster_positions, static_argnums=2)(slots, whole, 3)
    np.testing.assert_array_equal(found.position, slots.stream.position)


def test_samples_of_a_row_are_apart():
    """Two samples with a picture each, then a text-only one, whose first token follows nothing."""
    found = drawn([*shared("i", "c"), *shared(1, "i", "c", 5, sample=2), (6, 0, 3, True), (7, 0, 3, True)])
    assert found["kind"] == "vvvccpvvvccttt."
    assert found["sample"] == "111112222222330"
    assert found["segment"] == "111110222220000"
    assert found["visual"] == [0, 1, 2, -1, -1, -1, 3, 4, 5, -1, -1, -1, -1, -1, -1]
    assert found["position"] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 0, 1, 0]
    assert found["previous"] == [-1, 0, 1, 2, 3, -1, 5, 6, 7, 8, 9, 10, -1, 12, -1]
    # No token predicts the first one of a sample, so it is no target.
    assert found["supervised"] == [i == 13 for i in range(15)]


@pytest.mark.parametrize("left", [False, True])
def test_text_only_row(left):
    found = drawn(shared(1, 5, 6), left=left)
    assert found["kind"] == ("......ttt......" if left else "ttt............")
    assert set(found["segment"]) == {"0"} and set(found["visual"]) == set(found["voco"]) == {-1}
    real = slice(6, 9) if left else slice(0, 3)
    assert found["position"][real] == [0, 1, 2]


def test_every_voco_count_is_one_program():
    valid = np.ones((1, IMAGES, VISUAL), bool)
    batch = make_batch(shared(1, "i", "c", 5))
    for count in range(9):
        found = draw(expand(batch, valid, voco=8, voco_count=np.int32(count)))
        assert found["kind"].rstrip(".") == "pvvv" + "c" * count + "." * (8 - count) + "t"
        assert found["voco"][4:12] == [i if i < count else -1 for i in range(8)]
        assert found["position"][12] == 4 + count


def test_a_count_for_every_row():
    row = make_batch(shared(1, "i", "c", 5))
    batch = {name: np.repeat(value, 2, axis=0) for name, value in row.items()}
    slots = expand(batch, np.ones((2, IMAGES, VISUAL), bool), voco=SLOTS, voco_count=np.array([2, 1], np.int32))
    assert draw(slots, 0)["kind"].startswith("pvvvcct") and draw(slots, 1)["kind"].startswith("pvvvc.t")


def test_one_visual_token_and_no_voco_slots_take_no_more_room_than_the_ids():
    assert layout.slots(9, images=2, visual=1, voco=0) == 9
    found = draw(expand(make_batch(shared(1, "i", "c", 5)), np.ones((1, IMAGES, 1), bool), voco=0, voco_count=0))
    assert found["kind"] == "pvt......" and found["previous"][:3] == [-1, 0, 1]


@pytest.mark.parametrize("voco", [0, 2])
def test_a_full_row_without_voco_placeholders_loses_nothing(voco):
    tokens = shared(1, "i", 3, "i", 4, 5, 6, 7, 8)
    found = draw(expand(make_batch(tokens), np.ones((1, IMAGES, VISUAL), bool), voco=voco, voco_count=voco))
    assert [i for i in found["ids"] if i] == [1, 3, 4, 5, 6, 7, 8]


def expected_slots(batch, valid, count, total):
    """The expansion as a Python list: one dict a slot."""
    ids, thread, sample, supervised = (batch[n][0] for n in ("ids", "thread", "sample", "supervised"))
    out, image = [], 0

    def add(kind, at, **more):
        slot = {"kind": kind, "segment": 0, "ids": 0, "visual": -1, "voco": -1, "supervised": bool(supervised[at])}
        out.append({**slot, "thread": int(thread[at]), "sample": int(sample[at]), **more})

    for at in range(LENGTH):
        mine = [i for i in range(LENGTH) if sample[i] == sample[at]]
        before = [int(ids[i]) for i in mine if i < at]
        behind = [int(ids[i]) for i in mine if i > at]
        if sample[at] == 0:
            add(PAD, at)
        elif ids[at] == IMAGE_ID:
            image += 1
            for i in range(VISUAL):
                add(VISION if valid[image - 1, i] else PAD, at, segment=image, visual=(image - 1) * VISUAL + i)
        elif ids[at] == VOCO_ID:
            for i in range(SLOTS):
                add(VOCO if i < count else PAD, at, segment=image, voco=i)
        elif IMAGE_ID in behind and IMAGE_ID not in before:
            add(PREFIX, at, ids=int(ids[at]))
        elif VOCO_ID in behind and before.count(IMAGE_ID) > before.count(VOCO_ID):
            add(PREFIX, at, ids=int(ids[at]), segment=image)
        else:
            add(TEXT, at, ids=int(ids[at]))
    while len(out) < total:
        out.append({"kind": PAD, "thread": None})
    for i, slot in enumerate(out):
        if slot["kind"] == PAD:
            padding = {"segment": 0, "sample": 0, "ids": 0, "visual": -1, "voco": -1, "supervised": False}
            slot.update(padding, position=0, previous=-1)
            continue
        chain = [
            j
            for j in range(i)
            if out[j]["kind"] != PAD
            and out[j]["sample"] == slot["sample"]
            and out[j]["thread"] in (0, slot["thread"])
        ]
        slot.update(position=len(chain), previous=chain[-1] if chain else -1)
        slot["supervised"] = slot["supervised"] and bool(chain)
    return out


@st.composite
def random_rows(draw_value):
    """Up to two pictures, text and separators anywhere, threads, two samples, either padding side."""
    tokens, images, sample, open_image, thread = [], 0, 1, False, 0
    for _ in range(draw_value(st.integers(1, LENGTH))):
        choice = draw_value(st.sampled_from(["text", "image", "voco", "sample", "thread"]))
        if choice == "image" and images < IMAGES and not open_image and thread == 0:
            tokens += shared("i", sample=sample)
            images, open_image = images + 1, True
        elif choice == "voco" and open_image:
            tokens += shared("c", sample=sample)
            open_image = False
        else:
            if choice == "sample" and sample == 1 and tokens and not open_image:
                sample, thread = 2, 0
            elif choice == "thread" and not open_image:
                thread += 1
            tokens.append((draw_value(st.integers(3, 9)), thread, sample, draw_value(st.booleans())))
    return tokens, draw_value(st.booleans())


@given(
    row=random_rows(),
    count=st.integers(0, SLOTS),
    valid=st.lists(st.booleans(), min_size=IMAGES * VISUAL, max_size=IMAGES * VISUAL),
)
@settings(max_examples=150)
def test_expansion_equals_a_python_list(row, count, valid):
    tokens, left = row
    batch, valid = make_batch(tokens, left), np.array(valid).reshape(IMAGES, VISUAL)
    slots = expand(batch, valid[None], voco=SLOTS, voco_count=np.int32(count))
    expected = expected_slots(batch, valid, count, slots.ids.shape[1])
    assert len(expected) == slots.ids.shape[1]
    found_slots = {**vars(slots), **vars(slots.stream)}
    for name in expected[0]:
        found = np.asarray(found_slots[name])[0]
        wanted = [slot[name] for slot in expected]
        # The thread of padding means nothing.
        at = [i for i, slot in enumerate(expected) if name != "thread" or slot["kind"] != PAD]
        np.testing.assert_array_equal(found[at], [wanted[i] for i in at], err_msg=name)
    np.testing.assert_array_equal(slots.stream.order[0], np.arange(slots.ids.shape[1]))


@pytest.mark.parametrize("thread", [0, 2])
def test_text_stream_counts_from_zero_on_either_side(thread):
    stream = text_stream(np.array([[5, 6, 0], [0, 5, 6]], np.int32), thread=np.int32(thread))
    np.testing.assert_array_equal(stream.kind, [[TEXT, TEXT, PAD], [PAD, TEXT, TEXT]])
    np.testing.assert_array_equal(stream.position, [[0, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(stream.sample, [[1, 1, 0], [0, 1, 1]])
    np.testing.assert_array_equal(stream.thread, np.full((2, 3), thread))
    np.testing.assert_array_equal(stream.order, [[0, 1, 2]] * 2)
