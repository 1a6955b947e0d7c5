#!/bin/sh
# Make the passwords that compose.yaml mounts, once: deploy/secrets/ (mode 0700, ignored by git).
#
# The files inside are readable by all, because containers read them under users of their own; the
# folder is what keeps other users of this machine out. To change a password, remove its file, run
# this again, and change it where it is kept: Redis when it is started again, Postgres with
# ALTER ROLE (database_owner_password: headrace_owner; database_password: headrace_app), Grafana
# with `grafana cli admin reset-admin-password`.
set -eu
cd "$(dirname "$0")"
umask 077
mkdir -p secrets
chmod 700 secrets

random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

# write NAME: keep what is there; otherwise the text on standard input becomes the file, whole.
write() {
    if [ -s "secrets/$1" ]; then
        cat > /dev/null
        return
    fi
    cat > "secrets/.$1.new"
    chmod 644 "secrets/.$1.new"
    mv "secrets/.$1.new" "secrets/$1"
}

for name in redis_password postgres_password database_owner_password database_password \
    grafana_password; do
    random | write "$name"
done

# The rest is made of these, anew each time.
rm -f secrets/redis.conf secrets/redis_url secrets/database_url secrets/database_owner_url
redis_password=$(cat secrets/redis_password)

# Every write is on disk within a second; a full server refuses writes and never drops a job.
# One user, who reaches our keys and channels only and cannot administer the server.
write redis.conf <<END
user default off
user headrace on >$redis_password ~hr:* &hr:* +@all -@admin -@dangerous +info
appendonly yes
appendfsync everysec
save ""
maxmemory 1gb
maxmemory-policy noeviction
dir /data
END
printf 'redis://headrace:%s@redis:6379/0\n' "$redis_password" | write redis_url
printf 'postgresql+psycopg://headrace_app:%s@postgres:5432/headrace\n' \
    "$(cat secrets/database_password)" | write database_url
printf 'postgresql+psycopg://headrace_owner:%s@postgres:5432/headrace\n' \
    "$(cat secrets/database_owner_password)" | write database_owner_url
echo "secrets are in $(pwd)/secrets"
