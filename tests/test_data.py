"""easy-VQA as a data set, and the batches made of it: contents, order, shares and resume."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tokzip_jax.config import DataConfig
from tokzip_jax.data import easy_vqa, pipeline, sources
from tokzip_jax.data import tokenizer as bpe

SIZE = 16
COLORS = ("red", "blue", "teal")
NAMES = ("circle", "triangle", "rectangle")
CORRUPT, MISSING = 3, 7


def png(image_id):
    """A picture that its id can be read off: every pixel has red = id."""
    pixels = np.full((SIZE, SIZE, 3), (image_id, 40, 200), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def questions_of(image_id):
    """Two to seven questions with their answers; unlike those of any other picture."""
    color, name = COLORS[image_id % 3], NAMES[image_id // 3 % 3]
    pairs = [("what color is the shape?", color), (f"what shape is in image {image_id}?", name)]
    pairs += [(f"is there a {COLORS[i % 3]} shape, {i}?", "no" if COLORS[i % 3] != color else "yes") for i in range(5)]
    return pairs[: 2 + image_id % 6]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Stands in for the PyPI package: 12 training and 3 test pictures, one of them corrupt, one missing."""
    folder = tmp_path_factory.mktemp("package")

    def paths(ids):
        for image_id in ids:
            encoded = png(image_id)
            (folder / f"{image_id}.png").write_bytes(encoded[:60] if image_id == CORRUPT else encoded)
        return {image_id: str(folder / f"{image_id}.png") for image_id in reversed(ids) if image_id != MISSING}

    def triples(ids):
        return tuple(zip(*[(*pair, image_id) for image_id in ids for pair in questions_of(image_id)]))

    train, test = range(12), range(3)
    return SimpleNamespace(
        get_train_questions=lambda: triples(train),
        get_test_questions=lambda: triples(test),
        get_train_image_paths=lambda: paths(train),
        get_test_image_paths=lambda: paths(test),
    )


@pytest.fixture(scope="module")
def built(package, tmp_path_factory):
    """A configuration whose data set is built."""
    cfg = DataConfig(data_dir=str(tmp_path_factory.mktemp("tfds")), text_length=64, vocab_size=300, questions=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "easy_vqa", package)
        easy_vqa.build(cfg)
    return cfg


@pytest.fixture(scope="module")
def tok(built):
    return bpe.train(sources.texts(sources.load(built, "train")), built.vocab_size)


def replace(cfg, **changes):
    return DataConfig(**{**vars(cfg), **changes})


def test_round_trip(built):
    """Everything that was written comes back, in order of image id, without TensorFlow."""
    source = sources.load(built, "train")
    kept = [image_id for image_id in range(12) if image_id not in (CORRUPT, MISSING)]
    assert [source.text(i)["image_id"] for i in range(len(source))] == [str(image_id) for image_id in kept]
    for index, image_id in enumerate(kept):
        example = source[index]
        assert example["image"].shape == (SIZE, SIZE, 3) and example["image"].dtype == np.uint8
        assert (example["image"] == (image_id, 40, 200)).all()
        assert list(zip(example["questions"], example["answers"])) == questions_of(image_id)
        assert example["types"] == ["color", "shape", *["yes/no"] * (image_id % 6)]
        assert example["caption"] == f"a {COLORS[image_id % 3]} {NAMES[image_id // 3 % 3]}"
    assert len(sources.load(built, "test")) == 3
    assert "tensorflow" not in sys.modules


def test_held_out_pictures_are_validation_and_not_training(built):
    whole, cfg = sources.load(built, "train"), replace(built, held_out=3)
    train, held = sources.load(cfg, "train"), sources.load(cfg, "validation")
    assert [part.text(i)["image_id"] for part in (train, held) for i in range(len(part))] == [
        whole.text(i)["image_id"] for i in range(len(whole))
    ]
    assert len(held) == 3 and (held.image(0) == whole.image(len(whole) - 3)).all()
    assert len(sources.load(cfg, "test")) == 3
    assert sources.has_validation(cfg) and not sources.has_validation(built)
    with pytest.raises(ValueError, match=r"data\.held_out = 10 leaves no training picture of 10; give fewer"):
        sources.load(replace(built, held_out=10), "train")


def test_unusable_pictures_are_listed(built, caplog):
    builder = easy_vqa.build(built)
    lines = [json.loads(line) for line in (builder.data_path / easy_vqa.SKIPPED).read_text().splitlines()]
    assert [(line["split"], line["image_id"], line["file"]) for line in lines] == [
        ("train", str(CORRUPT), f"{CORRUPT}.png"),
        ("train", str(MISSING), f"{MISSING}.png"),
    ]
    assert "missing" in lines[1]["reason"] and lines[0]["reason"] and "/" not in lines[0]["reason"]
    assert "2 pictures" in caplog.text
    with pytest.raises(ValueError, match="without 2 pictures"):
        sources.load(replace(built, on_error="raise"), "train")


def test_on_error_raise_leaves_nothing(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", package)
    with pytest.raises(ValueError, match=r"data\.on_error.*picture 3 of easy_vqa/train \(3\.png\)"):
        sources.load(DataConfig(data_dir=str(tmp_path), on_error="raise"), "train")
    assert not list(tmp_path.rglob("*array_record*"))


def test_killed_build_is_not_believed(package, tmp_path, monkeypatch):
    """What a killed process leaves behind is another folder; the next build starts afresh."""
    monkeypatch.setitem(sys.modules, "easy_vqa", package)
    cfg = DataConfig(data_dir=str(tmp_path))
    seen = []

    def killed(path):
        seen.extend(file.parent.name for file in tmp_path.rglob("*incomplete*"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(easy_vqa, "check_picture", killed)
        with pytest.raises(KeyboardInterrupt):
            sources.load(cfg, "train")
    assert seen and not (tmp_path / "easy_vqa" / "1.0.0").exists()
    (tmp_path / "easy_vqa" / "incomplete.ABCDEF_1.0.0").mkdir()
    (tmp_path / "easy_vqa" / "incomplete.ABCDEF_1.0.0" / "easy_vqa-train.array_record-00000-of-00001").write_bytes(b"")
    assert len(sources.load(cfg, "train")) == 10


def test_nothing_built_and_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ModuleNotFoundError, match="pip install easy-vqa"):
        sources.load(DataConfig(data_dir=str(tmp_path)), "train")
    assert not list(tmp_path.iterdir())


def test_unknown_names(built):
    with pytest.raises(ValueError, match=r"data\.name = 'vqa_v2' is unknown; choose one of clips, easy_vqa"):
        sources.load(replace(built, name="vqa_v2"), "train")
    with pytest.raises(ValueError, match="no split 'val'; choose one of test, train"):
        sources.load(built, "val")


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("what is the blue shape?", "circle")], "a blue circle"),
        ([("what color is the triangle?", "teal")], "a teal triangle"),
        ([("is there not a red shape?", "no"), ("is no circle present?", "no")], "a red circle"),
        ([("is there a circle?", "yes")], "a circle"),
        ([("does the image contain a gray shape?", "yes"), ("is there a circle?", "no")], "a gray shape"),
        ([("is there a circle?", "no"), ("is no triangle present?", "yes")], "a rectangle"),
        ([("is there a circle?", "no"), ("is there a red shape?", "no")], "a shape"),
        ([(f"is there a {c} shape?", "no") for c in sorted(easy_vqa.COLORS - {"brown"})], "a brown shape"),
        ([], "a shape"),
    ],
)
def test_facts(pairs, expected):
    assert easy_vqa.caption(*easy_vqa.facts(pairs)) == expected


def test_facts_of_the_real_questions():
    """The numbers in the builder's docstring."""
    questions, answers, image_ids = pytest.importorskip("easy_vqa").get_train_questions()
    pairs = {image_id: [] for image_id in image_ids}
    for question, answer, image_id in zip(questions, answers, image_ids):
        pairs[image_id].append((question, answer))
    known = np.array([np.count_nonzero(easy_vqa.facts(values)) for values in pairs.values()])
    assert [(known == number).sum() for number in (2, 1, 0)] == [3578, 393, 29]
    assert {easy_vqa.question_type(answer) for answer in answers} == {"yes/no", "shape", "color"}


def read_row(row, tok):
    """The question and answer of every thread of a row."""
    out = []
    for number in range(1, row["thread"].max() + 1):
        parts = [row["ids"][(row["thread"] == number) & (row["supervised"] == target)] for target in (False, True)]
        out.append(tuple(tok.decode(part).strip() for part in parts))
    return out


def test_eval_batches_ask_every_question_once(built, tok):
    source = sources.load(built, "train")
    told = replace(built, describe="what is there?")  # for training only
    batches = list(pipeline.eval_batches(told, tok, split="train", image_size=SIZE, batch_size=4))
    asked = []
    for batch in batches:
        assert batch["images"].shape == (4, 1, SIZE, SIZE, 3) and batch["images"].dtype == np.uint8
        assert batch["ids"].shape == (4, 64) and batch["captions"].shape == (4, 16)
        assert batch["question"].shape == (4, 3) and batch["example"].dtype == batch["question"].dtype == np.int32
        for i, example in enumerate(batch["example"]):
            row = {key: batch[key][i] for key in batch}
            if example < 0:
                assert (row["question"] == -1).all() and not row["supervised"].any() and row["sample"].any()
                continue
            text = source.text(example)
            assert (row["images"][0] == source.image(example)).all()
            assert tok.decode(row["captions"]).strip() == text["caption"]
            numbers = [number for number in row["question"] if number >= 0]
            for number, pair in zip(numbers, read_row(row, tok), strict=True):
                assert pair == (text["questions"][number], text["answers"][number])
                asked.append((example, number))
    assert (batches[-1]["example"] < 0).any()
    assert asked == [(e, n) for e in range(len(source)) for n in range(len(source.text(e)["questions"]))]


def test_eval_limit_counts_pictures(built, tok):
    batches = pipeline.eval_batches(built, tok, split="train", image_size=SIZE, batch_size=2, limit=5)
    assert {int(example) for batch in batches for example in batch["example"]} - {-1} == set(range(5))


def train(cfg, tok, **changes):
    return pipeline.train_iterator(cfg, tok, **{"image_size": SIZE, "batch_size": 1, "seed": 0, **changes})


def keys(batches):
    """What tells rows apart: the picture's red channel and the tokens."""
    return [
        (int(images[0, 0, 0, 0]), ids.tobytes())
        for batch in batches
        for images, ids in zip(batch["images"], batch["ids"])
    ]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_epochs_are_permutations(built, tok):
    rows = len(sources.load(built, "train").rows(tok, built))
    order = keys(take(train(built, tok), 2 * rows))
    assert len(set(order[:rows])) == rows and set(order[rows:]) == set(order[:rows])
    assert order[rows:] != order[:rows]
    assert order == keys(take(train(built, tok), 2 * rows))
    assert order[:rows] != keys(take(train(built, tok, seed=1), rows))


def test_processes_share_an_epoch(built, tok):
    rows = len(sources.load(built, "train").rows(tok, built))
    whole = keys(take(train(built, tok), rows))
    shares = [
        keys(take(train(built, tok, process_index=i, process_count=3), len(range(i, rows, 3)))) for i in range(3)
    ]
    assert shares == [whole[i::3] for i in range(3)]
    with pytest.raises(ValueError, match=f"has {rows} rows, fewer than the 99 processes"):
        train(built, tok, process_count=99)


def test_resumed_is_straight(built, tok):
    """Across the end of an epoch, and from a state that went through JSON."""
    straight = train(built, tok, batch_size=4)
    take(straight, 3)
    state = json.loads(json.dumps(straight.get_state()))
    rest = take(straight, 6)
    resumed = train(built, tok, batch_size=4)
    resumed.set_state(state)
    for expected, batch in zip(rest, take(resumed, 6)):
        assert expected.keys() == batch.keys()
        assert all((expected[key] == batch[key]).all() for key in batch)


@pytest.mark.slow
def test_workers_keep_the_order(built, tok):
    straight = keys(take(train(built, tok, batch_size=4), 8))
    with_workers = train(replace(built, workers=2), tok, batch_size=4)
    assert keys(take(with_workers, 4)) == straight[:16]
    state = with_workers.get_state()
    resumed = train(replace(built, workers=2), tok, batch_size=4)
    resumed.set_state(state)
    assert keys(take(resumed, 4)) == straight[16:]


def test_other_sizes_are_resized(built, tok):
    batch = next(train(built, tok, image_size=24))
    assert batch["images"].shape == (1, 1, 24, 24, 3)
    assert batch["images"][0, 0].std((0, 1)).max() == 0  # one colour stays that colour


def test_more_targets_than_places_are_refused(built, tok):
    rows = sources.load(built, "train").rows(tok, built)
    most = max(int(rows.row(i)["supervised"].sum()) for i in range(len(rows)))
    assert rows.most_targets == most > 1
    train(replace(built, targets=most), tok)
    with pytest.raises(ValueError, match=f"data.targets = {most - 1} would leave out .* has {most}"):
        train(replace(built, targets=most - 1), tok)
