"""What a vision-language model is asked."""

from __future__ import annotations

from nemo_cosmos.errors import user_error

PROMPTS = {
    "default": (
        "These are frames of a video clip in the order of time. Describe the clip in one paragraph for somebody who "
        "cannot see it: the place, the things and people in it with how they look, what happens from beginning to "
        "end, and how the camera moves. Say only what can be seen. Do not speak of frames or of this question."
    ),
    "short": (
        "These are frames of a video clip in the order of time. Say in one sentence what happens in it and where. "
        "Say only what can be seen."
    ),
    "driving": (
        "These are frames of a video from a vehicle in the order of time. Describe in one paragraph the road, weather "
        "and light, what the vehicle itself does (speed, turns, lane changes, stops), and where other road users, "
        "signals and signs are and what they do. Say only what can be seen."
    ),
    "manipulation": (
        "These are frames of a video of a robot or a hand at work in the order of time. Describe in one paragraph "
        "the objects with colour, shape and place, what the arm or hand does to which of them step by step, and how "
        "the scene has changed at the end. Say only what can be seen."
    ),
}
"""Prompts by the name of the variant."""

_REFINE = (
    "{question}\n\nA first description was:\n{caption}\n\nHold it against the frames: take out what cannot be seen, "
    "put right what is wrong, and add what matters and is missing. Answer with the better description alone."
)


def prompt_of(name_or_text: str) -> str:
    """Returns a variant's prompt; text of more than one word is a prompt itself.

    Raises:
        UserError: It is one word and no variant's name.
    """
    if name_or_text in PROMPTS:
        return PROMPTS[name_or_text]
    if len(name_or_text.split()) < 2:
        raise user_error("caption_prompt", name_or_text, f"one of {tuple(PROMPTS)} or a prompt", "Choose one or write.")
    return name_or_text


def refining(question: str, caption: str) -> str:
    """Asks for a better version of a caption, on the same frames."""
    return _REFINE.format(question=question, caption=caption)
