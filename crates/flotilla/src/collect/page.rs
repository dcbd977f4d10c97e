//! The metrics of this process' collectors.

use super::Roles;
use super::tally::Counts;
use crate::observe::text::{Buckets, Labels};
use crate::observe::{Page, queues};

/// The page of all runs that this process collects.
pub(super) async fn page(roles: Roles) -> Page {
    let runs: Vec<(String, Counts)> =
        roles.tallies.all().into_iter().map(|(run, tally)| (run, tally.counts())).collect();
    let uncollected = roles.uncollected.runs();
    let mut ups: Vec<(String, u64)> = uncollected.iter().map(|run| (run.clone(), 0)).collect();
    ups.extend(
        runs.iter().filter(|(run, _)| !uncollected.contains(run)).map(|(run, _)| (run.clone(), 1)),
    );
    let mut page = Page::default();
    gauges(&mut page, "output_up", "Whether the run is collected; /healthz says why not.", &ups);
    let rows = |value: fn(&Counts) -> u64| {
        let row = |(run, counts): &(String, Counts)| (run.clone(), value(counts));
        runs.iter().map(row).collect::<Vec<_>>()
    };
    gauges(&mut page, "output_lines", "Lines of the output.", &rows(|c| c.lines));
    gauges(&mut page, "output_failed_lines", "Lines of failed jobs.", &rows(|c| c.failed));
    counters(&mut page, "outcomes_written_total", "Lines written.", &rows(|c| c.written));
    counters(
        &mut page,
        "outcomes_duplicate_total",
        "Outcomes dropped because their line was there.",
        &rows(|c| c.repeated),
    );
    let labels: Vec<[(&str, &str); 1]> = runs.iter().map(|(run, _)| [("run", &**run)]).collect();
    let syncs = runs.iter().map(|(_, c)| Buckets {
        buckets: &c.syncs,
        count: c.num_syncs,
        sum: c.sync_seconds,
    });
    let rows = labels.iter().map(|labels| labels as Labels<'_>).zip(syncs);
    page.histograms("output_sync_seconds", "Syncing a batch of lines to disk.", rows);
    queues::add_queues(&mut page, &roles.fleet).await;
    page
}

fn gauges(page: &mut Page, name: &str, help: &str, rows: &[(String, u64)]) {
    let labels: Vec<[(&str, &str); 1]> = rows.iter().map(|(run, _)| [("run", &**run)]).collect();
    let values = rows.iter().map(|(_, value)| value);
    page.gauges(name, help, labels.iter().map(|labels| labels as Labels<'_>).zip(values));
}

fn counters(page: &mut Page, name: &str, help: &str, rows: &[(String, u64)]) {
    let labels: Vec<[(&str, &str); 1]> = rows.iter().map(|(run, _)| [("run", &**run)]).collect();
    let values = rows.iter().map(|(_, value)| value);
    page.counters(name, help, labels.iter().map(|labels| labels as Labels<'_>).zip(values));
}
