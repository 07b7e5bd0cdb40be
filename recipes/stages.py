"""All stages of a WFM's pretraining in a row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import nemo_run as run

from nemo_cosmos.errors import user_error
from recipes import autoregressive, diffusion_stages
from recipes.executors import slurm_for


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A training, and what it is called."""

    name: str
    recipe: run.Partial


@dataclass(frozen=True, kw_only=True)
class _Family:
    """Models that are trained in the same stages."""

    sizes: dict[str, tuple[Callable[..., run.Partial], ...]]
    inputs: dict[str, dict[str, str]]
    """By stage: which argument of its recipe is which cache of `stages_of`."""


_FAMILIES = (
    _Family(
        sizes=diffusion_stages.STAGES,
        inputs={
            "pretrain": {"latents": "latents", "pictures": "pictures"},
            "highres": {"latents": "latents_highres", "pictures": "pictures_highres"},
            "cooldown": {"latents": "latents_quality", "pictures": "pictures_highres"},
            "video2world": {"latents": "latents_highres"},
        },
    ),
    _Family(
        sizes=autoregressive.STAGES,
        inputs={
            "pretrain": {"latents": "latents"},
            "long": {"latents": "latents_highres"},
            "video2world": {"latents": "latents_highres", "pictures": "pictures_highres"},
            "cooldown": {"latents": "latents_quality", "pictures": "pictures_highres"},
        },
    ),
)


def stages_of(
    size: str,
    *,
    latents: str,
    latents_highres: str,
    latents_quality: str,
    directory: str,
    pictures: str | None = None,
    pictures_highres: str | None = None,
    max_steps: tuple[int, ...] | None = None,
    **settings: Any,  # noqa: ANN401 - arguments that the recipes of this size share
) -> list[Stage]:
    """Puts the stages of a size in a row, each on the run of the one before.

    Args:
        size: A diffusion WFM's (`tiny`, `7b`, `14b`) or an autoregressive one's (`autoregressive_tiny`, `4b`, `12b`).
        latents: Cache of the first stage.
        latents_highres: Of larger videos, or of longer ones, for all stages but the first and the cool-down.
        latents_quality: Of the cool-down.
        directory: A folder for all; each stage has its run in a folder of its own there.
        pictures: Cache of single frames for the first stage of a diffusion WFM.
        pictures_highres: Of larger ones, for the later stages that take any.
        max_steps: Optimizer steps of each stage; the recipes' own where None.
        **settings: Further arguments of all recipes, such as `num_nodes`, or `sample_every`.

    Raises:
        UserError: There is no such size, it does not take a setting or a cache, or the steps are not as many as the
            stages.
    """
    family = next((family for family in _FAMILIES if size in family.sizes), None)
    if family is None:
        known = sorted(name for family in _FAMILIES for name in family.sizes)
        raise user_error("size", size, f"one of {known}", "Choose one of them.")
    recipes, names = family.sizes[size], tuple(family.inputs)
    if max_steps is not None and len(max_steps) != len(names):
        raise user_error("max_steps", max_steps, f"{len(names)} numbers, for {names}", "Give one for each stage.")
    if unknown := sorted(set(settings) - set(inspect.signature(recipes[0]).parameters)):
        raise user_error(f"settings of {size}", unknown, "arguments of its recipes", "Leave them out.")
    caches = {
        "latents": latents,
        "latents_highres": latents_highres,
        "latents_quality": latents_quality,
        "pictures": pictures,
        "pictures_highres": pictures_highres,
    }
    if pictures is not None and "pictures" not in family.inputs[names[0]]:
        raise user_error("pictures", pictures, f"None, for the first stage of {size} takes none", "Leave it out.")
    stages: list[Stage] = []
    for number, (name, recipe) in enumerate(zip(names, recipes, strict=True)):
        inputs = {argument: caches[cache] for argument, cache in family.inputs[name].items()}
        given: dict[str, Any] = {**inputs, **settings, "directory": f"{directory}/{name}"}
        if stages:
            given["base"] = stages[-1].recipe.log.directory
        if max_steps is not None:
            given["max_steps"] = max_steps[number]
        stages.append(Stage(name=name, recipe=recipe(**given)))
    return stages


def submit_stages(stages: Iterable[Stage], *, dryrun: bool = False) -> None:
    """Hands the trainings to Slurm as one nemo-run experiment, in which each job waits for the one before to succeed.

    Args:
        stages: In their order.
        dryrun: Print the sbatch scripts instead.
    """
    import fiddle

    with run.Experiment("nemo-cosmos-stages") as experiment:
        for stage in stages:
            executor = fiddle.build(slurm_for(stage.recipe))
            experiment.add(stage.recipe, executor=executor, name=stage.name)
        if dryrun:
            experiment.dryrun()
        else:
            experiment.run(sequential=True, detach=True)
