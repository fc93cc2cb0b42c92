"""The text of single tokens, so that each can be coloured by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


def find_tokenizer(folders: Sequence[Path]) -> Tokenizer | None:
    """The first tokenizer.json in these folders that can be read."""
    for folder in folders:
        file = folder / "tokenizer.json"
        if file.is_file():
            try:
                return Tokenizer.from_file(str(file))
            except Exception:  # noqa: BLE001  the library raises Exception itself for a file it cannot read
                continue
    return None


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """One text a token; joined they are the decoded answer, special tokens included.

    Where several tokens make up one character, the last of them has it and the others are empty. Bytes at the end that
    make up none become the replacement character.
    """
    stream = DecodeStream(skip_special_tokens=False)
    texts = [stream.step(tokenizer, token) or "" for token in ids]
    if texts and not texts[-1]:
        whole = tokenizer.decode(list(ids), skip_special_tokens=False)
        texts[-1] = whole[len("".join(texts)) :]
    return texts
