"""Reference pages of the environments, from their docstrings and tables, with a picture of every task.

``python benchmarks/gallery.py`` writes ``docs/environments``; ``--text`` leaves the pictures as they are; ``--check``
writes nothing and fails when a committed page differs from what the code says.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import vla_rl_envs
from docstring_tables import argument_table, parse, space_table, table
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from vla_rl_envs.kitchen_tasks import TASK_TABLE as KITCHEN_TABLE
from vla_rl_envs.kitchen_tasks import VARIANTS as KITCHEN_VARIANTS
from vla_rl_envs.robohive import KITCHEN_INSTRUCTIONS as ROBOHIVE_INSTRUCTIONS
from vla_rl_envs.tasks import INSTRUCTION_OF, VARIANTS
from vla_rl_envs.toy import TOY_TASKS

OUTPUT = Path(__file__).parents[1] / "docs" / "environments"
TITLES = {
    "Observation": "Observation space",
    "Action": "Action space",
    "Reward": "Rewards",
    "Reset": "Starting state",
}
NOTE = "<!-- Written by `python benchmarks/gallery.py` from the docstring of the class; edit that instead. -->"

Tile = tuple[str, str, NDArray[np.uint8]]
"""Name, sentence and picture, uint8 [H, W, 3]."""


@dataclass(frozen=True)
class Page:
    """What is said of an environment besides its docstring.

    Attributes:
        name: the page's file name without its ending.
        title: the page's heading.
        env_id: Gymnasium id.
        make: arguments of ``gym.make`` in the example.
        tasks: (task, sentence, variants) of every task.
        pictures: (file, what it shows, function that draws its tiles or None if another command draws it).
        needs: environment variable without which the environment cannot be made, so that its spaces are not shown.
    """

    name: str
    title: str
    env_id: str
    make: str
    tasks: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    pictures: tuple[tuple[str, str, Callable[[], list[Tile]] | None], ...] = ()
    needs: str | None = None

    @property
    def env_class(self) -> Any:
        """The environment's class."""
        module, _, name = str(gym.spec(self.env_id).entry_point).partition(":")
        return getattr(import_module(module), name)


def first_picture(name: str, /, *, size: int = 320, seed: int = 3, **kwargs: Any) -> NDArray[np.uint8]:
    """The picture of the state that a reset leaves."""
    env = gym.make(name, image_size=size, **kwargs)
    observation, _ = env.reset(seed=seed)
    env.close()
    return observation["image"]


def metaworld_tiles() -> list[Tile]:
    """Every Meta-World task at the start of an episode."""
    return [(task, text, first_picture("VLA/MetaWorld-v0", task=task)) for task, text in INSTRUCTION_OF.items()]


def robohive_tiles() -> list[Tile]:
    """The paper's five tasks in RoboHive, each at the start of another episode, because the scene is one."""
    ids = {task: f"FK1_{task}Random_v2d-v4" for task in ("Knob1On", "LightOn", "MicroOpen", "SdoorOpen", "LdoorOpen")}
    return [
        (env_id, ROBOHIVE_INSTRUCTIONS[task], first_picture("VLA/RoboHive-v0", seed=seed, env_id=env_id))
        for seed, (task, env_id) in enumerate(ids.items())
    ]


def toy_tiles() -> list[Tile]:
    """Every toy task and variant at the start of an episode."""
    return [
        (f"{task} ({variant})", text, first_picture("VLA/Toy-v0", task=task, variant=variant))
        for variant in ("original", "new")
        for task, text in TOY_TASKS.items()
    ]


def kitchen_tiles() -> list[Tile]:
    """Every kitchen task and colour when it is solved, because at the start the pictures are one and the same."""
    return [
        (task if variant == "original" else f"{task} ({variant})", text, solved_kitchen(task, variant))
        for task, text in ((task, rule.instruction) for task, rule in KITCHEN_TABLE.items())
        for variant in ("original", *KITCHEN_VARIANTS.get(task, ()))
    ]


def solved_kitchen(task: str, variant: str, *, size: int = 320, seed: int = 0) -> NDArray[np.uint8]:
    """The picture at success: of the scripted expert where there is one, else with the kitchen's joint put there.

    Raises:
        RuntimeError: if the task is not solved in that picture.
    """
    env = gym.make("VLA/FrankaKitchen-v0", task=task, variant=variant, image_size=size, variation=0.0)
    env.reset(seed=seed)
    inner: Any = env.unwrapped
    success = False
    try:
        expert = vla_rl_envs.make_expert(env)
    except (TypeError, ValueError):
        rule = KITCHEN_TABLE[task]
        goal = getattr(rule, "goal", None)
        inner.data.qpos[rule.index : rule.index + (3 if goal else 1)] = goal or 0.95 * rule.end
        observation, _, _, _, info = env.step(np.zeros(9, np.float32))
        success = info["success"]
    else:
        for _ in range(inner.horizon):
            observation, _, _, _, info = env.step(expert(env))
            success = success or info["success"]
            if success:
                break
    env.close()
    if not success:
        raise RuntimeError(f"{task!r} is not solved in its picture.")
    return observation["image"]


def sheet(tiles: list[Tile], *, columns: int, size: int) -> Image.Image:
    """One picture of all tiles with name and sentence beneath each.

    Args:
        tiles: what to show, row by row.
        columns: tiles in a row.
        size: side of a tile in pixels; pictures are scaled to it.
    """
    from matplotlib import font_manager

    bold, plain = (
        ImageFont.truetype(font_manager.findfont(f"DejaVu Sans:{weight}"), 11) for weight in ("bold", "normal")
    )
    gap, line = 8, 14
    captions = [
        [(text, bold) for text in wrap(name, bold, size)] + [(text, plain) for text in wrap(sentence, plain, size)]
        for name, sentence, _ in tiles
    ]
    rows = [captions[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [size + 4 + line * max(len(caption) for caption in row) + gap for row in rows]
    width = gap + min(columns, len(tiles)) * (size + gap)
    canvas = Image.new("RGB", (width, gap + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (_, _, picture) in enumerate(tiles):
        row, column = divmod(index, columns)
        left, top = gap + column * (size + gap), gap + sum(heights[:row])
        canvas.paste(Image.fromarray(picture).resize((size, size), Image.Resampling.BOX), (left, top))
        for number, (text, font) in enumerate(captions[index]):
            draw.text((left, top + size + 2 + number * line), text, fill="black", font=font)
    return canvas


def wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines of whole words (names break at "-" and "_" too) that are at most ``width`` pixels wide."""
    lines = [""]
    for word in re.findall(r"\S+?(?:[-_]|\s+|$)", text):
        if lines[-1] and font.getlength((lines[-1] + word).rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return [line.rstrip() for line in lines]


def render_page(page: Page) -> str:
    """The Markdown text of a page.

    Raises:
        ValueError: if the docstring of an environment past its first version has no section "Version history".
    """
    docstring = parse(inspect.getdoc(page.env_class) or "")
    make = f'import gymnasium as gym\n\nenv = gym.make("vla_rl_envs:{page.env_id}", {page.make})'
    spaces: dict[str, gym.Space] = {}
    if page.needs is None:
        env = gym.make(page.env_id)
        spaces = {"Observation": env.observation_space, "Action": env.action_space}
        env.close()
    text = [f"# {page.title}", NOTE, f"```python\n{make}\n```", "## Description", docstring.description]
    if page.tasks:
        text += [f"## Tasks\n\n{len(page.tasks)} tasks; `task_id` is the number of the row."]
        text += [f"![{caption}]({file})\n\n{caption}" for file, caption, _ in page.pictures]
        header = ["task_id", "Task", "Instruction", "Variants besides `original`"]
        rows = [[str(i), f"`{task}`", told, ", ".join(names)] for i, (task, told, names) in enumerate(page.tasks)]
        shown = 4 if any(names for _, _, names in page.tasks) else 3
        text += [table(header[:shown], [row[:shown] for row in rows])]
    for heading, body in docstring.sections.items():
        text += [f"## {TITLES.get(heading, heading)}", body]
        text += [space_table(spaces[heading])] if heading in spaces else []
    text += ["## Arguments", argument_table(page.env_class, docstring.arguments)]
    text += ["## Errors", "\n".join(f"* `{name}`: {why}" for name, why in docstring.errors.items())]
    if "Version history" not in docstring.sections:
        if not page.env_id.endswith("-v0"):
            raise ValueError(f"{page.env_id} is not a first version: add '## Version history' to its docstring.")
        text += ["## Version history", "* v0: first version."]
    return "\n\n".join(text) + "\n"


def _with_variants(tasks: dict[str, str], variants: Mapping[str, Any]) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    return tuple((task, text, tuple(variants.get(task, ()))) for task, text in tasks.items())


PAGES = (
    Page(
        "metaworld",
        "Meta-World",
        "VLA/MetaWorld-v0",
        'task="drawer-open"',
        _with_variants(INSTRUCTION_OF, VARIANTS),
        (
            (
                "metaworld.jpg",
                "The tasks at the start of an episode (seed 3), from the default camera.",
                metaworld_tiles,
            ),
            ("../variants/contact_sheet.png", "The variants, with the scripted expert's success over 20 seeds.", None),
        ),
    ),
    Page(
        "kitchen",
        "Franka Kitchen",
        "VLA/FrankaKitchen-v0",
        'task="slide-door-open"',
        _with_variants({task: rule.instruction for task, rule in KITCHEN_TABLE.items()}, KITCHEN_VARIANTS),
        (("kitchen.jpg", "Every task and colour when it is solved.", kitchen_tiles),),
    ),
    Page(
        "robohive",
        "RoboHive",
        "VLA/RoboHive-v0",
        'env_id="FK1_SdoorOpenRandom_v2d-v4", python="path/to/its/python"',
        tuple((f"FK1_{task}Random_v2d-v4", text, ()) for task, text in ROBOHIVE_INSTRUCTIONS.items()),
        (("robohive.jpg", "The paper's five tasks at the start of five episodes (seeds 0 to 4).", robohive_tiles),),
        needs="VLA_RL_ROBOHIVE_PYTHON",
    ),
    Page(
        "toy",
        "Toy",
        "VLA/Toy-v0",
        'task="reach-red"',
        _with_variants(TOY_TASKS, dict.fromkeys(TOY_TASKS, ("new",))),
        (("toy.png", "Every task and variant at the start of an episode (seed 3).", toy_tiles),),
    ),
    Page(
        "subprocess",
        "Any interpreter",
        "VLA/Subprocess-v0",
        'env_id="CartPole-v1", python="path/to/another/python"',
        needs="an interpreter",
    ),
)


def render_index() -> str:
    """The Markdown text of the overview."""
    rows = []
    for page in PAGES:
        summary = parse(inspect.getdoc(page.env_class) or "").description.partition("\n\n")[0].replace("\n", " ")
        rows.append([f"[{page.title}]({page.name}.md)", f"`{page.env_id}`", str(len(page.tasks) or ""), summary])
    text = [
        "# Environments",
        NOTE,
        "All follow one convention: `Dict(image: uint8 [H, W, 3], state: float32 [S], task_id: int64)`, the sentences "
        'in `env.unwrapped.instructions`, `info["success"]` at every step and `info["instruction"]` after reset. '
        "Any other Gymnasium environment follows it through [`VLAObservation`](../guides/any-env.md).",
        table(["Page", "Id", "Tasks", "What it is"], rows),
    ]
    return "\n\n".join(text) + "\n"


def texts() -> dict[str, str]:
    """File name -> text of every page."""
    return {"index.md": render_index(), **{f"{page.name}.md": render_page(page) for page in PAGES}}


def differing(folder: Path) -> list[str]:
    """Names of the pages in ``folder`` that are missing or not what the code says."""
    return [
        name for name, text in texts().items() if not (folder / name).is_file() or (folder / name).read_text() != text
    ]


def main() -> None:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page differs")
    parser.add_argument("--text", action="store_true", help="leave the pictures as they are")
    parser.add_argument("--only", choices=[page.name for page in PAGES], help="draw the pictures of one page")
    parser.add_argument("--size", type=int, default=160, help="pixels per tile")
    args = parser.parse_args()
    if args.check:
        if names := differing(OUTPUT):
            sys.exit(f"{', '.join(names)} in {OUTPUT} differ from the code; run python benchmarks/gallery.py --text.")
        return
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name, text in texts().items():
        (OUTPUT / name).write_text(text)
    for page in () if args.text else [page for page in PAGES if args.only in (None, page.name)]:
        for file, tiles in [(file, tiles) for file, _, tiles in page.pictures if tiles is not None]:
            if page.needs is not None and page.needs not in os.environ:
                print(f"{file} is left as it is: {page.needs} is not set.")
                continue
            sheet(tiles(), columns=6, size=args.size).save(OUTPUT / file, quality=85, optimize=True)
            print(f"{OUTPUT / file}: {(OUTPUT / file).stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
