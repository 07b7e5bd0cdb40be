from __future__ import annotations

import dataclasses
import json
import typing

import pytest

from nemo_cosmos import contracts
from nemo_cosmos.contracts import CaptionWindow, ClipRecord, Conditions, RawVideo, Record, Verdict

RECORDS = sorted(
    (value for value in vars(contracts).values() if isinstance(value, type) and issubclass(value, Record)),
    key=lambda record: record.__name__,
)


def _example(hint: object) -> object:
    """A value other than the default for a field's type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return hint(**{name: _example(inner) for name, inner in typing.get_type_hints(hint).items()})
    if origin is typing.Literal:
        return args[-1]
    if origin is tuple:
        return (_example(args[0]), _example(args[0]))
    if origin is list:
        return [_example(args[0])] * 2
    if origin is dict:
        return {"key": _example(args[1])}
    if args and type(None) in args:
        return _example(args[0])
    return {str: "word", int: 3, float: 0.1, bool: True, typing.Any: [1, None, "x"]}[hint]


@pytest.mark.parametrize("record", RECORDS)
def test_every_record_goes_through_json_with_all_fields_set(record):
    value = _example(record)
    assert record.from_dict(json.loads(json.dumps(value.to_dict()))) == value


@pytest.mark.parametrize("record", [record for record in RECORDS if record is not Record])
def test_every_record_goes_through_json_with_defaults_only(record):
    hints = typing.get_type_hints(record)
    required = {
        f.name: _example(hints[f.name])
        for f in dataclasses.fields(record)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    value = record(**required)
    restored = record.from_dict(json.loads(json.dumps(value.to_dict())))
    assert restored == value


def test_nested_records_and_tuples_get_their_types_back():
    video = RawVideo(
        source="street",
        rollout="r0",
        fps=10.0,
        num_frames=17,
        split="heldout",
        captions=(CaptionWindow(start_frame=0, end_frame=17, text="a car", captioner="simulator"),),
        conditions=Conditions(actions=[[0.0] * contracts.ACTION_DIM] * 16, view="front"),
    )
    restored = RawVideo.from_dict(json.loads(json.dumps(video.to_dict())))
    assert isinstance(restored.captions, tuple)
    assert isinstance(restored.captions[0], CaptionWindow)
    assert isinstance(restored.conditions, Conditions)
    assert restored.conditions.camera_poses is None


def test_missing_and_unknown_fields_are_named():
    with pytest.raises(ValueError, match=r"Verdict: missing fields \['safe'\], unknown fields \['sage'\]"):
        Verdict.from_dict({"guard": "faces", "reason": "none", "sage": True})


def test_records_cannot_be_changed_or_given_by_position():
    verdict = Verdict(guard="faces", safe=True, reason="none")
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.safe = False
    with pytest.raises(TypeError):
        Verdict("faces", True, "none")


def test_defaults_are_not_shared():
    required = {"clip_id": "a", "source_video": "a.mp4", "source": "arm", "rollout": "a", "split": "train"}
    sizes = {"start_frame": 0, "num_frames": 17, "fps": 10.0, "height": 256, "width": 256}
    first, second = (ClipRecord(**required, **sizes) for _ in range(2))
    first.scores["motion"] = 1.0
    assert second.scores == {}


def test_optional_tuples_come_back_as_tuples():
    card = contracts.CheckpointCard(
        model="diffusion_tiny", config={}, step=1, data="d", command="c", latent_mean=(0.0, 1.0)
    )
    assert contracts.CheckpointCard.from_dict(json.loads(json.dumps(card.to_dict()))).latent_mean == (0.0, 1.0)
