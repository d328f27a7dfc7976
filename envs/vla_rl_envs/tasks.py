"""The Meta-World task table: instructions, looks and positions of the variants, and the experiments' task lists."""

from __future__ import annotations

from dataclasses import dataclass, field

INSTRUCTION_OF: dict[str, str] = {
    "assembly": "pick up the nut and place it onto the peg",
    "basketball": "dunk the basketball into the hoop",
    "bin-picking": "move the block from one bin to the other",
    "box-close": "put the lid on the box",
    "button-press-topdown": "press the button down from the top",
    "button-press-topdown-wall": "press the button behind the wall from the top",
    "button-press": "press the button on the front of the box",
    "button-press-wall": "reach around the wall and press the button",
    "coffee-button": "push the button on the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the nut off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "hand-insert": "insert the gripper into the hole",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-open": "open the faucet",
    "faucet-close": "close the faucet",
    "hammer": "hammer the nail into the wall",
    "handle-press-side": "press the handle down from the side",
    "handle-press": "press the handle down",
    "handle-pull-side": "pull the handle up from the side",
    "handle-pull": "pull the handle up",
    "lever-pull": "pull the lever up",
    "pick-place-wall": "pick up the puck, carry it over the wall and place it at the goal",
    "pick-out-of-hole": "pick the puck out of the hole",
    "pick-place": "pick up the puck and place it at the goal",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-side": "slide the plate into the cabinet from the side",
    "plate-slide-back": "slide the plate out of the cabinet",
    "plate-slide-back-side": "slide the plate out of the cabinet sideways",
    "peg-insert-side": "insert the peg into the hole in the side of the box",
    "peg-unplug-side": "unplug the peg from the side of the box",
    "soccer": "kick the ball into the goal",
    "stick-push": "grasp the stick and push the thermos with it",
    "stick-pull": "grasp the stick and pull the thermos with it",
    "push": "push the puck to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "push-back": "push the puck back to the goal",
    "reach": "reach the goal",
    "reach-wall": "reach the goal behind the wall",
    "shelf-place": "pick up the puck and place it on the shelf",
    "sweep-into": "sweep the puck into the hole",
    "sweep": "sweep the puck off the table",
    "window-open": "slide the window open",
    "window-close": "slide the window closed",
}
"""One sentence per task, in Meta-World's order of its 50 tasks."""

TASKS: tuple[str, ...] = tuple(INSTRUCTION_OF)
INSTRUCTIONS: tuple[str, ...] = tuple(INSTRUCTION_OF.values())
"""Sentence of ``TASKS[task_id]`` at index ``task_id``."""

EXPERT_TASKS: tuple[str, ...] = (
    "reach",
    "push",
    "pick-place",
    "door-open",
    "drawer-open",
    "drawer-close",
    "button-press-topdown",
    "peg-insert-side",
    "window-open",
    "window-close",
    "coffee-pull",
    "pick-out-of-hole",
    "disassemble",
    "pick-place-wall",
    "basketball",
    "stick-pull",
    "button-press-wall",
    "faucet-open",
    "door-lock",
    "lever-pull",
    "sweep-into",
    "faucet-close",
    "coffee-button",
    "button-press-topdown-wall",
    "dial-turn",
)
"""Meta-World's own MT25 list; the paper does not name its 25 expert tasks."""

RL_TASKS: tuple[tuple[str, str], ...] = (
    ("button-press-topdown", "new"),
    ("drawer-open", "new"),
    ("door-open", "new"),
    ("window-open", "new"),
    ("window-close", "new"),
)
"""(task, variant) pairs of stage 1: the paper's five "-new" tasks."""

UNSEEN_TASKS: tuple[tuple[str, str], ...] = (
    ("button-press-topdown", "unseen"),
    ("drawer-open", "unseen"),
    ("door-open", "unseen"),
    ("window-open", "unseen"),
    ("window-close", "unseen"),
    ("button-press", "original"),
    ("reach-wall", "original"),
    ("push-wall", "original"),
    ("door-unlock", "original"),
    ("handle-press", "original"),
)
"""(task, variant) pairs that are only evaluated: five further looks, five skills of a kind seen in ``EXPERT_TASKS``."""

Point = tuple[float, float, float]
Rgba = tuple[float, float, float, float]


@dataclass(frozen=True)
class Variant:
    """What differs from Meta-World's own scene.

    Attributes:
        colours: material name -> RGBA in [0, 1] (a textured material is tinted).
        low: lower corner (x, y, z) in metres of the box from which the object's position is drawn; None keeps it.
        high: upper corner of that box.
    """

    colours: dict[str, Rgba] = field(default_factory=dict)
    low: Point | None = None
    high: Point | None = None


_BUTTON_NEW: dict[str, Rgba] = {"btn_yellow": (0.4, 0.6, 0.3, 1.0), "btn_red": (0.8, 0.3, 0.1, 1.0)}
_DRAWER_NEW: dict[str, Rgba] = {"drawer_beige": (0.35, 0.5, 0.75, 1.0), "drawer_white": (0.85, 0.8, 0.4, 1.0)}
_DOOR_NEW: dict[str, Rgba] = {"dl_metal2": (0.3, 0.4, 0.6, 1.0), "dl_metal": (0.85, 0.75, 0.45, 1.0)}
_WINDOW_NEW: dict[str, Rgba] = {"window_red": (0.27, 0.32, 0.55, 1.0)}

_BUTTON_UNSEEN: dict[str, Rgba] = {"btn_yellow": (0.75, 0.4, 0.3, 1.0), "btn_red": (0.6, 0.1, 0.35, 1.0)}
_DRAWER_UNSEEN: dict[str, Rgba] = {"drawer_beige": (0.75, 0.6, 0.35, 1.0), "drawer_white": (0.5, 0.5, 0.55, 1.0)}
_DOOR_UNSEEN: dict[str, Rgba] = {"dl_metal2": (0.35, 0.5, 0.35, 1.0), "dl_metal": (0.85, 0.5, 0.5, 1.0)}
_WINDOW_UNSEEN: dict[str, Rgba] = {"window_red": (0.3, 0.45, 0.3, 1.0)}

VARIANTS: dict[str, dict[str, Variant]] = {
    "button-press-topdown": {
        "new": Variant(_BUTTON_NEW, low=(-0.2, 0.75, 0.115), high=(0.2, 0.9, 0.115)),
        "wide": Variant(low=(-0.25, 0.725, 0.115), high=(0.25, 0.9, 0.115)),
        "recoloured": Variant(_BUTTON_NEW),
        "unseen": Variant(_BUTTON_UNSEEN, low=(-0.2, 0.75, 0.115), high=(0.2, 0.9, 0.115)),
    },
    "drawer-open": {
        "new": Variant(_DRAWER_NEW, low=(-0.25, 0.88, 0.0), high=(0.25, 0.92, 0.0)),
        "wide": Variant(low=(-0.25, 0.9, 0.0), high=(0.25, 0.9, 0.0)),
        "recoloured": Variant(_DRAWER_NEW),
        "unseen": Variant(_DRAWER_UNSEEN, low=(-0.25, 0.88, 0.0), high=(0.25, 0.92, 0.0)),
    },
    "door-open": {
        "new": Variant(_DOOR_NEW, low=(0.04, 0.78, 0.15), high=(0.2, 0.95, 0.15)),
        "wide": Variant(low=(0.03, 0.75, 0.15), high=(0.25, 0.95, 0.15)),
        "recoloured": Variant(_DOOR_NEW),
        "unseen": Variant(_DOOR_UNSEEN, low=(0.04, 0.78, 0.15), high=(0.2, 0.95, 0.15)),
    },
    "window-open": {
        "new": Variant(_WINDOW_NEW, low=(-0.2, 0.65, 0.16), high=(0.2, 0.9, 0.16)),
        "wide": Variant(low=(-0.25, 0.65, 0.16), high=(0.25, 0.9, 0.16)),
        "recoloured": Variant(_WINDOW_NEW),
        "unseen": Variant(_WINDOW_UNSEEN, low=(-0.2, 0.65, 0.16), high=(0.2, 0.9, 0.16)),
    },
    "window-close": {
        "new": Variant(_WINDOW_NEW, low=(-0.1, 0.7, 0.2), high=(0.1, 0.9, 0.2)),
        "wide": Variant(low=(-0.15, 0.7, 0.2), high=(0.15, 0.9, 0.2)),
        "recoloured": Variant(_WINDOW_NEW),
        "unseen": Variant(_WINDOW_UNSEEN, low=(-0.1, 0.7, 0.2), high=(0.1, 0.9, 0.2)),
    },
}
"""Variants by task and name; every task also has "original"."""
