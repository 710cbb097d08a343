"""Token ids to readable text, with the tokenizer in the cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tokenizers import Tokenizer

from cache_schema.errors import printable

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 4  # bytes, so tokens, of one character in UTF-8

VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})


class TokenText:
    """The text of single tokens and of sequences. Without a tokenizer every id reads `#id`."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._partial: set[int] = set()  # bytes that are not a character by themselves
        self._anchor = tokenizer.encode("a", add_special_tokens=False).ids[-1:] if tokenizer else []
        self._anchor_text = self._decode([self._anchor])[0] if tokenizer else ""

    @classmethod
    def of_assets(cls, assets: Mapping[str, bytes]) -> TokenText:
        """The tokenizer.json among a cache's assets; without one, ids stay numbers."""
        content = assets.get("tokenizer.json")
        return cls(None if content is None else Tokenizer.from_buffer(content))

    def piece(self, token_id: int) -> str:
        """The text of one token with its leading space; for a part of a character, its name in the
        vocabulary."""
        if token_id not in self._known:
            self.learn([token_id])
        return self._known[token_id]

    def learn(self, token_ids: Iterable[int]) -> None:
        """Decodes the new ids together: much faster than one at a time."""
        new = sorted({i for i in map(int, token_ids) if i not in self._known})
        if self._tokenizer is None:
            self._known.update((token_id, f"#{token_id}") for token_id in new)
            return
        # Alone, a token may lose its leading space; after another one it keeps it.
        for token_id, text in zip(new, self._decode([[*self._anchor, i] for i in new]), strict=True):
            piece = text.removeprefix(self._anchor_text)
            if UNKNOWN in piece:
                self._partial.add(token_id)
            if not piece.strip(UNKNOWN):
                piece = self._tokenizer.id_to_token(token_id) or f"#{token_id}"
            self._known[token_id] = piece

    def flow(self, token_ids: Sequence[int]) -> list[str]:
        """One text per token, which joined give the sequence: a character split into several tokens is at its
        last one, the earlier ones are empty."""
        self.learn(token_ids)
        texts: list[str] = []
        cut: list[int] = []  # the tokens of a character that is not whole yet
        for token_id in map(int, token_ids):
            if not cut and token_id not in self._partial:
                texts.append(self._known[token_id])
                continue
            cut.append(token_id)
            text = self._decode([[*self._anchor, *cut]])[0].removeprefix(self._anchor_text)
            if UNKNOWN in text and len(cut) < LONGEST_CHARACTER:
                texts.append("")
            else:
                texts.append(text)
                cut = []
        if cut:
            texts[-1] = UNKNOWN
        return texts

    def _decode(self, sequences: list[list[int]]) -> list[str]:
        assert self._tokenizer is not None
        return list(self._tokenizer.decode_batch(sequences, skip_special_tokens=False))


def visible(text: str) -> str:
    """One token on one line: spaces and line ends as symbols, other control characters as escapes."""
    return printable(text.translate(VISIBLE))
