//! flotilla engine.
