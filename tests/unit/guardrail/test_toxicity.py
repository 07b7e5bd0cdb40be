from __future__ import annotations

import pytest

from nemo_cosmos.guardrail.toxicity import Toxicity

pytest.importorskip("profanity_check")


@pytest.fixture(scope="module")
def toxicity() -> Toxicity:
    return Toxicity()


@pytest.mark.parametrize(
    "prompt",
    ["A robot arm screws the nut onto the peg.", "screw the nut", "The car drives down the wet street.", ""],
)
def test_harmless_prompts_pass(toxicity, prompt):
    assert toxicity.check(prompt).safe


def test_one_bad_sentence_is_found_in_a_long_prompt(toxicity):
    harmless = "A robot arm slowly lifts a red cube from the wooden table and places it in the blue tray. " * 5
    assert toxicity.check(harmless).safe
    verdict = toxicity.check(harmless + "You are a fucking idiot. " + harmless)
    assert not verdict.safe
    assert verdict.scores["profanity"] > 0.98
