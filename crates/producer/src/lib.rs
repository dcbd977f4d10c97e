//! flotilla producer.
