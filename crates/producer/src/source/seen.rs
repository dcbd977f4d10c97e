//! What came before: an exact repeat is left out, another question under the same id is bad input.

use std::hash::{DefaultHasher, Hash, Hasher};

use shared::{Generation, IdTable};

use super::{Pending, Place};

/// The ids that came so far, each with a hash of what came with it: 20 bytes an id.
#[derive(Default)]
pub(super) struct Seen {
    bodies: IdTable<u32>,
    warned: bool,
}

/// Whether a record is the first of its id.
pub(super) enum Novelty {
    New,
    Repeat,
    Conflict(String),
}

impl Seen {
    /// Notes a record that stands there.
    pub(super) fn note(&mut self, pending: &Pending, place: &Place<'_>) -> Novelty {
        let Some(id) = pending.id() else {
            return Novelty::New;
        };
        let body = pending.body();
        match self.bodies.insert(id.digest(), body) {
            None => Novelty::New,
            Some(earlier) if earlier == body => {
                if !self.warned {
                    let (file, line) = (place.file.display(), place.line);
                    tracing::warn!(job_id = %id, "{file}:{line}: a query comes twice; repeats are left out");
                    self.warned = true;
                }
                Novelty::Repeat
            }
            Some(_) => {
                let reason = format!("id '{id}' already belongs to another query above");
                Novelty::Conflict(reason)
            }
        }
    }
}

impl Pending {
    /// Hash of what was asked, to tell a repeat from a conflict.
    fn body(&self) -> u32 {
        let mut hasher = DefaultHasher::new();
        match self {
            Self::Query(query) => {
                (&query.query, &query.target_api, &query.dependencies).hash(&mut hasher);
                hash_generation(&query.generation, &mut hasher);
            }
            Self::Done(Ok(context)) => {
                (&context.query, &context.context).hash(&mut hasher);
                hash_generation(&context.generation, &mut hasher);
            }
            Self::Done(Err(bad)) => (&bad.query, &bad.reason).hash(&mut hasher),
        }
        // Half of it: enough to tell another question under the same id.
        hasher.finish() as u32
    }
}

fn hash_generation(generation: &Generation, hasher: &mut impl Hasher) {
    // Most queries say nothing; floats have no hash, their texts do.
    if !generation.is_empty() {
        format!("{generation:?}").hash(hasher);
    }
}
