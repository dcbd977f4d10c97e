//! A backend for tests, in which one job takes the whole process down.

use gpu_worker::{Answer, Backend, Counters, Error, Failure, Progress, Serving};
use shared::Job;

/// Aborts the process when it begins the job with this id; otherwise what it wraps.
#[derive(Clone, Debug)]
pub(super) struct Poisonable<B> {
    /// What answers.
    pub(super) backend: B,
    /// The id.
    pub(super) poison: Option<String>,
}

impl<B: Backend> Backend for Poisonable<B> {
    type Engine = Poisonable<B::Engine>;

    async fn start(&self) -> Result<Self::Engine, Error> {
        Ok(Poisonable { backend: self.backend.start().await?, poison: self.poison.clone() })
    }
}

impl<E: Serving> Serving for Poisonable<E> {
    fn model_name(&self) -> &str {
        self.backend.model_name()
    }

    fn num_slots(&self) -> usize {
        self.backend.num_slots()
    }

    fn progress(&self) -> Progress {
        self.backend.progress()
    }

    fn counters(&self) -> Counters {
        self.backend.counters()
    }

    async fn down(&self) {
        self.backend.down().await;
    }

    async fn answer(&self, job: &Job) -> Result<Answer, Failure> {
        if self.poison.as_ref() == Some(&job.id().0) {
            std::process::abort();
        }
        self.backend.answer(job).await
    }
}
