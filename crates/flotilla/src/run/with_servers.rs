//! `flotilla run --nats-url`: producer, workers and collector in this process, the queues at the
//! fleet's server, so that workers elsewhere help and nothing queued is lost with the process.
//!
//! Ends when everything published has its line, whoever answered it. An interruption leaves what is
//! queued where it is; the same command goes on.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use engine::{Device, EngineConfig};
use gpu_worker::EngineBackend;
use producer::{BadInput, JobTemplate, Published, Publisher, Stats};
use shared::JobId;
use shared::queue::nats::Fleet;
use tokio_util::sync::CancellationToken;

use crate::cli::RunOptions;
use crate::cli::fleet::NatsOptions;
use crate::collect::{Collected, Roles, Tallies, Uncollected};
use crate::observe::Health;
use crate::produce::{self, Said};
use crate::rejects::Rejects;
use crate::statistics::Statistics;
use crate::work::{self, Worker, Workers};
use crate::{FAILED, FINISHED_WITH_FAILURES, INTERRUPTED, fleet, reconcile, signals, telemetry};

/// Runs `flotilla run` with servers.
pub(super) fn main(
    options: &RunOptions,
    nats: &NatsOptions,
    engines: (EngineConfig, Vec<Device>),
    template: JobTemplate,
) -> anyhow::Result<ExitCode> {
    let rejects = Rejects::beside(&options.output_file)?;
    fleet::block_on(answer_all(options, nats, engines, (template, rejects)))
}

async fn answer_all(
    options: &RunOptions,
    nats: &NatsOptions,
    (engine, devices): (EngineConfig, Vec<Device>),
    (template, mut rejects): (JobTemplate, Rejects),
) -> anyhow::Result<ExitCode> {
    let interruption = signals::interruption()?;
    let Some(fleet) = fleet::connect_unless(&interruption, nats).await? else {
        return Ok(ExitCode::from(INTERRUPTED));
    };
    let over = interruption.child_token();
    let roles = Roles {
        fleet: fleet.clone(),
        redis_url: options.servers.redis.redis_url.clone(),
        wait: false,
        until_done: true,
        published: CancellationToken::new(),
        abort_at: None,
        shutdown: over.clone(),
        tallies: Tallies::default(),
        uncollected: Uncollected::default(),
    };
    let run = template.run.clone();
    let all_published = roles.published.clone();
    let producing = async {
        let published =
            publish(options, (&fleet, &engine.model_path), template, &over, &mut rejects).await;
        all_published.cancel();
        cancel_if_failed(published, &over)
    };
    let collecting = async {
        let collected = roles.collect(run, options.output_file.clone()).await;
        // Nothing more is wanted, whether all is written or nothing can be.
        over.cancel();
        collected
    };
    let workers = start_workers(options, &fleet, (&engine, &devices), &over);
    let working = async { cancel_if_failed(work::supervise(workers, &interruption).await, &over) };
    let (published, collected, worked) = tokio::join!(producing, collecting, working);
    rejects.finish()?;
    let (collected, (), published) = (collected?, worked?, published?);
    tell(options, collected, published, interruption.is_cancelled())
}

/// Without one of its parts, the command ends.
fn cancel_if_failed<T>(result: anyhow::Result<T>, over: &CancellationToken) -> anyhow::Result<T> {
    if result.is_err() {
        over.cancel();
    }
    result
}

async fn publish(
    options: &RunOptions,
    (fleet, model_path): (&Fleet, &Path),
    template: JobTemplate,
    over: &CancellationToken,
    rejects: &mut Rejects,
) -> anyhow::Result<Published> {
    let model = &engine::model_name(model_path);
    let answered = reconcile::read_output(&options.output_file)?;
    let known = move |id: &JobId| answered.contains(&id.digest());
    let retriever =
        produce::retriever(&options.retrieval, &options.source, || Ok(model_path.to_owned()))?;
    let contexts = producer::contexts(&options.source, retriever)?.leaving_out(known);
    let stats = Arc::<Stats>::default();
    let about = produce::about(&template.run, model, produce::input_name(&options.source)?);
    let said = Said::start(fleet, about, &stats);
    let queues = (fleet.jobs(model), fleet.outcomes(None));
    let publisher = Publisher::new(template, queues).with_stats(stats);
    let mut report = |bad: &BadInput| rejects.add(bad);
    let published = producer::publish(contexts, &publisher, over, &mut report).await;
    said.end(published.is_ok() && !over.is_cancelled()).await;
    Ok(published?)
}

fn start_workers(
    options: &RunOptions,
    fleet: &Fleet,
    (engine, devices): (&EngineConfig, &[Device]),
    over: &CancellationToken,
) -> Workers {
    let mut workers = Workers::new();
    for (rank, device) in (0..).zip(devices) {
        let worker = Worker {
            rank,
            device: *device,
            max_attempts: options.max_attempts,
            // The user's second interrupt ends it.
            drain_timeout: Duration::MAX,
            fleet: fleet.clone(),
            stats: Arc::default(),
            health: Health::default(),
            shutdown: over.clone(),
            last_words: None,
        };
        let backend = EngineBackend { engine: options.model.on(*device, engine) };
        workers.spawn(worker.run(backend, engine::model_name(&engine.model_path)));
    }
    workers
}

/// Shows the statistics, and says what the output holds now.
fn tell(
    options: &RunOptions,
    collected: Option<Collected>,
    published: Published,
    interrupted: bool,
) -> anyhow::Result<ExitCode> {
    let Some(Collected { report, elapsed, lines, failed, missing }) = collected else {
        return Ok(ExitCode::from(INTERRUPTED));
    };
    telemetry::print(&report.statistics(elapsed).to_string()).context("cannot write to stdout")?;
    if let Some(path) = &options.statistics_file {
        Statistics::of(&report, elapsed).write(path)?;
    }
    let path = options.output_file.display();
    tracing::info!("{path} has {lines} lines, {failed} of them failed");
    Ok(if interrupted {
        tracing::warn!("interrupted; the same command goes on");
        ExitCode::from(INTERRUPTED)
    } else if missing > 0 {
        ExitCode::from(FAILED)
    } else if failed > 0 || published.rejected > 0 {
        ExitCode::from(FINISHED_WITH_FAILURES)
    } else {
        ExitCode::SUCCESS
    })
}
