"""Prompt guard by a packaged text classifier for profanity (alt-profanity-check: linear SVM on word counts)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nemo_cosmos.contracts import Verdict
from nemo_cosmos.guardrail.verdict import guard_package


@dataclass(kw_only=True)
class ToxicityConfig:
    """Settings of `Toxicity`."""

    threshold: float = 0.98
    """Probability from which a sentence counts as profane. Measured: swear words give 1.00; robotics phrases reach
    0.97 (`screw the nut`)."""


class Toxicity:
    """Objects to prompts that hold a profane sentence."""

    name = "toxicity"

    def __init__(self, config: ToxicityConfig | None = None) -> None:
        """Loads the packaged model.

        Raises:
            UserError: The package is missing.
        """
        self.config = config or ToxicityConfig()
        self._predict_prob = guard_package("profanity_check", "alt-profanity-check").predict_prob

    def check(self, prompt: str) -> Verdict:
        """Judges a prompt sentence by sentence, so that a long harmless text does not hide one."""
        sentences = [part for part in re.split(r"[.!?;\n]+", prompt) if part.strip()] or [prompt]
        probability = float(max(self._predict_prob(sentences)))
        return Verdict(
            guard=self.name,
            safe=probability < self.config.threshold,
            reason=f"profanity {probability:.3f}, limit {self.config.threshold}",
            scores={"profanity": probability},
        )
