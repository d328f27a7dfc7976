"""The `vla-rl data export` and `vla-rl data import` commands: one class per format and direction."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from vla_rl._data_output import print_store, progress, say
from vla_rl.data import (
    EpisodeStore,
    Labels,
    export_lerobot,
    export_minari,
    export_robomimic,
    import_lerobot,
    import_minari,
    import_rlds,
    import_robomimic,
    import_roboset,
)
from vla_rl.importing import load_object

Store = tyro.conf.Positional[Path]


@dataclass
class ExportMinari:
    """Write a Minari data set in one HDF5 file; images stay raw, which Minari reads from version 0.5.4 on.

    Example: vla-rl data export minari demos --out ~/.minari/datasets/me/drawers-v0
    """

    store: Store
    """directory of the store"""
    out: Path
    """directory of the data set; minari.load_dataset finds it below ~/.minari/datasets by its path from there"""
    where: str | None = None
    """which episodes, such as "success\""""
    overwrite: bool = False
    """replace the data set at --out"""

    def run(self, console: Console) -> None:
        """Export."""
        with EpisodeStore(self.store, mode="r") as store, progress(console, "episodes") as report:
            export_minari(store, self.out.expanduser(), where=self.where, overwrite=self.overwrite, progress=report)
        say(console, f"wrote {self.out}")


@dataclass
class ImportMinari:
    """Copy a Minari data set into a store: any with images, or with --render, any with states.

    Example: vla-rl data import minari me/drawers-v0 --out drawers --instruction "open the drawer"
    """

    dataset: tyro.conf.Positional[str]
    """id of a data set that Minari has downloaded, or its directory"""
    out: Path
    """directory of the new store"""
    labels: tyro.conf.OmitArgPrefixes[Labels] = field(default_factory=Labels)
    """what the episodes do not say of themselves"""
    render: str | None = None
    """"package.module:function" that draws an episode's images from its arrays; see docs/guides/data.md"""
    overwrite: bool = False
    """replace what is at --out"""

    def run(self, console: Console) -> None:
        """Import."""
        _import(import_minari, self, self.dataset, console)


@dataclass
class ExportRobomimic:
    """Write a robomimic file: a small one of views into the store, or with --materialize one that stands alone.

    Example: vla-rl data export robomimic demos --out demos.hdf5
    """

    store: Store
    """directory of the store"""
    out: Path
    """file to write"""
    materialize: bool = False
    """copy the data instead of pointing to the store"""
    where: str | None = None
    """which episodes, such as "success\""""
    overwrite: bool = False
    """replace the file at --out"""

    def run(self, console: Console) -> None:
        """Export."""
        options = {"materialize": self.materialize, "where": self.where, "overwrite": self.overwrite}
        with EpisodeStore(self.store, mode="r") as store, progress(console, "episodes") as report:
            export_robomimic(store, self.out, progress=report, **options)
        say(console, f"wrote {self.out}")


@dataclass
class ImportRobomimic:
    """Copy the demonstrations of a robomimic file into a store.

    Example: vla-rl data import robomimic low_dim.hdf5 --out lift --task lift --instruction "lift the cube"
    """

    file: tyro.conf.Positional[Path]
    """the HDF5 file"""
    out: Path
    """directory of the new store"""
    labels: tyro.conf.OmitArgPrefixes[Labels] = field(default_factory=Labels)
    """what the episodes do not say of themselves"""
    render: str | None = None
    """"package.module:function" that draws an episode's images from its arrays; see docs/guides/data.md"""
    overwrite: bool = False
    """replace what is at --out"""

    def run(self, console: Console) -> None:
        """Import."""
        _import(import_robomimic, self, self.file, console)


@dataclass
class ExportLeRobot:
    """Write a LeRobotDataset v3, pictures as PNG in its tables or with --video as mp4.

    Example: vla-rl data export lerobot demos --out lerobot/drawers --fps 20 --video
    """

    store: Store
    """directory of the store"""
    out: Path
    """directory of the data set"""
    fps: int = 20
    """steps per second, which a store does not know"""
    video: bool = False
    """pictures as H.264 videos: small, and no longer what they were bit by bit"""
    crf: int = 18
    """quality of videos, 0 to 51; less is better and larger"""
    where: str | None = None
    """which episodes, such as "success\""""
    overwrite: bool = False
    """replace the data set at --out"""

    def run(self, console: Console) -> None:
        """Export."""
        options = {"fps": self.fps, "video": self.video, "crf": self.crf, "overwrite": self.overwrite}
        with EpisodeStore(self.store, mode="r") as store, progress(console, "episodes") as report:
            export_lerobot(store, self.out, where=self.where, progress=report, **options)
        say(console, f"wrote {self.out}")


@dataclass
class ImportLeRobot:
    """Copy the episodes of a LeRobotDataset v3 into a store.

    Example: vla-rl data import lerobot lerobot/drawers --out drawers
    """

    dataset: tyro.conf.Positional[Path]
    """its directory, without links into a cache; `hf download --local-dir` makes such a one"""
    out: Path
    """directory of the new store"""
    labels: tyro.conf.OmitArgPrefixes[Labels] = field(default_factory=Labels)
    """what the episodes do not say of themselves"""
    render: str | None = None
    """"package.module:function" that draws an episode's images from its arrays; see docs/guides/data.md"""
    overwrite: bool = False
    """replace what is at --out"""

    def run(self, console: Console) -> None:
        """Import."""
        _import(import_lerobot, self, self.dataset, console)


@dataclass
class ImportRoboSet:
    """Copy the trials of RoboHive or RoboSet traces into a store.

    Example: vla-rl data import roboset traces/ --out drawers --instruction "open the drawer"
    """

    traces: tyro.conf.Positional[Path]
    """a trace (.h5), or a directory of them"""
    out: Path
    """directory of the new store"""
    labels: tyro.conf.OmitArgPrefixes[Labels] = field(default_factory=Labels)
    """what the trials do not say of themselves"""
    render: str | None = None
    """"package.module:function" that draws an episode's images from its arrays; see docs/guides/data.md"""
    overwrite: bool = False
    """replace what is at --out"""

    def run(self, console: Console) -> None:
        """Import."""
        _import(import_roboset, self, self.traces, console)


@dataclass
class ImportRlds:
    """Copy the episodes of an RLDS data set (TensorFlow Datasets, Open X-Embodiment) into a store.

    Example: vla-rl data import rlds bridge/1.0.0 --out bridge --state-keys state
    """

    dataset: tyro.conf.Positional[Path]
    """directory of one version: features.json, dataset_info.json and *.tfrecord-* files"""
    out: Path
    """directory of the new store"""
    split: str = "train"
    """which part of the data set"""
    labels: tyro.conf.OmitArgPrefixes[Labels] = field(default_factory=Labels)
    """what the episodes do not say of themselves"""
    render: str | None = None
    """"package.module:function" that draws an episode's images from its arrays; see docs/guides/data.md"""
    overwrite: bool = False
    """replace what is at --out"""

    def run(self, console: Console) -> None:
        """Import."""
        _import(partial(import_rlds, split=self.split), self, self.dataset, console)


@dataclass
class Export:
    """Hand episodes on in the format of another program."""

    format: tyro.conf.OmitSubcommandPrefixes[
        Annotated[ExportMinari, tyro.conf.subcommand("minari")]
        | Annotated[ExportRobomimic, tyro.conf.subcommand("robomimic")]
        | Annotated[ExportLeRobot, tyro.conf.subcommand("lerobot")]
    ]

    def run(self, console: Console) -> None:
        """Export."""
        self.format.run(console)


@dataclass
class Import:
    """Make a store of episodes that another program wrote."""

    format: tyro.conf.OmitSubcommandPrefixes[
        Annotated[ImportMinari, tyro.conf.subcommand("minari")]
        | Annotated[ImportRobomimic, tyro.conf.subcommand("robomimic")]
        | Annotated[ImportLeRobot, tyro.conf.subcommand("lerobot")]
        | Annotated[ImportRoboSet, tyro.conf.subcommand("roboset")]
        | Annotated[ImportRlds, tyro.conf.subcommand("rlds")]
    ]

    def run(self, console: Console) -> None:
        """Import."""
        self.format.run(console)


def _import(function: Callable[..., EpisodeStore], options: Any, path: Path | str, console: Console) -> None:
    render = None if options.render is None else load_object(options.render)
    with warnings.catch_warnings(record=True) as caught, progress(console, "episodes") as report:
        warnings.simplefilter("default")
        function(path, options.out, labels=options.labels, render=render, overwrite=options.overwrite, progress=report)
    for text in sorted({str(warning.message) for warning in caught if warning.category is UserWarning}):
        say(console, f"warning: {text}")
    print_store(options.out, console)
