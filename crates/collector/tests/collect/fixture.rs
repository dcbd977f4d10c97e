//! Outcomes, and what is in a file of their lines.

use std::fs;
use std::path::Path;

use flotilla_collector::{Collector, Error, Lock, MemoryDedup, Observer, Output, Report};
use serde_json::Value;
use shared::{
    Completed, Context, FinishReason, JobId, Outcome, Query, RunId, Settled, WIRE_VERSION,
};

pub(crate) fn settled(id: &str, outcome: Outcome) -> Settled {
    let query = Query {
        dependencies: [("numpy".to_owned(), None)].into(),
        ..Query::new(JobId(id.to_owned()), "naïve \u{2028} \"query\"\n".to_owned())
    };
    Settled {
        version: WIRE_VERSION,
        run: RunId("run".into()),
        context: Context { retrieval_time: 0.25, ..Context::empty(query) },
        model: Some("tiny".into()),
        seed: 7,
        worker_rank: 1,
        attempts: 2,
        inference_time: 1.5,
        outcome,
    }
}

pub(crate) fn answered(id: &str) -> Settled {
    let completed = Completed {
        answer: format!("answer to {id}"),
        finish_reason: FinishReason::Stop,
        prompt_tokens: 10,
        completion_tokens: 4,
        prompt_sha256: "ab".into(),
        context_truncated: false,
        logprobs: None,
    };
    settled(id, Outcome::Completed(completed))
}

pub(crate) fn failed(id: &str) -> Settled {
    settled(id, Outcome::Failed("too long".into()))
}

pub(crate) fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

pub(crate) fn ids(path: &Path) -> Vec<String> {
    lines(path).iter().map(|l| l["id"].as_str().unwrap().to_owned()).collect()
}

/// A collector of the file at `path`, with its ids in memory.
pub(crate) async fn open(path: &Path) -> Result<Collector<MemoryDedup>, Error> {
    Collector::open(Output::open(path, Lock::Refuse).await?, MemoryDedup::default()).await
}

/// Counts what is written.
#[derive(Default)]
pub(crate) struct Count {
    pub(crate) report: Report,
    pub(crate) repeated: u64,
}

impl Observer for Count {
    fn written(&mut self, outcomes: &[Settled]) {
        outcomes.iter().for_each(|settled| self.report.add(settled));
    }

    fn repeated(&mut self, outcomes: u64) {
        self.repeated += outcomes;
    }
}
