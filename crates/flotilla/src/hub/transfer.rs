//! Brings files of a repository into the cache: `blobs/<hash>`, and a link to it in `snapshots/<commit>`.
//!
//! A blob grows as `<hash>.incomplete` under a lock that Python's libraries take too, and gets its name when
//! it is whole, checked and synced. What is broken off goes on where it stopped.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use hf_hub::CacheRepo;
use hf_hub::api::sync::{Api, ApiRepo};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use ureq::Agent;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode, header};

use super::listing::{
    ANSWER_TIMEOUT, CONNECT_TIMEOUT, INDEX, Listing, check_blob_name, local_files, refusal, shards,
    wanted,
};
use super::{Hub, Need, Remote};
use crate::telemetry;

/// Attempts that may fail one after the other without a byte between them.
const MAX_FRUITLESS_ATTEMPTS: u32 = 5;
/// Before an attempt that follows a fruitless one, times the number of those.
const PAUSE: Duration = Duration::from_secs(1);
/// Between two lines that tell how far it is, where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
const BUFFER_LEN: usize = 1 << 16;

/// The fetching of one model.
pub(super) struct Transfers<'a> {
    hub: &'a Hub,
    remote: &'a Remote,
    listing: &'a Listing,
    api: Api,
    source: ApiRepo,
    agent: Agent,
    cache: CacheRepo,
    snapshot: PathBuf,
    locks: PathBuf,
    progress: Progress,
}

/// A file on its way.
struct Blob<'a> {
    /// In the repository.
    file: &'a str,
    path: PathBuf,
    incomplete: PathBuf,
    size: u64,
    sha256: Option<&'a str>,
}

/// What ended an attempt.
enum Broken {
    /// Another attempt may do better.
    Again(anyhow::Error),
    /// None will.
    Never(anyhow::Error),
}

impl<'a> Transfers<'a> {
    pub(super) fn new(
        hub: &'a Hub,
        remote: &'a Remote,
        listing: &'a Listing,
    ) -> anyhow::Result<Self> {
        let api = hub.api()?;
        // All files are of one commit, whatever the branch does meanwhile.
        let repo = remote.at(&listing.commit);
        let cache = hub.cache.repo(repo.clone());
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(ANSWER_TIMEOUT))
            .timeout_per_read(Some(ANSWER_TIMEOUT))
            .build()
            .into();
        Ok(Self {
            hub,
            remote,
            listing,
            source: api.repo(repo.clone()),
            api,
            agent,
            snapshot: cache.pointer_path(&listing.commit),
            locks: hub.cache.path().join(".locks").join(repo.folder_name()),
            cache,
            progress: Progress::new(&remote.repo),
        })
    }

    /// Fetches what is missing; where the model is then.
    pub(super) fn run(mut self, need: Need) -> anyhow::Result<PathBuf> {
        let names = self.listing.files.keys().cloned().collect();
        let wanted = wanted(self.remote, &names, need)?;
        let have = local_files(&self.snapshot);
        let mut files = wanted.files.clone();
        for file in &files {
            self.fetch(file, &have)?;
        }
        if wanted.has_index {
            let index = self.snapshot.join(INDEX);
            let index = std::fs::read_to_string(&index)
                .with_context(|| format!("cannot read {}", index.display()))?;
            files = shards(&index)?.into_iter().collect();
            for file in &files {
                ensure!(
                    self.listing.files.contains_key(file),
                    "{} has no {file}, which its {INDEX} names",
                    self.remote.repo
                );
                self.fetch(file, &have)?;
            }
        }
        self.progress.finish();
        Ok(wanted.path_in(&self.snapshot))
    }

    /// Brings one file into the snapshot.
    fn fetch(&mut self, file: &str, have: &BTreeSet<String>) -> anyhow::Result<()> {
        let link = self.snapshot.join(file);
        // A link may lead nowhere.
        if have.contains(file) && link.is_file() {
            return Ok(());
        }
        let known = &self.listing.files[file];
        let (size, name) = match &known.blob {
            Some((size, name)) => (*size, name.clone()),
            // Mirrors don't say as much as the Hub itself.
            None => {
                let metadata = self.api.metadata(&self.source.url(file));
                let metadata = metadata.with_context(|| {
                    format!("cannot learn from {} what {file} is", self.hub.endpoint)
                })?;
                (metadata.size() as u64, metadata.etag().to_owned())
            }
        };
        check_blob_name(&name)?;
        let path = self.cache.blob_path(&name);
        let incomplete = path.with_file_name(format!("{name}.incomplete"));
        let blob = Blob { file, path, incomplete, size, sha256: known.sha256.as_deref() };
        let cannot =
            |path: &Path| format!("cannot write to the cache of models: {}", path.display());
        for folder in [blob.path.parent(), link.parent(), Some(self.locks.as_path())] {
            let folder = folder.unwrap_or(&self.snapshot);
            std::fs::create_dir_all(folder).with_context(|| cannot(folder))?;
        }
        let lock = self.locks.join(format!("{name}.lock"));
        let lock = File::create(&lock).with_context(|| cannot(&lock))?;
        if lock.try_lock().is_err() {
            tracing::info!("another process fetches {file}; waiting for it");
            lock.lock().with_context(|| cannot(&self.locks))?;
        }
        if !blob.path.metadata().is_ok_and(|found| found.len() == size) {
            self.download(&blob)?;
        }
        // Dead links go; those that another process made meanwhile are as good.
        if link.symlink_metadata().is_ok() && !link.is_file() {
            std::fs::remove_file(&link).with_context(|| cannot(&link))?;
        }
        let up = "../".repeat(2 + Path::new(file).components().count() - 1);
        match std::os::unix::fs::symlink(format!("{up}blobs/{name}"), &link) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                Err(error).with_context(|| cannot(&link))
            }
            _ => Ok(()),
        }
    }

    /// Makes the blob whole, in as many attempts as it takes.
    fn download(&mut self, blob: &Blob<'_>) -> anyhow::Result<()> {
        let mut fruitless = 0;
        loop {
            let before = blob.incomplete.metadata().map_or(0, |file| file.len());
            let error = match self.attempt(blob) {
                Ok(()) => return Ok(()),
                Err(Broken::Never(error)) => return Err(error),
                Err(Broken::Again(error)) => error,
            };
            let after = blob.incomplete.metadata().map_or(0, |file| file.len());
            fruitless = if after > before { 0 } else { fruitless + 1 };
            if fruitless == MAX_FRUITLESS_ATTEMPTS {
                let file = blob.file;
                return Err(error.context(format!(
                    "cannot fetch {file} of {}; the same command goes on at byte {after} of {}",
                    self.remote.repo, blob.size
                )));
            }
            tracing::debug!(file = blob.file, at = after, "the transfer broke off: {error:#}");
            if fruitless > 0 {
                pause(PAUSE * fruitless);
            }
        }
    }

    /// Fetches what the blob lacks, and gives it its name.
    fn attempt(&mut self, blob: &Blob<'_>) -> Result<(), Broken> {
        let write = |error: std::io::Error| Broken::Never(unwritten(error, blob));
        let mut file =
            OpenOptions::new().append(true).create(true).open(&blob.incomplete).map_err(write)?;
        let mut position = file.metadata().map_err(write)?.len();
        if position > blob.size {
            file.set_len(0).map_err(write)?;
            position = 0;
        }
        self.progress.start(blob, position);
        if position < blob.size {
            let mut response = self.ask(blob, position)?;
            if response.status() == StatusCode::OK && position > 0 {
                // It does not know parts of files: all over again.
                file.set_len(0).map_err(write)?;
                self.progress.start(blob, 0);
                position = 0;
            }
            let mut body = response.body_mut().as_reader();
            let mut buffer = vec![0; BUFFER_LEN];
            while position < blob.size {
                let len = match body.read(&mut buffer) {
                    Ok(0) => return Err(Broken::Again(anyhow!("it ended at byte {position}"))),
                    Ok(len) => len,
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(error) => return Err(Broken::Again(error.into())),
                };
                let len = len.min((blob.size - position) as usize);
                file.write_all(&buffer[..len]).map_err(write)?;
                position += len as u64;
                self.progress.add(len);
            }
        }
        file.sync_all().map_err(write)?;
        check(blob)?;
        std::fs::rename(&blob.incomplete, &blob.path).map_err(write)
    }

    /// Asks for a file from a position on.
    fn ask(&self, blob: &Blob<'_>, position: u64) -> Result<Response<ureq::Body>, Broken> {
        let mut request = self.agent.get(self.source.url(blob.file));
        // Compressed, its parts would be others.
        request = request.header(header::ACCEPT_ENCODING, "identity");
        if let Some(token) = &self.hub.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if position > 0 {
            request = request.header(header::RANGE, format!("bytes={position}-"));
        }
        let response = request.call().map_err(|error| Broken::Again(error.into()))?;
        let status = response.status();
        let begins_at = |position: u64| {
            let range = response.headers().get(header::CONTENT_RANGE);
            let range = range.and_then(|range| range.to_str().ok());
            range.is_some_and(|range| range.starts_with(&format!("bytes {position}-")))
        };
        match status {
            StatusCode::OK => Ok(response),
            StatusCode::PARTIAL_CONTENT if begins_at(position) => Ok(response),
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                // What is here and what is there do not fit together.
                let _gone_already = std::fs::remove_file(&blob.incomplete);
                Err(Broken::Again(anyhow!("it does not go on at byte {position}")))
            }
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => {
                Err(Broken::Again(anyhow!("the answer is {status}")))
            }
            _ if status.is_server_error() => Err(Broken::Again(anyhow!("the answer is {status}"))),
            _ => Err(Broken::Never(refusal(self.hub, self.remote, &response))),
        }
    }
}

/// Compares the content with its hash, where that is known; what is wrong is removed.
fn check(blob: &Blob<'_>) -> Result<(), Broken> {
    let Some(expected) = blob.sha256 else { return Ok(()) };
    let hash = || {
        let mut hasher = Sha256::new();
        std::io::copy(&mut File::open(&blob.incomplete)?, &mut hasher)?;
        Ok::<_, std::io::Error>(hasher.finalize())
    };
    let found = hash().map_err(|error| Broken::Never(unwritten(error, blob)))?;
    let found: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
    if found == expected.to_lowercase() {
        return Ok(());
    }
    std::fs::remove_file(&blob.incomplete)
        .map_err(|error| Broken::Never(unwritten(error, blob)))?;
    Err(Broken::Again(anyhow!("its hash is {found}, expected {expected}")))
}

fn unwritten(error: std::io::Error, blob: &Blob<'_>) -> anyhow::Error {
    let path = blob.incomplete.display();
    let is_full = matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
    let what = if is_full {
        let have = blob.incomplete.metadata().map_or(0, |file| file.len());
        let missing = indicatif::HumanBytes(blob.size.saturating_sub(have));
        format!("the disk is full: {} needs {missing} more at {path}", blob.file)
    } else {
        format!("cannot write {path}")
    };
    anyhow::Error::new(error).context(what)
}

#[expect(clippy::disallowed_methods, reason = "nothing tells when a server works again")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// How far the fetching is: a bar on a terminal, a line every ten seconds elsewhere.
struct Progress {
    repo: String,
    is_shown: bool,
    bar: Option<ProgressBar>,
    position: u64,
    size: u64,
    file: String,
    told: Instant,
}

impl Progress {
    fn new(repo: &str) -> Self {
        Self {
            repo: repo.to_owned(),
            is_shown: std::io::stderr().is_terminal(),
            bar: None,
            position: 0,
            size: 0,
            file: String::new(),
            told: Instant::now(),
        }
    }

    /// A file begins, or goes on.
    fn start(&mut self, blob: &Blob<'_>, position: u64) {
        if self.file.is_empty() {
            tracing::info!("fetching {}", self.repo);
        }
        (self.file, self.position, self.size) = (blob.file.to_owned(), position, blob.size);
        if !self.is_shown {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let style = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} ETA {eta}";
            let style = ProgressStyle::with_template(style)
                .unwrap_or_else(|_wrong| ProgressStyle::default_bar())
                .progress_chars("=> ");
            let bar = ProgressBar::no_length().with_style(style);
            telemetry::set_bar(Some(bar.clone()));
            bar
        });
        bar.set_length(blob.size);
        bar.set_position(position);
        bar.reset_eta();
        bar.set_message(blob.file.to_owned());
    }

    fn add(&mut self, len: usize) {
        self.position += len as u64;
        if let Some(bar) = &self.bar {
            bar.set_position(self.position);
        } else if self.told.elapsed() >= LINE_INTERVAL {
            self.told = Instant::now();
            let [position, size] = [self.position, self.size].map(indicatif::HumanBytes);
            tracing::info!("{}: {position} of {size}", self.file);
        }
    }

    fn finish(&mut self) {
        telemetry::set_bar(None);
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}
