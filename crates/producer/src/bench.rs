//! Measures retrieval on a corpus that the measurement makes up itself; always the same one.
//!
//! Words are drawn as in natural text, a few very often and most hardly ever. A quarter of the
//! queries names an API of the corpus, a quarter asks about one package, and half ask the whole
//! corpus, which is the most work.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use serde_json::json;
use shared::{JobId, Query, RetrievalMethod};

use crate::config::{RetrievalConfig, SourceConfig};
use crate::error::Error;
use crate::retrieve::Retriever;
use crate::source::contexts;

const NUM_PACKAGES: usize = 50;
const VOCABULARY: usize = 20_000;
const WORDS_IN_DOCUMENT: usize = 120;
const WORDS_IN_QUERY: usize = 12;
const SEED: u64 = 7;

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Documents in the corpus.
    pub num_documents: usize,
    /// Queries that were looked up.
    pub num_queries: usize,
    /// Threads that looked them up.
    pub num_threads: usize,
    /// Size of the corpus.
    pub corpus_bytes: u64,
    /// Seconds to index the corpus and open the index.
    pub index_seconds: f64,
    /// Seconds to open the index that was kept.
    pub second_open_seconds: f64,
    /// Seconds to read all queries and look them up.
    pub query_seconds: f64,
    /// `num_queries` by `query_seconds`.
    pub queries_per_second: f64,
    /// Queries answered by an exact name.
    pub num_exact: usize,
    /// Queries answered by BM25.
    pub num_bm25: usize,
    /// Most memory that this process has had resident, indexing included; `None` where the
    /// system doesn't say.
    pub peak_rss_bytes: Option<u64>,
}

/// Makes a corpus and queries below `dir`, indexes the one and looks up the others.
pub fn retrieval(num_documents: usize, num_queries: usize, dir: &Path) -> Result<Report, Error> {
    let mut words = Words::new();
    let corpus_path = dir.join("corpus");
    let queries_file = dir.join("queries.jsonl");
    let corpus_bytes = write_corpus(&mut words, num_documents, &corpus_path)
        .map_err(Error::corpus(&corpus_path))?;
    write_queries(&mut words, num_documents, num_queries, &queries_file)
        .map_err(Error::input(&queries_file))?;
    let config = RetrievalConfig {
        corpus_path: Some(corpus_path),
        cache_dir: Some(dir.join("cache")),
        ..RetrievalConfig::default()
    };
    let source = SourceConfig { queries_file: Some(queries_file), ..SourceConfig::default() };
    let start = Instant::now();
    drop(Retriever::open(&config, None)?);
    let index_seconds = start.elapsed().as_secs_f64();

    let start = Instant::now();
    let retriever = Retriever::open(&config, None)?;
    let second_open_seconds = start.elapsed().as_secs_f64();

    let start = Instant::now();
    let (mut num_exact, mut num_bm25) = (0, 0);
    for context in contexts(&source, Some(Arc::new(retriever)))?.flatten() {
        match context.retrieval_method {
            RetrievalMethod::ExactApiMatch => num_exact += 1,
            RetrievalMethod::RagFallback => num_bm25 += 1,
            RetrievalMethod::RagStringMatch | RetrievalMethod::None => {}
        }
    }
    let query_seconds = start.elapsed().as_secs_f64();
    Ok(Report {
        num_documents,
        num_queries,
        num_threads: rayon::current_num_threads(),
        corpus_bytes,
        index_seconds,
        second_open_seconds,
        query_seconds,
        queries_per_second: num_queries as f64 / query_seconds,
        num_exact,
        num_bm25,
        peak_rss_bytes: peak_rss_bytes(),
    })
}

fn write_corpus(words: &mut Words, num_documents: usize, dir: &Path) -> std::io::Result<u64> {
    let mut num_bytes = 0;
    for package in 0..NUM_PACKAGES {
        let file = dir.join(format!("package{package}")).join("1.0.jsonl");
        fs::create_dir_all(file.parent().unwrap_or(dir))?;
        let mut lines = BufWriter::new(File::create(&file)?);
        for number in (package..num_documents).step_by(NUM_PACKAGES) {
            let doc = words.text(WORDS_IN_DOCUMENT);
            let path = path(number);
            let line = json!({"path": path, "doc": doc, "signature": "(x, axis=None)"});
            writeln!(lines, "{line}")?;
        }
        lines.flush()?;
        num_bytes += fs::metadata(&file)?.len();
    }
    Ok(num_bytes)
}

fn path(number: usize) -> String {
    let package = number % NUM_PACKAGES;
    format!("package{package}.{}.api_{number}", word(number / NUM_PACKAGES % 40))
}

fn write_queries(
    words: &mut Words,
    num_documents: usize,
    num_queries: usize,
    file: &Path,
) -> std::io::Result<()> {
    let mut lines = BufWriter::new(File::create(file)?);
    for k in 0..num_queries {
        let number = words.below(num_documents.max(1));
        let package = format!("package{}", number % NUM_PACKAGES);
        let question = format!("How do I {}?", words.text(WORDS_IN_QUERY));
        let mut query = Query::new(JobId(format!("q{k}")), question);
        match k % 4 {
            0 => {
                query.target_api = Some(path(number));
                query.dependencies = [(package, Some("1.0".to_owned()))].into();
            }
            1 => query.dependencies = [(package, None)].into(),
            _ => {}
        }
        let line = serde_json::to_string(&query).map_err(std::io::Error::from)?;
        writeln!(lines, "{line}")?;
    }
    lines.flush()
}

/// Words by their rank, drawn with a probability of about one by rank.
struct Words {
    state: u64,
    cumulated: Vec<f64>,
}

impl Words {
    fn new() -> Self {
        let weights = (1..=VOCABULARY).map(|rank| 1.0 / rank as f64);
        let cumulated = weights.scan(0.0, |sum, weight| {
            *sum += weight;
            Some(*sum)
        });
        Self { state: SEED, cumulated: cumulated.collect() }
    }

    fn text(&mut self, num_words: usize) -> String {
        let words: Vec<String> = (0..num_words).map(|_| self.draw()).collect();
        words.join(" ")
    }

    fn draw(&mut self) -> String {
        let total = self.cumulated.last().copied().unwrap_or(1.0);
        let at = (self.next() >> 11) as f64 / (1_u64 << 53) as f64 * total;
        word(self.cumulated.partition_point(|&sum| sum < at))
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// A word of two to four syllables, another one for each number.
fn word(number: usize) -> String {
    const SYLLABLES: [&str; 20] = [
        "ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu",
        "va", "we", "xi", "yo", "zu",
    ];
    let mut rest = number + SYLLABLES.len();
    let mut word = String::new();
    while rest > 0 {
        word.push_str(SYLLABLES[rest % SYLLABLES.len()]);
        rest /= SYLLABLES.len();
    }
    word
}

fn peak_rss_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}
