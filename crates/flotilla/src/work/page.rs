//! The metrics of this process' workers.

use std::sync::Arc;

use gpu_worker::{HistogramSnapshot, Snapshot, Stats};

use crate::observe::Page;
use crate::observe::text::{Buckets, Labels};

/// The page of all workers of this process, `engine` being each one's rank.
pub(super) fn page(all_stats: &[Arc<Stats>]) -> Page {
    let workers: Vec<(String, Snapshot)> = all_stats
        .iter()
        .enumerate()
        .map(|(rank, stats)| (rank.to_string(), stats.snapshot()))
        .collect();
    let mut page = Page::default();
    add_gauges(&mut page, &workers);
    add_counters(&mut page, &workers);
    add_results(&mut page, &workers);
    add_histograms(&mut page, &workers);
    page
}

type Workers = [(String, Snapshot)];

fn labels(worker: &(String, Snapshot)) -> [(&str, &str); 2] {
    [("model_name", &worker.1.model), ("engine", &worker.0)]
}

fn add_gauges(page: &mut Page, workers: &Workers) {
    let mut gauge = |name: &str, help: &str, value: fn(&Snapshot) -> f64| {
        let rows: Vec<_> = workers.iter().map(|w| (labels(w), value(&w.1))).collect();
        page.gauges(name, help, rows.iter().map(|(labels, value)| (labels as Labels<'_>, value)));
    };
    gauge("num_requests_running", "Jobs that the engine computes.", |s| {
        s.engine.num_running as f64
    });
    gauge(
        "num_requests_waiting",
        "Jobs held that the engine does not compute yet, or any more.",
        |s| s.num_waiting() as f64,
    );
    gauge("num_slots", "Jobs that the worker holds at most.", |s| s.num_slots as f64);
    gauge("kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all of them.", |s| {
        s.engine.kv_blocks_used as f64 / (s.engine.kv_blocks_total as f64).max(1.0)
    });
}

fn add_counters(page: &mut Page, workers: &Workers) {
    let mut counter = |name: &str, help: &str, value: fn(&Snapshot) -> u64| {
        let rows: Vec<_> = workers.iter().map(|w| (labels(w), value(&w.1))).collect();
        page.counters(name, help, rows.iter().map(|(labels, value)| (labels as Labels<'_>, value)));
    };
    counter("prompt_tokens_total", "Tokens of prompts.", |s| s.engine.prompt_tokens);
    counter("generation_tokens_total", "Tokens generated.", |s| s.engine.generation_tokens);
    counter(
        "prefix_cache_queries_total",
        "Tokens of prompts looked up in the prefix cache.",
        |s| s.engine.prompt_tokens,
    );
    counter("prefix_cache_hits_total", "Tokens of prompts found in the prefix cache.", |s| {
        s.engine.cached_prompt_tokens
    });
    counter("num_preemptions_total", "Jobs that lost their KV blocks to an older one.", |s| {
        s.engine.preemptions
    });
    counter("redeliveries_total", "Jobs received that had been delivered before.", |s| {
        s.redeliveries
    });
    counter("jobs_given_back_total", "Jobs given back to the queue.", |s| s.given_back);
    counter("leases_lost_total", "Jobs whose lease ended before they did.", |s| s.leases_lost);
    counter("engine_starts_total", "Times that an engine was started.", |s| s.engine_starts);
}

/// Answers and failures, by their reasons.
fn add_results(page: &mut Page, workers: &Workers) {
    let mut add = |name: &str,
                   help: &str,
                   reason: &str,
                   counts: fn(&Snapshot) -> Vec<(&str, u64)>| {
        let mut rows = Vec::new();
        for worker in workers {
            let [model, engine] = labels(worker);
            for (name, count) in counts(&worker.1) {
                rows.push(([model, engine, (reason, name)], count));
            }
        }
        page.counters(name, help, rows.iter().map(|(labels, count)| (labels as Labels<'_>, count)));
    };
    add("request_success_total", "Jobs answered.", "finished_reason", |s| {
        s.answered.iter().map(|(reason, count)| (*reason, *count)).collect()
    });
    add("request_failure_total", "Jobs failed for good.", "reason", |s| {
        s.failed.iter().map(|(kind, count)| (kind.name(), *count)).collect()
    });
}

fn add_histograms(page: &mut Page, workers: &Workers) {
    let mut add = |name: &str, help: &str, of: fn(&Snapshot) -> &HistogramSnapshot| {
        let rows: Vec<_> = workers
            .iter()
            .map(|worker| {
                let HistogramSnapshot { buckets, count, sum } = of(&worker.1);
                (labels(worker), Buckets { buckets, count: *count, sum: *sum })
            })
            .collect();
        page.histograms(name, help, rows.iter().map(|(labels, row)| (labels as Labels<'_>, *row)));
    };
    add("time_to_first_token_seconds", "From the delivery to the first token.", |s| {
        &s.time_to_first_token
    });
    add("inter_token_latency_seconds", "Between two tokens of an answer.", |s| {
        &s.inter_token_latency
    });
    add("e2e_request_latency_seconds", "From the delivery to the outcome.", |s| {
        &s.e2e_request_latency
    });
    add("request_queue_time_seconds", "From the delivery to its first computation.", |s| {
        &s.request_queue_time
    });
}
