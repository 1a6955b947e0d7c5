"""The Lua scripts of `streams.py` and `tokens.py`: each operation whole or not at all.

Keys are those of `keys.py`, built from the prefix in ARGV[1]; KEYS[1] only routes a script to the
slot of its model. Times are the server's. Every script may be run again after an error whose
outcome is unknown; what a repeat does is said where it is not obvious.

count_waiting, none_waits and cost_of are waiting.py's, which streams.py puts in front.

Called by: contract.streams (lanes), contract.tokens (logs), and nothing else. CLAIM, the longest,
is in claim_script.py.

Size: the operations are read against one another (who sets, who deletes a field), so they stay
together.
"""

_SUSPECT = """
local function suspect_lane(lane)
  local class, tenant = lane:match('^([^:]*):[^:]*:(.*)$')
  return class..':suspect:'..tenant
end
local function wait_among_suspects(lane, job, spec, cost, level)
  -- Pending under nobody from the start, as what is handed back: only CLAIM's trials look there.
  local stream = P..'lane:'..lane
  if redis.call('EXISTS', stream) == 0 then
    redis.call('XGROUP', 'CREATE', stream, 'workers', '0', 'MKSTREAM')
  end
  local id = redis.call('XADD', stream, '*', 'job', job, 'spec', spec, 'cost', cost)
  -- Each entry of this lane is read at once, so '>' is exactly this one.
  redis.call('XREADGROUP', 'GROUP', 'workers', 'nobody', 'STREAMS', stream, '>')
  redis.call('XCLAIM', stream, 'workers', 'nobody', 0, id, 'IDLE', 1000000000, 'JUSTID')
  redis.call('SADD', P..'suspects', lane)
  redis.call('HSET', P..'job:'..job, 'lane', lane, 'entry', id, 'suspect', level)
  redis.call('PUBLISH', P..'wake', 'work')
end
"""

_LEAVE = """
local function leave(lane, id)  -- delete a job's entry, and the lane with its last
  local stream = P..'lane:'..lane
  if redis.call('EXISTS', stream) == 1 then
    if redis.call('XACK', stream, 'workers', id) == 0 then  -- nobody was given it
      local cost = cost_of(stream, id)
      if cost then count_waiting(lane, -1, -cost) end
    end
    redis.call('XDEL', stream, id)
    if redis.call('XLEN', stream) == 0 then
      none_waits(lane)
      redis.call('DEL', stream)
      redis.call('SREM', P..'lanes', lane)
      redis.call('SREM', P..'held', lane)
      redis.call('SREM', P..'suspects', lane)
    elseif redis.call('XPENDING', stream, 'workers')[1] == 0 then
      redis.call('SREM', P..'held', lane)
    end
  end
  redis.call('ZREM', P..'urgent', lane..'|'..id)
end
"""

ENQUEUE = (
    """
-- KEYS 1 lanes | ARGV prefix job lane tenant spec cost urgent_ms ttl_s suspect
local P, job, lane, tenant = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local hash, stream = P..'job:'..job, P..'lane:'..lane
if redis.call('HEXISTS', hash, 'lane') == 1 then return 0 end
"""
    + _SUSPECT
    + """
if ARGV[9] ~= '0' then
  wait_among_suspects(suspect_lane(lane), job, ARGV[5], ARGV[6], ARGV[9])
  redis.call('EXPIRE', hash, ARGV[8])
  return 1
end
if redis.call('EXISTS', stream) == 0 then
  redis.call('XGROUP', 'CREATE', stream, 'workers', '0', 'MKSTREAM')
end
local id = redis.call('XADD', stream, '*', 'job', job, 'spec', ARGV[5], 'cost', ARGV[6])
redis.call('HSET', hash, 'lane', lane, 'entry', id)
redis.call('EXPIRE', hash, ARGV[8])
redis.call('HINCRBY', P..'counts', 'accepted', 1)
count_waiting(lane, 1, ARGV[6])
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
)

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
    if ok.err and not ok.err:find('NOGROUP', 1, true) then return ok end  -- e.g. a full disk
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

FINISH = (
    """
-- KEYS 1 lanes | ARGV prefix ttl_s (job entry)...     entry '' = whatever the hash names
local P = ARGV[1]
"""
    + _LEAVE
    + """
for i = 3, #ARGV, 2 do
  local hash = P..'job:'..ARGV[i]
  local h = redis.call('HMGET', hash, 'lane', 'entry')
  local id = ARGV[i + 1]
  if h[1] and (id == '' or id == h[2]) then
    if redis.call('EXISTS', P..'lane:'..h[1]) == 1 then
      local tenant = h[1]:match('^[^:]*:[^:]*:(.*)$')
      redis.call('HSET', P..'served', '', redis.call('HGET', P..'served', tenant) or '0')
    end
    leave(h[1], h[2])
    redis.call('EXPIRE', hash, ARGV[2])
  end
end
return 1
"""
)

HAND_BACK = (
    """
-- KEYS 1 lanes | ARGV prefix job attempt suspect
-- The entry stays pending under nobody with an endless idle time: the next claim takes it first. A
-- suspect's goes to the lane of suspects; there it is on a repeat, or when its level rises.
local P, hash, level = ARGV[1], ARGV[1]..'job:'..ARGV[2], ARGV[4]
"""
    + _SUSPECT
    + _LEAVE
    + """
local h = redis.call('HMGET', hash, 'attempt', 'lane', 'entry')
if not h[2] or (h[1] and tonumber(h[1]) > tonumber(ARGV[3])) then return 0 end
if level ~= '0' then
  local entry = redis.call('XRANGE', P..'lane:'..h[2], h[3], h[3])[1]
  if not entry then  -- the sweeper finds a job without a lane, and enqueues it by its row
    redis.call('HDEL', hash, 'lane', 'entry')
    return 0
  end
  if redis.call('HGET', hash, 'suspect') ~= level then
    local f = {}
    for i = 1, #entry[2], 2 do f[entry[2][i]] = entry[2][i + 1] end
    leave(h[2], h[3])
    wait_among_suspects(suspect_lane(h[2]), ARGV[2], f.spec, f.cost, level)
    return 1
  end
end
local ok = redis.pcall('XCLAIM', P..'lane:'..h[2], 'workers', 'nobody', 0, h[3],
                       'IDLE', 1000000000, 'JUSTID')
if ok.err and not ok.err:find('NOGROUP', 1, true) then return ok end
redis.call('PUBLISH', P..'wake', 'work')
return 1
"""
)

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
count_waiting(h[1], -1, -cost_of(old, h[2]))
count_waiting(lane, 1, ARGV[5])
local due = redis.call('ZSCORE', P..'urgent', h[1]..'|'..h[2])
if due then
  redis.call('ZREM', P..'urgent', h[1]..'|'..h[2])
  redis.call('ZADD', P..'urgent', due, lane..'|'..id)
end
redis.call('XDEL', old, h[2])
if redis.call('XLEN', old) == 0 then
  none_waits(h[1])
  redis.call('DEL', old)
  redis.call('SREM', P..'lanes', h[1])
  redis.call('SREM', P..'held', h[1])
end
redis.call('PUBLISH', P..'wake', 'work')
return 1
"""

RESTORE = """
-- KEYS 1 lanes | ARGV prefix consumer job attempt gen next lane spec cost ttl_s suspect log...
-- This Redis lost the job while its worker ran on: the worker puts back what it knows.
local P, job, attempt = ARGV[1], ARGV[3], tonumber(ARGV[4])
local hash = P..'job:'..job
local h = redis.call('HMGET', hash, 'attempt', 'lane', 'entry', 'end', 'gen', 'next')
if h[4] or (h[1] and tonumber(h[1]) > attempt) then return 0 end
-- A flush whose reply was lost may have logged, and shown, more than the worker knows of.
local is_longer = h[1] and tonumber(h[1]) == attempt and h[5] == ARGV[5]
  and tonumber(h[6] or '0') > tonumber(ARGV[6]) and redis.call('EXISTS', P..'log:'..job) == 1
if h[2] then  -- a relay enqueued it again meanwhile: that entry goes, ours replaces it
  local cost = cost_of(P..'lane:'..h[2], h[3])
  local num_given = redis.call('XACK', P..'lane:'..h[2], 'workers', h[3])
  if cost and num_given == 0 then count_waiting(h[2], -1, -cost) end
  redis.call('XDEL', P..'lane:'..h[2], h[3])
end
local lane, stream = ARGV[7], P..'lane:'..ARGV[7]
if redis.call('EXISTS', stream) == 0 then
  redis.call('XGROUP', 'CREATE', stream, 'workers', '0', 'MKSTREAM')
end
-- Each entry of this lane (restored ones, or suspects) is read at once, so '>' is exactly this one.
local id = redis.call('XADD', stream, '*', 'job', job, 'spec', ARGV[8], 'cost', ARGV[9])
redis.call('XREADGROUP', 'GROUP', 'workers', ARGV[2], 'STREAMS', stream, '>')
redis.call('SADD', P..(ARGV[11] == '0' and 'held' or 'suspects'), lane)
redis.call('HSET', hash, 'lane', lane, 'entry', id, 'attempt', attempt, 'gen', ARGV[5],
           'worker', ARGV[2], 'suspect', ARGV[11])
redis.call('EXPIRE', hash, ARGV[10])
if not is_longer then
  redis.call('HSET', hash, 'next', ARGV[6])
  redis.call('DEL', P..'log:'..job)
  for i = 12, #ARGV do redis.call('RPUSH', P..'log:'..job, ARGV[i]) end
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
-- KEYS 1 lanes | ARGV prefix shard_prefix (job attempt payload prompt_tokens)...
local P, SHARD, num_refused = ARGV[1], ARGV[2], 0
"""
    + _SHARDS
    + """
for i = 3, #ARGV, 4 do
  if redis.call('HGET', P..'job:'..ARGV[i], 'attempt') == ARGV[i + 1] then
    redis.call('HSET', P..'job:'..ARGV[i], 'prompt', ARGV[i + 3])
    send(ARGV[i], ARGV[i + 2])
  else
    num_refused = num_refused + 1
  end
end
flush()
return num_refused
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
