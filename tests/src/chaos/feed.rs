//! The queries of a round: written to a file that grows, and posted to the producer that listens.
//! Each has a thread that ends when it is told to, and says which ids the output must have. The one that writes
//! the file also rotates it, between two lines, as a logger does.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

/// Between two pieces of the growing file.
const WRITE_INTERVAL: Duration = Duration::from_millis(20);
/// Between two posts.
const POST_INTERVAL: Duration = Duration::from_millis(200);
/// Before a post that was not accepted is tried again.
const RETRY_DELAY: Duration = Duration::from_millis(100);
/// How long an answer to a post may take; the server behind may be down.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// What the thread that writes the file is asked to do; it answers when it is done.
pub(super) enum Order {
    /// Gives the file this name, and goes on in a new one.
    Rotate(PathBuf, mpsc::Sender<()>),
    /// Writes a query with this id, which takes no part in repeats.
    Write(String, mpsc::Sender<()>),
}

/// A thread that feeds.
pub(super) struct Feed {
    stopped: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<String>, String>>,
}

impl Feed {
    fn start(
        feeding: impl FnOnce(&AtomicBool) -> Result<Vec<String>, String> + Send + 'static,
    ) -> Self {
        let stopped = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stopped);
        let thread = std::thread::spawn(move || feeding(&seen));
        Self { stopped, thread }
    }

    /// Tells it to end.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.thread.thread().unpark();
    }

    /// Whether it has ended.
    pub(super) fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// The ids that it has fed.
    pub(super) fn end(self) -> Result<Vec<String>, String> {
        self.stop();
        self.thread.join().map_err(|_| "a feeding thread panicked".to_owned())?
    }

    /// Appends queries to `path`, some of them in two pieces and some of them twice, and obeys `orders`.
    pub(super) fn file(path: PathBuf, seed: u64, orders: mpsc::Receiver<Order>) -> Self {
        let text = |error: std::io::Error| error.to_string();
        Self::start(move |stopped| {
            let mut random = StdRng::seed_from_u64(seed);
            let mut file = append_to(&path).map_err(text)?;
            let (mut ids, mut ordered) = (Vec::new(), Vec::new());
            while !has_stopped(stopped, WRITE_INTERVAL) {
                for _ in 0..random.random_range(0..4) {
                    let repeated = random.random_bool(0.02) && !ids.is_empty();
                    let number =
                        if repeated { random.random_range(0..ids.len()) } else { ids.len() };
                    let line = line(&file_id(number));
                    let cut = random.random_range(0..line.len());
                    let cut = if random.random_bool(0.1) { cut } else { line.len() };
                    file.write_all(&line.as_bytes()[..cut]).map_err(text)?;
                    if cut < line.len() {
                        // Whoever reads now sees half a line. It is ended in any case.
                        has_stopped(stopped, WRITE_INTERVAL);
                        file.write_all(&line.as_bytes()[cut..]).map_err(text)?;
                    }
                    if !repeated {
                        ids.push(file_id(number));
                    }
                }
                let done = match orders.try_recv() {
                    Ok(Order::Rotate(to, done)) => {
                        std::fs::rename(&path, to).map_err(text)?;
                        file = append_to(&path).map_err(text)?;
                        done
                    }
                    Ok(Order::Write(id, done)) => {
                        file.write_all(line(&id).as_bytes()).map_err(text)?;
                        ordered.push(id);
                        done
                    }
                    Err(_none) => continue,
                };
                let _gone = done.send(());
            }
            ids.append(&mut ordered);
            Ok(ids)
        })
    }

    /// Posts queries to `address`, each batch again until it is accepted.
    pub(super) fn post(address: SocketAddr, token: String, seed: u64) -> Self {
        Self::start(move |stopped| {
            let mut random = StdRng::seed_from_u64(seed);
            let mut ids = Vec::new();
            let mut is_over = false;
            while !is_over {
                is_over = has_stopped(stopped, POST_INTERVAL);
                let batch: Vec<String> = (0..random.random_range(1..12))
                    .map(|number| format!("posted-{}", ids.len() + number))
                    .collect();
                let body: String = batch.iter().map(|id| line(id)).collect();
                while !is_accepted(address, &token, &body)? {
                    is_over |= has_stopped(stopped, RETRY_DELAY);
                }
                ids.extend(batch);
            }
            Ok(ids)
        })
    }
}

fn append_to(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

/// Ids with all that is special in a subject, a key or a path.
fn file_id(number: usize) -> String {
    match number % 10 {
        3 => format!("file {number} a.b*c>"),
        7 => format!("filé/{number}"),
        _ => format!("file-{number}"),
    }
}

/// The query with this id, as a line.
pub(super) fn line(id: &str) -> String {
    format!("{}\n", json!({ "id": id, "query": format!("What is {id}?") }))
}

/// Waits for the word to stop, for at most `limit`; whether it came by now.
fn has_stopped(stopped: &AtomicBool, limit: Duration) -> bool {
    std::thread::park_timeout(limit);
    stopped.load(Ordering::Relaxed)
}

/// Whether the producer took it; an error if it never will.
fn is_accepted(address: SocketAddr, token: &str, body: &str) -> Result<bool, String> {
    // Whatever breaks on the way: it is posted again.
    let Ok(answer) = post(address, token, body) else { return Ok(false) };
    match answer.split_whitespace().nth(1) {
        Some("202") => Ok(true),
        Some("400" | "401" | "404" | "413") => Err(format!("a post was refused: {answer}")),
        _ => Ok(false),
    }
}

fn post(address: SocketAddr, token: &str, body: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    write!(
        stream,
        "POST /v1/queries HTTP/1.1\r\nHost: flotilla\r\nConnection: close\r\n\
         Authorization: Bearer {token}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
