//! Options of `flotilla bench`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use engine::{Device, InstructionSet, KvCacheDtype, Precision};

use super::{ModelPath, named};

/// Options of `flotilla bench`.
#[derive(Args, Debug)]
pub(crate) struct BenchOptions {
    /// What to measure.
    #[command(subcommand)]
    pub(crate) what: Option<BenchCommand>,
    /// Print JSON.
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Answers and tokens per second of the whole run in one process [the default, with `memory`].
    Run {
        /// Queries to answer.
        #[arg(long, default_value_t = 500)]
        queries: u64,
        #[command(flatten)]
        model_path: ModelPath,
    },
    /// Peak memory of a run, for several numbers of queries.
    Memory {
        /// Numbers of queries.
        #[arg(long, value_delimiter = ',', default_values_t = [1_000, 100_000])]
        queries: Vec<u64>,
    },
    /// Contexts per second, from a corpus made for it.
    Retrieval {
        /// Documents of the corpus.
        #[arg(long, default_value_t = 50_000)]
        documents: usize,
        /// Queries to retrieve for.
        #[arg(long, default_value_t = 10_000)]
        queries: usize,
    },
    /// Tokens per second of the engine alone, by the number of sequences at once, and their share of
    /// what this machine can do at most.
    ///
    /// Prompts of random tokens, greedy answers of exactly --output-len tokens. Each number of
    /// sequences gets a process of its own; loading the model is not counted, and a short warm-up goes
    /// before.
    Engine(EngineBench),
    /// Jobs per second through the queue: all roles with their servers, and workers that do nothing.
    Queue(QueueBench),
}

/// Options of `flotilla bench queue`.
#[derive(Args, Clone, Debug)]
pub(crate) struct QueueBench {
    /// Jobs of about 1 KB.
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) jobs: u64,
    /// Worker processes.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) workers: u32,
    /// The nats-server to start [default: the one that scripts/servers.sh fetched, or on PATH].
    #[arg(long, value_name = "FILE")]
    pub(crate) nats_server: Option<PathBuf>,
    /// The redis-server to start [default: the one on PATH].
    #[arg(long, value_name = "FILE")]
    pub(crate) redis_server: Option<PathBuf>,
    /// Let the NATS server sync every message to disk before it confirms it.
    #[arg(long)]
    pub(crate) sync_always: bool,
}

/// Options of `flotilla bench engine`.
#[derive(Args, Clone, Debug)]
pub(crate) struct EngineBench {
    #[command(flatten)]
    pub(crate) model_path: ModelPath,
    /// The same as --model-path, before which it counts.
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<String>,
    /// Tokens of each prompt.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) input_len: u32,
    /// Tokens of each answer.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) output_len: u32,
    /// Numbers of sequences, each a measurement.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 8, 32, 64], value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) batch: Vec<u32>,
    /// What computes: cpu, the number of a GPU or its name (GPU-…).
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub(crate) device: Device,
    /// How weights are kept in memory [default: as the checkpoint stores them].
    #[arg(long, value_name = "NAME", value_parser = named(&Precision::ALL, Precision::name))]
    pub(crate) precision: Option<Precision>,
    /// How the KV cache keeps keys and values [default: fp16, fp32 beside weights in fp32].
    #[arg(long, value_name = "NAME", value_parser = named(&KvCacheDtype::ALL, KvCacheDtype::name))]
    pub(crate) kv_cache_dtype: Option<KvCacheDtype>,
    /// What computes: amx, avx512-vnni, avx512, avx2 or portable, as far as the machine has it [default: the best].
    #[arg(long, value_name = "NAME")]
    pub(crate) instruction_set: Option<InstructionSet>,
    /// Threads [default: the cores].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) threads: Option<u32>,
    /// Most sequences that are computed at once [default: all of the measurement].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_num_seqs: Option<u32>,
    /// Most tokens that are computed in one step [default: 512, on a GPU 8192].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_num_batched_tokens: Option<u32>,
    /// Memory of the KV cache, in MiB [default: from the free memory].
    #[arg(long, value_name = "MIB")]
    pub(crate) kv_cache_memory: Option<u64>,
    /// Times that each measurement is made; the median counts.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) repeat: u32,
    /// Measure the one batch in this process and print what came of it; what each process is told.
    #[arg(long, hide = true)]
    pub(crate) in_this_process: bool,
}
