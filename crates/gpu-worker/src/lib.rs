//! flotilla gpu-worker.
