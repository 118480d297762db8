"""Numbers that a field may hold: finite ones, and none so large that a run could never end or fit anywhere."""

from jsonargparse.typing import ClosedUnitInterval, OpenUnitInterval, restricted_number_type

__all__ = ["ClosedUnitInterval", "OpenUnitInterval"]

MOST, LEAST = 10**9, 1e-9
PositiveFloat = restricted_number_type("PositiveReal", float, [(">=", LEAST), ("<=", MOST)])
NonNegativeFloat = restricted_number_type("Real", float, [(">=", 0), ("<=", MOST)])
Share = restricted_number_type("Share", float, [(">", 0), ("<=", 1)])
PositiveInt = restricted_number_type("PositiveCount", int, [(">", 0), ("<=", MOST)])
NonNegativeInt = restricted_number_type("Count", int, [(">=", 0), ("<=", MOST)])
Stage = restricted_number_type("Stage", int, [(">=", -1000), ("<=", 1000)])
Several = restricted_number_type("Several", int, [(">=", 2), ("<=", 1000)])
BelowOne = restricted_number_type("BelowOne", float, [(">=", 0), ("<", 1)])
