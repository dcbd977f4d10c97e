//! Measures retrieval: `cargo run --release -p flotilla-producer --example bench_retrieval`.
//!
//! Takes the number of documents and of queries, 50,000 and 10,000 where none are given.

use std::error::Error;
use std::io::Write;

fn main() -> Result<(), Box<dyn Error>> {
    let numbers = std::env::args().skip(1).map(|text| text.parse());
    let numbers: Vec<usize> = numbers.collect::<Result<_, _>>()?;
    let (num_documents, num_queries) = match numbers[..] {
        [] => (50_000, 10_000),
        [num_documents, num_queries] => (num_documents, num_queries),
        _ => return Err("expected a number of documents and one of queries".into()),
    };
    let dir = tempfile::tempdir()?;
    let report = flotilla_producer::bench::retrieval(num_documents, num_queries, dir.path())?;
    serde_json::to_writer_pretty(std::io::stdout().lock(), &report)?;
    writeln!(std::io::stdout())?;
    Ok(())
}
