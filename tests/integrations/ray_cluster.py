"""Two Ray nodes on this machine, for the tests; and environments and a head that their workers can import."""

from __future__ import annotations

import os
import socket
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import gymnasium as gym
import ray
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from ray.cluster_utils import Cluster
from tiny import toy_env

from vla_rl.heads import GaussianHead
from vla_rl.integrations.ray import Placement

HORIZON = 7
HERE = Path(__file__).parent
AGENTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


@contextmanager
def two_nodes():
    """A cluster of two nodes that this process is connected to; nothing of it is left afterwards."""
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    settings = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),  # the workers import this file
        "RAY_worker_niceness": "0",  # Ray's 15 starves them beside other processes
    }
    with patch.dict(os.environ, settings):
        cluster = started(lambda: Cluster(initialize_head=True, head_node_args=node(include_dashboard=False)))
        try:
            # Ray believes that there is a GPU: good enough to see where it puts those who ask for one.
            started(lambda: cluster.add_node(**node(resources={"trainer": 1}, num_gpus=1)))
            started(lambda: ray.init(address=cluster.address, log_to_driver=False, ignore_reinit_error=True))
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def node(**more):
    """Arguments of a node; with its agents' ports, for Ray gives up on agents that take 15 s to choose some."""
    sockets = [socket.socket() for _ in AGENTS]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = {name: each.getsockname()[1] for name, each in zip(AGENTS, sockets, strict=True)}
    for each in sockets:
        each.close()
    return {"num_cpus": 4, "object_store_memory": 100_000_000, **ports, **more}


def started(start):
    """What `start` returns; Ray gives a node 30 seconds, which a busy machine may not find enough."""
    for attempt in range(4):
        with suppress(Exception) if attempt < 3 else nullcontext():
            return start()


def waiting_at(folder, count):
    """Process ids and nodes of the workers that have come to the gate, once there are `count`."""
    deadline = time.monotonic() + 300
    while len(found := [path.name for path in Path(folder).glob("*-*")]) < count:
        assert time.monotonic() < deadline, f"only {len(found)} of {count} workers have come to the gate"
        time.sleep(0.05)
    return {int(name.split("-")[0]): name.split("-")[1] for name in found}


def toy_envs(count, *, task="reach-red", horizon=HORIZON):
    """A vector env whose environments all go through the model in one batch."""
    return SyncVectorEnv([partial(toy_env, task, horizon=horizon)] * count, autoreset_mode=AutoresetMode.NEXT_STEP)


def come_to_gate(folder):
    """Say in a folder where this process runs, and wait while the folder says so."""
    (folder / f"{os.getpid()}-{ray.get_runtime_context().get_node_id()}").touch()
    while (folder / "closed").exists():
        time.sleep(0.05)


class Gate(gym.Wrapper):
    """Comes to the gate at its third step; and one of them, when the folder says so, hangs."""

    def __init__(self, env, folder):
        super().__init__(env)
        self.folder, self.count = Path(folder), 0

    def step(self, action):
        self.count += 1
        if self.count == 3:
            come_to_gate(self.folder)
        with suppress(FileNotFoundError):
            (self.folder / "hang").rename(self.folder / f"hanging.{os.getpid()}")  # only one can
            time.sleep(600)
        return self.env.step(action)


class GatedHead(GaussianHead):
    """Comes to the gate at its third supervised loss."""

    def __init__(self, *args, folder, **kwargs):
        super().__init__(*args, **kwargs)
        self.folder, self.count = Path(folder), 0

    def config(self):
        return super().config() | {"folder": str(self.folder)}

    def supervised_loss(self, features, state, actions):
        self.count += 1
        if self.count == 3:
            come_to_gate(self.folder)
        return super().supervised_loss(features, state, actions)


@dataclass(frozen=True)
class WithoutGPU(Placement):
    """Computes on the CPU wherever it is put."""

    @property
    def device(self):
        return "cpu"


def gated_envs(count, *, folder):
    """As `toy_envs`, behind a gate."""
    fns = [lambda: Gate(toy_env("reach-red", horizon=HORIZON), folder)] * count
    return SyncVectorEnv(fns, autoreset_mode=AutoresetMode.NEXT_STEP)
