"""Episodes: in memory, on disk, as balanced batches of steps, their statistics, and tools for whole stores."""

from vla_rl.data.copying import Progress
from vla_rl.data.edits import filter_episodes, merge, relabel, sample, split
from vla_rl.data.episode import Episode
from vla_rl.data.examination import Finding
from vla_rl.data.foreign import Labels
from vla_rl.data.image_formats import ImageFormat
from vla_rl.data.layout import EpisodeInfo
from vla_rl.data.lerobot_format import export_lerobot
from vla_rl.data.lerobot_import import import_lerobot
from vla_rl.data.minari_format import export_minari, import_minari
from vla_rl.data.packing import pack
from vla_rl.data.pictures import play
from vla_rl.data.reencoding import FeatureGroup, feature_groups, read_features, reencode
from vla_rl.data.rlds_format import import_rlds
from vla_rl.data.robomimic_format import export_robomimic, import_robomimic
from vla_rl.data.roboset_format import import_roboset
from vla_rl.data.safety import UnsafeFileError
from vla_rl.data.salvage import Repair, repair
from vla_rl.data.sampler import BalancedSampler
from vla_rl.data.selection import select
from vla_rl.data.statistics import (
    ArrayStatistics,
    Statistics,
    TaskStatistics,
    TaskSummary,
    compute_statistics,
    stats,
    summarize,
)
from vla_rl.data.steps import Batch
from vla_rl.data.store import EpisodeStore
from vla_rl.data.verification import Verification, verify

__all__ = [
    "ArrayStatistics",
    "BalancedSampler",
    "Batch",
    "Episode",
    "EpisodeInfo",
    "EpisodeStore",
    "FeatureGroup",
    "Finding",
    "ImageFormat",
    "Labels",
    "Progress",
    "Repair",
    "Statistics",
    "TaskStatistics",
    "TaskSummary",
    "UnsafeFileError",
    "Verification",
    "compute_statistics",
    "export_lerobot",
    "export_minari",
    "export_robomimic",
    "feature_groups",
    "filter_episodes",
    "import_lerobot",
    "import_minari",
    "import_rlds",
    "import_robomimic",
    "import_roboset",
    "merge",
    "pack",
    "play",
    "read_features",
    "reencode",
    "relabel",
    "repair",
    "sample",
    "select",
    "split",
    "stats",
    "summarize",
    "verify",
]
