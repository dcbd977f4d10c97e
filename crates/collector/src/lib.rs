//! flotilla collector.
