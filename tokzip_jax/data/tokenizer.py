"""A small byte-level BPE, trained on the texts of the training split and kept as one `tokenizer.json`.

Ids 0 .. 3 are fixed, so that the rest of the code needs no tokenizer to know where a row ends. The vocabularies of
LLaMA and SmolLM2 have BOS and EOS at the same ids.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al., arXiv 1508.07909, on bytes as GPT-2 does).

    The same texts give the same tokenizer, in whatever order they come: merges go by count, ties by their ids.

    Args:
        texts: what to train on; repetitions count.
        vocab_size: the most entries, special tokens included. Any text can be encoded whatever the size only when
            all 256 bytes fit (vocab_size >= 260); below that, bytes that `texts` did not hold become <unk>.

    Returns:
        The tokenizer. A word is encoded alike wherever it stands (a space is put before the first one), and the name
        of a special token in a text is text, not that token.
    """
    if vocab_size <= len(SPECIAL):
        raise ValueError(f"data.vocab_size = {vocab_size} must be above {len(SPECIAL)}, the number of special tokens")
    tok = Tokenizer(models.BPE(unk_token=SPECIAL[UNK_ID]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tok.decoder = decoders.ByteLevel()
    full = vocab_size >= len(SPECIAL) + 256
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()) if full else [],
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    tok.encode_special_tokens = True
    return tok


def save(tok: Tokenizer, path: str | Path) -> None:
    """Write `tokenizer.json`; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(tok.to_str(pretty=True), encoding="utf-8")
    partial.replace(path)


def load(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`, one written by `save` or another model's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data.tokenizer: {path} does not exist; give the path of a tokenizer.json")
    try:
        tok = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the package raises bare Exception, whatever is wrong with the file
        raise ValueError(f"data.tokenizer: {path} is not a tokenizer.json ({error})") from None
    tok.encode_special_tokens = True
    return tok


def check(tok: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer that a model cannot read.

    Args:
        tok: any.
        vocab_size: rows of the model's embedding.

    Raises:
        ValueError: ids past the embedding, or BOS and EOS elsewhere than at the ids that rows are made with.
    """
    most = tok.get_vocab_size()
    if most > vocab_size:
        raise ValueError(
            f"data.tokenizer knows {most} tokens, more than model.llm.vocab_size = {vocab_size}; give a model with at "
            "least as many"
        )
    special = {number for number, token in tok.get_added_tokens_decoder().items() if token.special}
    if not {BOS_ID, EOS_ID} <= special:
        raise ValueError(
            f"data.tokenizer must have BOS and EOS as special tokens at the ids {BOS_ID} and {EOS_ID}, as LLaMA's has; "
            f"its special tokens are at {sorted(special)}"
        )
