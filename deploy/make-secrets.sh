#!/bin/sh
# Make the passwords that compose.yaml mounts, once: deploy/secrets/ (mode 0700, ignored by git).
#
# The files inside are readable by all, because containers read them under users of their own; the
# folder is what keeps other users of this machine out. To change a password, remove its files, run
# this again, and (for Postgres) change it in the database too.
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

random | write redis_password
random | write postgres_password
redis_password=$(cat secrets/redis_password)
postgres_password=$(cat secrets/postgres_password)
rm -f secrets/redis.conf secrets/redis_url secrets/database_url

# Every write is on disk within a second; a full server refuses writes and never drops a job.
write redis.conf <<END
requirepass $redis_password
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
dir /data
END
printf 'redis://:%s@redis:6379/0\n' "$redis_password" | write redis_url
printf 'postgresql+psycopg://headrace:%s@postgres:5432/headrace\n' "$postgres_password" |
    write database_url
echo "secrets are in $(pwd)/secrets"
