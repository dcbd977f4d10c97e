//! `flotilla bench`: what this machine gives, measured with the real program in processes of its
//! own, so that their peak memory is theirs alone.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use shared::{Context, JobId, Query, RetrievalMethod};

use crate::cli::{BenchCommand, BenchOptions, ModelPath};
use crate::hub::Need;
use crate::statistics::Statistics;
use crate::telemetry;

mod engine;
mod processes;
mod queue;

/// Queries of the default throughput run.
const DEFAULT_QUERIES: u64 = 500;
/// Numbers of queries whose peak memory the default compares.
const DEFAULT_MEMORY_QUERIES: [u64; 2] = [1_000, 100_000];
const MIB: f64 = (1 << 20) as f64;

/// Runs `flotilla bench`.
pub(crate) fn main(options: &BenchOptions) -> anyhow::Result<ExitCode> {
    let json = options.json;
    let report = match &options.what {
        None => {
            let mut report = run(DEFAULT_QUERIES, &ModelPath::shipped()?)?;
            report.extend(memory(&DEFAULT_MEMORY_QUERIES)?);
            report
        }
        Some(BenchCommand::Run { queries, model_path }) => {
            run(*queries, &model_path.find(Need::Model)?)?
        }
        Some(BenchCommand::Memory { queries }) => memory(queries)?,
        Some(BenchCommand::Retrieval { documents, queries }) => retrieval(*documents, *queries)?,
        Some(BenchCommand::Engine(options)) => {
            return engine::main(options, json).map(|()| ExitCode::SUCCESS);
        }
        Some(BenchCommand::Queue(options)) => queue::main(options)?,
    };
    let text = if json { format!("{:#}\n", Value::Object(report)) } else { table(&report) };
    telemetry::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

type Report = serde_json::Map<String, Value>;

/// Greedy answers to questions about made-up documentation.
fn run(queries: u64, model_path: &Path) -> anyhow::Result<Report> {
    let statistics = flotilla_run(write_contexts, queries, (64, model_path))?;
    let mut report = Report::new();
    report.insert("queries".into(), json!(queries));
    report.insert("answers_per_second".into(), json!(statistics.answers_per_second));
    report.insert("tokens_per_second".into(), json!(statistics.tokens_per_second));
    let prompt_rate = statistics.prompt_tokens as f64 / statistics.elapsed_seconds;
    report.insert("prompt_tokens_per_second".into(), json!(prompt_rate));
    report.insert("peak_memory_bytes".into(), json!(statistics.peak_memory_bytes));
    Ok(report)
}

/// Peak memory against the number of queries: short ones with short answers, since only their number
/// counts.
fn memory(sizes: &[u64]) -> anyhow::Result<Report> {
    let model_path = ModelPath::shipped()?;
    let mut rows = Vec::new();
    for &queries in sizes {
        let statistics = flotilla_run(write_questions, queries, (1, &model_path))?;
        rows.push(json!({
            "queries": queries,
            "peak_memory_bytes": statistics.peak_memory_bytes,
            "answers_per_second": statistics.answers_per_second,
        }));
    }
    Ok(Report::from_iter([("memory".to_owned(), Value::Array(rows))]))
}

fn retrieval(documents: usize, queries: usize) -> anyhow::Result<Report> {
    let dir = tempfile::tempdir().context("cannot make a temporary folder")?;
    let measured = producer::bench::retrieval(documents, queries, dir.path())?;
    match serde_json::to_value(measured)? {
        Value::Object(report) => Ok(report),
        other => Ok(Report::from_iter([("retrieval".to_owned(), other)])),
    }
}

/// Writes an input of so many contexts.
type WriteInput = fn(&Path, u64) -> std::io::Result<()>;

/// Runs this program over `queries` made-up contexts and reads its statistics.
fn flotilla_run(
    write_input: WriteInput,
    queries: u64,
    (max_new_tokens, model_path): (u32, &Path),
) -> anyhow::Result<Statistics> {
    let dir = tempfile::tempdir().context("cannot make a temporary folder")?;
    let [contexts, results, statistics] =
        ["contexts.jsonl", "results.jsonl", "statistics.json"].map(|name| dir.path().join(name));
    write_input(&contexts, queries)
        .with_context(|| format!("cannot write {}", contexts.display()))?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let status = Command::new(program)
        .arg("run")
        .args(["--temperature", "0", "--max-new-tokens", &max_new_tokens.to_string()])
        .arg("--contexts-file")
        .arg(&contexts)
        .arg("--output-file")
        .arg(&results)
        .arg("--statistics-file")
        .arg(&statistics)
        .arg("--model-path")
        .arg(model_path)
        .stdout(Stdio::null())
        .status()
        .context("cannot run this program again")?;
    ensure!(status.success(), "the measured run ended with {status}");
    let text =
        std::fs::read_to_string(&statistics).context("the measured run left no statistics")?;
    let statistics: Statistics = serde_json::from_str(&text)?;
    ensure!(statistics.answered == queries, "expected {queries} answers: {statistics:?}");
    Ok(statistics)
}

/// Contexts without documents, as short as questions are.
fn write_questions(path: &Path, queries: u64) -> std::io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for number in 0..queries {
        let id = JobId(format!("bench-{number}"));
        let query = Query::new(id, format!("What is number {number}?"));
        serde_json::to_writer(&mut file, &Context::empty(query))?;
        file.write_all(b"\n")?;
    }
    file.flush()
}

/// Contexts of one document each, as different as real ones and always the same.
fn write_contexts(path: &Path, queries: u64) -> std::io::Result<()> {
    const VERBS: [&str; 8] =
        ["Returns", "Computes", "Removes", "Collects", "Splits", "Merges", "Counts", "Sorts"];
    const NOUNS: [&str; 11] = [
        "rows", "headers", "blocks", "tokens", "edges", "labels", "samples", "columns", "paths",
        "weights", "frames",
    ];
    let mut file = BufWriter::new(File::create(path)?);
    for number in 0..queries {
        // Coprime steps visit all combinations before one comes again.
        let verb = VERBS[(number % 8) as usize];
        let [noun, other] = [number % 11, (number / 8 + 3) % 11].map(|n| NOUNS[n as usize]);
        let api = format!("pkg{}.{noun}.{}_{other}_{number}", number % 5, verb.to_lowercase());
        let text = format!(
            "## {api}\n{api}(data, axis=0, limit={number})\n{verb} the {noun} of every {other} \
             group below a limit.\n\nParameters\n----------\ndata : array\n    The {noun} to read, \
             one {other} group after another.\naxis : int\n    Axis along which the groups lie.\n\
             limit : int\n    Groups above it are left out.\n\nReturns\n-------\narray\n    The \
             {noun}, in the order of their groups."
        );
        let query = Query {
            target_api: Some(api.clone()),
            ..Query::new(JobId(format!("bench-{number}")), format!("What does {api} do?"))
        };
        let context = Context {
            retrieval_method: RetrievalMethod::ExactApiMatch,
            context_length: text.chars().count(),
            context: text,
            ..Context::empty(query)
        };
        serde_json::to_writer(&mut file, &context)?;
        file.write_all(b"\n")?;
    }
    file.flush()
}

/// One line a figure; memory in MiB.
fn table(report: &Report) -> String {
    let mut text = String::new();
    for (name, value) in report {
        match value {
            Value::Array(rows) => {
                for row in rows.iter().filter_map(Value::as_object) {
                    let cells: Vec<String> = row.iter().map(|(k, v)| figure(k, v)).collect();
                    text += &format!("{name}: {}\n", cells.join(", "));
                }
            }
            value => {
                // Writing to a String cannot fail.
                let _infallible = writeln!(text, "{}", figure(name, value));
            }
        }
    }
    text
}

fn figure(name: &str, value: &Value) -> String {
    match (name.strip_suffix("_bytes"), value.as_f64()) {
        (Some(name), Some(bytes)) => format!("{name} {:.1} MiB", bytes / MIB),
        (None, Some(number)) if value.is_f64() => format!("{name} {number:.2}"),
        _ => format!("{name} {value}"),
    }
}
