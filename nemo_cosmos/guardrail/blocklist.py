"""Prompt guard by word lists: exact words, their usual endings, and near misses.

Source: behaviour after the published blocklist guard (word-boundary match, difflib near match, whitelist, ASCII
folding, empty prompt refused); the lists are our own.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from difflib import SequenceMatcher
from importlib import resources

from nemo_cosmos.contracts import Verdict

_ENDINGS = "(?:s|es|d|ed|er|ers|ing)?"
_LOOKALIKES = str.maketrans("01345789@$!", "oieastbgasi")


@dataclass(kw_only=True)
class BlocklistConfig:
    """Settings of `Blocklist`."""

    extra_blocked: tuple[str, ...] = ()
    """Words or phrases blocked besides the packaged list."""
    extra_allowed: tuple[str, ...] = ()
    """Words or phrases that are cut out of the prompt before matching, besides the packaged list."""
    near_slack_letters: float = 0.55
    """A prompt word is a near miss when its difflib ratio reaches (n - slack) / n, n the blocked word's length. 0.55
    catches one letter added or dropped, 1.0 also one changed; the published 0.4 catches none at any length."""
    near_min_letters: int = 6
    """Shorter blocked words are matched exactly only."""


class Blocklist:
    """Objects to prompts with blocked words, and to empty ones."""

    name = "blocklist"

    def __init__(self, config: BlocklistConfig | None = None) -> None:
        """Reads the packaged word lists and adds the configuration's."""
        self.config = config or BlocklistConfig()
        blocked = {fold(word) for word in (*read_words("blocked_words.txt"), *self.config.extra_blocked)}
        allowed = {fold(word) for word in (*read_words("allowed_words.txt"), *self.config.extra_allowed)}
        self._exact = re.compile(rf"\b({_alternatives(blocked)}){_ENDINGS}\b")
        self._allowed = re.compile(rf"\b({_alternatives(allowed)}){_ENDINGS}\b")
        self._near = sorted(word for word in blocked if len(word) >= self.config.near_min_letters and " " not in word)

    def check(self, prompt: str) -> Verdict:
        """Judges a prompt."""
        folded = fold(prompt)
        if not folded:
            return self._verdict("the prompt is empty")
        # Digits and signs in place of letters are read both ways: `3d` is no word, `k1ll` is one.
        for text in dict.fromkeys((folded, fold(prompt.translate(_LOOKALIKES)))):
            text = self._allowed.sub(" ", text)
            if found := self._exact.search(text):
                return self._verdict(f"blocked word {found.group(0)!r}")
            for word in text.split():
                if near := self._near_miss(word):
                    return self._verdict(f"{word!r} is close to the blocked word {near!r}")
        return Verdict(guard=self.name, safe=True, reason="no blocked word")

    def _near_miss(self, word: str) -> str | None:
        slack = self.config.near_slack_letters
        for blocked in self._near:
            wanted = (len(blocked) - slack) / len(blocked)
            # No ratio exceeds what the lengths alone allow; this spares nearly all of the full comparisons.
            if 2 * min(len(word), len(blocked)) / (len(word) + len(blocked)) < wanted:
                continue
            if SequenceMatcher(None, word, blocked, autojunk=False).ratio() >= wanted:
                return blocked
        return None

    def _verdict(self, reason: str) -> Verdict:
        return Verdict(guard=self.name, safe=False, reason=reason)


def fold(text: str) -> str:
    """Lower-case ASCII letters and digits with single spaces: accents, width variants and invisible characters go."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")
    return " ".join(re.findall(r"[a-z0-9]+", ascii_text.casefold().replace("'", "")))


def read_words(file: str) -> list[str]:
    """Reads a word list of this package: one word or phrase per line, `#` starts a comment."""
    lines = resources.files("nemo_cosmos.guardrail").joinpath(file).read_text(encoding="utf-8").splitlines()
    return [word for line in lines if (word := line.partition("#")[0].strip())]


def _alternatives(words: set[str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=lambda word: (-len(word), word)) if word)
