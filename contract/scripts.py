"""The Lua scripts of `streams.py` and `tokens.py`: each operation whole or not at all.

Keys are those of `keys.py`, built from the prefix in ARGV[1]; KEYS[1] only routes a script to the
slot of its model. Times are the server's. Every script may be run again after an error whose
outcome is unknown; what a repeat does is said where it is not obvious.

Called by: contract.streams (lanes), contract.tokens (logs), and nothing else.

Size: the operations are read against one another (who sets, who deletes a field), so they stay
together.
"""

ENQUEUE = """
-- KEYS 1 lanes | ARGV prefix job lane tenant spec cost urgent_ms ttl_s
local P, job, lane, tenant = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local hash, stream = P..'job:'..job, P..'lane:'..lane
if redis.call('HEXISTS', hash, 'lane') == 1 then return 0 end
if redis.call('EXISTS', stream) == 0 then
  redis.call('XGROUP', 'CREATE', stream, 'workers', '0', 'MKSTREAM')
end
local id = redis.call('XADD', stream, '*', 'job', job, 'spec', ARGV[5], 'cost', ARGV[6])
redis.call('HSET', hash, 'lane', lane, 'entry', id)
redis.call('EXPIRE', hash, ARGV[8])
redis.call('HINCRBY', P..'counts', 'accepted', 1)
if redis.call('SISMEMBER', P..'lanes', lane) == 0 then
  local present = false
  local function least(set)  -- what the least served other tenant of these lanes was served
    local found = nil
    for _, other in ipairs(redis.call('SMEMBERS', P..set)) do
      local t = other:match('^[^:]*:[^:]*:(.*)$')
      local s = tonumber(redis.call('HGET', P..'served', t) or '0')
      if t == tenant then present = present or set == 'lanes'
      elseif not found or s < found then found = s end
    end
    return found
  end
  local level = least('lanes') or least('held')
  level = level or tonumber(redis.call('HGET', P..'served', '') or '0')
  if not present and tonumber(redis.call('HGET', P..'served', tenant) or '0') < level then
    redis.call('HSET', P..'served', tenant, level)
  end
  redis.call('SADD', P..'lanes', lane)
end
if ARGV[7] ~= '' then redis.call('ZADD', P..'urgent', ARGV[7], lane..'|'..id) end
redis.call('PUBLISH', P..'wake', 'work')
return 1
"""

CLAIM = """
-- KEYS 1 lanes | ARGV prefix consumer lease_ms room max_jobs is_idle takeovers_ttl_s
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
local function give(kind, lane, id, f)
  given[#given + 1] = {kind, lane, id, f.job, f.spec, f.cost}
  room, left = room - tonumber(f.cost), left - 1
end
local function is_current(lane, id, f)
  if redis.call('HGET', P..'job:'..f.job, 'entry') == id then return true end
  redis.call('XACK', P..'lane:'..lane, 'workers', id)
  redis.call('XDEL', P..'lane:'..lane, id)
  return false
end

for _, lane in ipairs(redis.call('SMEMBERS', P..'held')) do
  if left <= 0 then return {given, 0} end
  local stream = P..'lane:'..lane
  if redis.call('EXISTS', stream) == 0 then
    redis.call('SREM', P..'held', lane)
  else
    for _, p in ipairs(redis.call('XPENDING', stream, 'workers', 'IDLE', lease, '-', '+', left)) do
      local entry = redis.call('XRANGE', stream, p[1], p[1])[1]
      if not entry then
        redis.call('XACK', stream, 'workers', p[1])
      else
        local f = fields(entry)
        if is_current(lane, p[1], f) then
          if not fits(tonumber(f.cost)) then return {given, 1} end
          redis.call('XCLAIM', stream, 'workers', me, lease, p[1])
          if p[2] ~= 'nobody' then  -- handed back in good order is no takeover
            redis.call('HINCRBY', P..'counts', 'takeovers', 1)
            redis.call('HINCRBY', P..'takeovers', lane, 1)
            redis.call('EXPIRE', P..'takeovers', ARGV[7])
          end
          give('takeover', lane, p[1], f)
        end
      end
    end
  end
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
  if not lane then return {given, 0} end
  local entry = head(lane)
  if not entry then
    redis.call('SREM', P..'lanes', lane)
    if redis.call('XLEN', P..'lane:'..lane) == 0 then redis.call('DEL', P..'lane:'..lane) end
  else
    local f = fields(entry)
    if not fits(tonumber(f.cost)) then return {given, 1} end
    redis.call('XREADGROUP', 'GROUP', 'workers', me, 'COUNT', 1, 'STREAMS', P..'lane:'..lane, '>')
    if is_current(lane, entry[1], f) then
      redis.call('SADD', P..'held', lane)
      local tenant = lane:match('^[^:]*:[^:]*:(.*)$')
      charged[tenant] = (charged[tenant] or 0) + tonumber(f.cost)
      give('new', lane, entry[1], f)
    end
  end
end
return {given, 0}
"""

RENEW = """
-- KEYS 1 lanes | ARGV prefix consumer ttl_s (job attempt)...
local P, me, out = ARGV[1], ARGV[2], {}
for i = 4, #ARGV, 2 do
  local hash = P..'job:'..ARGV[i]
  local h = redis.call('HMGET', hash, 'attempt', 'lane', 'entry', 'cancel', 'end')
  local state, attempt = 'held', tonumber(ARGV[i + 1])
  if h[5] then state = 'lost'
  elseif not h[1] or not h[2] then state = 'gone'
  elseif tonumber(h[1]) > attempt then state = 'lost'
  elseif tonumber(h[1]) < attempt then state = 'gone'  -- the newest fence was not on disk
  else
    local ok = redis.pcall('XCLAIM', P..'lane:'..h[2], 'workers', me, 0, h[3], 'JUSTID')
    if ok.err or #ok == 0 then state = 'gone'
    else
      redis.call('EXPIRE', hash, ARGV[3])
      if h[4] then state = 'cancel' end
    end
  end
  out[#out + 1] = state
end
return out
"""

FINISH = """
-- KEYS 1 lanes | ARGV prefix ttl_s (job entry)...     entry '' = whatever the hash names
local P = ARGV[1]
for i = 3, #ARGV, 2 do
  local hash = P..'job:'..ARGV[i]
  local h = redis.call('HMGET', hash, 'lane', 'entry')
  local id = ARGV[i + 1]
  if h[1] and (id == '' or id == h[2]) then
    local stream = P..'lane:'..h[1]
    if redis.call('EXISTS', stream) == 1 then
      redis.call('XACK', stream, 'workers', h[2])
      redis.call('XDEL', stream, h[2])
      if redis.call('XLEN', stream) == 0 then
        redis.call('DEL', stream)
        redis.call('SREM', P..'lanes', h[1])
        redis.call('SREM', P..'held', h[1])
      elseif redis.call('XPENDING', stream, 'workers')[1] == 0 then
        redis.call('SREM', P..'held', h[1])
      end
      local tenant = h[1]:match('^[^:]*:[^:]*:(.*)$')
      redis.call('HSET', P..'served', '', redis.call('HGET', P..'served', tenant) or '0')
    end
    redis.call('ZREM', P..'urgent', h[1]..'|'..h[2])
    redis.call('EXPIRE', hash, ARGV[2])
  end
end
return 1
"""

HAND_BACK = """
-- KEYS 1 lanes | ARGV prefix job attempt
-- The entry stays pending under nobody with an endless idle time: the next claim takes it first.
local P, hash = ARGV[1], ARGV[1]..'job:'..ARGV[2]
local h = redis.call('HMGET', hash, 'attempt', 'lane', 'entry')
if not h[2] or (h[1] and tonumber(h[1]) > tonumber(ARGV[3])) then return 0 end
redis.pcall('XCLAIM', P..'lane:'..h[2], 'workers', 'nobody', 0, h[3],
            'IDLE', 1000000000, 'JUSTID')
redis.call('PUBLISH', P..'wake', 'work')
return 1
"""

CANCEL = """
-- KEYS 1 lanes | ARGV prefix job
if redis.call('EXISTS', ARGV[1]..'job:'..ARGV[2]) == 1 then
  redis.call('HSET', ARGV[1]..'job:'..ARGV[2], 'cancel', '1')
end
redis.call('PUBLISH', ARGV[1]..'wake', 'cancel '..ARGV[2])
return 1
"""

MOVE = """
-- KEYS 1 lanes | ARGV prefix job lane spec cost
-- 1 moved, 0 it is in that lane already (a repeat), 2 a worker was given it, 3 not known here.
-- The new entry is the youngest of its lane; its tenant had work queued, so `served` stays.
local P, job, lane = ARGV[1], ARGV[2], ARGV[3]
local hash = P..'job:'..job
local h = redis.call('HMGET', hash, 'lane', 'entry', 'end')
if not h[1] or h[3] then return 3 end
if h[1] == lane then return 0 end
local old, stream = P..'lane:'..h[1], P..'lane:'..lane
if #redis.call('XRANGE', old, h[2], h[2]) == 0 then return 3 end
if #redis.call('XPENDING', old, 'workers', h[2], h[2], 1) > 0 then return 2 end
if redis.call('EXISTS', stream) == 0 then
  redis.call('XGROUP', 'CREATE', stream, 'workers', '0', 'MKSTREAM')
end
local id = redis.call('XADD', stream, '*', 'job', job, 'spec', ARGV[4], 'cost', ARGV[5])
redis.call('HSET', hash, 'lane', lane, 'entry', id)
redis.call('SADD', P..'lanes', lane)
local due = redis.call('ZSCORE', P..'urgent', h[1]..'|'..h[2])
if due then
  redis.call('ZREM', P..'urgent', h[1]..'|'..h[2])
  redis.call('ZADD', P..'urgent', due, lane..'|'..id)
end
redis.call('XDEL', old, h[2])
if redis.call('XLEN', old) == 0 then
  redis.call('DEL', old)
  redis.call('SREM', P..'lanes', h[1])
  redis.call('SREM', P..'held', h[1])
end
redis.call('PUBLISH', P..'wake', 'work')
return 1
"""

RESTORE = """
-- KEYS 1 lanes | ARGV prefix consumer job attempt gen next lane spec cost ttl_s log...
-- This Redis lost the job while its worker ran on: the worker puts back what it knows.
local P, job, attempt = ARGV[1], ARGV[3], tonumber(ARGV[4])
local hash = P..'job:'..job
local h = redis.call('HMGET', hash, 'attempt', 'lane', 'entry', 'end', 'gen', 'next')
if h[4] or (h[1] and tonumber(h[1]) > attempt) then return 0 end
-- A flush whose reply was lost may have logged, and shown, more than the worker knows of.
local is_longer = h[1] and tonumber(h[1]) == attempt and h[5] == ARGV[5]
  and tonumber(h[6] or '0') > tonumber(ARGV[6]) and redis.call('EXISTS', P..'log:'..job) == 1
if h[2] then  -- a relay enqueued it again meanwhile: that entry goes, ours replaces it
  redis.pcall('XACK', P..'lane:'..h[2], 'workers', h[3])
  redis.pcall('XDEL', P..'lane:'..h[2], h[3])
end
local lane, stream = ARGV[7], P..'lane:'..ARGV[7]
if redis.call('EXISTS', stream) == 0 then
  redis.call('XGROUP', 'CREATE', stream, 'workers', '0', 'MKSTREAM')
end
-- Only restored entries go to this lane, and each is read at once, so '>' is exactly this one.
local id = redis.call('XADD', stream, '*', 'job', job, 'spec', ARGV[8], 'cost', ARGV[9])
redis.call('XREADGROUP', 'GROUP', 'workers', ARGV[2], 'STREAMS', stream, '>')
redis.call('SADD', P..'held', lane)
redis.call('HSET', hash, 'lane', lane, 'entry', id, 'attempt', attempt, 'gen', ARGV[5],
           'worker', ARGV[2])
redis.call('EXPIRE', hash, ARGV[10])
if not is_longer then
  redis.call('HSET', hash, 'next', ARGV[6])
  redis.call('DEL', P..'log:'..job)
  for i = 11, #ARGV do redis.call('RPUSH', P..'log:'..job, ARGV[i]) end
end
redis.call('EXPIRE', P..'log:'..job, ARGV[10])
return 1
"""

DEPTHS = """
-- KEYS 1 lanes | ARGV prefix lane...
-- per lane: name length pending lag oldest (not given) num_back oldest_back (handed back) holders
local P, out = ARGV[1], {}
for n = 2, #ARGV do
  local stream = P..'lane:'..ARGV[n]
  local length = redis.call('XLEN', stream)
  if length > 0 then
    local held, last, lag = 0, '0-0', ''
    for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
      for i = 1, #group, 2 do
        if group[i] == 'last-delivered-id' then last = group[i + 1] end
        if group[i] == 'pending' then held = group[i + 1] end
        if group[i] == 'lag' then lag = group[i + 1] or '' end
      end
    end
    local oldest = length > held and redis.call('XRANGE', stream, '('..last, '+', 'COUNT', 1)[1]
    local holders, num_back, oldest_back = {}, 0, ''
    if held > 0 then
      for _, holder in ipairs(redis.call('XPENDING', stream, 'workers')[4] or {}) do
        if holder[1] ~= 'nobody' then
          holders[#holders + 1], holders[#holders + 2] = holder[1], holder[2]
        else
          num_back = tonumber(holder[2])
          local first = redis.call('XPENDING', stream, 'workers', '-', '+', 1, 'nobody')[1]
          oldest_back = first and first[1] or ''
        end
      end
    end
    out[#out + 1] = {ARGV[n], length, held, lag, oldest and oldest[1] or '',
                     num_back, oldest_back, holders}
  end
end
return out
"""

_SHARDS = """
local now = redis.call('TIME')
now = tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
local frames = {}
local function send(job, payload)  -- collect for each shard that wants the job's messages
  for _, shard in ipairs(redis.call('ZRANGEBYSCORE', P..'subs:'..job, now, '+inf')) do
    local frame = frames[shard]
    if not frame then frame = {} frames[shard] = frame end
    frame[#frame + 1] = struct.pack('>I4', #payload)..payload
  end
end
local function flush()
  for shard, parts in pairs(frames) do
    redis.call('PUBLISH', SHARD..shard, table.concat(parts))
  end
end
"""

FENCE = """
-- KEYS 1 lanes | ARGV prefix job attempt worker ttl_s
local P, job, attempt = ARGV[1], ARGV[2], tonumber(ARGV[3])
local hash = P..'job:'..job
local h = redis.call('HMGET', hash, 'attempt', 'gen', 'next', 'cancel', 'end')
if h[1] and tonumber(h[1]) > attempt then return {0} end
local gen, log = h[2], redis.call('LRANGE', P..'log:'..job, 0, -1)
if gen and tonumber(h[3] or '0') > 0 and #log == 0 then gen = nil end  -- the log was evicted
if not gen then
  gen = tostring(attempt - 1)
  log = {}
  redis.call('DEL', P..'log:'..job)
  redis.call('HSET', hash, 'gen', gen, 'next', 0)
end
redis.call('HSET', hash, 'attempt', attempt, 'worker', ARGV[4])
redis.call('EXPIRE', hash, ARGV[5])
return {1, tonumber(gen), h[4] and 1 or 0, log}
"""

APPEND = (
    """
-- KEYS 1 lanes | ARGV prefix shard_prefix ttl_s items payloads
-- items: msgpack [[job tenant attempt first count size]...]; payloads: the chunks, joined. Packed,
-- because six arguments a job cost the client more than all else in a flush; two of them, because
-- this msgpack reads no `bin`.
local P, SHARD, out, served, made, at = ARGV[1], ARGV[2], {}, {}, 0, 1
"""
    + _SHARDS
    + """
for _, item in ipairs(cmsgpack.unpack(ARGV[4])) do
  local job, tenant, attempt, first, count, size = unpack(item)
  local payload = ARGV[5]:sub(at, at + size - 1)
  at = at + size
  local hash = P..'job:'..job
  local h = redis.call('HMGET', hash, 'attempt', 'next', 'end')
  local newest, state = tonumber(h[1] or '-1'), nil
  if h[3] or newest > attempt then state = 2
  elseif newest < attempt then state = 3  -- unknown, or the newest fence was not on disk
  else
    local next_index = tonumber(h[2] or '0')
    if first + count <= next_index then state = 1
    elseif first < next_index then state = -next_index  -- the rest is asked for
    elseif first > next_index then state = 3
    else
      state = 0
      redis.call('RPUSH', P..'log:'..job, payload)
      redis.call('HSET', hash, 'next', first + count)
      if first == 0 then redis.call('EXPIRE', P..'log:'..job, ARGV[3]) end
      served[tenant] = (served[tenant] or 0) + count
      made = made + count
      send(job, payload)
    end
  end
  out[#out + 1] = state
end
for tenant, count in pairs(served) do redis.call('HINCRBY', P..'served', tenant, count) end
if made > 0 then redis.call('HINCRBY', P..'counts', 'tokens', made) end
flush()
return out
"""
)

ANNOUNCE = (
    """
-- KEYS 1 lanes | ARGV prefix shard_prefix (job attempt payload)...
local P, SHARD = ARGV[1], ARGV[2]
"""
    + _SHARDS
    + """
for i = 3, #ARGV, 3 do
  if redis.call('HGET', P..'job:'..ARGV[i], 'attempt') == ARGV[i + 1] then
    send(ARGV[i], ARGV[i + 2])
  end
end
flush()
return 1
"""
)

END = (
    """
-- KEYS 1 lanes | ARGV prefix shard_prefix ttl_s hash_ttl_s (job status payload)...
-- Postgres has accepted this end, so it is the truth whatever attempt the hash names.
local P, SHARD = ARGV[1], ARGV[2]
"""
    + _SHARDS
    + """
for i = 5, #ARGV, 3 do
  local job, hash = ARGV[i], P..'job:'..ARGV[i]
  if redis.call('HSETNX', hash, 'end', '1') == 1 then
    redis.call('RPUSH', P..'log:'..job, ARGV[i + 2])
    redis.call('HINCRBY', P..'counts', 'ended:'..ARGV[i + 1], 1)
    send(job, ARGV[i + 2])
  end
  redis.call('EXPIRE', P..'log:'..job, ARGV[3])
  redis.call('EXPIRE', hash, ARGV[4])
end
flush()
return 1
"""
)
