"""What can be named in a scene: parts, their moving joints, and the part that a task's instruction is about."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Some drawn geoms of a scene that share a name and, when recoloured, a colour.

    Attributes:
        name: what it is called in texts.
        body: name of a MuJoCo body; the part takes drawn geoms on it and below it that no earlier part has taken.
        materials: only geoms of these materials; empty means all.
        moves: body whose joint opens or turns it; None if it does not move.
        ends: joint values (radians or metres) at fraction 0 and 1.
        states: what it is called near fraction 0 and near fraction 1.
    """

    name: str
    body: str
    materials: tuple[str, ...] = ()
    moves: str | None = None
    ends: tuple[float, float] = (0.0, 0.0)
    states: tuple[str, str] = ("closed", "open")


_PUCK = (Part("puck", "obj"),)
_PUCK_AND_WALL = (*_PUCK, Part("wall", "wall"))
_PRESS = {"moves": "button", "ends": (0.0, -0.06), "states": ("released", "pressed")}
_BUTTON = (Part("button", "button", ("btn_red",), **_PRESS), Part("box", "box"))
_HANDLE = {"moves": "handle_link", "ends": (0.0, -0.1), "states": ("up", "down")}
_HANDLE_BOX = (Part("handle", "handle_link", **_HANDLE), Part("box", "box"))
_PLATE = (Part("plate", "puck_channel"), Part("cabinet", "puck_goal"))
_DOOR = {"moves": "door_link", "ends": (0.0, -1.57)}

METAWORLD: dict[str, tuple[Part, ...]] = {
    "assembly_peg": (Part("nut", "RoundNut"), Part("peg", "peg")),
    "basketball": (Part("basketball", "bsktball"), Part("hoop", "hooplink"), Part("backboard", "basket_goal")),
    "bin_picking": (Part("block", "obj"), Part("bin", "bin_start"), Part("bin", "bin_goal")),
    "box": (
        Part("lid handle", "top_link", ("box_metal",)),
        Part("lid", "boxbodytop"),
        Part("box", "boxbody"),
    ),
    "button_press_topdown": _BUTTON,
    "button_press_topdown_wall": (*_BUTTON, Part("wall", "wall")),
    "button_press": _BUTTON,
    "button_press_wall": (*_BUTTON, Part("wall", "wall")),
    "coffee": (
        Part("mug", "obj"),
        Part("button", "cmbutton", moves="cmbutton", ends=(0.0, 0.03), states=("released", "pressed")),
        Part("coffee machine", "coffee_machine"),
    ),
    "dial": (Part("dial", "dial"),),
    "door_pull": (
        Part("door handle", "door_link", ("dl_metal",), **_DOOR),
        Part("door", "door_link", **_DOOR),
        Part("door frame", "door"),
    ),
    "door_lock": (
        Part("lock", "lock_link", moves="lock_link", ends=(0.0, 1.57), states=("unlocked", "locked")),
        Part("door", "door"),
    ),
    "table_with_hole": (Part("puck", "obj"),),
    "drawer": (
        Part("drawer handle", "drawer_link", ("drawer_white",), moves="drawer_link", ends=(0.0, -0.16)),
        Part("drawer", "drawer_link", moves="drawer_link", ends=(0.0, -0.16)),
        Part("cabinet", "drawer"),
    ),
    "faucet": (
        Part("faucet handle", "faucet_link2", moves="faucet_link2", ends=(-1.57, 1.57)),
        Part("faucet", "faucetBase"),
    ),
    "hammer": (
        Part("hammer handle", "hammer", ("hmr_red",)),
        Part("hammer", "hammerbody"),
        Part("nail", "nail_link", moves="nail_link", ends=(0.0, 0.1), states=("out", "in")),
        Part("box", "box"),
    ),
    "handle_press_sideways": _HANDLE_BOX,
    "handle_press": _HANDLE_BOX,
    "lever_pull": (
        Part("lever", "lever_link1", moves="lever_link1", ends=(0.0, -1.57), states=("down", "up")),
        Part("stand", "lever"),
    ),
    "pick_place_wall_v3": _PUCK_AND_WALL,
    "pick_out_of_hole": _PUCK,
    "pick_place_v3": _PUCK,
    "plate_slide": _PLATE,
    "plate_slide_sideway": _PLATE,
    "peg_insertion_side": (Part("peg", "peg"), Part("box", "box")),
    "peg_unplug_side": (Part("peg", "plug1"), Part("box", "box")),
    "soccer": (Part("ball", "soccer_ball"), Part("goal", "goal_whole")),
    "stick_obj": (Part("stick", "stick"), Part("thermos", "object")),
    "push_v3": _PUCK,
    "push_wall_v3": _PUCK_AND_WALL,
    "push_back_v3": _PUCK,
    "reach_v3": _PUCK,
    "reach_wall_v3": _PUCK_AND_WALL,
    "shelf_placing": (Part("puck", "obj"), Part("shelf", "shelf")),
    "sweep_v3": _PUCK,
    "window_horizontal": (
        Part("window handle", "windowb_a", ("window_white",), moves="windowb_a", ends=(0.0, 0.2)),
        Part("window", "windowb_a", moves="windowb_a", ends=(0.0, 0.2)),
        Part("window frame", "window"),
    ),
}
"""Parts by scene: the name of Meta-World's file without ``sawyer_`` and ``.xml``."""

HELD_OUT: tuple[str, ...] = ("soccer", "shelf_placing", "handle_press_sideways", "plate_slide", "plate_slide_sideway")
"""Scenes never shown in pretraining, for the probes; none belongs to the expert, RL or unseen tasks of the tables."""


def _knob(name: str, index: int) -> Part:
    body = f"knob {index}"
    return Part(f"{name} knob", body, moves=body, ends=(0.0, -1.57), states=("off", "on"))


_SLIDE = {"moves": "slidelink", "ends": (0.0, 0.44)}
_LEFT = {"moves": "hingeleftdoor", "ends": (0.0, -1.57)}
_RIGHT = {"moves": "hingerightdoor", "ends": (0.0, 1.57)}
_MICROWAVE = {"moves": "microdoorroot", "ends": (0.0, -2.09)}

KITCHEN: tuple[Part, ...] = (
    _knob("lower right", 1),
    _knob("lower left", 2),
    _knob("upper right", 3),
    _knob("upper left", 4),
    Part("light switch", "lightswitchroot", moves="lightswitchroot", ends=(0.0, -0.7), states=("off", "on")),
    Part("slide door handle", "slidelink", ("M_slide_metal",), **_SLIDE),
    Part("slide door", "slidelink", **_SLIDE),
    Part("slide cabinet", "slidecabinet"),
    Part("left door handle", "hingeleftdoor", ("M_hinge_metal",), **_LEFT),
    Part("left door", "hingeleftdoor", **_LEFT),
    Part("right door handle", "hingerightdoor", ("M_hinge_metal",), **_RIGHT),
    Part("right door", "hingerightdoor", **_RIGHT),
    Part("hinge cabinet", "hingecabinet"),
    Part("microwave handle", "microdoorroot", ("micro_metal",), **_MICROWAVE),
    Part("microwave door", "microdoorroot", ("micro_black", "micro_window"), **_MICROWAVE),
    Part("microwave", "microwave"),
    Part("kettle handle", "kettle", ("kettle_wood",)),
    Part("kettle", "kettle"),
    Part("hood", "hoodroot"),
    Part("counter", "counters1"),
)
"""Parts of Franka Kitchen; its four knobs are named as in the instructions."""

SHAPES: tuple[str, ...] = ("cube", "ball", "cylinder")
"""Nouns of the coloured shapes that lie about."""

NOUNS: tuple[str, ...] = tuple(
    dict.fromkeys([part.name for table in (*METAWORLD.values(), KITCHEN) for part in table] + list(SHAPES))
)
"""Everything that may be asked for, the gripper apart."""

TARGETS: dict[str, str] = {
    "assembly": "nut",
    "basketball": "basketball",
    "bin-picking": "block",
    "box-close": "lid handle",
    "button-press-topdown": "button",
    "button-press-topdown-wall": "button",
    "button-press": "button",
    "button-press-wall": "button",
    "coffee-button": "button",
    "coffee-pull": "mug",
    "coffee-push": "mug",
    "dial-turn": "dial",
    "disassemble": "nut",
    "door-close": "door handle",
    "door-lock": "lock",
    "door-open": "door handle",
    "door-unlock": "lock",
    "drawer-close": "drawer handle",
    "drawer-open": "drawer handle",
    "faucet-open": "faucet handle",
    "faucet-close": "faucet handle",
    "hammer": "hammer handle",
    "handle-press-side": "handle",
    "handle-press": "handle",
    "handle-pull-side": "handle",
    "handle-pull": "handle",
    "lever-pull": "lever",
    "plate-slide": "plate",
    "plate-slide-side": "plate",
    "plate-slide-back": "plate",
    "plate-slide-back-side": "plate",
    "peg-insert-side": "peg",
    "peg-unplug-side": "peg",
    "soccer": "ball",
    "stick-push": "stick",
    "stick-pull": "stick",
    "window-open": "window handle",
    "window-close": "window handle",
    "knob-on": "lower right knob",
    "light-on": "light switch",
    "microwave-open": "microwave handle",
    "slide-door-open": "slide door handle",
    "left-door-open": "left door handle",
    "bottom-burner": "lower left knob",
    "knob-3-on": "upper right knob",
    "top-burner": "upper left knob",
    "hinge-cabinet": "right door handle",
    "kettle": "kettle handle",
}
"""Part that the hand has to reach first, by task; the remaining tasks are about the puck."""
