"""Episodes: in memory, on disk, as balanced batches of steps, and their statistics."""

from vla_rl.data.episode import Episode
from vla_rl.data.layout import EpisodeInfo
from vla_rl.data.sampler import BalancedSampler
from vla_rl.data.statistics import Statistics, TaskSummary, compute_statistics, summarize
from vla_rl.data.steps import Batch
from vla_rl.data.store import EpisodeStore

__all__ = [
    "BalancedSampler",
    "Batch",
    "Episode",
    "EpisodeInfo",
    "EpisodeStore",
    "Statistics",
    "TaskSummary",
    "compute_statistics",
    "summarize",
]
