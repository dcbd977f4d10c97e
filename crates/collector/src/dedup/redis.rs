//! The index in Redis: 16 bytes an id in a set, for runs whose ids don't fit into a process or
//! shall not be read again at every start.
//!
//! Four keys a run: `ids`, the set; `off`, the [`Position`]; `epoch`, the claim, which only grows;
//! `by`, who has it.
//! Every access is one script, so that claim, position and ids are looked at and moved together.
//! The position also tells how many ids the set must hold: a set that was evicted or tampered
//! with counts as rolled back. Nothing is ever lost with Redis, since the file can tell it all again; so
//! trouble that may pass is waited out here, told once.

use std::fmt;
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, FromRedisValue, RedisError, Script, ScriptInvocation};
use shared::{IdDigest, RunId};

use super::{Dedup, DedupError, Position, Span};

/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a script may take; the longest adds a few thousand ids.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two attempts to reach it, at first and at most.
const RETRY_DELAYS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Between two log lines about a server that is waited for.
const NOTICE_INTERVAL: Duration = Duration::from_secs(60);

/// What every script begins with: the claim and the position are looked at.
const GUARD: &str = r"
local ids, off, epoch, by = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local claimed = tonumber(redis.call('GET', epoch) or '0')
local mine = tonumber(ARGV[1])
if claimed > mine then return {'taken over', redis.call('GET', by) or ''} end
local function stands(at, lines)
    return claimed == mine and redis.call('GET', off) == at and redis.call('SCARD', ids) == tonumber(lines)
end
";
/// Claims grow with the server's clock, so that a claim that a rollback took away is not given twice: in
/// microseconds, since two of them may come within a millisecond.
const CLAIM: &str = r"
local ids, off, epoch, by = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now = redis.call('TIME')
local next = math.max(tonumber(redis.call('GET', epoch) or '0') + 1, now[1] * 1000000 + now[2])
next = string.format('%.0f', next)
redis.call('SET', epoch, next)
redis.call('SET', by, ARGV[1])
return {'ok', next, redis.call('GET', off) or '', tostring(redis.call('SCARD', ids))}
";
const RESUME: &str = r"
redis.call('SET', epoch, ARGV[1])
redis.call('SET', by, ARGV[2])
return {'ok', ARGV[1], redis.call('GET', off) or '', tostring(redis.call('SCARD', ids))}
";
const CLEAR: &str = r"
redis.call('SET', epoch, ARGV[1])
redis.call('UNLINK', ids)
redis.call('SET', off, ARGV[2])
return {'ok'}
";
const KNOWN: &str = r"
if not stands(ARGV[2], ARGV[3]) then return {'rolled back'} end
local known = {}
for i = 4, #ARGV do known[i - 3] = redis.call('SISMEMBER', ids, ARGV[i]) end
return {'ok', known}
";
const MARK: &str = r"
if not stands(ARGV[2], ARGV[3]) then return {'rolled back'} end
local had = {}
for i = 5, #ARGV do
    if redis.call('SADD', ids, ARGV[i]) == 0 then had[#had + 1] = i - 5 end
end
redis.call('SET', off, ARGV[4])
return {'ok', had}
";
const FORGET: &str = r"
if not stands(ARGV[2], ARGV[3]) then return {'rolled back'} end
for i = 5, #ARGV do redis.call('SREM', ids, ARGV[i]) end
redis.call('SET', off, ARGV[4])
return {'ok'}
";

/// Which Redis, and under which name.
#[derive(Clone)]
pub struct RedisConfig {
    /// `redis://`, `rediss://` (TLS) or `redis+unix://`, with user and password where it needs them.
    pub url: String,
    /// What the names of its keys begin with.
    pub prefix: String,
    /// What others are told of this collector, should it take a run over from them.
    pub holder: String,
}

impl RedisConfig {
    /// The server at `url`, keys named `flotilla`.
    pub fn new(url: impl Into<String>) -> Self {
        let holder = "another process".to_owned();
        Self { url: url.into(), prefix: "flotilla".to_owned(), holder }
    }
}

/// Without the URL, which may hold a password.
impl fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisConfig").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

/// The index of one run in Redis.
pub struct RedisDedup {
    server: Server,
    scripts: Scripts,
    keys: [String; 4],
    holder: String,
    claim: String,
}

impl fmt::Debug for RedisDedup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisDedup").field("keys", &self.keys).finish_non_exhaustive()
    }
}

struct Scripts {
    claim: Script,
    resume: Script,
    clear: Script,
    known: Script,
    mark: Script,
    forget: Script,
}

impl RedisDedup {
    /// Connects, waiting for a server that isn't there yet. Wrong credentials and a wrong URL fail
    /// at once.
    pub async fn connect(config: &RedisConfig, run: &RunId) -> Result<Self, DedupError> {
        let client = Client::open(config.url.as_str()).map_err(|error| {
            let given = redacted(&config.url);
            let text = format!(
                "expected redis://host:6379, redis://user:password@host:6379 or rediss://…, given \
                 '{given}': {error}"
            );
            DedupError::Refused(text.into())
        })?;
        let mut server = Server { client, connection: None };
        server.warn_of_settings().await?;
        let guarded = |script: &str| Script::new(&format!("{GUARD}{script}"));
        let scripts = Scripts {
            claim: Script::new(CLAIM),
            resume: guarded(RESUME),
            clear: guarded(CLEAR),
            known: guarded(KNOWN),
            mark: guarded(MARK),
            forget: guarded(FORGET),
        };
        let keys = ["ids", "off", "epoch", "by"]
            .map(|key| format!("{{{prefix}:{run}}}:{key}", prefix = config.prefix, run = run.0));
        Ok(Self { server, scripts, keys, holder: config.holder.clone(), claim: String::new() })
    }

    fn stands_at(&mut self, reply: Reply) -> Result<Option<Position>, DedupError> {
        let Reply { claim, position, num_ids } = reply;
        self.claim = claim;
        let position = position.parse().ok();
        // A set that lost some of its ids is worth nothing.
        Ok(position.filter(|position: &Position| num_ids == position.lines.to_string()))
    }
}

/// What claiming and resuming answer.
struct Reply {
    claim: String,
    position: String,
    num_ids: String,
}

impl FromRedisValue for Reply {
    fn from_redis_value(value: redis::Value) -> Result<Self, redis::ParsingError> {
        let (claim, position, num_ids) = FromRedisValue::from_redis_value(value)?;
        Ok(Self { claim, position, num_ids })
    }
}

impl Dedup for RedisDedup {
    async fn claim(&mut self) -> Result<Option<Position>, DedupError> {
        let mut script = with_keys(&self.scripts.claim, &self.keys);
        script.arg(&self.holder);
        let reply = self.server.run(&script).await?.fields()?;
        self.stands_at(reply)
    }

    async fn resume(&mut self) -> Result<Option<Position>, DedupError> {
        let mut script = with_keys(&self.scripts.resume, &self.keys);
        script.arg(&self.claim).arg(&self.holder);
        let reply = self.server.run(&script).await?.fields()?;
        self.stands_at(reply)
    }

    async fn clear(&mut self, start: &Position) -> Result<(), DedupError> {
        let mut script = with_keys(&self.scripts.clear, &self.keys);
        script.arg(&self.claim).arg(start.to_string());
        self.server.run(&script).await.map(drop)
    }

    async fn known(&mut self, ids: &[IdDigest], at: &Position) -> Result<Vec<bool>, DedupError> {
        let mut script = with_keys(&self.scripts.known, &self.keys);
        script.arg(&self.claim).arg(at.to_string()).arg(at.lines);
        add_ids(&mut script, ids);
        self.server.run(&script).await?.only()
    }

    async fn mark(&mut self, ids: &[IdDigest], span: Span<'_>) -> Result<Vec<usize>, DedupError> {
        let mut script = with_keys(&self.scripts.mark, &self.keys);
        script.arg(&self.claim).arg(span.from.to_string()).arg(span.from.lines);
        add_ids(script.arg(span.to.to_string()), ids);
        self.server.run(&script).await?.only()
    }

    async fn forget(&mut self, ids: &[IdDigest], span: Span<'_>) -> Result<(), DedupError> {
        let mut script = with_keys(&self.scripts.forget, &self.keys);
        script.arg(&self.claim).arg(span.from.to_string()).arg(span.from.lines);
        add_ids(script.arg(span.to.to_string()), ids);
        self.server.run(&script).await.map(drop)
    }
}

fn with_keys<'a>(script: &'a Script, keys: &[String; 4]) -> ScriptInvocation<'a> {
    let mut script = script.prepare_invoke();
    for key in keys {
        script.key(key);
    }
    script
}

fn add_ids(script: &mut ScriptInvocation<'_>, ids: &[IdDigest]) {
    for id in ids {
        script.arg(&id.0[..]);
    }
}

/// What follows the `ok` of a script.
struct Answer(Vec<redis::Value>);

impl Answer {
    fn only<T: FromRedisValue>(mut self) -> Result<T, DedupError> {
        let value = self.0.pop().unwrap_or(redis::Value::Nil);
        T::from_redis_value(value).map_err(|error| refused(error.into()))
    }

    fn fields<T: FromRedisValue>(self) -> Result<T, DedupError> {
        let value = redis::Value::Array(self.0);
        T::from_redis_value(value).map_err(|error| refused(error.into()))
    }
}

/// The server, and the connection to it while there is one.
struct Server {
    client: Client,
    connection: Option<MultiplexedConnection>,
}

impl Server {
    /// Runs a script, however long it takes until the server can.
    async fn run(&mut self, script: &ScriptInvocation<'_>) -> Result<Answer, DedupError> {
        let mut waiting = Waiting::of(&self.client);
        loop {
            let ran = match self.connection().await {
                Ok(connection) => script.invoke_async::<Vec<redis::Value>>(connection).await,
                Err(error) => Err(error),
            };
            match ran {
                Ok(values) => {
                    waiting.over();
                    return answer(values);
                }
                Err(error) => {
                    self.connection = None;
                    waiting.after(error).await?;
                }
            }
        }
    }

    async fn connection(&mut self) -> Result<&mut MultiplexedConnection, RedisError> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                let config = AsyncConnectionConfig::new()
                    .set_connection_timeout(Some(CONNECT_TIMEOUT))
                    .set_response_timeout(Some(RESPONSE_TIMEOUT));
                self.client.get_multiplexed_async_connection_with_config(&config).await?
            }
        };
        Ok(self.connection.insert(connection))
    }

    /// Warns of settings that make Redis forget; says nothing where it may not ask.
    async fn warn_of_settings(&mut self) -> Result<(), DedupError> {
        let mut waiting = Waiting::of(&self.client);
        let asked = loop {
            match self.connection().await {
                Ok(connection) => {
                    let mut ask = redis::cmd("CONFIG");
                    ask.arg("GET").arg("maxmemory-policy").arg("appendonly");
                    break ask.query_async::<Vec<(String, String)>>(connection).await;
                }
                Err(error) => waiting.after(error).await?,
            }
        };
        waiting.over();
        let settings = match asked {
            // Not even asking is allowed before a password was given.
            Err(error) if error.code() == Some("NOAUTH") => return Err(refused(error)),
            asked => asked.unwrap_or_default(),
        };
        for (setting, value) in settings {
            match (setting.as_str(), value.as_str()) {
                ("maxmemory-policy", "noeviction") | ("appendonly", "yes") => {}
                ("maxmemory-policy", _) => tracing::warn!(
                    "redis has maxmemory-policy {value}, expected noeviction: when its memory is full it forgets ids, and the output is read again each time"
                ),
                _ => tracing::warn!(
                    "redis has appendonly {value}, expected yes: after each of its restarts the whole output is read again"
                ),
            }
        }
        Ok(())
    }
}

fn answer(mut values: Vec<redis::Value>) -> Result<Answer, DedupError> {
    let verdict = if values.is_empty() { redis::Value::Nil } else { values.remove(0) };
    let verdict = String::from_redis_value(verdict).map_err(|error| refused(error.into()))?;
    match verdict.as_str() {
        "ok" => Ok(Answer(values)),
        "rolled back" => Err(DedupError::RolledBack),
        _ => Err(DedupError::TakenOver { by: Answer(values).only()? }),
    }
}

/// Waiting for a server that can't be reached, with a message at its begin, every minute and at its end.
struct Waiting {
    /// The server's address, without secrets.
    address: String,
    next: Option<Duration>,
    told_at: Option<Instant>,
}

impl Waiting {
    fn of(client: &Client) -> Self {
        let address = client.get_connection_info().addr().to_string();
        Self { address, next: None, told_at: None }
    }

    async fn after(&mut self, error: RedisError) -> Result<(), DedupError> {
        if !may_pass(&error) {
            return Err(refused(error));
        }
        if self.told_at.is_none_or(|at| at.elapsed() >= NOTICE_INTERVAL) {
            self.told_at = Some(Instant::now());
            tracing::warn!(
                %error,
                "redis at {} can't serve; waiting for it, nothing is acked meanwhile",
                self.address
            );
        }
        let delay = self.next.unwrap_or(RETRY_DELAYS.0);
        tokio::time::sleep(delay).await;
        self.next = Some((delay * 2).min(RETRY_DELAYS.1));
        Ok(())
    }

    fn over(&self) {
        if self.next.is_some() {
            tracing::info!("redis at {} serves again", self.address);
        }
    }
}

/// Whether waiting may help: a server that is down, loading, full, a replica or at its limit.
fn may_pass(error: &RedisError) -> bool {
    use redis::{ErrorKind, ServerErrorKind};
    // `ERR` is what a server says that can't take so many clients, too.
    let full = error.detail().is_some_and(|detail| detail.contains("max number of clients"));
    match error.kind() {
        ErrorKind::AuthenticationFailed
        | ErrorKind::InvalidClientConfig
        | ErrorKind::UnexpectedReturnType => false,
        ErrorKind::Server(ServerErrorKind::ResponseError | ServerErrorKind::NoPerm) => full,
        _ => !matches!(error.code(), Some("NOAUTH" | "WRONGPASS" | "WRONGTYPE" | "NOPERM")),
    }
}

/// The URL without what may be a secret: all between its scheme and its host.
fn redacted(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").map_or(("", url), |(name, rest)| (name, rest));
    let separator = if scheme.is_empty() { "" } else { "://" };
    match rest.rsplit_once('@') {
        Some((_secret, host)) => format!("{scheme}{separator}***@{host}"),
        None => format!("{scheme}{separator}{rest}"),
    }
}

fn refused(error: RedisError) -> DedupError {
    DedupError::Refused(error.into())
}
