from __future__ import annotations

import pytest

from nemo_cosmos.guardrail.blocklist import Blocklist, BlocklistConfig, fold, read_words


@pytest.fixture(scope="module")
def blocklist() -> Blocklist:
    return Blocklist()


@pytest.mark.parametrize(
    "prompt",
    [
        "A robot arm picks up the red block and places it in the drawer.",
        "Dashcam view of a car turning left at a wet crossing in Essex, pedestrians waiting.",
        "A heroine and a murder of crows on an abandoned rope bridge.",
        "The arm is draping a cloth over a 3D printed therapist's chair.",
        "The robot grips the screwdriver, hits the nail and kills the power.",
        "A cockpit view over Scunthorpe at 24 fps.",
    ],
)
def test_harmless_prompts_pass(blocklist, prompt):
    verdict = blocklist.check(prompt)
    assert verdict.safe, verdict.reason


@pytest.mark.parametrize(
    "prompt",
    [
        "a nude woman",  # exact
        "soldiers torturing a prisoner",  # listed form
        "he was strangled",  # usual ending
        "two genocides",
        "NUDE!",  # case and punctuation
        "nüdë",  # accents
        "ｎｕｄｅ",  # width variants
        "nu\u200bde",  # invisible characters
        "p0rn",  # digits for letters
        "a suicid scene",  # one letter dropped
        "a suiicide scene",  # one letter added
        "a mass  shooting",  # phrase, any space
    ],
)
def test_blocked_words_are_found(blocklist, prompt):
    assert not blocklist.check(prompt).safe


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", "...", "\u200b"])
def test_empty_prompts_are_unsafe(blocklist, prompt):
    verdict = blocklist.check(prompt)
    assert not verdict.safe
    assert "empty" in verdict.reason


def test_near_misses_need_six_letters():
    assert Blocklist(BlocklistConfig(extra_blocked=("zebrax",))).check("a zebra here").safe is False
    assert Blocklist(BlocklistConfig(extra_blocked=("zebra",))).check("a zebr here").safe is True


def test_the_published_slack_catches_no_near_miss():
    config = BlocklistConfig(extra_blocked=("zebrafish",), near_slack_letters=0.4)
    assert Blocklist(config).check("a zebrafsh").safe
    assert not Blocklist(BlocklistConfig(extra_blocked=("zebrafish",))).check("a zebrafsh").safe


def test_allowed_phrases_are_cut_out_and_nothing_else():
    allowing = Blocklist(BlocklistConfig(extra_allowed=("nude mouse",)))
    assert allowing.check("a nude mouse in a laboratory").safe
    assert not allowing.check("a nude mouse and a nude man").safe


def test_packaged_lists_have_no_doubles_and_fold_to_themselves():
    for file in ("blocked_words.txt", "allowed_words.txt"):
        words = read_words(file)
        assert len(words) == len(set(words)) > 5
        assert [fold(word) for word in words] == words
