"""The data set `scenes`: answers from the facts and from the pixels, balance. Its files are those of `test_drawn`."""

import collections
import json
import re

import numpy as np
import pytest

from tokzip_jax.config import ScenesConfig
from tokzip_jax.data import scenes, shapes
from tokzip_jax.evals.scoring import question_only_prior

COLORS = {name: np.array(rgb) for name, rgb in shapes.COLORS.items()}
REGIONS = {
    f"{row} {column}".replace("middle middle", "center"): (i, j)
    for i, row in enumerate(("top", "middle", "bottom"))
    for j, column in enumerate(("left", "middle", "right"))
}
SIDES = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}
ENDS = {"leftmost": ("x", -1), "rightmost": ("x", 1), "topmost": ("y", -1), "bottommost": ("y", 1)}


@pytest.fixture(scope="module")
def many():
    """1,200 examples of the default difficulty."""
    return [scenes.example(ScenesConfig(), "train", index) for index in range(1200)]


def only(things):
    """The one thing that is meant."""
    (thing,) = things
    return thing


def called(facts, name):
    color, shape = name.split()
    return only([thing for thing in facts if (thing["color"], thing["shape"]) == (color, shape)])


def kind(facts, word):
    """All things of a kind: "red objects", "red object", "circle", "crosses"."""
    color, _, rest = word.rpartition(" ")
    key, value = ("color", color) if rest in ("object", "objects") else ("shape", rest)
    return [thing for thing in facts if thing[key] in (value, value.removesuffix("s"), value.removesuffix("es"))]


def farthest(facts, key, sign, clear):
    """The thing with the largest signed value of a key, which the runner-up does not come near."""
    first, second = sorted(facts, key=lambda thing: -sign * thing[key])[:2]
    assert clear(first[key], second[key])
    return first


def differ(a, b):
    return abs(a - b) >= 0.08


def unlike(a, b):
    return max(a, b) >= 1.25 * min(a, b)


def pointed(facts, words):
    """The thing that "object in the top left", "leftmost object", "biggest object", "red object", "circle" means."""
    if words.startswith("object in the "):
        cell = REGIONS[words.removeprefix("object in the ")]
        thing = only([t for t in facts if (int(t["y"] * 3), int(t["x"] * 3)) == cell])
        for other in facts:  # it stands well inside, and the others well outside
            for at, number in ((other["y"], cell[0]), (other["x"], cell[1])):
                bounds = [line / 3 for line in (number, number + 1) if line in (1, 2)]
                assert other is not thing or all(abs(at - bound) > 0.0399 for bound in bounds)
            grown = [(max(0, i / 3 - 0.0399), min(1, (i + 1) / 3 + 0.0399)) for i in cell]
            assert other is thing or not all(a < at < b for at, (a, b) in zip((other["y"], other["x"]), grown))
        return thing
    word = words.removesuffix(" object")
    if word in ENDS:
        return farthest(facts, *ENDS[word], differ)
    if word in ("biggest", "smallest"):
        return farthest(facts, "size", 1 if word == "biggest" else -1, unlike)
    return only(kind(facts, words))


def yes(truth):
    return "yes" if truth else "no"


def read(question, facts):
    """The answer to a question from the facts; raises where it would be in doubt."""
    if found := re.fullmatch(r"what (color|shape) is the (.+)\?", question):
        return pointed(facts, found[2])[found[1]]
    if found := re.fullmatch(r"how many (.+) are there\?", question):
        return str(len(facts if found[1] == "objects" else kind(facts, found[1])))
    if found := re.fullmatch(r"is there an? (.+)\?", question):
        name = found[1].split()
        if len(name) == 2 and name[1] != "object":
            return yes([t for t in facts if [t["color"], t["shape"]] == name])
        return yes(kind(facts, found[1]))
    if found := re.fullmatch(r"are there more (.+) than (.+)\?", question):
        one, other = len(kind(facts, found[1])), len(kind(facts, found[2]))
        assert one != other and min(one, other) > 0
        return yes(one > other)
    if found := re.fullmatch(r"is the (\w+ \w+) bigger than the (\w+ \w+)\?", question):
        one, other = (called(facts, name)["size"] for name in found.groups())
        assert unlike(one, other)
        return yes(one > other)
    if found := re.fullmatch(r"is the (\w+ \w+) (left of|right of|above|below) the (\w+ \w+)\?", question):
        axis, sign = SIDES[found[2]]
        difference = called(facts, found[1])[axis] - called(facts, found[3])[axis]
        assert abs(difference) >= 0.08
        return yes(difference * sign > 0)
    found = re.fullmatch(r"what is (left of|right of|above|below) the (\w+ \w+)\?", question)
    axis, sign = SIDES[found[1]]
    here = called(facts, found[2])
    others = [thing for thing in facts if thing is not here]
    assert all(differ(thing[axis], here[axis]) for thing in others)
    thing = only([thing for thing in others if (thing[axis] - here[axis]) * sign > 0])
    return f"{thing['color']} {thing['shape']}"


@pytest.mark.parametrize("difficulty", shapes.LEVELS)
def test_answers_follow_from_the_facts(difficulty):
    """Read again by other code, which raises where a question means no thing, two things or a close call."""
    settings = ScenesConfig(difficulty=difficulty, questions=16)
    asked = collections.Counter()
    for index in range(80):
        example = scenes.example(settings, "test", index)
        facts = json.loads(example["facts"])
        assert len(set(example["questions"])) == len(example["questions"])
        assert [read(question, facts) for question in example["questions"]] == example["answers"]
        asked.update(example["types"])
    assert set(asked) == {"color", "shape", "count", "exists", "compare", "relation"} and min(asked.values()) > 50


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_the_prior_is_low_whatever_the_difficulty(difficulty):
    settings = ScenesConfig(difficulty=difficulty)
    examples = [scenes.example(settings, "train", index) for index in range(600)]
    assert question_only_prior(examples[:500], examples[500:]).accuracy < 0.4


def test_wording_does_not_tell_the_answer(many):
    """The prior that sees no picture stays low, in all and by type; "yes" and "no" are few and balanced."""
    prior = question_only_prior(many[:1000], many[1000:])
    assert prior.accuracy < 0.35
    assert max(prior.by_type.values()) < 0.6 and prior.by_type["color"] < 0.2 and prior.by_type["count"] < 0.4
    answers = collections.Counter(answer for example in many for answer in example["answers"])
    assert answers["yes"] + answers["no"] < 0.35 * answers.total()
    by_kind = collections.defaultdict(collections.Counter)
    for example in many:
        for question, answer, name in zip(example["questions"], example["answers"], example["types"]):
            if answer in ("yes", "no"):
                by_kind[name, question.split()[1]][answer] += 1
    for counts in by_kind.values():
        assert 0.42 < counts["yes"] / counts.total() < 0.58


def inside(shape, x, y):
    """Whether points are in a shape of size 2 around 0; written from the shapes' names, not from their outlines."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.88
    if shape == "diamond":
        return abs(x) + abs(y) <= 1.12
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.38) & (np.maximum(abs(x), abs(y)) <= 1)
    if shape == "triangle":
        return (y <= 0.65) & (y >= -1.25 + abs(x) * 1.9 / 1.1)
    # A star: the angle to the nearest spike, and the edge from there to the next notch.
    turn = abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius, notch = np.hypot(x, y), 0.6 * np.exp(1j * np.pi / 5)
    px, py = radius * np.cos(turn), radius * np.sin(turn)
    return (px - 1.2) * notch.imag - py * (notch.real - 1.2) <= 0


def labels(image):
    """The nearest colour's number for every pixel, -1 for the light background."""
    distances = np.stack([np.abs(image.astype(int) - rgb).sum(-1) for rgb in COLORS.values()])
    return np.where(image.min(-1) < 130, distances.argmin(0), -1)


def blobs(image):
    """The connected areas of one colour, as {"shape", "color", "x", "y"} read off the pixels."""
    label = labels(image)
    side, left = len(label), {tuple(at) for at in np.argwhere(label >= 0)}
    out = []
    while left:
        area, edge = [], [left.pop()]
        while edge:
            y, x = edge.pop()
            area.append((y, x))
            # Two squares of one colour may come as near as corner to corner.
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            edge += near
            left -= near
        votes = collections.Counter(int(label[at]) for at in area)
        mask = np.zeros((side, side), bool)
        mask[tuple(np.transpose(area))] = True
        out.append({"color": list(COLORS)[votes.most_common(1)[0][0]], **shape_of(mask)})
    return out


def shape_of(mask):
    """Which shape a mask is most like, and its centre of mass."""
    rows, columns = np.nonzero(mask)
    cy, cx = rows.mean(), columns.mean()
    y, x = np.mgrid[: len(mask), : len(mask)]
    fine = np.linspace(-1.3, 1.3, 261)
    overlap = {}
    for shape in shapes.SHAPES:
        unit = inside(shape, *np.meshgrid(fine, fine)).sum() * 0.01**2
        half = np.sqrt(len(rows) / unit)
        model = inside(shape, (x - cx) / half, (y - cy) / half)
        overlap[shape] = (model & mask).sum() / (model | mask).sum()
    return {"shape": max(overlap, key=overlap.get), "x": (cx + 0.5) / len(mask), "y": (cy + 0.5) / len(mask)}


def test_pixels_tell_colour_and_shape():
    """Where nothing overlaps, areas of one colour found in the picture are the facts, and so answer what is where."""
    settings = ScenesConfig(difficulty="easy", questions=12)
    asked = 0
    for index in range(40):
        example = scenes.example(settings, "train", index)
        found, facts = blobs(example["image"]), json.loads(example["facts"])
        assert len(found) == len(facts)
        for fact in facts:
            seen = min(found, key=lambda blob: abs(blob["x"] - fact["x"]) + abs(blob["y"] - fact["y"]))
            assert abs(seen["x"] - fact["x"]) < 0.02 and abs(seen["y"] - fact["y"]) < 0.02
            assert (seen["color"], seen["shape"]) == (fact["color"], fact["shape"])
        for question, answer in zip(example["questions"], example["answers"]):
            place = re.fullmatch(r"what (color|shape) is the (?:object in the (.+)|(\w+most) object)\?", question)
            if not place:
                continue
            if place[2]:
                cell = REGIONS[place[2]]
                there = only([b for b in found if (int(b["y"] * 3), int(b["x"] * 3)) == cell])
            else:
                axis, sign = ENDS[place[3]]
                there = max(found, key=lambda blob: sign * blob[axis])
            assert there[place[1]] == answer
            asked += 1
    assert asked > 80


@pytest.mark.parametrize("difficulty", ["medium", "hard"])
def test_nearer_things_hide_farther_ones(difficulty):
    """Every pixel that is a pixel deep in a thing, and as far from all nearer ones, has the thing's colour."""
    row, column = (np.mgrid[:64, :64] + 0.5) / 64
    hidden = 0
    for index in range(40):
        example = scenes.example(ScenesConfig(difficulty=difficulty), "train", index)
        label, facts = labels(example["image"]), json.loads(example["facts"])
        free = np.ones((64, 64), bool)
        for fact in sorted(facts, key=lambda fact: -fact["depth"]):
            half = fact["size"] / 2
            around = [
                inside(fact["shape"], (column + i / 64 - fact["x"]) / half, (row + j / 64 - fact["y"]) / half)
                for i in (-1, 0, 1) for j in (-1, 0, 1)
            ]  # fmt: skip
            core = np.all(around, axis=0)
            assert (label[core & free] == list(COLORS).index(fact["color"])).all()
            hidden += (core & ~free).sum()
            free &= ~np.any(around, axis=0)
        visible = shapes.shown([shapes.Thing(**fact) for fact in facts])
        assert min(visible) >= shapes.LEVELS[difficulty].shown
    assert hidden > 20


@pytest.mark.parametrize("difficulty", shapes.LEVELS)
def test_bigger_means_more_area(difficulty):
    """Sizes that a question may compare never contradict the areas: not for any two shapes."""
    fine = np.linspace(-1.3, 1.3, 521)
    areas = [inside(shape, *np.meshgrid(fine, fine)).sum() for shape in shapes.SHAPES]
    assert max(areas) < 1.25**2 * min(areas)
    sizes = shapes.LEVELS[difficulty].sizes
    assert all(0.97 * large > 1.25 * 1.03 * small for small, large in zip(sizes, sizes[1:]))


def test_partial_captions_leave_out_the_colors_of_every_second_picture(many):
    """And change nothing else: not the picture, not its questions."""
    for index in (0, 1, 2, 3):
        found, whole = scenes.example(ScenesConfig(captions="partial"), "train", index), many[index]
        assert {key for key in found if not np.array_equal(found[key], whole[key])} <= {"caption"}
        named = [thing["shape"] for thing in json.loads(whole["facts"])]
        words = whole["caption"].split()
        assert sorted(words[1::2]) == sorted(named)
        if index % 2:
            assert found["caption"] == whole["caption"]
        else:
            assert found["caption"] == " ".join(sorted(named, key=shapes.SHAPES.index))
