"""What README.md and docs/ point to is there: files, commands and their options, recipes, executors, make targets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from nemo_cosmos.cli.main import app
from recipes import executors
from recipes.registry import FINETUNE, PRETRAIN, RECIPES, STEPS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"^```.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_OTHER_PAGE = re.compile(r"^(?:[a-z]+:|#)")
_COMMAND = re.compile(r"(?<![\w/=])nemo-cosmos +((?!nemo-cosmos)[a-z].*)")
_NEMO_RUN = re.compile(r"\bnemo cosmos ([a-z_]+)")
_RECIPES = (
    re.compile(r"""--factory +["']?([a-z]\w*)"""),
    re.compile(r"nemo-cosmos (?:train|recipes show) +([a-z]\w*)"),
    re.compile(r"\b([a-z]\w*_(?:pretrain|finetune))\b"),
)


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def code_of(page: Path) -> list[str]:
    """The lines of code blocks, continued ones joined and without comments, and the spans of code in the text."""
    text = page.read_text()
    blocks = re.sub(r"\\\n\s*", " ", "\n".join(_BLOCK.findall(text))).splitlines()
    return [line.partition(" #")[0] for line in blocks] + _SPAN.findall(_BLOCK.sub("", text))


def found(pattern: re.Pattern[str], page: Path) -> Iterator[str]:
    for line in code_of(page):
        yield from pattern.findall(line)


def complaint_about(words: list[str]) -> str | None:
    """Says what is wrong with the words after `nemo-cosmos`; None when all is well."""
    command = typer.main.get_command(app)
    while words and isinstance(command, TyperGroup):
        name, *words = words
        if name not in command.commands:
            return f"there is no command {name!r} in {command.name}"
        command = command.commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in words if re.match(r"--[a-z]", word) and word.partition("=")[0] not in known]
    return f"{command.name} has no {unknown}" if unknown else None


def test_relative_links_point_to_files(page: Path) -> None:
    links = [link for link in _LINK.findall(_BLOCK.sub("", page.read_text())) if not _OTHER_PAGE.match(link)]
    missing = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    assert not missing


def test_commands_and_their_options_exist(page: Path) -> None:
    complaints = {command: complaint_about(command.split()) for command in found(_COMMAND, page)}
    assert not {command: complaint for command, complaint in complaints.items() if complaint}


def test_recipes_exist(page: Path) -> None:
    assert {name for pattern in _RECIPES for name in found(pattern, page)} <= set(RECIPES)


def test_entry_points_and_executors_exist(page: Path) -> None:
    assert set(found(_NEMO_RUN, page)) <= {"pretrain", "finetune", *STEPS}
    for name in found(re.compile(r"run\.executor=([\w.]+)"), page):
        assert callable(getattr(executors, name.removeprefix("recipes.executors."))), name


def test_recipes_are_given_to_their_own_entry_point(page: Path) -> None:
    for kind, recipes in (("pretrain", PRETRAIN), ("finetune", FINETUNE)):
        given = found(re.compile(rf"""nemo cosmos {kind} .*--factory +["']?([a-z]\w*)"""), page)
        assert set(given) <= set(recipes)


def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(found(re.compile(r"(?:^|&& )make ([a-z-]+)"), page)) <= targets


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("generate out.mp4 --prompt x --no-guard", None),
        ("evaluate wfm runs/curated runs/evaluation", None),
        ("recipes show diffusion_7b_pretrain", None),
        ("dream", "there is no command 'dream' in nemo-cosmos"),
        ("evaluate dreams", "there is no command 'dreams' in evaluate"),
        ("generate --promt=x", "generate has no ['--promt=x']"),
    ],
)
def test_the_check_itself(words: str, complaint: str | None) -> None:
    assert complaint_about(words.split()) == complaint
