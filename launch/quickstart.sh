#!/usr/bin/env bash
# See it run: install into .venv, start a real S3 server on this machine with two checkpoints in it, and load each of them
# into four ranks. Nothing is left behind but .venv.
set -eu -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/venv.sh

scratch=$(mktemp -d)
cleanup() {
    local running
    running=$(jobs -pr)
    # shellcheck disable=SC2086 # several numbers
    [[ -z $running ]] || kill $running || true
    wait
    rm -rf "$scratch"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

load() { # name, overrides…
    local name=$1
    shift
    echo "== $name"
    (
        set -x
        exec torchrun --standalone --nproc-per-node 4 -m loader.init_from_hf --config launch/quickstart.yaml \
            "source.uri=s3://loader/$name" "report=$scratch/$name.json" "$@"
    ) &
    wait $!
    echo "== from the report of $name"
    python -m launch.quickstart show "$scratch/$name.json"
}

install
export PATH=$PWD/.venv/bin:$PATH
python -m launch.quickstart serve "$scratch" &
server=$!
until [[ -f $scratch/env ]]; do
    kill -0 $server 2>/dev/null || { echo "the S3 server did not start" >&2; exit 1; }
    sleep 0.1
done
# shellcheck source=/dev/null
. "$scratch/env" # AWS_ENDPOINT_URL and credentials: what any S3 client reads
export OMP_NUM_THREADS=1 # torchrun's own choice, without the warning

load minilm
load llama mesh.tp=2 # with dp_shard -1: two by two
