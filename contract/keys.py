"""Every Redis key and channel of headrace: pattern, type, fields, writer, reader, lifetime.

`{model}` is a hash tag: all keys that one script touches carry the same one, so a Redis Cluster
keeps them in one slot; a Cluster spreads models, not the jobs of one model. Names of models are
percent-encoded in it (`model_tag`), so a name can hold neither a brace nor a colon.

Per model, written by the scripts of `streams.py` and `tokens.py` alone:

  hr:{m}:lane:<class>:<priority>:<tenant>   stream, group `workers`
      one entry a queued or running job: `job` id, `spec` wire.JobSpec, `cost` tokens.
      writer gateway and tasks (enqueue); reader courier (claim); an entry is deleted when the
      job ends, so what is in the stream is what is not done. The lease is the entry's idle time
      in the group's pending list. Priority `restored`: what a worker put back into a Redis that
      had lost it; `suspect`: jobs that run apart from others (crashes.py).
  hr:{m}:lanes     set of lane names that hold entries nobody was given yet      (enqueue, claim)
  hr:{m}:held      set of lane names with entries that were given and not ended   (claim, end)
  hr:{m}:suspects  set of lane names `<class>:suspect:<tenant>` that hold entries; they are in
      neither `lanes` nor `held`                             (hand back, enqueue; claim, end)
  hr:{m}:trial     string: the busy worker that is given nothing, so that it can try suspects once
      it has nothing in hand; lifetime a few of its claims                         (claim)
  hr:{m}:served    hash tenant -> tokens served, the scale of fairness            (append, enqueue)
      field '' holds what the tenant of the job that ended last was served        (finish)
  hr:{m}:urgent    zset `<lane>|<entry id>`, score = ms at which a deadline makes its lane jump
  hr:{m}:job:<id>  hash, one a job until JOB_TTL_S after its end:
      lane, entry  where its stream entry is
      attempt      the newest attempt's number, the fence (invariant 5)
      worker       who holds it
      next         index of the next token of the log
      gen          which log this is: 0, or the attempt before the one that had to start it anew
      prompt       tokens of the prompt, as its worker counted them: usage, should it die
      cancel       set once cancellation was asked
      suspect      its level (crashes.py), as its row says; without the field it is none
      end          set once the end record is in the log
  hr:{m}:log:<id>  list of wire.TokenChunk, then one wire.JobEnd: the token log  (append; follower)
      lifetime: RUNNING_TTL_S after the last write; LOG_TTL_S after the end (Postgres has it then)
  hr:{m}:subs:<id> zset gateway shard -> ms until which it wants the job's frames (subscribe)
  hr:{m}:counts    hash, what happened since this Redis is there: accepted   (enqueue)
      ended:<status>                                                         (end)
      tokens                                                                 (append)
      takeovers, jobs taken from a silent worker                             (claim)
      reader sampler
  hr:{m}:waiting   hash, two fields a lane: jobs:<lane>, tokens:<lane>, of the entries that nobody
      was given yet; deleted when the lane is found empty  (enqueue, claim, end, move; admission)
  hr:{m}:takeovers hash lane name -> takeovers; lifetime TAKEOVERS_TTL_S after the last one (claim)
  hr:{m}:paused    set of `<class>:<tenant>`, `*` for all: claim gives nothing new of such lanes;
      a copy of the table queue_pauses                               (gateway, sweeper; claim)

Fleet-wide:

  hr:worker:<id>   string wire.WorkerBeat, lifetime three beats                   (courier; sweeper)
  hr:worker-last:<id>  the same, lifetime WORKER_LAST_S: what it was when it died (courier; gateway)
  hr:workers       zset worker id -> ms of its last beat                          (courier; gateway)
  hr:streams       hash gateway shard -> `<ms of report>:<open event streams>`  (gateway; sampler)

Written by the sampler (tasks), read by it and the dashboards of the gateways; see live.py:

  hr:sample        string live.Sampled: the newest sample and the alarms
  hr:sampler       string: somebody samples now; lifetime a little less than a tick
  hr:snapshots     zset live.Snapshot, score = its ms: what counted up, of the last minutes
  hr:history:5s    list of live.Point, the last hour's, oldest first
  hr:history:1m    list of live.Point, one a minute of the last day, oldest first

Channels (pub/sub; nothing is lost with a message, each has a slower way that finds the same):

  hr:{m}:wake      `work`, or `cancel <job>`: couriers of the model listen
  hr:shard:<gateway>   frames for one gateway process: u32-prefixed wire messages of its jobs
"""

from __future__ import annotations

from urllib.parse import quote

#: The consumer group of every lane.
GROUP = "workers"
#: Seconds a running job's log and hash outlive their last write: longer than any sane outage.
RUNNING_TTL_S = 7 * 24 * 3600
#: Seconds the log of an ended job stays: time for live subscribers to drain; then Postgres replays.
LOG_TTL_S = 300
#: Seconds a job's hash stays after its end, so that a late relay does not enqueue it again.
JOB_TTL_S = 300
#: Seconds a lane's number of takeovers is remembered after the last one.
TAKEOVERS_TTL_S = 24 * 3600
#: Seconds a worker's last beat is kept after it went silent.
WORKER_LAST_S = 3600

#: What stands for the priority in the lane of a suspect.
SUSPECT = "suspect"

WORKERS = "hr:workers"
STREAMS = "hr:streams"
SAMPLE = "hr:sample"
SAMPLER = "hr:sampler"
SNAPSHOTS = "hr:snapshots"
HISTORY_5S = "hr:history:5s"
HISTORY_1M = "hr:history:1m"
#: Key prefix of the task queue (Celery), which shares the server.
CELERY_PREFIX = "hr:celery:"


def model_tag(model: str) -> str:
    """Return the model's name as it stands between the braces of a hash tag."""
    return quote(model, safe="")


def prefix(model: str) -> str:
    """Return the common beginning of a model's keys; scripts append to it."""
    return f"hr:{{{model_tag(model)}}}:"


def lane(job_class: str, priority: str, tenant: str) -> str:
    """Return a lane's name, as it stands in `lanes` and behind `lane:`."""
    return f"{job_class}:{priority}:{tenant}"


def lane_stream(model: str, lane_name: str) -> str:
    return f"{prefix(model)}lane:{lane_name}"


def job_hash(model: str, job: str) -> str:
    return f"{prefix(model)}job:{job}"


def token_log(model: str, job: str) -> str:
    return f"{prefix(model)}log:{job}"


def subscribers(model: str, job: str) -> str:
    return f"{prefix(model)}subs:{job}"


def counts(model: str) -> str:
    return f"{prefix(model)}counts"


def waiting(model: str) -> str:
    return f"{prefix(model)}waiting"


def takeovers(model: str) -> str:
    return f"{prefix(model)}takeovers"


def paused(model: str) -> str:
    return f"{prefix(model)}paused"


def wake_channel(model: str) -> str:
    return f"{prefix(model)}wake"


def shard_channel(shard: str) -> str:
    return f"hr:shard:{shard}"


def worker_beat(worker: str) -> str:
    return f"hr:worker:{worker}"


def worker_last(worker: str) -> str:
    return f"hr:worker-last:{worker}"
