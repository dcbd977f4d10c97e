#!/usr/bin/env bash
# Everything that needs a GPU, in one go: each kernel and the whole model beside the processor's, then the engine's speed beside
# transformers' and the device's limits. What it measured is in OUT (a folder, default ./gpu-report).
#
#   scripts/check_gpu.sh build [FOLDER]   on any machine: the programs into FOLDER (default gpu-programs), to be carried to one with a GPU
#   scripts/check_gpu.sh run [FOLDER]     on the machine with the GPU, from the folder of the checkout: checks and measures
#
# It needs a driver, and libnvrtc and libcublasLt of CUDA 12 or 13: from LD_LIBRARY_PATH, from Python's packages, or from FOLDER/cuda,
# into which `scripts/cuda_libraries.sh all FOLDER/cuda` fetches them. Without transformers in python3, that comparison is left out.
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:?expected build or run}
programs=${2:-gpu-programs}

build() {
    mkdir -p "$programs"
    cargo build --release --locked --package flotilla --features cuda
    cp "${CARGO_TARGET_DIR:-target}/release/flotilla" "$programs/flotilla"
    local tests
    tests=$(cargo test --release --locked --package flotilla-engine --features cuda --lib --no-run --message-format=json |
        python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["profile"]["test"]:
        print(message["executable"])')
    cp "$tests" "$programs/tests"
    strip --strip-debug "$programs/flotilla" "$programs/tests"
    ls -l "$programs"
}

# Where CUDA's libraries lie: in Python's packages, or else where they were fetched to.
libraries() {
    python3 - <<'PY'
import glob, os, site
places = site.getsitepackages() + [site.getusersitepackages()]
found = set()
for place in places:
    for name in ("libnvrtc.so.1*", "libcublasLt.so.1*"):
        for file in glob.glob(f"{place}/nvidia/**/lib/{name}", recursive=True):
            found.add(os.path.dirname(file))
print(":".join(sorted(found)))
PY
}

run() {
    local out=${OUT:-gpu-report} failed=0
    mkdir -p "$out"
    local found
    found=$(libraries)
    export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}${found:-$PWD/$programs/cuda}"
    # Only for the record: the programs ask the driver themselves.
    nvidia-smi 2>&1 | tee "$out/nvidia-smi.txt" || true

    echo "== the kernels and the model, beside the processor's"
    # Where the fixtures are: the program knows the folder that it was built in.
    CARGO_MANIFEST_DIR=$PWD/crates/engine "$programs/tests" on_a_gpu --include-ignored --test-threads 1 2>&1 | tee "$out/tests.txt" || failed=1

    echo "== speed"
    local model=/tmp/flotilla-tinyllama
    if [ ! -e "$model" ]; then
        python3 scripts/make_random_model.py "$model.part" --preset tinyllama && mv "$model.part" "$model"
    fi
    # The median of three: the first job meets every shape for the first time.
    measure() { "$programs/flotilla" bench engine --model "$model" --device 0 --repeat 3 --json "$@"; }
    # Many short answers; then long prompts and answers.
    measure --input-len 32 --output-len 50 --batch 1,32,128 | tee "$out/short.json" || failed=1
    measure --input-len 256 --output-len 256 --batch 1,32,128,256 | tee "$out/long.json" || failed=1
    if python3 -c 'import transformers, torch; assert torch.cuda.is_available()' 2>/dev/null; then
        scripts/bench_transformers.py "$model" --input-len 32 --output-len 50 --batch 1,32,128 | tee "$out/transformers-short.json" || failed=1
    fi
    return $failed
}

case $what in
    build) build ;;
    run) run ;;
    *) echo "expected build or run, got '$what'" >&2; exit 2 ;;
esac
