"""The Lua script of a claim: who gets which jobs, in which order.

An order in three parts, each a loop: suspects, if the worker has nothing in hand; what was taken
from a silent worker or handed back; what nobody was given yet, lane by lane (streams.py, invariant
4, says by which order).

Suspects (crashes.py) are in lanes of their own, `<class>:suspect:<tenant>`, named by the set
`suspects` and by no other, so that the other two parts never meet them:

1. They are given to a worker that has nothing in hand, and then nothing but suspects: the one that
   waits longest, alone if its level is 2; else with up to max_group in all of level 1.
2. They never starve: when one has waited for longer than trial_after_ms, one busy worker at a time
   (the key `trial`) is given nothing until it has nothing in hand; then part 1 is its.
3. They are leased as any other: an entry that is idle for longer than the lease is given again.

Where there is no suspect all this costs one command a claim.

Called by: contract.streams, and nothing else. Rules for all scripts: scripts.py.
"""

CLAIM = """
-- KEYS 1 lanes | ARGV prefix consumer lease_ms room max_jobs is_idle takeovers_ttl_s
--                     max_group trial_after_ms trial_ttl_ms
-- returns {given, is_blocked, is_trial}
local P, me, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local room, left, idle = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6] == '1'
local now = redis.call('TIME')
now = tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
local given = {}

local function fields(entry)
  local f = {}
  for i = 1, #entry[2], 2 do f[entry[2][i]] = entry[2][i + 1] end
  return f
end
local function id_after(a, b)  -- stream ids as numbers: a > b
  local am, as = a:match('^(%d+)-(%d+)$')
  local bm, bs = b:match('^(%d+)-(%d+)$')
  am, as, bm, bs = tonumber(am), tonumber(as), tonumber(bm), tonumber(bs)
  return am > bm or (am == bm and as > bs)
end
local function fits(cost)
  if cost <= room then return true end
  return idle and #given == 0  -- alone it may have the whole pool; the engine judges the rest
end
local function give(kind, lane, id, f, suspect)
  given[#given + 1] = {kind, lane, id, f.job, f.spec, f.cost, suspect or 0}
  room, left = room - tonumber(f.cost), left - 1
end
local function is_current(lane, id, f)
  if redis.call('HGET', P..'job:'..f.job, 'entry') == id then return true end
  redis.call('XACK', P..'lane:'..lane, 'workers', id)
  redis.call('XDEL', P..'lane:'..lane, id)
  return false
end
local function idle_entries(set, lane, count, take)
  -- Call take(id, holder, fields) for entries whose lease has run out, until it returns false.
  local stream = P..'lane:'..lane
  if redis.call('EXISTS', stream) == 0 then
    redis.call('SREM', P..set, lane)
    return true
  end
  for _, p in ipairs(redis.call('XPENDING', stream, 'workers', 'IDLE', lease, '-', '+', count)) do
    local entry = redis.call('XRANGE', stream, p[1], p[1])[1]
    if not entry then
      redis.call('XACK', stream, 'workers', p[1])
    else
      local f = fields(entry)
      if is_current(lane, p[1], f) and not take(p[1], p[2], f) then return false end
    end
  end
  return true
end
local function take_over(lane, id, holder, f, suspect)
  redis.call('XCLAIM', P..'lane:'..lane, 'workers', me, lease, id)
  if holder ~= 'nobody' then  -- handed back in good order is no takeover
    redis.call('HINCRBY', P..'counts', 'takeovers', 1)
    redis.call('HINCRBY', P..'takeovers', lane, 1)
    redis.call('EXPIRE', P..'takeovers', ARGV[7])
  end
  give('takeover', lane, id, f, suspect)
end

local function suspects_of(lanes, count)  -- those that nobody runs, the longest waiting first
  local found = {}
  for _, lane in ipairs(lanes) do
    idle_entries('suspects', lane, count, function(id, holder, f)
      found[#found + 1] = {lane = lane, id = id, holder = holder, f = f}
      return true
    end)
  end
  table.sort(found, function(a, b) return id_after(b.id, a.id) end)
  return found
end
local suspect_lanes = redis.call('SMEMBERS', P..'suspects')
if #suspect_lanes > 0 and left > 0 then
  if idle then
    local level_of_all = nil
    for _, s in ipairs(suspects_of(suspect_lanes, tonumber(ARGV[8]))) do
      local level = tonumber(redis.call('HGET', P..'job:'..s.f.job, 'suspect') or '1')
      level_of_all = level_of_all or level
      if level == level_of_all then
        if not fits(tonumber(s.f.cost)) then break end
        take_over(s.lane, s.id, s.holder, s.f, level)
        if level > 1 or left <= 0 or #given >= tonumber(ARGV[8]) then break end
      end
    end
    if #given > 0 then
      if redis.call('GET', P..'trial') == me then redis.call('DEL', P..'trial') end
      return {given, 0, 1}
    end
  else
    local oldest = suspects_of(suspect_lanes, 1)[1]
    if oldest and now - tonumber(oldest.id:match('^%d+')) > tonumber(ARGV[9]) then
      redis.call('SET', P..'trial', me, 'NX', 'PX', ARGV[10])
      if redis.call('GET', P..'trial') == me then
        redis.call('PEXPIRE', P..'trial', ARGV[10])
        return {{}, 0, 0}
      end
    end
  end
end

for _, lane in ipairs(redis.call('SMEMBERS', P..'held')) do
  if left <= 0 then return {given, 0, 0} end
  local all_fit = idle_entries('held', lane, left, function(id, holder, f)
    if not fits(tonumber(f.cost)) then return false end
    take_over(lane, id, holder, f)
    return true
  end)
  if not all_fit then return {given, 1, 0} end
end

local function head(lane)  -- the lane's oldest entry nobody was given
  local stream = P..'lane:'..lane
  if redis.call('EXISTS', stream) == 0 then return nil, '0-0' end
  local last = '0-0'
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    for i = 1, #group, 2 do
      if group[i] == 'last-delivered-id' then last = group[i + 1] end
    end
  end
  return redis.call('XRANGE', stream, '('..last, '+', 'COUNT', 1)[1], last
end
local paused, has_pauses = {}, false
for _, pause in ipairs(redis.call('SMEMBERS', P..'paused')) do
  paused[pause], has_pauses = true, true
end
local function is_paused(lane)
  if not has_pauses then return false end
  local class, tenant = lane:match('^([^:]*):[^:]*:(.*)$')
  return paused['*:*'] or paused[class..':*'] or paused['*:'..tenant] or paused[class..':'..tenant]
end
local function urgent_lane()
  local num_paused = 0  -- met so far: they stay, those behind them get their turn
  while true do
    local due = redis.call('ZRANGEBYSCORE', P..'urgent', '-inf', now, 'LIMIT', num_paused, 16)
    if #due == 0 then return nil end
    for _, member in ipairs(due) do
      local lane, id = member:match('^(.*)|([^|]*)$')
      local entry, last = head(lane)
      if not (entry and id_after(id, last)) then redis.call('ZREM', P..'urgent', member)
      elseif is_paused(lane) then num_paused = num_paused + 1
      else return lane end
    end
  end
end
local charged = {}  -- what this call gave, so that one call shares too
local function next_lane()
  local urgent = urgent_lane()
  if urgent then return urgent end
  local class_rank = {interactive = 0, batch = 1}
  local priority_rank = {high = 0, normal = 1, low = 2}
  local best, best_key = nil, nil
  for _, lane in ipairs(redis.call('SMEMBERS', P..'lanes')) do
    if not is_paused(lane) then
      local class, priority, tenant = lane:match('^([^:]*):([^:]*):(.*)$')
      local served = tonumber(redis.call('HGET', P..'served', tenant) or '0')
      served = served + (charged[tenant] or 0)
      local key = {class_rank[class] or 9, served, priority_rank[priority] or 9, lane}
      if not best_key then best, best_key = lane, key end
      for i = 1, 4 do
        if key[i] < best_key[i] then best, best_key = lane, key break end
        if key[i] > best_key[i] then break end
      end
    end
  end
  return best
end

while left > 0 do
  local lane = next_lane()
  if not lane then return {given, 0, 0} end
  local entry = head(lane)
  if not entry then
    redis.call('SREM', P..'lanes', lane)
    none_waits(lane)
    if redis.call('XLEN', P..'lane:'..lane) == 0 then redis.call('DEL', P..'lane:'..lane) end
  else
    local f = fields(entry)
    if not fits(tonumber(f.cost)) then return {given, 1, 0} end
    redis.call('XREADGROUP', 'GROUP', 'workers', me, 'COUNT', 1, 'STREAMS', P..'lane:'..lane, '>')
    count_waiting(lane, -1, -f.cost)
    if is_current(lane, entry[1], f) then
      redis.call('SADD', P..'held', lane)
      local tenant = lane:match('^[^:]*:[^:]*:(.*)$')
      charged[tenant] = (charged[tenant] or 0) + tonumber(f.cost)
      give('new', lane, entry[1], f)
    end
  end
end
return {given, 0, 0}
"""
