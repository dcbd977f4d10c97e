#!/usr/bin/env bash
# Fetches the CUDA libraries that flotilla loads at run time, from PyPI, without root and without a GPU.
#
#   scripts/cuda_libraries.sh compile [FOLDER]   what compiles kernels (libnvrtc): enough to check them
#   scripts/cuda_libraries.sh all [FOLDER]       what computes, too (libcublasLt): enough beside a driver
#
# It prints the folder of the libraries, for LD_LIBRARY_PATH. 13.0 works with drivers from 580 on.
set -euo pipefail

what=${1:?expected compile or all}
folder=${2:-${XDG_CACHE_HOME:-$HOME/.cache}/flotilla/cuda-13.0}
case $what in
    compile) wheels=(nvidia-cuda-nvrtc==13.0.88) ;;
    all) wheels=(nvidia-cuda-nvrtc==13.0.88 nvidia-cublas==13.1.0.3) ;;
    *) echo "expected compile or all, got '$what'" >&2; exit 2 ;;
esac

for wheel in "${wheels[@]}"; do
    done_file=$folder/.$wheel
    [ -e "$done_file" ] && continue
    unfinished=$(mktemp -d)
    trap 'rm -rf "$unfinished"' EXIT
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$unfinished" "$wheel"
    python3 -m zipfile -e "$unfinished"/*.whl "$unfinished/wheel"
    mkdir -p "$folder"
    cp -f "$unfinished"/wheel/nvidia/cu13/lib/*.so* "$folder/"
    rm -rf "$unfinished"
    touch "$done_file"
done
echo "$folder"
