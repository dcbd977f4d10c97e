//! What the queues hold, for the pages of producers and collectors.

use std::time::Duration;

use shared::queue::nats::{Fleet, FleetError};

use super::text::{Labels, Page};

/// Longest time that the server may take to tell.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Adds the queues to a page; without a server that answers, only that there is none.
pub(crate) async fn add_queues(page: &mut Page, fleet: &Fleet) {
    let looked = tokio::time::timeout(TIMEOUT, look(fleet)).await;
    let queues = looked.ok().and_then(Result::ok);
    let is_up = u8::from(queues.is_some());
    page.gauge("queue_up", "Whether the NATS server told what the queues hold.", is_up);
    let Some(queues) = queues else { return };
    add(page, "queue_jobs", "Jobs not yet settled, those in flight included.", &queues.jobs);
    add(page, "queue_jobs_waiting", "Jobs that wait for a worker.", &queues.waiting);
    add(page, "queue_jobs_in_flight", "Jobs that workers hold.", &queues.in_flight);
    add(
        page,
        "queue_jobs_redelivered",
        "Jobs in flight not for the first time.",
        &queues.redelivered,
    );
    add(page, "queue_outcomes", "Outcomes not yet written.", &queues.outcomes);
    add(page, "dead_letters", "Dead letters.", &queues.dead);
}

type Row = (Vec<(&'static str, String)>, u64);

#[derive(Default)]
struct Queues {
    jobs: Vec<Row>,
    waiting: Vec<Row>,
    in_flight: Vec<Row>,
    redelivered: Vec<Row>,
    outcomes: Vec<Row>,
    dead: Vec<Row>,
}

async fn look(fleet: &Fleet) -> Result<Queues, FleetError> {
    let mut queues = Queues::default();
    for ((model, run), count) in fleet.num_jobs_queued().await? {
        queues.jobs.push((vec![("model_name", model), ("run", run.0)], count));
    }
    for (run, count) in fleet.num_outcomes_queued().await? {
        queues.outcomes.push((vec![("run", run.0)], count));
    }
    for (run, count) in fleet.num_dead().await? {
        queues.dead.push((vec![("run", run.0)], count));
    }
    for consumer in fleet.consumers().await? {
        let labels = || vec![("model_name", consumer.model.clone())];
        queues.waiting.push((labels(), consumer.num_pending));
        queues.in_flight.push((labels(), consumer.num_in_flight));
        queues.redelivered.push((labels(), consumer.num_redelivered));
    }
    Ok(queues)
}

fn add(page: &mut Page, name: &str, help: &str, rows: &[Row]) {
    let rows: Vec<(Vec<(&str, &str)>, u64)> = rows
        .iter()
        .map(|(labels, count)| (labels.iter().map(|(k, v)| (*k, v.as_str())).collect(), *count))
        .collect();
    page.gauges(
        name,
        help,
        rows.iter().map(|(labels, count)| (labels.as_slice() as Labels<'_>, count)),
    );
}
