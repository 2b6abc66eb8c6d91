"""The text of a continuation as its tokens arrive, and where it ends."""

import codecs
from collections.abc import Sequence

from llm.tokens.tokenizer import Tokenizer


class Writing:
    """The text of one continuation as its tokens arrive, up to its end.

    It ends at end-of-text, unless that is `ignored`, and before the first of the texts `stop`: neither is part of it.
    `cut` is what the tokens spell from that text on, "" without one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), ignored: bool = False) -> None:
        self.ended = False
        self.cut = ""
        self._tokenizer = tokenizer
        self._stop = stop
        self._last = None if ignored else tokenizer.end_of_text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character waits until it is complete
        self._held = ""  # what may be the beginning of a stop text

    def add(self, token: int) -> str:
        """Return the text that is certain with one more token. Nothing comes after the end."""
        if self.ended:
            return ""
        if token == self._last:
            return self.rest()
        text = self._held + self._decoder.decode(self._tokenizer.decode_bytes([token]))
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.ended = True
            self._held = ""
            self.cut = text[min(places) :]
            return text[: min(places)]
        kept = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def go_on(self) -> None:
        """Take more tokens, also after an end: another end is looked for from here on."""
        self.ended = False
        self.cut = ""

    def rest(self) -> str:
        """Return the text that was held back: there are no more tokens."""
        if self.ended:
            return ""
        self.ended = True
        return self._held + self._decoder.decode(b"", final=True)
