//! `flotilla produce`: queries become jobs on the queue, from a file, stdin, a growing file or HTTP.
//!
//! Nothing of it is kept here. What a crash leaves unpublished, the same command publishes; what has its
//! line it leaves out, and what it publishes a second time, the queue or the collector drops.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use engine::ModelFiles;
use producer::{
    BadInput, Contexts, JobTemplate, ListenConfig, Published, Publisher, RetrievalConfig,
    Retriever, SourceConfig, Stats,
};
use shared::queue::nats::{Fleet, NatsQueue};
use shared::status::unix_now;
use shared::{Job, RunId, Settled};
use tokio_util::sync::CancellationToken;

use crate::cli::GenerationOptions;
use crate::cli::Usage;
use crate::cli::fleet::ProduceOptions;
use crate::hub::Need;
use crate::observe::{self, Health, queues};
use crate::rejects::Rejects;
use crate::{FINISHED_WITH_FAILURES, INTERRUPTED, files, fleet, heartbeat, signals};

mod asking;
mod listening;
mod said;

use asking::{Asking, Manner};
pub(crate) use said::{Said, about, input_name};

/// Runs `flotilla produce`.
pub(crate) fn main(options: &ProduceOptions) -> anyhow::Result<ExitCode> {
    let jobs = &options.jobs;
    jobs.retrieval.validate()?;
    options.follow.idle_timeout()?;
    let listen = options.listen.map(|addr| ListenConfig::new(addr, options.token.clone()));
    if let Some(listen) = &listen {
        listen.validate()?;
    }
    let input = match listen {
        Some(_) => None,
        None if jobs.source.queries_file.is_none() && jobs.source.contexts_file.is_none() => {
            let text = "expected --queries-file, --contexts-file or --listen, given none of them";
            return Err(Usage(text.to_owned()).into());
        }
        None => Some(jobs.source.file()?.0),
    };
    let run = fleet::run_id(&jobs.run, input)?;
    if let Some(input) = input.filter(|_| !options.follow.follow) {
        files::check_input(input)?;
    }
    let template = template(run, &jobs.generation)?;
    let model = || jobs.model_path.find(Need::Tokenizer);
    let retriever = retriever(&jobs.retrieval, &jobs.source, model)?;
    match listen {
        Some(config) => fleet::block_on(listening::listen(options, config, template, retriever)),
        None => fleet::block_on(produce(options, template, retriever)),
    }
}

/// What all jobs of the run have in common.
pub(crate) fn template(run: RunId, generation: &GenerationOptions) -> anyhow::Result<JobTemplate> {
    Ok(JobTemplate {
        run,
        prompt_template: generation.template()?,
        system_prompt: generation.system_prompt.clone(),
        generation: generation.generation()?,
    })
}

/// What looks contexts up, where there is a corpus and not finished contexts.
pub(crate) fn retriever(
    retrieval: &RetrievalConfig,
    source: &SourceConfig,
    model_path: impl FnOnce() -> anyhow::Result<PathBuf>,
) -> anyhow::Result<Option<Arc<Retriever>>> {
    if retrieval.corpus_path.is_none() || source.contexts_file.is_some() {
        return Ok(None);
    }
    let model =
        model_path().context("--max-tokens of a context are counted with a model's tokenizer")?;
    let tokenizer = tokenizer_json(&model)?;
    Ok(Some(Arc::new(Retriever::open(retrieval, Some(&tokenizer))?)))
}

/// The text of a model's tokenizer.
pub(crate) fn tokenizer_json(model_path: &Path) -> anyhow::Result<String> {
    Ok(ModelFiles::open(model_path)?.required("tokenizer.json")?)
}

/// The contexts of the input, as they come.
fn contexts(
    options: &ProduceOptions,
    retriever: Option<Arc<Retriever>>,
    shutdown: &CancellationToken,
) -> Result<Contexts, producer::Error> {
    if options.follow.follow {
        producer::follow(&options.jobs.source, &options.follow, retriever, shutdown)
    } else {
        producer::contexts(&options.jobs.source, retriever)
    }
}

/// A producer's publishes, counted.
type FleetPublisher = Publisher<NatsQueue<Job>, NatsQueue<Settled>>;

fn publisher(
    options: &ProduceOptions,
    fleet: &Fleet,
    template: JobTemplate,
    stats: &Arc<Stats>,
) -> FleetPublisher {
    let queues = (fleet.jobs(&options.jobs.model.model), fleet.outcomes(None));
    Publisher::new(template, queues).with_window(options.window).with_stats(Arc::clone(stats))
}

async fn produce(
    options: &ProduceOptions,
    template: JobTemplate,
    retriever: Option<Arc<Retriever>>,
) -> anyhow::Result<ExitCode> {
    let interruption = signals::interruption()?;
    let contexts = contexts(options, retriever, &interruption)?;
    let Some((fleet, stats)) = start(options, &interruption).await? else {
        return Ok(ExitCode::from(INTERRUPTED));
    };
    let input = input_name(&options.jobs.source)?;
    let about = about(&template.run, &options.jobs.model.model, input);
    let said = Said::start(&fleet, about, &stats);
    if !options.follow.follow {
        said.count(options.jobs.source.clone());
    }
    let mut rejects = rejects(options)?;
    let contexts = contexts.leaving_out(Asking::new(&fleet, &template.run, Manner::INPUT, &stats));
    let publisher = publisher(options, &fleet, template, &stats);
    let mut report = |bad: &BadInput| rejects.add(bad);
    let published = producer::publish(contexts, &publisher, &interruption, &mut report).await;
    let rejected_file = rejects.finish()?;
    let is_finished = published.is_ok() && !interruption.is_cancelled();
    said.end(is_finished).await;
    let published = published?;
    tell(&published, &stats, rejected_file.as_deref());
    Ok(if interruption.is_cancelled() {
        if options.follow.follow {
            // A file that is followed has no other end; what it still holds is not published, so the
            // run stays open.
            tracing::info!("no longer following; the same command goes on where this one stopped");
            exit_code(&published)
        } else {
            tracing::warn!("interrupted; the same command publishes the rest");
            ExitCode::from(INTERRUPTED)
        }
    } else {
        exit_code(&published)
    })
}

/// Connects, and opens the metrics; `None` if interrupted.
async fn start(
    options: &ProduceOptions,
    interruption: &CancellationToken,
) -> anyhow::Result<Option<(Fleet, Arc<Stats>)>> {
    let Some(fleet) = fleet::connect_unless(interruption, &options.nats).await? else {
        return Ok(None);
    };
    warn_without_worker(&fleet, &options.jobs.model.model).await;
    let stats = Arc::<Stats>::default();
    let health = Health::default();
    health.set(Ok(()));
    let page = {
        let (fleet, stats) = (fleet.clone(), Arc::clone(&stats));
        move || {
            let mut page = said::page(&stats);
            let fleet = fleet.clone();
            async move {
                queues::add_queues(&mut page, &fleet).await;
                page
            }
        }
    };
    observe::serve(options.metrics.metrics_addr, health, page).await?;
    Ok(Some((fleet, stats)))
}

/// Says that the jobs will wait, where no worker has their model.
async fn warn_without_worker(fleet: &Fleet, model: &str) {
    let now = unix_now();
    // Only words: what can't be seen is not told.
    let Ok(Ok(workers)) = tokio::time::timeout(heartbeat::TIMEOUT, fleet.workers()).await else {
        return;
    };
    let models: BTreeSet<&str> =
        workers.iter().filter(|w| !w.is_silent(now)).map(|w| w.model.as_str()).collect();
    if models.is_empty() {
        tracing::warn!("no worker runs yet: the jobs wait for one with the model '{model}'");
    } else if !models.contains(model) {
        let models = models.into_iter().collect::<Vec<_>>().join(", ");
        tracing::warn!(
            "no worker has the model '{model}': the jobs wait for one; there are workers of: {models}"
        );
    }
}

/// The report of input that can have no line.
fn rejects(options: &ProduceOptions) -> anyhow::Result<Rejects> {
    match (&options.rejected_file, options.jobs.source.file()) {
        (Some(path), _) => Rejects::at(path.clone()),
        // The input's folder may be one that only others write.
        (None, Ok((file, _))) if file.is_file() => Rejects::beside(file).or_else(|error| {
            tracing::warn!("{error:#}; what is rejected is told here, or in --rejected-file");
            Ok(Rejects::shown())
        }),
        _ => Ok(Rejects::shown()),
    }
}

/// Says what became of the input, and where the rest of it is.
fn tell(published: &Published, stats: &Stats, rejected_file: Option<&Path>) {
    let Published { jobs, repeated, failed, rejected } = published;
    let answered = stats.snapshot().answered;
    let place = rejected_file.map(|file| format!(": see {}", file.display())).unwrap_or_default();
    let queued = if *repeated > 0 { format!(", {repeated} already queued") } else { String::new() };
    tracing::info!(
        "{jobs} jobs published{queued}, {answered} already answered, {failed} failed, {rejected} \
         rejected{place}"
    );
}

fn exit_code(published: &Published) -> ExitCode {
    if published.failed > 0 || published.rejected > 0 {
        ExitCode::from(FINISHED_WITH_FAILURES)
    } else {
        ExitCode::SUCCESS
    }
}
