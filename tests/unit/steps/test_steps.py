import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from nemo_cosmos.contracts import GeneratedVideo, Verdict
from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation import perceptual
from nemo_cosmos.evaluation.video_prediction import (
    MEASURES,
    Interval,
    MeasureResult,
    MethodResult,
    PredictionEvaluation,
)
from nemo_cosmos.files import read_json, write_json
from nemo_cosmos.generation.sampling import SamplingConfig
from nemo_cosmos.steps import evaluate_wfm
from nemo_cosmos.steps import generate as step
from nemo_cosmos.steps.evaluate_tokenizer import reconstruct
from nemo_cosmos.steps.evaluate_wfm import shuffled_actions
from nemo_cosmos.steps.heldout import HeldOutWindow
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from nemo_cosmos.video_io import write_video


def _window(source, value):
    return HeldOutWindow(
        frames=np.zeros((2, 16, 16, 3), np.uint8),
        caption="",
        source=source,
        fps=10.0,
        actions=np.full((1, 7), value, np.float32),
    )


def test_shuffled_actions_come_from_another_window_of_the_same_domain():
    windows = [_window("street", i) for i in range(4)] + [_window("arm", 10 + i) for i in range(3)]
    given = [int(rows[0, 0]) for rows in shuffled_actions(windows)]
    assert sorted(given[:4]) == [0, 1, 2, 3]
    assert sorted(given[4:]) == [10, 11, 12]
    assert all(given[i] != int(w.actions[0, 0]) for i, w in enumerate(windows))


def test_predictions_are_told_for_each_domain_alone(tmp_path, monkeypatch):
    windows = [_window("street", 0), _window("arm", 1), _window("street", 2)]
    result = MeasureResult(
        measure="PSNR",
        over_videos=Interval(mean=20.0, low=10.0, high=30.0),
        per_video=(20.0, 30.0, 10.0),
        per_frame=(20.0,),
        frames=(1,),
    )
    sampled = (evaluate_wfm.MODEL, evaluate_wfm.SHUFFLED, evaluate_wfm.UNCONDITIONAL)
    names = (*(f"{name}, seed 0" for name in sampled), evaluate_wfm.REPEAT, evaluate_wfm.CEILING)
    measures = tuple(dataclasses.replace(result, measure=name) for name in MEASURES)
    found = PredictionEvaluation(
        num_videos=3,
        num_frames=2,
        skip_frames=1,
        methods=tuple(MethodResult(method=name, measures=measures) for name in names),
    )
    monkeypatch.setattr(evaluate_wfm, "held_out_windows", lambda *_, **__: windows)
    monkeypatch.setattr(evaluate_wfm, "evaluate_predictions", lambda *_, **__: found)
    for name in ("_predict_all", "_predict", "_show"):
        monkeypatch.setattr(evaluate_wfm, name, lambda *_: {})
    monkeypatch.setattr(evaluate_wfm, "open_world_model", lambda *_: contextlib.nullcontext())
    returned = evaluate_wfm.evaluate_wfm("curated", tmp_path)
    assert returned[evaluate_wfm.MODEL]["PSNR"] == 20.0
    by_source = read_json(tmp_path / "prediction_by_source.json")
    assert by_source.keys() == returned.keys()
    means = {"arm": dict.fromkeys(MEASURES, 30.0), "street": dict.fromkeys(MEASURES, 15.0)}
    assert by_source[evaluate_wfm.SHUFFLED] == means


def test_each_seed_predicts_from_noise_of_its_own_and_measures_are_means(tmp_path, monkeypatch):
    windows = [_window("street", 0), _window("arm", 1)]
    drawn = []

    class Brightness:
        """A measure of frames that needs no weights."""

        def frames(self, truth, videos):
            return np.stack([video.mean(axis=(1, 2, 3)) for video in videos])

    class Noise:
        """Fills videos with their seed."""

        tokenizer = contextlib.nullcontext()
        tokenizer.use = lambda _: [window.frames for window in windows]

        def generate(self, prompts, sampling, *, seeds, **_):
            drawn.append(seeds)
            return [np.full((2, 16, 16, 3), seed, np.uint8) for seed in seeds]

    monkeypatch.setattr(evaluate_wfm, "held_out_windows", lambda *_, **__: windows)
    monkeypatch.setattr(evaluate_wfm, "open_world_model", lambda *_: contextlib.nullcontext(Noise()))
    monkeypatch.setattr(perceptual, "LpipsLike", Brightness)
    sampling = SamplingConfig(seed=5, num_frames=2, height=16, width=16)
    returned = evaluate_wfm.evaluate_wfm("curated", tmp_path, num_seeds=2, batch_size=1, sampling=sampling)
    assert drawn == [[5], [6], [7], [8]] * 3  # of each WFM every window and seed
    by_seed = read_json(tmp_path / "prediction_by_seed.json")[evaluate_wfm.MODEL]["LPIPS-like"]
    assert by_seed == pytest.approx([5.5, 7.5])
    assert returned[evaluate_wfm.MODEL]["LPIPS-like"] == pytest.approx(6.5)
    difference = read_json(tmp_path / "differences.json")[evaluate_wfm.REPEAT]["LPIPS-like"]
    assert (difference["mean"], difference["low"], difference["high"]) == pytest.approx((6.5, 6, 7))


def test_no_seeds_are_refused(tmp_path):
    with pytest.raises(UserError, match="num_seeds: got 0, expected at least 1"):
        evaluate_wfm.evaluate_wfm("curated", tmp_path, num_seeds=0)


def test_an_unsafe_prompt_stops_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "open_world_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="prompt blocked by the guardrail"):
        step.generate(tmp_path / "a.mp4", prompt="")
    assert not list(tmp_path.iterdir())


def test_a_record_tells_all_that_it_takes_to_generate_again(tmp_path, monkeypatch):
    generated = {}

    def frames(opening, prompt, sampling, **others):
        generated.update(sampling=sampling, **others)
        return np.zeros((sampling.num_frames, sampling.height, sampling.width, 3), np.uint8)

    monkeypatch.setattr(step, "_frames", frames)
    first = write_video(tmp_path / "first.mp4", np.zeros((9, 32, 48, 3), np.uint8), fps=10)
    settings = SamplingConfig(num_frames=25, height=32, width=48, chunk_frames=17, overlap_frames=9, guidance=2.0)
    step.generate(
        tmp_path / "a.mp4",
        prompt="A car.",
        negative_prompt="Rain.",
        checkpoint="diffusion_tiny_text2world",
        first_frame=first,
        num_first_frames=9,
        sampling=settings,
        guards=step.GuardConfig(prompt=(), video=()),
    )
    told = GeneratedVideo.from_dict(read_json(tmp_path / "a.json"))
    fields = {field.name: getattr(told, field.name) for field in dataclasses.fields(SamplingConfig)}
    assert SamplingConfig(**fields) == generated["sampling"]
    assert (told.prompt, told.negative_prompt, told.tokenizer) == ("A car.", generated["negative_prompt"], None)
    assert (told.first_frame, told.num_first_frames) == (str(first), len(generated["first"]))


def test_an_unsafe_video_is_not_returned(monkeypatch):
    class Objecting:
        def guard_video(self, frames, fps):
            return frames, [Verdict(guard="content", safe=False, reason="nudity")]

    monkeypatch.setattr(step.PostGuard, "from_names", lambda names: Objecting())
    with pytest.raises(UserError, match="content: nudity"):
        step.check_video(np.zeros((2, 8, 8, 3), np.uint8), 10.0, step.GuardConfig())


def test_a_tokenizer_rebuilds_where_it_is(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
    model = CausalVideoTokenizer(TokenizerConfig(channels=8, num_res_blocks=1)).to("meta")
    assert reconstruct(model, np.zeros((9, 16, 16, 3), np.uint8)).shape == (9, 16, 16, 3)


def test_actions_are_read_from_rows_records_and_npy(tmp_path):
    rows = [[0.0] * 7, [1.0] * 7]
    np.save(tmp_path / "a.npy", np.array(rows))
    write_json(tmp_path / "b.json", rows)
    write_json(tmp_path / "c.json", {"conditions": {"actions": rows}})
    for name in ("a.npy", "b.json", "c.json"):
        assert step.read_actions(tmp_path / name).tolist() == rows
    write_json(tmp_path / "d.json", [[1, 2], [3]])
    with pytest.raises(UserError, match="is no table of numbers"):
        step.read_actions(tmp_path / "d.json")
    with pytest.raises(UserError, match="no such file"):
        step.read_actions(tmp_path / "f.npy")
    for name, content in (("g.npy", b""), ("h.npy", b"no array")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: is no table of numbers"):
            step.read_actions(tmp_path / name)


@pytest.mark.parametrize(
    ("values", "shape"), [([[0.0] * 6] * 2, "(2, 6)"), ([1.0, 2.0], "(2,)"), ([[[0.0] * 7]], "(1, 1, 7)")]
)
def test_actions_of_another_width_are_refused_before_anything_is_loaded(tmp_path, monkeypatch, values, shape):
    monkeypatch.setattr(step, "open_world_model", lambda *_: pytest.fail("a model was loaded"))
    path = write_json(tmp_path / "actions.json", values)
    with pytest.raises(UserError) as raised:
        step.generate(tmp_path / "a.mp4", prompt="A red car turns left.", actions=path)
    assert str(raised.value) == (
        f"{path}: got 'shape {shape}', expected [frames - 1, 7] (x, y, z, roll, pitch, yaw, gripper). "
        "Give one row of seven numbers per frame after the first."
    )
