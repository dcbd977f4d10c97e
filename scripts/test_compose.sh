#!/usr/bin/env bash
# The compose files as a user runs them: builds the image, brings the fleet up, streams queries in, kills a worker and the
# collector, adds workers, and checks that every id has exactly one line. Then opens NATS with a password and TLS.
#
#   scripts/test_compose.sh
#   BINARY=target/debug/flotilla scripts/test_compose.sh     the same, with a program compiled before instead of compiling it
#
# Needs a Docker engine and compose (v2 or 1.29). Where no registry can be reached, the base images are put together by
# standin_images.sh. Every wait has a deadline; nothing stays but the images, so that the next time is short.
set -euo pipefail
cd "$(dirname "$0")/.."

# Enough to keep the workers busy while things happen to them.
QUERIES=${QUERIES:-3000}
project=flotilla-test-$$
work=$(mktemp -d)
: >"$work/env"

say() { printf '[%3ss] %s\n' "$SECONDS" "$*"; }
die() { say "FAILED: $*" >&2; exit 1; }

if docker compose version >/dev/null 2>&1; then engine=(docker compose); else engine=(docker-compose); fi
files=(-f docker-compose.yml)
# Not this folder's .env: the test sets everything itself.
compose() { "${engine[@]}" --env-file "$work/env" --project-directory . -p "$project" "${files[@]}" "$@"; }

unset COMPOSE_FILE COMPOSE_PROJECT_NAME FLOTILLA_NATS_URL FLOTILLA_REDIS_URL FLOTILLA_RUN NATS_USER NATS_PASSWORD NATS_ADDRESS NATS_CERTS
export FLOTILLA_VERSION=test FLOTILLA_PROFILE=${FLOTILLA_PROFILE:-quick}
# Any free port of 127.0.0.1, so that a NATS of the developer's is not in the way.
export NATS_PORT="" FLOTILLA_DATA=$work/data
IMAGE=flotilla:$FLOTILLA_VERSION
results=$FLOTILLA_DATA/results

finish() {
    local code=$?
    if [ "$code" != 0 ]; then
        compose ps || true
        compose logs --no-color --tail 40 || true
    fi
    files=(-f docker-compose.yml)
    compose down -v --remove-orphans --timeout 5 >/dev/null 2>&1 || true
    # Files in there belong to the containers' user.
    rm -rf "$work" 2>/dev/null || docker run --rm -u 0:0 -v "$work:/work" --entrypoint rm "$IMAGE" -rf /work/data || true
    rm -rf "$work"
    docker rmi flotilla-prebuilt:test >/dev/null 2>&1 || true
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

# Ids of the running containers of service $1.
containers() {
    docker ps --quiet --filter "label=com.docker.compose.project=$project" --filter "label=com.docker.compose.service=$1"
}

# await SECONDS WHAT COMMAND…: waits until COMMAND succeeds, tried again at each event of the project's containers.
await() {
    local seconds=$1 what=$2 since reader
    shift 2
    since=$(date +%s)
    if "$@"; then return; fi
    exec {events}< <(exec timeout "$seconds" docker events --since "$since" --filter "label=com.docker.compose.project=$project")
    reader=$!
    while read -r _ <&"$events"; do
        if "$@"; then
            kill "$reader" 2>/dev/null || true
            exec {events}<&-
            return
        fi
    done
    die "$what: not within $seconds seconds"
}

# Whether service $1 has $2 running containers, all of them healthy.
healthy() {
    local ids
    mapfile -t ids < <(containers "$1")
    [ "${#ids[@]}" = "$2" ] || return 1
    ! docker inspect --format '{{.State.Health.Status}}' "${ids[@]}" | grep -qv '^healthy$'
}

# await_lines SECONDS FILE COUNT: waits until the file has so many lines.
await_lines() {
    local seen=0 reader
    exec {lines}< <(exec timeout "$1" tail -n +1 -F "$2" 2>/dev/null)
    reader=$!
    while [ "$seen" -lt "$3" ] && read -r _ <&"$lines"; do seen=$((seen + 1)); done
    kill "$reader" 2>/dev/null || true
    exec {lines}<&-
    [ "$seen" -ge "$3" ] || die "$2 has $seen lines after $1 seconds, expected $3"
}

# Kills the program in container $1 as a crash would; docker's own kill counts as a wish and is not followed by a restart.
crash() {
    docker exec "$1" bash -c 'for p in /proc/[0-9]*; do [ "$(<"$p/comm")" != flotilla ] || kill -9 "${p#/proc/}"; done'
}

# Ids of the lines of file $1 that have an answer.
answered() { grep '"success":true' "$1" | grep -oE '^\{"id":"[^"]*"' | cut -d '"' -f 4 | sort; }

images() {
    local image missing=()
    for image in $(sed -n 's/^ARG [A-Z]*_IMAGE=//p' Dockerfile) $(grep -oE 'image: (nats|redis):[^ ]+' docker-compose.yml | cut -d ' ' -f 2); do
        docker image inspect "$image" >/dev/null 2>&1 || missing+=("$image")
    done
    for image in "${missing[@]}"; do
        if ! timeout 300 docker pull --quiet "$image" >/dev/null 2>&1; then
            say "no registry answers: base images from Debian packages"
            scripts/standin_images.sh
            break
        fi
    done
    say "base images are here"
}

# A builder whose cargo hands out the program $1; all else of the Dockerfile stays as it is.
prebuilt() {
    mkdir "$work/prebuilt"
    cp "$1" "$work/prebuilt/flotilla"
    cat >"$work/prebuilt/cargo" <<'CARGO'
#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" != --profile ] || profile=$2; shift; done
[ "$profile" != dev ] || profile=debug
mkdir -p "/target/$profile" && cp /usr/local/share/flotilla "/target/$profile/"
CARGO
    cat >"$work/prebuilt/Dockerfile" <<IMAGE
FROM $(sed -n 's/^ARG BUILDER_IMAGE=//p' Dockerfile)
COPY flotilla /usr/local/share/
COPY cargo /usr/local/cargo/bin/
RUN chmod 755 /usr/local/cargo/bin/cargo
IMAGE
    docker build --quiet --tag flotilla-prebuilt:test "$work/prebuilt"
}

image() {
    local args=()
    if [ -n "${BINARY:-}" ]; then
        prebuilt "$BINARY" >"$work/build.log" 2>&1 || { cat "$work/build.log"; die "no builder out of $BINARY"; }
        args=(--build-arg BUILDER_IMAGE=flotilla-prebuilt:test)
    fi
    timeout 1500 "${engine[@]}" --env-file "$work/env" --project-directory . -p "$project" -f docker-compose.yml \
        build "${args[@]}" producer >"$work/build.log" 2>&1 || {
        tail -n 40 "$work/build.log"
        die "the image does not build"
    }
    say "image built (${BINARY:-$FLOTILLA_PROFILE}), $(docker image inspect --format '{{.Size}}' "$IMAGE" | awk '{printf "%.0f MB", $1 / 1e6}')"
}

# Nothing but NATS on 127.0.0.1 is published, and no role runs as root.
exposed() {
    local published users
    published=$(docker ps --filter "label=com.docker.compose.project=$project" --format '{{.Ports}}' | tr ',' '\n' | grep -e '->' || true)
    [[ $published =~ ^127\.0\.0\.1:[0-9]+-\>4222/tcp$ ]] || die "expected only NATS on 127.0.0.1 to be published, found: $published"
    users=$({ containers gpu-worker; containers collector; } | xargs docker inspect --format '{{.Config.User}}' | sort -u)
    [ "$users" = 1000:1000 ] || die "expected the roles to run as user 1000, found: $users"
}

examples() {
    compose up -d --no-build --scale gpu-worker=2 >"$work/up.log" 2>&1 || { cat "$work/up.log"; die "compose up"; }
    await 90 "two healthy workers" healthy gpu-worker 2
    await 30 "a healthy collector" healthy collector 1
    exposed
    say "the fleet is up: 2 workers"
    await_lines 120 "$results/examples.jsonl" 17
    say "examples answered: $(wc -l <"$results/examples.jsonl") lines"
}

# More queries from outside, through the published port, as a program on this machine would.
more() {
    local i port
    for ((i = 0; i < QUERIES; i++)); do
        printf '{"id": "more-%d", "query": "What does numpy.where do? (%d)", "target_api": "numpy.where", "target_dependency": {"numpy": "1.16.6"}}\n' "$i" "$i"
    done >"$work/more.jsonl"
    port=$(docker port "$(containers nats)" 4222 | head -n 1)
    docker run --rm -i --network host -v "$PWD/examples:/input:ro" "$IMAGE" produce --nats-url "nats://$port" \
        --queries-file - --corpus-path /input/corpus --run more <"$work/more.jsonl" >"$work/more.log" 2>&1 || {
        cat "$work/more.log"
        die "flotilla produce from outside"
    }
    say "$QUERIES more queries published from outside"
}

faults() {
    local first added
    await_lines 120 "$results/more.jsonl" $((QUERIES / 10))
    first=$(containers gpu-worker | tail -n 1)
    docker kill "$first" >/dev/null
    say "killed a worker at $(wc -l <"$results/more.jsonl") lines"
    compose up -d --no-build --no-deps --scale gpu-worker=3 gpu-worker >/dev/null 2>&1
    await 60 "three healthy workers" healthy gpu-worker 3
    say "three workers"
    crash "$(containers collector)"
    say "crashed the collector at $(wc -l <"$results/more.jsonl") lines"
    added=$(containers gpu-worker | head -n 1)
    docker stop --time 45 "$added" >/dev/null
    [ "$(docker inspect --format '{{.State.ExitCode}}' "$added")" = 0 ] || die "a worker that was asked to stop did not end with 0"
    say "stopped a worker: it gave back what it held"
    # The same queries again, by the service that published them: nothing may come twice.
    compose up -d --no-build --no-deps producer >/dev/null 2>&1
    await_lines 300 "$results/more.jsonl" "$QUERIES"
    await 60 "a healthy collector" healthy collector 1
    say "all lines are there; the collector was restarted $(docker inspect --format '{{.RestartCount}}' "$(containers collector)") time(s)"
}

check() {
    local queued again
    queued=$(docker exec "$(containers collector)" flotilla status --json) || die "flotilla status"
    printf '%s\n' "$queued" >"$work/status.json"
    compose stop --timeout 45 collector gpu-worker producer >/dev/null 2>&1
    for ((i = 0; i < QUERIES; i++)); do echo "more-$i"; done | sort >"$work/expected"
    answered "$results/more.jsonl" | diff "$work/expected" - >"$work/diff" || { head "$work/diff"; die "expected each id once in more.jsonl"; }
    # Otherwise nobody held a job when the worker died, and nothing was shown.
    again=$(grep -cvE '"attempts":1[,}]' "$results/more.jsonl" || true)
    [ "$again" -gt 0 ] || die "expected jobs of the killed worker to be delivered again"
    [ "$(wc -l <"$results/more.jsonl")" = "$QUERIES" ] || die "more.jsonl has lines that are no answers"
    [ "$(answered "$results/examples.jsonl" | uniq | wc -l) $(wc -l <"$results/examples.jsonl")" = "17 17" ] ||
        die "expected 17 answers in examples.jsonl, found $(wc -l <"$results/examples.jsonl") lines"
    [ "$(stat -c %u "$results/more.jsonl")" = 1000 ] || die "expected the results to belong to user 1000"
    say "each of $((QUERIES + 17)) ids has exactly one line; $again jobs were delivered more than once"
}

# status on the opened NATS with URL $1; the rest are options of docker run.
status_on() {
    local url=$1
    shift
    timeout 30 docker run --rm --network host -e FLOTILLA_NATS_URL="$url" "$@" "$IMAGE" status >"$work/status.log" 2>&1
}

opened() {
    local port ca=(-v "$work/certs/ca.crt:/ca.crt:ro" -e FLOTILLA_NATS_CA=/ca.crt)
    compose down -v --timeout 5 >/dev/null 2>&1
    files=(-f docker-compose.yml -f docker-compose.open.yml)
    if NATS_ADDRESS=127.0.0.2 compose config >/dev/null 2>&1; then die "opened NATS without credentials"; fi
    say "refuses to open NATS without credentials"
    files+=(-f docker-compose.tls.yml)
    deploy/make_certs.sh "$work/certs" 127.0.0.2 >/dev/null
    export NATS_ADDRESS=127.0.0.2 NATS_USER=flotilla NATS_PASSWORD=0123456789 NATS_CERTS=$work/certs
    compose up -d --no-build nats gpu-worker >/dev/null 2>&1
    await 60 "a healthy worker over TLS" healthy gpu-worker 1
    port=$(docker port "$(containers nats)" 4222 | grep '^127\.0\.0\.2:')
    status_on "tls://flotilla:0123456789@$port" "${ca[@]}" || { cat "$work/status.log"; die "status with credentials over TLS"; }
    if status_on "tls://flotilla:wrong@$port" "${ca[@]}"; then die "let in with a wrong password"; fi
    if status_on "tls://flotilla:0123456789@$port"; then die "trusted a certificate of nobody"; fi
    say "opened with password and TLS: let in, wrong password and unknown certificate refused"
}

images
image
examples
more
faults
check
opened
say "passed"
