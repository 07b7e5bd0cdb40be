"""Kinds of videos that are told apart, each with the sentence that CLIP knows it by."""

VIDEO_TYPES = {
    "driving": "a video from a driving car on a road",
    "hand_motion": "a video of hands handling objects",
    "human_motion": "a video of people moving about",
    "navigation": "a video of walking through rooms or streets",
    "first_person": "a first-person video from a camera worn on the head",
    "nature": "a video of a landscape, plants, animals or the sea",
    "camera_motion": "a video of a camera flying or gliding past a scene",
    "synthetic": "a video rendered by a computer, from a simulator or a video game",
    "animation": "a cartoon or an animated drawing",
    "screen": "a recording of a computer screen, slides or a user interface",
    "still_text": "a picture of text or titles on a plain ground",
}
"""The technical report's categories of physical AI, and kinds that are of no use to it."""
