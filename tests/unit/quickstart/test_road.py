import dataclasses

import nemo_run as run
import pytest

from nemo_cosmos.errors import UserError
from nemo_cosmos.quickstart import road
from nemo_cosmos.quickstart.config import QuickstartConfig
from nemo_cosmos.quickstart.process import run_recipe


def double(value: int) -> int:
    return 2 * value


def refuse(value: int) -> int:
    raise UserError(f"value: got {value}")


def vanish(value: int) -> int:
    import os

    os._exit(9)


def test_a_recipe_runs_in_a_process_of_its_own():
    finished = run_recipe(run.Partial(double, value=21))
    assert finished.result == 42
    assert finished.resources.seconds > 0


def test_errors_and_deaths_of_a_step_are_told():
    with pytest.raises(UserError, match="value: got 3"):
        run_recipe(run.Partial(refuse, value=3))
    with pytest.raises(RuntimeError, match="ended with status 9"):
        run_recipe(run.Partial(vanish, value=3))


def test_an_interrupted_road_goes_on_with_the_step_that_was_cut_off(tmp_path, monkeypatch):
    calls = []

    def recorded(recipe):
        calls.append(recipe.value)
        if recipe.value == 2 and calls.count(2) == 1:
            raise KeyboardInterrupt
        return run_recipe_result(recipe)

    def run_recipe_result(recipe):
        from nemo_cosmos.evaluation.resources import StepResources
        from nemo_cosmos.quickstart.process import Finished

        return Finished(result=recipe.value, resources=StepResources(seconds=1.0, peak_memory_mb=2.0))

    steps = tuple(
        road.Step(
            name=f"step {n}",
            recipe=lambda config, n=n: run.Partial(double, value=n),
            measures=lambda config, result: {"result": float(result)},
        )
        for n in (1, 2, 3)
    )
    monkeypatch.setattr(road, "STEPS", steps)
    monkeypatch.setattr(road, "run_recipe", recorded)
    monkeypatch.setattr(road.measures, "for_report", lambda config: {})
    config = QuickstartConfig(output=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        road.run_quickstart(config)
    report, summary = road.run_quickstart(config)
    assert calls == [1, 2, 2, 3]
    assert [step.measures["result"] for step in summary.steps] == [1.0, 2.0, 3.0]
    assert report.exists()
    with pytest.raises(UserError, match="was begun with"):
        road.run_quickstart(dataclasses.replace(config, from_scratch=True))


def test_a_missing_folder_of_videos_is_refused_before_work(tmp_path):
    with pytest.raises(UserError, match="--videos"):
        QuickstartConfig(output=tmp_path, videos=tmp_path / "nothing")
