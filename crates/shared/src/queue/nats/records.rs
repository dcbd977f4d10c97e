//! What can be known about the fleet: how much is queued, and what the roles tell about themselves.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::kv;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{Info as StreamInfo, RawMessageErrorKind};
use bytes::Bytes;
use futures_util::{Stream, stream};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::streams::{Nothing, code};
use super::{Fleet, FleetError, JOBS, RESULTS, STATUS, dead, job_subject, run_token};
use crate::message::RunId;
use crate::status::{Role, RunStatus, WorkerStatus, unix_now};
use crate::token;

/// How long a record outlives the last word of who wrote it.
const RECORD_AGE: Duration = Duration::from_secs(24 * 3600);
/// A record is small, and there is one a worker, a producer and a run.
const RECORDS_BYTES: i64 = 64 << 20;
/// The bucket's stream.
const STATUS_STREAM: &str = "KV_flotilla-status";
/// The server marks a removed record so.
const OPERATION: &str = "KV-Operation";

/// One model's consumer of jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsumerStatus {
    /// Name of the model.
    pub model: String,
    /// Jobs that were never delivered.
    pub num_pending: u64,
    /// Jobs that are with a worker.
    pub num_in_flight: u64,
    /// Of these, jobs that were delivered before.
    pub num_redelivered: u64,
    /// Pulls that wait for a job.
    pub num_waiting: u64,
}

/// A stream's messages by subject, a page of them.
#[derive(Deserialize)]
struct Subjects {
    state: SubjectsState,
    #[serde(default)]
    total: u64,
}

#[derive(Deserialize)]
struct SubjectsState {
    #[serde(default)]
    subjects: Option<HashMap<String, u64>>,
}

#[derive(Deserialize)]
struct Purged {
    purged: u64,
}

#[derive(Deserialize)]
struct Consumers {
    consumers: Option<Vec<Info>>,
    total: u64,
}

impl Fleet {
    /// Jobs in the queue by model and run, those in flight included.
    pub async fn num_jobs_queued(&self) -> Result<BTreeMap<(String, RunId), u64>, FleetError> {
        let counts = self.count(JOBS, "flotilla.jobs.*.*").await?;
        let named = counts.into_iter().filter_map(|(subject, count)| {
            Some(((dead::model(&subject)?, run_of(&subject)?), count))
        });
        Ok(named.collect())
    }

    /// Removes the jobs of a run from the queue, of all models and those in flight too; how many there
    /// were.
    pub async fn drop_jobs(&self, run: &RunId) -> Result<u64, FleetError> {
        let body = json!({ "filter": job_subject("*", run) });
        match self.shared.api::<Purged>(format!("STREAM.PURGE.{JOBS}"), &body).await {
            Ok(Purged { purged }) => Ok(purged),
            Err(error) if error.code() == Some(code::STREAM_NOT_FOUND) => Ok(0),
            Err(error) => Err(FleetError::server("drop jobs", error)),
        }
    }

    /// Outcomes in the queue by run, those in flight included.
    pub async fn num_outcomes_queued(&self) -> Result<BTreeMap<RunId, u64>, FleetError> {
        self.count_by_run(RESULTS, "flotilla.results.*").await
    }

    /// The models that have, or had lately, a worker.
    pub async fn consumers(&self) -> Result<Vec<ConsumerStatus>, FleetError> {
        let infos = self.consumer_infos(JOBS).await?;
        let mut all: Vec<ConsumerStatus> = infos.iter().filter_map(consumer_status).collect();
        all.sort_by(|one, other| one.model.cmp(&other.model));
        Ok(all)
    }

    /// The consumers of a stream.
    pub(super) async fn consumer_infos(&self, stream: &str) -> Result<Vec<Info>, FleetError> {
        let mut all = Vec::new();
        loop {
            let path = format!("CONSUMER.LIST.{stream}");
            let page = self.shared.api::<Consumers>(path, &json!({ "offset": all.len() })).await;
            let page = match page {
                Err(error) if error.code() == Some(code::STREAM_NOT_FOUND) => return Ok(all),
                page => page.map_err(|error| FleetError::server("list the consumers", error))?,
            };
            let infos = page.consumers.unwrap_or_default();
            let is_last = infos.is_empty();
            all.extend(infos);
            if is_last || all.len() as u64 >= page.total {
                return Ok(all);
            }
        }
    }

    /// Tells about a worker.
    pub async fn put_worker(&self, status: &WorkerStatus) -> Result<(), FleetError> {
        self.put(&format!("worker.{}", token::encode(&status.id)), status).await
    }

    /// Forgets a worker that ends in good order.
    pub async fn remove_worker(&self, id: &str) -> Result<(), FleetError> {
        let removed = self.bucket().await?.purge(format!("worker.{}", token::encode(id))).await;
        removed.map_err(|error| FleetError::server("remove a worker's record", error))
    }

    /// What the workers tell, those of the last day that did not end in good order included.
    pub async fn workers(&self) -> Result<Vec<WorkerStatus>, FleetError> {
        self.records("worker.*").await
    }

    /// Tells about a run.
    pub async fn put_run(&self, status: &RunStatus) -> Result<(), FleetError> {
        self.put(&run_key(status), status).await
    }

    /// Forgets what one has told about a run.
    pub async fn remove_run(&self, status: &RunStatus) -> Result<(), FleetError> {
        let removed = self.bucket().await?.purge(run_key(status)).await;
        removed.map_err(|error| FleetError::server("remove a run's record", error))
    }

    /// What the producers and collectors of the last day tell.
    pub async fn runs(&self) -> Result<Vec<RunStatus>, FleetError> {
        self.records("run.>").await
    }

    /// The same of one run.
    pub async fn run(&self, run: &RunId) -> Result<Vec<RunStatus>, FleetError> {
        self.records(&format!("run.{}.>", token::encode(&run.0))).await
    }

    /// Keeps the records of producers that are gone for another day: a run may last longer, and is
    /// not complete without them.
    pub async fn keep_producers(&self, run: &RunId) -> Result<(), FleetError> {
        let now = unix_now();
        for status in self.run(run).await? {
            if status.role == Role::Producer && status.is_gone(now) {
                self.put_run(&status).await?;
            }
        }
        Ok(())
    }

    /// Messages of a stream by subject, where there are any.
    pub(super) async fn count(
        &self,
        stream: &str,
        subjects: &str,
    ) -> Result<HashMap<String, u64>, FleetError> {
        let mut counts = HashMap::new();
        loop {
            let body = json!({ "subjects_filter": subjects, "offset": counts.len() });
            let page = self.shared.api::<Subjects>(format!("STREAM.INFO.{stream}"), &body).await;
            let page = match page {
                Err(error) if error.code() == Some(code::STREAM_NOT_FOUND) => return Ok(counts),
                page => {
                    page.map_err(|error| FleetError::server(format!("count {stream}"), error))?
                }
            };
            let before = counts.len();
            counts.extend(page.state.subjects.unwrap_or_default());
            if counts.len() == before || counts.len() as u64 >= page.total {
                return Ok(counts);
            }
        }
    }

    pub(super) async fn count_by_run(
        &self,
        stream: &str,
        subjects: &str,
    ) -> Result<BTreeMap<RunId, u64>, FleetError> {
        let counts = self.count(stream, subjects).await?.into_iter();
        Ok(counts.filter_map(|(subject, count)| Some((run_of(&subject)?, count))).collect())
    }

    /// The messages of a stream with this subject, oldest first, as they are when they are reached.
    pub(super) fn messages(
        &self,
        stream: &'static str,
        subject: String,
    ) -> impl Stream<Item = Result<StreamMessage, FleetError>> + Send + use<> {
        let fleet = self.clone();
        stream::try_unfold((fleet, subject, 1), move |(fleet, subject, from)| async move {
            let message = fleet.next_message(stream, &subject, from).await?;
            Ok(message.map(|message| {
                let next = message.sequence + 1;
                (message, (fleet, subject, next))
            }))
        })
    }

    async fn next_message(
        &self,
        stream: &str,
        subject: &str,
        from: u64,
    ) -> Result<Option<StreamMessage>, FleetError> {
        let failed = |error| FleetError::server(format!("read stream {stream}"), error);
        let found = self.shared.jetstream.get_stream_no_info(stream).await;
        let found =
            found.map_err(|error| FleetError::server(format!("read stream {stream}"), error))?;
        let asked =
            found.raw_message_builder().sequence(from).next_by_subject(subject).send().await;
        match asked.map_err(|error| (error.kind(), error)) {
            Ok(message) => Ok(Some(message)),
            Err((RawMessageErrorKind::NoMessageFound, _)) => Ok(None),
            Err((RawMessageErrorKind::JetStream(error), _))
                if error.error_code().0 == code::STREAM_NOT_FOUND =>
            {
                Ok(None)
            }
            Err((_, error)) => Err(failed(error)),
        }
    }

    /// The records under `keys`, each once, however many are written anew meanwhile.
    async fn records<R: DeserializeOwned>(&self, keys: &str) -> Result<Vec<R>, FleetError> {
        let keys = format!("$KV.{STATUS}.{keys}");
        let mut records = BTreeMap::new();
        let mut from = 1;
        // What is written anew while it is read moves behind the end of then: it is in the second
        // part. There is no third, since others may write faster than this reads.
        for _ in 0..2 {
            let end = self.last_sequence(STATUS_STREAM).await?;
            while from <= end {
                let Some(message) = self.next_message(STATUS_STREAM, &keys, from).await? else {
                    break;
                };
                from = message.sequence + 1;
                let is_removed = message.headers.get(OPERATION).is_some();
                // A record of another version is nobody's trouble.
                let record = serde_json::from_slice(&message.payload).ok();
                records.insert(message.subject.to_string(), record.filter(|_| !is_removed));
            }
        }
        Ok(records.into_values().flatten().collect())
    }

    /// Number of the newest message; 0 for a stream that is not there.
    async fn last_sequence(&self, stream: &str) -> Result<u64, FleetError> {
        match self.shared.api::<StreamInfo>(format!("STREAM.INFO.{stream}"), &Nothing {}).await {
            Ok(info) => Ok(info.state.last_sequence),
            Err(error) if error.code() == Some(code::STREAM_NOT_FOUND) => Ok(0),
            Err(error) => Err(FleetError::server(format!("tell about stream {stream}"), error)),
        }
    }

    async fn put(&self, key: &str, record: &(impl Serialize + Sync)) -> Result<(), FleetError> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            FleetError::server("store a record", error)
        };
        let text = serde_json::to_vec(record).map_err(|error| failed(error.into()))?;
        let put = self.bucket().await?.put(key, Bytes::from(text)).await;
        if put.is_err() {
            // It may have been wiped with the server's store: the next record makes it anew.
            *self.shared.bucket.lock().await = None;
        }
        put.map(drop).map_err(|error| failed(error.into()))
    }

    /// The bucket of the records, made where it is missing.
    async fn bucket(&self) -> Result<kv::Store, FleetError> {
        let mut bucket = self.shared.bucket.lock().await;
        if let Some(store) = &*bucket {
            return Ok(store.clone());
        }
        let config = kv::Config {
            bucket: STATUS.to_owned(),
            history: 1,
            max_age: RECORD_AGE,
            max_bytes: RECORDS_BYTES,
            num_replicas: self.shared.limits.replicas.max(1),
            ..kv::Config::default()
        };
        let store = match self.shared.jetstream.get_key_value(STATUS).await {
            Ok(store) => store,
            Err(_missing) => {
                self.shared.jetstream.create_key_value(config).await.map_err(|error| {
                    FleetError::server("make the bucket of status records", error)
                })?
            }
        };
        self.shared.raise_replicas(store.stream.cached_info()).await;
        Ok(bucket.insert(store).clone())
    }
}

fn run_key(status: &RunStatus) -> String {
    let run = token::encode(&status.run.0);
    match status.role {
        Role::Producer => format!("run.{run}.producer.{}", token::encode(&status.id)),
        Role::Collector => format!("run.{run}.collector"),
    }
}

fn run_of(subject: &str) -> Option<RunId> {
    token::decode(run_token(subject)).map(RunId)
}

fn consumer_status(info: &Info) -> Option<ConsumerStatus> {
    Some(ConsumerStatus {
        model: dead::model(&info.config.filter_subject)?,
        num_pending: info.num_pending,
        num_in_flight: info.num_ack_pending as u64,
        num_redelivered: info.num_redelivered as u64,
        num_waiting: info.num_waiting as u64,
    })
}
