"""Tokens → pieces of text as they come, without broken characters, and cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence

MAX_STOPS = 4  # as OpenAI's API has it
HELD = 16  # tokens that may be decoded again and again while nothing comes of them
UNFINISHED = 3  # bytes at most of a character in UTF-8 that is not complete, and a token has one or more


class Detokenizer:
    """Turns one token after another into text. All pieces together are what decoding all tokens at once gives, except within
    HELD tokens and more that are no text (random bytes)."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids = tokenizer, []
        self.start = 0  # of the tokens that are decoded again, as context: a word's first token may lose its space
        self.said = 0  # tokens before it are out

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that is complete with this token; "" while a character is not."""
        self.ids.append(token)
        return self._rest(whole=False)

    def end(self) -> str:
        """What is left when no more tokens come; a character that was cut off is the replacement character."""
        return self._rest(whole=True)

    def _rest(self, whole: bool) -> str:
        before, now, end = self._decode(self.ids[self.start : self.said]), self._decode(self.ids[self.start :]), None
        waiting = len(self.ids) - self.said
        if len(now) <= len(before):
            if waiting > HELD:  # special tokens, or such as mean nothing
                del self.ids[self.said :]
            return ""
        if now.endswith("\ufffd") and not whole:
            if waiting <= HELD:
                return ""
            end = len(self.ids) - UNFINISHED  # what is before it will be no character any more
            now = self._decode(self.ids[self.start : end])
        self.start, self.said = self.said, len(self.ids) if end is None else end
        return now[len(before) :]


class StopStrings:
    """Passes text on up to the first stop string. What may be the beginning of one is held back until that is known."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held, self.found = tuple(stops), "", False

    def push(self, text: str) -> str:
        """Text that certainly lies before any stop string; `found` says whether one came."""
        if self.found or not self.stops:
            return "" if self.found else text
        held = self.held + text
        places = [place for stop in self.stops if (place := held.find(stop)) >= 0]
        if places:
            self.held, self.found = "", True
            return held[: min(places)]
        longest = min(len(held), max(map(len, self.stops)) - 1)
        keep = next(
            n for n in range(longest, -1, -1) if n == 0 or any(stop.startswith(held[-n:]) for stop in self.stops)
        )
        self.held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def end(self) -> str:
        """What was held back in vain."""
        held, self.held = self.held, ""
        return held


def checked_stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings of a request. ValueError: too many, an empty one, or something else."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise ValueError(f"stop: at most {MAX_STOPS} strings, got {len(stops)}")
    if bad := [text for text in stops if not isinstance(text, str) or not text]:
        raise ValueError(f"stop: must be strings that are not empty, got {bad[0]!r}")
    return stops
