"""Instruction data in LLaVA's format, and its way of preparing pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, normalizers

from tokzip_jax.config import DataConfig
from tokzip_jax.data import pipeline, sources
from tokzip_jax.data import tokenizer as bpe
from tokzip_jax.data.transforms import fit_image, pad_to_square
from tokzip_jax.types import IMAGE_ID, VOCO_ID

GOLDEN = Path(__file__).parent / "data" / "llava_preprocess.npz"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant{}. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TURNS = [("<image>\nWhat is\nthis?", "A red\ncircle."), ("Sure?", "Yes.")]


@pytest.mark.parametrize("number", range(4))
def test_pictures_are_llavas(number):
    golden = np.load(GOLDEN)
    image = golden[f"image_{number}"]
    np.testing.assert_array_equal(pad_to_square(image), golden[f"padded_square_{number}"])
    normalised = (fit_image(image, 48) / 255 - MEAN) / STD
    np.testing.assert_allclose(normalised.transpose(2, 0, 1), golden[f"pixel_values_pad_{number}"], atol=1e-5)


def test_odd_margins_go_below_and_right():
    tall = pad_to_square(np.zeros((5, 2, 3), np.uint8))
    wide = pad_to_square(np.zeros((2, 5, 3), np.uint8))
    assert list(tall.any((0, 2))) == list(wide.any((1, 2))) == [True, False, False, True, True]


def entry(turns, **extra):
    messages = [({"from": "human", "value": q}, {"from": "gpt", "value": a}) for q, a in turns]
    return {"id": "x", "conversations": [message for pair in messages for message in pair], **extra}


@pytest.fixture
def folder(tmp_path):
    """Three conversations: with a picture, with a missing one, and text only."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10), (9, 8, 7)).save(tmp_path / "images" / "a.png")
    entries = [entry(TURNS, image="a.png"), entry(TURNS, id="gone", image="b.png"), entry(TURNS[1:])]
    (tmp_path / "llava.json").write_text(json.dumps(entries))
    return tmp_path


def config(folder, **changes):
    fields = {"data_dir": str(folder), "tokenizer": "tokenizer.json", "text_length": 512, "caption_length": 2}
    return DataConfig(**{"name": "llava_json", **fields, **changes})


def byte_tokenizer():
    """Byte-level without merges and without a prefix space: every token is one byte."""
    return bpe.train([], 260)


def sentencepiece_like():
    """Puts a word mark before every text, as LLaMA's tokenizer does; characters are tokens."""
    vocab = {chr(i): i for i in range(4, 128)} | {"<unk>": 3, "▁": 200}
    tok = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tok


def spell(row, tok):
    """The ids of a row as text; what is a target stands in brackets."""
    names = {bpe.BOS_ID: "<s>", bpe.EOS_ID: "</s>", IMAGE_ID: "<I>", VOCO_ID: "<V>"}
    out = []
    for token, target in zip(row["ids"][row["sample"] > 0], row["supervised"][row["sample"] > 0]):
        text = names.get(int(token)) or tok.id_to_token(int(token))
        text = text.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
        out.append(f"[{text}]" if target else text)
    return "".join(out).replace("][", "")


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_like])
def test_layouts(folder, make):
    """Both layouts letter by letter, whichever way a tokenizer marks the start of a text (here always with a space)."""
    tok = make()
    source = sources.load(config(folder), "train")
    rows = source.rows(tok, config(folder))
    assert len(rows) == 2
    row = rows.row(0)
    system = SYSTEM.format(" of the image")
    rounds = " USER: What isthis? ASSISTANT: [A redcircle.</s>] USER: Sure? ASSISTANT: [Yes.</s>]"
    expected = "<s><I> \n<V> \n" + system + rounds
    assert spell(row, tok) == expected
    assert not row["thread"].any() and set(row["sample"]) == {0, 1}
    plain = "<s> " + SYSTEM.format("") + " USER: Sure? ASSISTANT: [Yes.</s>]"
    assert spell(rows.row(1), tok) == plain
    first = config(folder, name="llava_json_system_first")
    rows = sources.load(first, "train").rows(tok, first)
    expected = (
        "<s> " + SYSTEM.format("") + " USER: <I><V> \nWhat is\nthis? ASSISTANT: [A red\ncircle.</s>]"
        " USER: Sure? ASSISTANT: [Yes.</s>]"
    )
    assert spell(rows.row(0), tok) == expected
    assert spell(rows.row(1), tok) == plain


def test_a_token_that_reaches_into_the_answer_is_a_target(folder):
    """The space before an answer belongs to its first token in a trained vocabulary."""
    tok = bpe.train(["Yes."] * 9, 270)
    cfg = config(folder)
    assert spell(sources.load(cfg, "train").rows(tok, cfg).row(1), tok).endswith(" ASSISTANT:[ Yes.</s>]")


def test_picture_of_a_later_turn(folder):
    """LLaVA's layout puts the picture into the message that its marker stands in."""
    turns = [("Hello.", "Hi."), ("What is this?\n<image>", "A circle.")]
    (folder / "llava.json").write_text(json.dumps([entry(turns, image="a.png")]))
    cfg = config(folder, name="llava_json_system_first")
    text = spell(sources.load(cfg, "train").rows(byte_tokenizer(), cfg).row(0), byte_tokenizer())
    assert text.endswith("[Hi.</s>] USER: <I><V> \nWhat is this? ASSISTANT: [A circle.</s>]")


def test_examples_and_batches(folder):
    cfg = config(folder)
    source = sources.load(cfg, "train")
    assert source[0]["image"].shape == (10, 20, 3) and source[1]["image"] is None
    assert source[0]["questions"] == ["What is\nthis?", "Sure?"] and source[0]["types"] == ["open", "open"]
    assert source[0]["answers"] == [answer for _, answer in TURNS]
    (batch,) = pipeline.eval_batches(cfg, byte_tokenizer(), split="train", image_size=20, batch_size=3)
    assert list(batch["example"]) == [0, 1, -1] and (batch["question"] == -1).all()
    assert (batch["images"][0, 0, 10] == (9, 8, 7)).all() and not batch["images"][1].any()
    iterator = pipeline.train_iterator(cfg, byte_tokenizer(), image_size=8, batch_size=2, seed=0)
    assert sorted(next(iterator)["images"].any((1, 2, 3, 4))) == [False, True]


def test_long_conversations_are_cut(folder, caplog):
    cfg = config(folder, text_length=230)
    rows = sources.load(cfg, "train").rows(byte_tokenizer(), cfg)
    whole = sources.load(config(folder), "train").rows(byte_tokenizer(), config(folder))
    for key in ("ids", "sample", "supervised"):
        np.testing.assert_array_equal(rows.row(0)[key], whole.row(0)[key][:230])
        np.testing.assert_array_equal(rows.row(1)[key], whole.row(1)[key][:230])
    assert "1 of 2 conversations are cut at data.text_length = 230" in caplog.text


def test_missing_and_broken_pictures(folder, caplog):
    """Left out and listed; what was decoded once is not decoded again until it changes."""
    whole = (folder / "images" / "a.png").read_bytes()
    entries = json.loads((folder / "llava.json").read_text())
    (folder / "images" / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "llava.json").write_text(json.dumps([*entries, entry(TURNS, id="cut", image="half.png")]))
    assert len(sources.load(config(folder), "train")) == 2
    missing, cut = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
    assert missing == {"split": "train", "image_id": "gone", "file": "b.png", "reason": "the file is missing"}
    assert (cut["image_id"], cut["file"]) == ("cut", "half.png") and cut["reason"]
    assert "2 of 4 entries are left out for their picture" in caplog.text
    (line,) = (folder / "checked.txt").read_text().splitlines()
    assert line.startswith(f"a.png\t{len(whole)}\t")
    (folder / "images" / "half.png").write_bytes(whole)
    (folder / "images" / "a.png").write_bytes(b"no picture")
    assert len(sources.load(config(folder), "train")) == 2  # now the other one
    (folder / "skipped.jsonl").unlink()
    (folder / "skipped.jsonl").mkdir()  # stands in for a folder that cannot be written to
    (folder / "checked.txt").unlink()
    (folder / "checked.txt").mkdir()
    assert len(sources.load(config(folder), "train")) == 2
    assert "the first is" in caplog.text and '"file": "a.png"' in caplog.text
    with pytest.raises(ValueError, match=r"data\.on_error = 'raise'.*a\.png cannot be used: cannot identify"):
        sources.load(config(folder, on_error="raise"), "train")


def test_errors(folder, tmp_path):
    source = sources.load(config(folder), "train")
    (folder / "images" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded"):
        source.image(0)
    with pytest.raises(ValueError, match="no split 'test'; the only one is 'train'"):
        sources.load(config(folder), "test")
    with pytest.raises(ValueError, match=r"data\.tokenizer is empty"):
        sources.load(config(folder, tokenizer=""), "train")
    for name in ("images", "llava.json"):
        (folder / name).rename(folder / "away")
        with pytest.raises(FileNotFoundError, match=rf"{name} does not exist"):
            sources.load(config(folder), "train")
        (folder / "away").rename(folder / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "must hold a list of conversations, not a dict"),
        ('[{"id": "x"}]', "entry 0 must be"),
        ('[{"conversations": []}]', "entry 0 must be"),
        ('[{"conversations": [{"from": "human", "value": "a"}]}]', "entry 0 must be"),
        ('[{"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "a"}]}]', "entry 0 must be"),
        (json.dumps([entry(TURNS), entry(TURNS, image=["a", "b"])]), "entry 1 must be"),
    ],
)
def test_bad_json(folder, text, message):
    (folder / "llava.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        sources.load(config(folder), "train")
