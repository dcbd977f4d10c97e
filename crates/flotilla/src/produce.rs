//! `flotilla produce`: queries become jobs on the queue, from a file, stdin, a growing file or HTTP.
//!
//! Nothing of it is kept here. What a crash leaves unpublished, the same command publishes; what it
//! publishes a second time, the queue or the collector drops.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use producer::{
    BadInput, JobTemplate, ListenConfig, Published, Publisher, RetrievalConfig, Retriever,
    SourceConfig, Stats,
};
use shared::queue::nats::{Fleet, NatsQueue};
use shared::{Context, Job, JobId, RunId, Settled};
use tokio_util::sync::CancellationToken;

use crate::cli::fleet::ProduceOptions;
use crate::cli::{self, GenerationOptions};
use crate::observe::{self, Health, queues};
use crate::rejects::Rejects;
use crate::{FINISHED_WITH_FAILURES, INTERRUPTED, files, fleet, signals};

mod listening;
mod said;

pub(crate) use said::Said;

/// Runs `flotilla produce`.
pub(crate) fn main(options: &ProduceOptions) -> anyhow::Result<ExitCode> {
    options.retrieval.validate()?;
    options.follow.idle_timeout()?;
    let listen = options.listen.map(|addr| ListenConfig::new(addr, options.token.clone()));
    if let Some(listen) = &listen {
        listen.validate()?;
    }
    let input = match listen {
        Some(_) => None,
        None => Some(options.source.file()?.0),
    };
    let run = fleet::run_id(&options.run, input)?;
    if let Some(input) = input.filter(|_| !options.follow.follow) {
        files::check_input(input)?;
    }
    let template = template(run, &options.generation)?;
    let retriever = retriever(&options.retrieval, &options.source, options.model_path.as_ref())?;
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
        generation: generation.generation(),
    })
}

/// What looks contexts up, where there is a corpus and not finished contexts.
pub(crate) fn retriever(
    retrieval: &RetrievalConfig,
    source: &SourceConfig,
    model_path: Option<&PathBuf>,
) -> anyhow::Result<Option<Arc<Retriever>>> {
    if retrieval.corpus_path.is_none() || source.contexts_file.is_some() {
        return Ok(None);
    }
    let tokenizer = cli::model_path(model_path)?.join("tokenizer.json");
    Ok(Some(Arc::new(Retriever::open(retrieval, Some(&tokenizer))?)))
}

/// The contexts of the input, as they come.
fn contexts(
    options: &ProduceOptions,
    retriever: Option<Arc<Retriever>>,
    shutdown: &CancellationToken,
) -> anyhow::Result<Box<dyn Iterator<Item = Result<Context, BadInput>> + Send>> {
    let all = |_: &JobId| false;
    if options.follow.follow {
        let followed =
            producer::follow(&options.source, &options.follow, retriever, all, shutdown)?;
        return Ok(Box::new(followed));
    }
    Ok(Box::new(producer::contexts(&options.source, retriever, all)?))
}

/// A producer's publishes, counted.
type FleetPublisher = Publisher<NatsQueue<Job>, NatsQueue<Settled>>;

fn publisher(
    options: &ProduceOptions,
    fleet: &Fleet,
    template: JobTemplate,
    stats: &Arc<Stats>,
) -> FleetPublisher {
    let queues = (fleet.jobs(&options.model.model), fleet.outcomes(None));
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
    let said = Said::start(&fleet, &template.run, &options.model.model, &stats);
    if !options.follow.follow {
        said.count(options.source.clone());
    }
    let mut rejects = rejects(options)?;
    let publisher = publisher(options, &fleet, template, &stats);
    let mut report = |bad: &BadInput| rejects.add(bad);
    let published = producer::publish(contexts, &publisher, &interruption, &mut report).await;
    rejects.finish()?;
    let is_finished = published.is_ok() && !interruption.is_cancelled();
    said.end(is_finished).await;
    let published = published?;
    tell(&published);
    Ok(if interruption.is_cancelled() {
        tracing::warn!("interrupted; the same command publishes the rest");
        ExitCode::from(INTERRUPTED)
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
    let stats = Arc::<Stats>::default();
    let health = Health::default();
    health.set(true);
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

/// The report of input that can have no line.
fn rejects(options: &ProduceOptions) -> anyhow::Result<Rejects> {
    match (&options.rejected_file, options.source.file()) {
        (Some(path), _) => Rejects::at(path.clone()),
        (None, Ok((file, _))) if file.is_file() => Rejects::beside(file),
        _ => Ok(Rejects::shown()),
    }
}

fn tell(published: &Published) {
    let Published { jobs, failed, rejected } = published;
    tracing::info!("{jobs} jobs published, {failed} failed, {rejected} rejected");
}

fn exit_code(published: &Published) -> ExitCode {
    if published.failed > 0 || published.rejected > 0 {
        ExitCode::from(FINISHED_WITH_FAILURES)
    } else {
        ExitCode::SUCCESS
    }
}
