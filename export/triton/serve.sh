#!/bin/sh
# What the image runs: tritonserver on a model repository, with all closed that serving does not need. Options of
# tritonserver may follow: dagan-rt-serve --log-verbose=1
#
# dagan-rt-serve drain, before a container is ended, waits until no sequence is open, for DRAIN_SECONDS at most.
set -eu

repository=$(realpath --canonicalize-missing "${MODEL_REPOSITORY:-/models}")
http=${HTTP_PORT:-8000} grpc=${GRPC_PORT:-8001} metrics=${METRICS_PORT:-8002}

if [ "${1:-}" = drain ]; then
    left=${DRAIN_SECONDS:-600}
    while [ "$left" -gt 0 ]; do
        sleep 5 # at least once: until then new channels may still come
        left=$((left - 5))
        curl --silent --fail "http://127.0.0.1:$metrics/metrics" |
            awk '/^dagan_sequences_open/ { open += $NF } END { exit open > 0 }' && exit
    done
    exit 0
fi

marker=$repository/dagan-rt.json
if [ ! -f "$marker" ]; then
    echo "dagan-rt-serve: $repository must be a model repository that dagan-rt wrote: it holds no dagan-rt.json" >&2
    exit 2
fi

# Whoever may change models, map shared memory or set traces and logs must send a key, and nobody knows this one.
closed=model-repository,trace,logging,shared-memory
key=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')

# Triton calls itself ready even if the process of a model instance is gone, and does not start another. Each has its
# line in the metrics: if there are more lines than processes, end, so that whoever runs the container starts it again.
lost_one() {
    curl --silent --fail --output /dev/null "http://127.0.0.1:$http/v2/health/ready" || return 1
    instances=$(curl --silent --fail "http://127.0.0.1:$metrics/metrics" | grep -c '^dagan_sequences_open')
    processes=$(cat /proc/[0-9]*/status 2>/dev/null | awk -v server=$$ '
        /^Name:/ { stub = ($2 == "triton_python_b") }
        /^State:/ { stub = stub && $2 != "Z" }
        /^PPid:/ && stub && $2 == server { count++ }
        END { print count + 0 }')
    [ "$instances" -gt "$processes" ]
}
watch() {
    while sleep "${WATCH_SECONDS:-10}" && kill -0 $$; do
        if lost_one; then
            echo "dagan-rt-serve: the process of a model instance is gone: ending the server" >&2
            kill $$
            return
        fi
    done
}
watch &

# What the marker of the repository asks of the server itself.
limit=$(sed -n 's/^ *"rate_limit": *\([0-9]*\).*/\1/p' "$marker")
if [ "${limit:-0}" -gt 0 ]; then
    set -- --rate-limit=execution_count --rate-limit-resource="dagan_rt:$limit" "$@"
fi

exec tritonserver \
    --model-repository="$repository" \
    --http-port="$http" \
    --grpc-port="$grpc" \
    --metrics-port="$metrics" \
    --exit-timeout-secs=5 \
    --http-restricted-api="$closed:dagan-rt-key=$key" \
    --grpc-restricted-protocol="$closed:dagan-rt-key=$key" \
    "$@"
