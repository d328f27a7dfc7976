"""One physical robot as a Gymnasium environment: its clock, its limits, the person beside it, and learning on it."""

from vla_rl.robot.episodes import EarlyStop, ManualReset, Pause, SuccessSignal
from vla_rl.robot.operator import Operator, OperatorQuit
from vla_rl.robot.recording import RecordEpisodes
from vla_rl.robot.safety import SafetyLimits, UnsafeActionError
from vla_rl.robot.success import SuccessDetector
from vla_rl.robot.timing import ControlRate
from vla_rl.robot.training import RobotRun, evaluate_on_robot, robot_settings, train_on_robot

__all__ = [
    "ControlRate",
    "EarlyStop",
    "ManualReset",
    "Operator",
    "OperatorQuit",
    "Pause",
    "RecordEpisodes",
    "RobotRun",
    "SafetyLimits",
    "SuccessDetector",
    "SuccessSignal",
    "UnsafeActionError",
    "evaluate_on_robot",
    "robot_settings",
    "train_on_robot",
]
