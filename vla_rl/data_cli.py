"""The `vla-rl data` command: one class per tool, each around a function of `vla_rl.data`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from vla_rl._data_output import print_store, progress, say, say_array, say_rows
from vla_rl.data import (
    EpisodeStore,
    ImageFormat,
    filter_episodes,
    merge,
    pack,
    play,
    relabel,
    repair,
    sample,
    select,
    split,
    stats,
    verify,
)
from vla_rl.data_features_cli import ReEncode
from vla_rl.data_formats_cli import Export, Import

Store = tyro.conf.Positional[Path]
MAX_FINDINGS = 20


@dataclass
class Info:
    """Episodes, steps, success and length per task and source.

    Example: vla-rl data info runs/demo/expert_data
    """

    store: Store
    """directory of the store"""

    def run(self, console: Console) -> None:
        """Print the table."""
        print_store(self.store, console)


@dataclass
class Ls:
    """One line per episode: number, task, source, success, steps, return, seed, size.

    Example: vla-rl data ls runs/demo/expert_data --where "not success" --limit 10
    """

    store: Store
    """directory of the store"""
    where: str | None = None
    """which episodes, such as "success and task == 'drawer-open' and total_steps < 120\""""
    limit: int = 50
    """most lines; 0 for all"""

    def run(self, console: Console) -> None:
        """Print the lines."""
        with EpisodeStore(self.store, mode="r") as store:
            infos = store.index
        chosen = select(infos, self.where)
        shown = chosen[: self.limit or None]
        rows = [("index", "task", "source", "success", "steps", "return", "seed", "kB")]
        for i in shown:
            info = infos[i]
            seed = "-" if info.seed is None else str(info.seed)
            figures = (str(info.total_steps), f"{info.return_:.4g}", seed, f"{info.num_bytes / 1e3:.0f}")
            rows.append((str(i), info.task, info.source, "yes" if info.success else "no", *figures))
        say_rows(console, rows, text_columns=(1, 2, 3))
        if len(shown) < len(chosen):
            say(console, f"... {len(chosen) - len(shown)} more; --limit 0 shows all")


@dataclass
class Stats:
    """Length, return, action and state statistics per task.

    Read from the index; episodes of older stores, without sums in it, are opened, about 1 ms each.

    Example: vla-rl data stats runs/demo/expert_data --where success
    """

    store: Store
    """directory of the store"""
    where: str | None = None
    """which episodes, such as "success and task == 'drawer-open'\""""

    def run(self, console: Console) -> None:
        """Print the statistics."""
        with EpisodeStore(self.store, mode="r") as store, progress(console, "episodes") as report:
            tasks = stats(store, where=self.where, progress=report)
        for task in tasks:
            shortest, median, longest = task.lengths
            lowest, mean, highest = task.returns
            rate = f"success {task.success_rate:.2f}"
            say(console, f"{task.task}: {task.episodes} episodes, {task.steps:,} steps, {rate}")
            say(console, f"  length   min {shortest}, median {median:g}, max {longest}")
            say(console, f"  return   min {lowest:.4g}, mean {mean:.4g}, max {highest:.4g}")
            say_array(console, "actions", task.actions)
            if task.state is not None:
                say_array(console, "state", task.state)


@dataclass
class Verify:
    """Read every byte; check structure, shapes, ranges, NaN, success and checksums. Exit status 1 if there are errors.

    Example: vla-rl data verify runs/demo/expert_data
    """

    store: Store
    """directory of the store"""

    def run(self, console: Console) -> int:
        """Print what is wrong."""
        with progress(console, "episodes") as report:
            result = verify(self.store, progress=report)
        for finding in result.findings[:MAX_FINDINGS]:
            say(console, f"{finding.severity}: {finding.file}: {finding.message}")
        if len(result.findings) > MAX_FINDINGS:
            say(console, f"... {len(result.findings) - MAX_FINDINGS} more")
        errors = len(result.errors)
        say(
            console,
            f"{result.episodes} whole episodes, {result.checksums} of {result.arrays} arrays with a right checksum, "
            f"{errors} errors, {len(result.findings) - errors} warnings"
            + ("; `vla-rl data repair` rebuilds records and leaves out damaged episodes" if errors else ""),
        )
        return 1 if errors else 0


@dataclass
class Repair:
    """Write a new store of every complete episode of a damaged one, which is left as it is.

    Example: vla-rl data repair runs/demo/expert_data
    """

    store: Store
    """directory of the damaged store"""
    out: Path | None = None
    """where to write; by default <store>-repaired"""
    in_place: bool = False
    """give the new store the old one's name, and rename the old one to <store>-damaged"""
    overwrite: bool = False
    """replace what is at --out"""

    def run(self, console: Console) -> None:
        """Repair and say what was done."""
        with progress(console, "episodes") as report:
            done = repair(self.store, self.out, in_place=self.in_place, overwrite=self.overwrite, progress=report)
        if done.path is None:
            say(console, f"nothing to repair: all {done.kept} episodes are complete and in place; nothing was written")
            return
        for finding in done.findings:
            say(console, f"found: {finding.file}: {finding.message}")
        for finding in done.lost:
            say(console, f"lost: {finding.file}: {finding.message}")
        for new, old in done.renumbered.items():
            say(console, f"episode {old} is now episode {new}")
        say(console, f"wrote {done.kept} complete episodes to {done.path}; the damaged store is at {done.original}")


@dataclass
class Merge:
    """Join stores; frames are copied as they are.

    Example: vla-rl data merge monday tuesday --out both
    """

    stores: tyro.conf.Positional[tuple[Path, ...]]
    """directories of the stores, in the order their episodes get"""
    out: Path
    """directory of the new store"""
    overwrite: bool = False
    """replace what is at --out"""

    def run(self, console: Console) -> None:
        """Merge."""
        with progress(console, "episodes") as report:
            merge(self.stores, self.out, overwrite=self.overwrite, progress=report)
        print_store(self.out, console)


@dataclass
class Split:
    """Divide a store in two by a share of every task's episodes, or into one store per task.

    Example: vla-rl data split demos --out parts --fraction 0.9   (makes parts/train and parts/val)
    """

    store: Store
    """directory of the store"""
    out: Path
    """new directory for the parts"""
    fraction: float | None = None
    """share of the first part, such as 0.9; without it, one store per task"""
    names: tuple[str, str] = ("train", "val")
    """names of the two parts"""
    seed: int = 0
    """seed of the draw"""
    overwrite: bool = False
    """replace what is at --out"""

    def run(self, console: Console) -> None:
        """Split."""
        options = {"fraction": self.fraction, "names": self.names, "seed": self.seed, "overwrite": self.overwrite}
        with progress(console, "episodes") as report:
            parts = split(self.store, self.out, progress=report, **options)
        for part in parts:
            say(console, f"{part.path}: {len(part)} episodes, {part.total_steps:,} steps")


@dataclass
class Filter:
    """Copy the episodes for which an expression holds.

    Names: index, task, success, source, total_steps, iteration, seed, instruction, policy_version, return_.

    Example: vla-rl data filter demos --where "success and task == 'drawer-open' and total_steps < 120" --out short
    """

    store: Store
    """directory of the store"""
    where: str
    """the expression: and, or, not, comparisons, in, numbers, strings, arithmetic"""
    out: Path
    """directory of the new store"""
    overwrite: bool = False
    """replace what is at --out"""

    def run(self, console: Console) -> None:
        """Filter."""
        with progress(console, "episodes") as report:
            filter_episodes(self.store, self.out, where=self.where, overwrite=self.overwrite, progress=report)
        print_store(self.out, console)


@dataclass
class Relabel:
    """Copy a store with another task, instruction or source for some or all episodes.

    Example: vla-rl data relabel demos --where "task == 'drawer'" --task drawer-open --out relabelled
    """

    store: Store
    """directory of the store"""
    out: Path
    """directory of the new store"""
    task: str | None = None
    """new task"""
    instruction: str | None = None
    """new instruction"""
    source: str | None = None
    """new source"""
    where: str | None = None
    """which episodes to change, such as "task == 'drawer'"; the others are copied unchanged"""
    overwrite: bool = False
    """replace what is at --out"""

    def run(self, console: Console) -> None:
        """Relabel."""
        changes = {"task": self.task, "instruction": self.instruction, "source": self.source}
        with progress(console, "episodes") as report:
            relabel(self.store, self.out, where=self.where, overwrite=self.overwrite, progress=report, **changes)
        print_store(self.out, console)


@dataclass
class Sample:
    """Copy a number of episodes, drawn as evenly over the tasks as they allow.

    Example: vla-rl data sample demos --number 100 --where success --out hundred
    """

    store: Store
    """directory of the store"""
    number: int
    """how many episodes"""
    out: Path
    """directory of the new store"""
    where: str | None = None
    """draw from these only, such as "success and total_steps < 120\""""
    seed: int = 0
    """seed of the draw"""
    overwrite: bool = False
    """replace what is at --out"""

    def run(self, console: Console) -> None:
        """Sample."""
        options = {"seed": self.seed, "where": self.where, "overwrite": self.overwrite}
        with progress(console, "episodes") as report:
            sample(self.store, self.out, self.number, progress=report, **options)
        print_store(self.out, console)


@dataclass
class Pack:
    """Write a store anew with its pictures compressed, to keep or send it; --images raw unpacks it for training.

    raw; lzf, zstd, png, webp: bit by bit the same when read; jpeg, video: nearly.

    Example: vla-rl data pack demos --images webp --out demos-small
    """

    store: Store
    """directory of the store"""
    out: Path
    """directory of the new store"""
    images: ImageFormat
    """how it keeps pictures"""
    overwrite: bool = False
    """replace what is at --out"""

    def run(self, console: Console) -> None:
        """Pack."""
        before = sum(info.num_bytes for info in EpisodeStore(self.store, mode="r").index)  # --out may replace it
        with progress(console, "episodes") as report:
            packed = pack(self.store, self.out, images=self.images, overwrite=self.overwrite, progress=report)
        after = sum(info.num_bytes for info in packed.index)
        say(console, f"{self.out}: {len(packed)} episodes, {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB now")


@dataclass
class Play:
    """Write a video (.mp4, .gif) or a contact sheet (.png, .jpg) with instruction, actions and success drawn in.

    Example: vla-rl data play demos --episodes 0 7 --out look.mp4
    """

    store: Store
    """directory of the store"""
    out: Path
    """file to write; its suffix decides the kind"""
    episodes: tuple[int, ...] = ()
    """numbers of the episodes; by default the first ones that --where selects"""
    where: str | None = None
    """which episodes, such as "not success\""""
    limit: int = 6
    """most episodes, where --episodes does not name them"""
    height: int = 192
    """height of a camera picture in pixels"""
    fps: float = 20
    """frames per second of a video"""
    columns: int = 8
    """frames per row of a contact sheet"""
    overwrite: bool = False
    """replace the file at --out"""

    def run(self, console: Console) -> None:
        """Play."""
        options = {"height": self.height, "fps": self.fps, "columns": self.columns, "overwrite": self.overwrite}
        with EpisodeStore(self.store, mode="r") as store, progress(console, "episodes") as report:
            episodes = self.episodes or select(store.index, self.where)[: self.limit]
            try:
                play(store, self.out, episodes, progress=report, **options)
            except IndexError as error:
                raise ValueError(f"{error}; `vla-rl data ls` lists them") from error
        say(console, f"wrote {self.out} ({len(episodes)} episodes)")


Tool = (
    Info
    | Ls
    | Stats
    | Verify
    | Repair
    | Merge
    | Split
    | Filter
    | Relabel
    | Sample
    | Pack
    | Play
    | Export
    | Import
    | ReEncode
)


@dataclass
class Data:
    """Look into episode stores; check, repair, cut, join and convert them."""

    tool: tyro.conf.FlagCreatePairsOff[tyro.conf.OmitSubcommandPrefixes[Tool]]

    def run(self, console: Console) -> int | None:
        """Run the tool; returns its exit status, None for 0."""
        return self.tool.run(console)
