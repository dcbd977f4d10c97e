//! Threads that share the work of an operation.

use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use crate::Error;

/// Work (multiply-adds, roughly) below which an operation is not worth a second thread.
const MIN_PARALLEL_WORK: usize = 1 << 20;

/// Work below which a thread takes several pieces at once.
const MIN_PIECE_WORK: usize = 1 << 17;

/// A fixed number of threads, kept for as long as the runner lives.
#[derive(Debug)]
pub(crate) struct Threads {
    pool: Option<rayon::ThreadPool>,
    num_threads: usize,
}

impl Threads {
    /// Starts `num_threads` threads; with one, everything runs on the caller's.
    pub(crate) fn new(num_threads: usize) -> Result<Self, Error> {
        if num_threads <= 1 {
            return Ok(Self { pool: None, num_threads: 1 });
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(num_threads)
            .thread_name(|index| format!("engine-{index}"))
            .build()
            .map_err(|error| {
                Error::OutOfMemory(format!("cannot start {num_threads} threads: {error}"))
            })?;
        Ok(Self { pool: Some(pool), num_threads })
    }

    /// How many there are.
    pub(crate) fn num_threads(&self) -> usize {
        self.num_threads
    }

    /// Index of the thread that calls, below [`Self::num_threads`].
    pub(crate) fn current(&self) -> usize {
        self.pool.as_ref().and_then(rayon::ThreadPool::current_thread_index).unwrap_or(0)
    }

    /// Runs a whole step on one of the threads, so that its operations find them awake.
    pub(crate) fn step<R: Send>(&self, step: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(step),
            None => step(),
        }
    }

    /// Runs `piece(0)` to `piece(num_pieces - 1)`, in any order, shared out when `work` in all is worth it.
    pub(crate) fn share(
        &self,
        num_pieces: usize,
        work: usize,
        piece: impl Fn(usize) + Send + Sync,
    ) {
        if self.num_threads == 1 || num_pieces < 2 || work < MIN_PARALLEL_WORK {
            (0..num_pieces).for_each(piece);
            return;
        }
        let grain = MIN_PIECE_WORK.div_ceil((work / num_pieces).max(1)).min(num_pieces);
        (0..num_pieces).into_par_iter().with_min_len(grain).for_each(piece);
    }

    /// Runs `piece(index, scratch, chunk)` for each chunk of `data`, shared out.
    pub(crate) fn share_chunks<T: Send, S: Default>(
        &self,
        data: &mut [T],
        chunk_len: usize,
        piece: impl Fn(usize, &mut S, &mut [T]) + Send + Sync,
    ) {
        if self.num_threads == 1 {
            let mut scratch = S::default();
            for (index, chunk) in data.chunks_mut(chunk_len).enumerate() {
                piece(index, &mut scratch, chunk);
            }
            return;
        }
        self.step(|| {
            data.par_chunks_mut(chunk_len).enumerate().for_each_init(
                S::default,
                |scratch, (index, chunk)| {
                    piece(index, scratch, chunk);
                },
            );
        });
    }
}
