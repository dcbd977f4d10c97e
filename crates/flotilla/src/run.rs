//! `flotilla run`: producer, workers and collector in one process, over queues in memory.
//!
//! The output file is the only state. Whatever kills the process, the same command reads which
//! ids have their line and answers the others.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use collector::{Answered, Collector, End, Lock, MemoryDedup, Output};
use engine::{Device, EngineConfig};
use gpu_worker::{EngineBackend, Stats};
use producer::{BadInput, JobTemplate, Published, Publisher, Retriever};
use shared::{Context, Job, JobId, MemoryQueue, RunId, Settled};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::cli::{RunOptions, Usage};
use crate::files;
use crate::progress::Progress;
use crate::rejects::Rejects;
use crate::statistics::Statistics;
use crate::work::{self, Workers};
use crate::{FINISHED_WITH_FAILURES, INTERRUPTED, produce, signals, telemetry};

mod with_servers;

/// Jobs that wait in memory for a worker: enough that no slot stays free, few enough to be small.
const QUEUE_CAPACITY: usize = 256;
/// How long a worker may be silent before its jobs go to another. Long, since a step of a large model
/// on a small machine is slow, and an engine that died says so without it.
const LEASE: Duration = Duration::from_secs(600);

/// The two queues of a run.
#[derive(Clone)]
struct Queues {
    jobs: MemoryQueue<Job>,
    outcomes: MemoryQueue<Settled>,
}

/// Runs `flotilla run`.
pub(crate) fn main(options: &RunOptions) -> anyhow::Result<ExitCode> {
    let input = options.source.file()?.0;
    let nats = options.servers.nats();
    if options.workers == 0 && nats.is_none() {
        return Err(Usage("expected --workers of at least 1 without --nats-url".to_owned()).into());
    }
    let devices = options.model.devices()?.repeat(options.workers as usize);
    let engine = options.model.engine_config(devices.len())?;
    let template = JobTemplate {
        run: RunId(run_name(&options.output_file)),
        prompt_template: options.generation.template()?,
        system_prompt: options.generation.system_prompt.clone(),
        generation: options.generation.generation()?,
    };
    options.retrieval.validate()?;
    files::check(input, &options.output_file)?;
    if let Some(nats) = nats {
        return with_servers::main(options, &nats, (engine, devices), template);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        // Each thread that tokenises keeps words of its own; no more of them than run at a time.
        .max_blocking_threads(4 + 4 * devices.len())
        .build()
        .context("cannot start the async runtime")?;
    let mut collector = runtime.block_on(async {
        let output = Output::open(&options.output_file, Lock::Refuse).await?;
        Collector::open(output, MemoryDedup::default()).await
    })?;
    let contexts = contexts(options, &engine, collector.answered())?;
    let mut rejects = Rejects::beside(&options.output_file)?;
    let answering = answer_all(
        options,
        (&engine, &devices),
        template,
        contexts,
        (&mut collector, &mut rejects),
    );
    let answered = runtime.block_on(answering);
    // A thread that still reads ahead has nothing left to do.
    runtime.shutdown_background();
    let done = answered?;
    rejects.finish()?;
    done.tell(options, &collector);
    Ok(done.exit_code(&collector))
}

/// The input: its files open, its corpus indexed, what is answered already left out.
fn contexts(
    options: &RunOptions,
    engine: &EngineConfig,
    answered: &Answered,
) -> anyhow::Result<impl Iterator<Item = Result<Context, BadInput>> + Send + use<>> {
    let retriever = match &options.retrieval.corpus_path {
        Some(_) if options.source.contexts_file.is_none() => {
            let tokenizer = produce::tokenizer_json(&engine.model_path)?;
            Some(Arc::new(Retriever::open(&options.retrieval, Some(&tokenizer))?))
        }
        _ => None,
    };
    let answered = answered.clone();
    if !answered.is_empty() {
        let lines = answered.len();
        tracing::info!("{lines} lines are already in {}", options.output_file.display());
    }
    let known = move |id: &JobId| answered.contains(id);
    Ok(producer::contexts(&options.source, retriever)?.leaving_out(known))
}

/// What a run came to.
struct Done {
    published: Published,
    interrupted: bool,
}

/// Wires the roles together and waits until everything is written.
async fn answer_all(
    options: &RunOptions,
    engines: (&EngineConfig, &[Device]),
    template: JobTemplate,
    contexts: impl Iterator<Item = Result<Context, BadInput>> + Send + 'static,
    (collector, rejects): (&mut Collector<MemoryDedup>, &mut Rejects),
) -> anyhow::Result<Done> {
    let queues = Queues {
        jobs: MemoryQueue::new(QUEUE_CAPACITY, LEASE),
        outcomes: MemoryQueue::new(QUEUE_CAPACITY, LEASE),
    };
    let shutdown = CancellationToken::new();
    let unwritable = CancellationToken::new();
    let (tell_end, end) = watch::channel(End::Open);
    let interruption = signals::interruption()?;
    let (tell_total, total) = watch::channel(None);
    let workers = start_workers(options, engines, &queues, &shutdown);
    let mut progress = Progress::start(total);
    tokio::task::spawn_blocking({
        let source = options.source.clone();
        // What a slice of the input has left can't be told from the number of lines.
        let is_whole = source.start_index == 0 && source.max_samples.is_none();
        let num_answered = if is_whole { collector.num_lines() } else { 0 };
        move || {
            let total = producer::count(&source);
            tell_total.send_replace(total.map(|total| total.saturating_sub(num_answered)));
        }
    });

    let producing = async {
        let queues = (queues.jobs.clone(), queues.outcomes.clone());
        // In memory a publish is done as soon as there is room, and what has none at a shutdown
        // never gets any.
        let publisher =
            Publisher::new(template, queues).with_window(1).with_drain_timeout(Duration::ZERO);
        let mut report = |bad: &BadInput| rejects.add(bad);
        let published = producer::publish(contexts, &publisher, &shutdown, &mut report).await;
        match &published {
            // An end that was told already, by a shutdown, stays.
            Ok(published) => drop(tell_end.send_if_modified(|end| {
                let open = *end == End::Open;
                *end = if open { End::AtLines(published.lines()) } else { *end };
                open
            })),
            Err(_) => shutdown.cancel(),
        }
        published
    };
    let collecting = async {
        // Nothing but its end is ever asked of it.
        let (_, controls) = mpsc::channel(1);
        let outcomes = &queues.outcomes;
        let collected = collector::run(outcomes, collector, end, controls, &mut progress).await;
        if collected.is_err() {
            unwritable.cancel();
        }
        // Nothing more is wanted, whether all is written or nothing can be.
        shutdown.cancel();
        collected
    };
    let signals = Signals { interruption: &interruption, unwritable: &unwritable };
    let supervising = supervise(workers, signals, &shutdown, &tell_end);
    let (published, collected, supervised) = tokio::join!(producing, collecting, supervising);
    let (report, elapsed) = progress.finish();
    let printed = telemetry::print(&report.statistics(elapsed).to_string());
    collected?;
    supervised?;
    if let Some(path) = &options.statistics_file {
        Statistics::of(&report, elapsed).write(path)?;
    }
    printed.context("cannot write to stdout")?;
    Ok(Done { published: published?, interrupted: interruption.is_cancelled() })
}

fn start_workers(
    options: &RunOptions,
    (engine, devices): (&EngineConfig, &[Device]),
    queues: &Queues,
    shutdown: &CancellationToken,
) -> Workers {
    let mut workers = Workers::new();
    for (rank, device) in (0..).zip(devices) {
        let config = gpu_worker::Config {
            rank,
            name: rank.to_string(),
            max_attempts: options.max_attempts,
            // The user's second interrupt ends it.
            drain_timeout: Duration::MAX,
        };
        let backend = EngineBackend { engine: options.model.on(*device, engine) };
        let queues = (queues.jobs.clone(), queues.outcomes.clone());
        let control = (Arc::new(Stats::default()), shutdown.clone());
        workers.spawn(async move {
            let ready = |model: &str| tracing::info!(worker = rank, model, "worker is ready");
            gpu_worker::run(config, backend, queues, control, ready).await
        });
    }
    workers
}

/// What cuts a run short.
#[derive(Clone, Copy)]
struct Signals<'a> {
    /// The user wants it to end once the running jobs are done.
    interruption: &'a CancellationToken,
    /// Nothing can be written any more.
    unwritable: &'a CancellationToken,
}

/// Waits for the workers to end. One that cannot go on leaves its jobs to the others; when none is
/// left, the run ends with what is written, and the error of the first.
async fn supervise(
    mut workers: Workers,
    signals: Signals<'_>,
    shutdown: &CancellationToken,
    tell_end: &watch::Sender<End>,
) -> anyhow::Result<()> {
    let mut first_error = None;
    loop {
        let joined = tokio::select! {
            joined = workers.join_next() => joined,
            // Their answers have nowhere to go, so nothing is worth waiting for.
            () = signals.unwritable.cancelled() => {
                workers.shutdown().await;
                break;
            }
            () = signals.interruption.cancelled(), if !shutdown.is_cancelled() => {
                tracing::warn!("stopping once the running jobs are done; interrupt again to stop at once");
                shutdown.cancel();
                continue;
            }
        };
        let Some(ended) = joined else { break };
        if let Err(error) = work::note_end(ended, workers.len()) {
            first_error.get_or_insert(error);
        }
    }
    let finished = shutdown.is_cancelled();
    shutdown.cancel();
    tell_end.send_replace(End::WhenDrained);
    match first_error {
        Some(error) if !finished => Err(error.context("no worker is left")),
        _ => Ok(()),
    }
}

fn run_name(output_file: &Path) -> String {
    output_file.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

impl Done {
    /// Says on stderr what the output holds now.
    fn tell(&self, options: &RunOptions, collector: &Collector<MemoryDedup>) {
        let path = options.output_file.display();
        let (lines, failed) = (collector.num_lines(), collector.num_failed());
        let rejected = self.published.rejected;
        if rejected > 0 {
            let report = Rejects::path(&options.output_file);
            tracing::warn!(
                "{rejected} entries of the input have no line; see {}",
                report.display()
            );
        }
        if self.interrupted {
            tracing::warn!(
                "interrupted: {path} has {lines} lines, {failed} of them failed; the same command goes on"
            );
        } else {
            tracing::info!("{path} has {lines} lines, {failed} of them failed");
        }
    }

    fn exit_code(&self, collector: &Collector<MemoryDedup>) -> ExitCode {
        if self.interrupted {
            ExitCode::from(INTERRUPTED)
        } else if collector.num_failed() > 0 || self.published.rejected > 0 {
            ExitCode::from(FINISHED_WITH_FAILURES)
        } else {
            ExitCode::SUCCESS
        }
    }
}
