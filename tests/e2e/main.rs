//! End-to-end tests of flotilla.
