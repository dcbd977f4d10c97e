//! How input comes to be on a queue: published in a window, read from stdin, followed, posted.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod client;
mod follow;
mod gate;
mod generation;
mod hostile;
mod listen;
mod publish;
mod stdin;

use std::time::Duration;

use flotilla_producer::JobTemplate;
use shared::{Context, Generation, JobId, Query, RunId};

/// After which a test that waits for an event fails.
const DEADLINE: Duration = Duration::from_secs(20);

fn template() -> JobTemplate {
    JobTemplate {
        run: RunId("run".into()),
        prompt_template: None,
        system_prompt: None,
        generation: Generation {
            max_new_tokens: Some(8),
            temperature: Some(0.0),
            seed: Some(7),
            ..Generation::default()
        },
    }
}

fn context(id: &str) -> Context {
    Context::empty(Query::new(JobId(id.to_owned()), "why?".into()))
}

fn good_line(id: &str) -> String {
    format!("{{\"id\": \"{id}\", \"query\": \"what?\"}}\n")
}

/// Waits for a future, but not for ever.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("nothing came before the deadline")
}
