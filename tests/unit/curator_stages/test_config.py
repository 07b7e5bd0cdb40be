from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from curator_stages.config import CurationConfig, load_config
from nemo_cosmos.errors import UserError

CONF = Path(__file__).parents[3] / "conf" / "curation.yaml"


def test_shipped_values_load_and_can_be_overridden() -> None:
    assert load_config(CONF).captioner == "none"
    assert load_config(CONF).max_clips_per_video is None
    assert load_config(CONF, gop=4).gop == 4


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"captioner": ""}, "captioner"),
        ({"height": 255}, "height"),
        ({"sizes": [[64, 65]]}, "sizes"),
        ({"sizes": [64, 64]}, "sizes"),
        ({"sizes": None}, "sizes"),
        ({"encoder": "auto", "crf": 0}, "crf"),
        ({"sizes": [[64, 64, 3]]}, "sizes"),
        ({"encoder": "av1"}, "encoder"),
        ({"shot_detector": "magic"}, "shot_detector"),
        ({"min_s": 5.0, "max_s": 2.0}, "min_s"),
        ({"max_s": 40.0}, "span_s"),
        ({"crf": 52}, "crf"),
        ({"x264_preset": "quick"}, "x264_preset"),
        ({"max_clips_per_video": 0}, "max_clips_per_video"),
        ({"dedup_similarity": 1.5}, "dedup_similarity"),
        ({"dedup_memory_gb": 0}, "dedup_memory_gb"),
        ({"heldout": 5}, "heldout"),
    ],
)
def test_wrong_value_is_named(values: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        CurationConfig.from_dict({"captioner": "none"} | values)


def test_captioner_must_be_chosen() -> None:
    with pytest.raises(UserError, match="captioner"):
        CurationConfig.from_dict({})


@pytest.mark.parametrize("text", ["- a\n- b\n", "captioner: [none"])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(UserError, match="wrong.yaml"):
        load_config(tmp_path / "wrong.yaml")


def test_fingerprints_follow_what_each_part_depends_on(config: CurationConfig) -> None:
    other_set = replace(config, dedup_similarity=0.5)
    assert other_set.span_fingerprint() == config.span_fingerprint()
    assert other_set.set_fingerprint() != config.set_fingerprint()
    assert replace(config, crf=20).span_fingerprint() != config.span_fingerprint()
