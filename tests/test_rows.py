"""The tokenizer, and how questions are packed into rows."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from tokzip_jax.config import DataConfig
from tokzip_jax.data import tokenizer as bpe
from tokzip_jax.data.rows import question_rows
from tokzip_jax.types import IMAGE_ID, VOCO_ID


@pytest.fixture(scope="module")
def tok_300():
    return bpe.train(["what color is the shape?", "a red circle"], 300)


def test_tokenizer_is_deterministic_and_saved(tmp_path):
    texts = [f"is there a {color} {name}?" for color in ("red", "teal", "blue") for name in ("circle", "ring")] * 3
    first, second = bpe.train(texts, 300), bpe.train(reversed(texts), 300)
    assert first.to_str() == second.to_str()
    bpe.save(first, tmp_path / "new" / "tokenizer.json")
    loaded = bpe.load(tmp_path / "new" / "tokenizer.json")
    assert loaded.to_str() == first.to_str() and loaded.get_vocab_size() <= 300
    assert [loaded.token_to_id(name) for name in bpe.SPECIAL] == [0, 1, 2, 3]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.json"]


@given(st.text())
@settings(deadline=None, max_examples=50)
def test_any_text_survives_the_tokenizer(tok_300, text):
    ids = tok_300.encode(text).ids
    assert not set(ids) & {0, 1, 2, 3}
    assert tok_300.decode(ids) in (text, " " + text)


def test_special_names_are_text(tok_300, tmp_path):
    bpe.save(tok_300, tmp_path / "tokenizer.json")
    for tok in (tok_300, bpe.load(tmp_path / "tokenizer.json")):
        assert not set(tok.encode("a <eos> in <pad> text").ids) & {0, 1, 2, 3}


def test_tokenizer_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer: .*none\.json does not exist"):
        bpe.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        bpe.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"data\.vocab_size = 4"):
        bpe.train(["a"], 4)


def read_row(row, tok):
    """The (question, answer) of every thread of a padded row, and whether its bookkeeping is consistent."""
    ids, thread, supervised = row["ids"], row["thread"], row["supervised"]
    assert list(ids[:3]) == [bpe.BOS_ID, IMAGE_ID, VOCO_ID] and not thread[:3].any()
    length = np.count_nonzero(row["sample"])
    assert (row["sample"][:length] == 1).all() and not ids[length:].any() and not supervised[length:].any()
    out = []
    for number in range(1, thread.max() + 1):
        mine = thread == number
        answer = ids[mine & supervised]
        assert answer[-1] == bpe.EOS_ID and bpe.EOS_ID not in answer[:-1]
        assert (np.diff(np.flatnonzero(mine)) == 1).all() and (np.diff(supervised[mine].astype(int)) >= 0).all()
        out.append((tok.decode(ids[mine & ~supervised]).strip(), tok.decode(answer).strip()))
    return out


@given(
    st.lists(st.lists(st.tuples(*[st.sampled_from(["red", "what color?", "is it a circle"])] * 2), max_size=9)),
    st.sampled_from([0, 1, 4]),
)
@settings(deadline=None, max_examples=50)
def test_every_question_has_one_row(tok_300, pictures, limit):
    texts = [
        {"image_id": "0", "questions": [q for q, _ in pairs], "answers": [a for _, a in pairs], "caption": "red"}
        for pairs in pictures
    ]
    rows = question_rows(texts, tok_300, DataConfig(text_length=32, questions=limit, caption_length=4))
    asked = {}
    for index in range(len(rows)):
        pairs = read_row(rows.row(index), tok_300)
        assert len(pairs) == rows.count[index] and 0 < len(pairs) <= (limit or 99)
        for number, pair in enumerate(pairs, rows.first[index]):
            assert asked.setdefault((int(rows.example[index]), number), pair) is pair
    assert asked == {(e, n): pair for e, pairs in enumerate(pictures) for n, pair in enumerate(pairs)}


def test_rows_are_filled(tok_300):
    """A row is closed only when the next question does not fit: exactly full is still one row."""
    text = {"image_id": "9", "questions": ["red"] * 6, "answers": ["circle"] * 6, "caption": "red"}
    each = len(tok_300.encode("red").ids) + len(tok_300.encode("circle").ids) + 1
    full = DataConfig(text_length=3 + 6 * each)
    assert list(question_rows([text], tok_300, full).count) == [6]
    assert list(question_rows([text], tok_300, dataclasses.replace(full, text_length=2 + 6 * each)).count) == [5, 1]
    with pytest.raises(ValueError, match=rf"data\.text_length = {2 + each} .* question 0 of picture 9.*{3 + each}"):
        question_rows([text], tok_300, dataclasses.replace(full, text_length=2 + each))
    with pytest.raises(ValueError, match=r"data\.caption_length = 2 .* picture 9"):
        question_rows([{**text, "caption": "a blue circle"}], tok_300, dataclasses.replace(full, caption_length=2))


def test_a_description_is_asked_for_first(tok_300):
    text = {"image_id": "9", "questions": ["red", "is it"], "answers": ["a", "b"], "caption": "a red circle"}
    cfg = DataConfig(text_length=40, describe="what is the shape?")
    rows = question_rows([text], tok_300, cfg)
    pairs = [("what is the shape?", "a red circle"), ("red", "a"), ("is it", "b")]
    assert len(rows) == 1 and read_row(rows.row(0), tok_300) == pairs
    assert text["questions"] == ["red", "is it"]  # what the caller holds stays as it is


def test_a_tokenizer_that_the_model_cannot_read(tok_300):
    bpe.check(tok_300, tok_300.get_vocab_size())
    with pytest.raises(ValueError, match=r"data\.tokenizer knows \d+ tokens, more than model\.llm\.vocab_size = 200"):
        bpe.check(tok_300, 200)
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    with pytest.raises(ValueError, match=r"BOS and EOS as special tokens at the ids 1 and 2, .* are at \[\]"):
        bpe.check(plain, 3)
