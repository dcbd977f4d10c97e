# One image for all roles. Works with BuildKit and with the classic builder.
#
#   docker build -t flotilla:local .
#   docker run --rm -v "$PWD:/data" -u "$(id -u):$(id -g)" flotilla:local run --queries-file queries.jsonl …
#
# For GPUs: --build-arg FEATURES=cuda --build-arg RUNTIME_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04, whose libraries the program loads.
#
# PROFILE is cargo's: release, or quick, which compiles in a fraction of the time and computes slower (for tests of the image).

ARG BUILDER_IMAGE=rust:1.95.0-bookworm
ARG RUNTIME_IMAGE=debian:bookworm-20260824-slim

# What decides which dependencies are compiled, and nothing else: so the stage after it is run again
# only when a manifest changes, not with every line of code.
FROM ${BUILDER_IMAGE} AS manifests
WORKDIR /build
COPY Cargo.toml Cargo.lock ./
COPY crates crates
COPY tests/Cargo.toml tests/
RUN find crates -type f ! -name Cargo.toml ! -path '*/src/lib.rs' ! -path '*/src/main.rs' ! -path '*/benches/*.rs' -delete \
    && find crates -name '*.rs' -exec sh -c 'for file; do echo "fn main() { }" >"$file"; done' sh {} + \
    && mkdir -p tests/src && touch tests/src/lib.rs

FROM ${BUILDER_IMAGE} AS builder
ARG FEATURES=""
ARG PROFILE=release
ENV CARGO_TARGET_DIR=/target CARGO_INCREMENTAL=0
WORKDIR /build
COPY --from=manifests /build .
RUN cargo build --locked --package flotilla --profile "$PROFILE" --features "$FEATURES"
COPY crates crates
# Newer than what was compiled from the empty files, whatever the clock of the checkout said.
RUN find crates -name '*.rs' -exec touch {} + \
    && cargo build --locked --package flotilla --profile "$PROFILE" --features "$FEATURES" \
    && case "$PROFILE" in dev) folder=debug ;; *) folder=$PROFILE ;; esac \
    && strip --strip-debug -o /flotilla "/target/$folder/flotilla"

FROM ${RUNTIME_IMAGE}
# For servers whose certificates come from a public authority.
COPY --from=builder /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=builder /flotilla /usr/local/bin/flotilla
COPY LICENSE /usr/share/doc/flotilla/
COPY models/flotilla-reader /models/flotilla-reader
# Whoever it runs as (-u) can keep an index of the corpus.
RUN mkdir -m 1777 /var/cache/flotilla
ENV FLOTILLA_CACHE_DIR=/var/cache/flotilla FLOTILLA_KERNEL_CACHE=/var/cache/flotilla/kernels
WORKDIR /data
USER 1000:1000
ENTRYPOINT ["/usr/local/bin/flotilla"]
CMD ["--help"]
