"""Text in, text out, by the checkpoint's own tokenizer.json (library: tokenizers)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hybridlab.errors import CheckpointError, RequestError


class Text:
    """Opens `tokenizer.json` when text is first met; token ids alone never need it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "tokenizer.json"
        self._loaded: Any = None

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text`; raises `RequestError` if there is no tokenizer or no token comes out."""
        ids = tuple(self._tokenizer().encode(text).ids)
        if not ids:
            raise RequestError(f"prompt {text!r:.40} has no token")
        return ids

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer().decode(tokens)

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text as it becomes certain: a piece is held back while it ends inside a multi-byte character."""
        seen: list[int] = []
        shown = ""
        for token in tokens:
            seen.append(token)
            text = self.decode(seen)
            if not text.endswith("\ufffd") and text.startswith(shown) and len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
        if seen and (rest := self.decode(seen)[len(shown) :]):
            yield rest

    def _tokenizer(self) -> Any:
        if self._loaded is None:
            if not self._file.is_file():
                raise RequestError(f"{self._file}: not found, so prompts must be token ids, not text")
            from tokenizers import Tokenizer

            try:
                self._loaded = Tokenizer.from_file(str(self._file))
            except Exception as error:  # the library raises bare Exception
                raise CheckpointError(
                    f"{self._file}: not a tokenizer that the tokenizers library reads ({error})"
                ) from None
        return self._loaded
