"""Many machines through Ray: what a user imports of the files beside this one; see docs/guides/cluster.md."""

from vla_rl.integrations.ray_policy import Adaptation
from vla_rl.integrations.ray_rollouts import RayRolloutCollector
from vla_rl.integrations.ray_supervised import RemoteSupervised, share_episodes, supervised_remote
from vla_rl.integrations.ray_worker import NoiseByEnv
from vla_rl.integrations.ray_workers import Placement, RolloutWorkers, WorkerLossError

__all__ = [
    "Adaptation",
    "NoiseByEnv",
    "Placement",
    "RayRolloutCollector",
    "RemoteSupervised",
    "RolloutWorkers",
    "WorkerLossError",
    "share_episodes",
    "supervised_remote",
]
