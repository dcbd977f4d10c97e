//! How input comes to be on a queue: published in a window, read from stdin, followed, posted.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod client;
mod follow;
mod gate;
mod hostile;
mod listen;
mod publish;
mod stdin;

use std::time::Duration;

use flotilla_producer::JobTemplate;
use shared::{Context, Dependencies, Generation, JobId, Query, RunId};

/// After which a test that waits for an event fails.
const DEADLINE: Duration = Duration::from_secs(20);

fn template() -> JobTemplate {
    JobTemplate {
        run: RunId("run".into()),
        prompt_template: None,
        system_prompt: None,
        generation: Generation {
            max_new_tokens: 8,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            stop: Vec::new(),
            seed: 7,
        },
    }
}

fn context(id: &str) -> Context {
    let id = JobId(id.to_owned());
    let dependencies = Dependencies::new();
    Context::empty(Query { id, query: "why?".into(), target_api: None, dependencies })
}

fn good_line(id: &str) -> String {
    format!("{{\"id\": \"{id}\", \"query\": \"what?\"}}\n")
}

/// Waits for a future, but not for ever.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("nothing came before the deadline")
}
