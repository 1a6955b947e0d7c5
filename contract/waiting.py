"""How many jobs and tokens wait in each lane, kept by the scripts that let entries in and out.

One hash a model (keys.waiting) with two fields a lane: `jobs:<lane>` and `tokens:<lane>` (cost
as claims count it) of the entries that nobody was given yet. What was handed back is not counted:
it was let in once, and a worker takes it first.

Invariants:
1. Each entry is counted in by the script that adds it and out by the one that gives it to a worker,
   moves it or deletes it; both belong to that script, so a repeat after an unknown outcome changes
   nothing.
2. A count heals: both fields of a lane are deleted whenever the lane is found empty, so entries of
   an older version, or of a Redis that lost its tail, are not missed or counted for ever. Whoever
   reads takes a negative count for none.

Called by: streams (the Lua), live (reads).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Lua that the scripts of lanes begin with; ARGV[1] is the model's prefix.
COUNT_WAITING = """
local function count_waiting(lane, jobs, tokens)
  redis.call('HINCRBY', ARGV[1]..'waiting', 'jobs:'..lane, jobs)
  redis.call('HINCRBY', ARGV[1]..'waiting', 'tokens:'..lane, tokens)
end
local function none_waits(lane)
  redis.call('HDEL', ARGV[1]..'waiting', 'jobs:'..lane, 'tokens:'..lane)
end
local function cost_of(stream, id)  -- of an entry, nil when it is not there
  local entry = redis.call('XRANGE', stream, id, id)[1]
  for i = 1, entry and #entry[2] or 0, 2 do
    if entry[2][i] == 'cost' then return tonumber(entry[2][i + 1]) end
  end
end
"""


@dataclass(frozen=True, slots=True)
class Load:
    """Jobs, and the tokens they may cost."""

    num_jobs: int = 0
    num_tokens: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(self.num_jobs + other.num_jobs, self.num_tokens + other.num_tokens)


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits for one model."""

    lanes: Mapping[tuple[str, str], Load] = field(default_factory=dict[tuple[str, str], Load])
    # by class and tenant
    num_accepted: int = 0  # ever enqueued here; less what waits, it is what has left the queue


def waiting_of(row: Mapping[bytes, bytes], num_accepted: bytes | None) -> Waiting:
    """Read the hash of a model; lanes that differ in priority alone are added up."""
    lanes: dict[tuple[str, str], Load] = {}
    for name, value in row.items():
        kind, job_class, _, tenant = name.decode().split(":", 3)
        count = max(0, int(value))
        load = Load(num_jobs=count) if kind == "jobs" else Load(num_tokens=count)
        key = (job_class, tenant)
        lanes[key] = lanes.get(key, Load()) + load
    return Waiting(lanes, int(num_accepted or 0))
