//! The fleet of a round: two servers, the roles as processes, bad links between them; what each fault
//! does to it and what ends the fault. Not when: that is the plan's business.

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use super::Settings;
use super::feed::Order;
use super::plan::{Fault, Kind};
use crate::process::{DEADLINE, Process, free_port};
use crate::{NatsServer, Proxy, RedisCopy, RedisServer};

/// The run of a round.
pub(super) const RUN: &str = "chaos";
/// What the listening producer asks for.
pub(super) const TOKEN: &str = "chaos-token";
/// Seconds that a silent role keeps what it holds.
const LEASE: &str = "--lease 2";
/// Copies of the Redis data to go back to.
const MAX_COPIES: usize = 3;
/// Files that a server with a full disk can still write: those up to this size.
const FULL: u64 = 1024;
/// Id of the job that no worker survives.
pub(super) const POISON: &str = "poison";
/// How slow a slow link is.
const SLOW: Duration = Duration::from_millis(60);

/// What a process of the fleet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Worker,
    Collector,
    Producer,
    Listener,
}

/// A process of the fleet.
struct Member {
    name: String,
    role: Role,
    process: Process,
}

/// A proxy, and whether something is wrong with it now.
struct Link {
    proxy: Proxy,
    is_bad: bool,
}

/// What ends a fault.
#[derive(Debug)]
pub(super) enum Remedy {
    /// The stopped member of this name goes on, if it still lives.
    Continue(String),
    /// nats-server comes back.
    Nats,
    /// nats-server goes on.
    NatsContinues,
    /// nats-server can write again.
    NatsWrites,
    /// redis-server comes back.
    Redis,
    /// redis-server goes on.
    RedisContinues,
    /// redis-server can write again.
    RedisWrites,
    /// This link is mended.
    Mend(usize),
}

/// The fleet.
pub(super) struct Fleet {
    program: PathBuf,
    dir: TempDir,
    pub(super) nats: NatsServer,
    redis: RedisServer,
    nats_is_bad: bool,
    redis_is_bad: bool,
    /// Two for the workers, one each for the producers, for collectors and NATS, for collectors and
    /// Redis.
    links: Vec<Link>,
    listen_port: u16,
    members: Vec<Member>,
    /// Told to end.
    leaving: Vec<Member>,
    copies: VecDeque<RedisCopy>,
    /// To the thread that writes the followed file.
    orders: mpsc::Sender<Order>,
    /// Files that were rotated away from the producer that follows, since its start.
    rotated: Vec<PathBuf>,
    num_rotated: usize,
    /// Whether the poisonous job was fed.
    pub(super) is_poisoned: bool,
    num_started: usize,
    /// Faults that happened, by kind.
    pub(super) counts: BTreeMap<Kind, usize>,
}

impl Fleet {
    /// Servers, two collectors of one run, a producer of each sort, workers.
    pub(super) fn start(settings: &Settings, orders: mpsc::Sender<Order>) -> Self {
        let (nats, redis) = (NatsServer::start(), RedisServer::start());
        let upstreams = [nats.address(); 5].into_iter().chain([redis.address()]);
        let links = upstreams.map(|to| Link { proxy: Proxy::start(to), is_bad: false }).collect();
        let mut fleet = Self {
            program: settings.program.clone(),
            dir: tempfile::tempdir().unwrap(),
            nats,
            redis,
            nats_is_bad: false,
            redis_is_bad: false,
            links,
            listen_port: free_port(),
            members: Vec::new(),
            leaving: Vec::new(),
            copies: VecDeque::new(),
            orders,
            rotated: Vec::new(),
            num_rotated: 0,
            is_poisoned: false,
            num_started: 0,
            counts: BTreeMap::new(),
        };
        std::fs::write(fleet.input(), "").unwrap();
        for role in [Role::Collector, Role::Collector, Role::Producer, Role::Listener] {
            fleet.add(role);
        }
        for _ in 0..settings.workers {
            fleet.add(Role::Worker);
        }
        fleet
    }

    /// Freezes all workers.
    pub(super) fn stop_workers(&self) {
        self.workers().for_each(Process::stop);
    }

    /// Lets them go on.
    pub(super) fn continue_workers(&self) {
        self.workers().for_each(Process::cont);
    }

    fn workers(&self) -> impl Iterator<Item = &Process> {
        let workers = self.members.iter().filter(|member| member.role == Role::Worker);
        workers.map(|member| &member.process)
    }

    /// Runs a command of the program to its end, which must be a good one; what it said.
    pub(super) fn run(&mut self, args: &str) -> Result<String, String> {
        let member = self.spawn(Role::Producer, 2, args);
        self.settle(&member)?;
        Ok(member.process.log())
    }

    /// The file that the producer follows.
    pub(super) fn input(&self) -> PathBuf {
        self.dir.path().join("queries.jsonl")
    }

    /// The run's output.
    pub(super) fn output(&self) -> PathBuf {
        self.dir.path().join("results.jsonl")
    }

    /// Where the other producer listens.
    pub(super) fn listen_address(&self) -> std::net::SocketAddr {
        ([127, 0, 0, 1], self.listen_port).into()
    }

    /// Starts one more process.
    fn add(&mut self, role: Role) {
        let number = self.num_started;
        let (link, args) = match role {
            Role::Worker => (
                number % 2,
                format!(
                    "work --backend noop --noop-latency 300 --noop-slots 16 --noop-poison {POISON} --drain-timeout 1 {LEASE}"
                ),
            ),
            Role::Producer => {
                (2, format!("produce --queries-file queries.jsonl --run {RUN} --follow"))
            }
            Role::Listener => {
                (3, format!("produce --listen {} --run {RUN}", self.listen_address()))
            }
            Role::Collector => (
                4,
                format!(
                    "collect --run {RUN} --output-file results.jsonl --redis-url redis://{} {LEASE}",
                    self.links[5].proxy.address()
                ),
            ),
        };
        let member = self.spawn(role, link, &args);
        self.members.push(member);
    }

    /// A process with these arguments, behind a link to NATS.
    fn spawn(&mut self, role: Role, link: usize, args: &str) -> Member {
        let number = self.num_started;
        self.num_started += 1;
        let nats = self.nats.url_at(self.links[link].proxy.address());
        let mut command = Command::new(&self.program);
        command
            .args(args.split_whitespace())
            .current_dir(self.dir.path())
            .env("FLOTILLA_CACHE_DIR", self.dir.path().join("cache"))
            .env("FLOTILLA_NATS_URL", nats)
            .env_remove("FLOTILLA_LOG");
        if role == Role::Listener {
            command.env("FLOTILLA_TOKEN", TOKEN);
        }
        let name = format!("{role:?}-{number}").to_lowercase();
        Member { name, role, process: Process::start(&mut command) }
    }

    /// The `target`-th process of a role.
    fn find(&self, role: Role, target: usize) -> Option<usize> {
        let places: Vec<usize> =
            (0..self.members.len()).filter(|place| self.members[*place].role == role).collect();
        places.get(target % places.len().max(1)).copied()
    }

    fn kill(&mut self, role: Role, target: usize) -> bool {
        let Some(place) = self.find(role, target) else { return false };
        let member = self.members.swap_remove(place);
        member.process.kill();
        self.keep_log(&member);
        self.add(role);
        if role == Role::Producer {
            self.publish_rotated();
        }
        true
    }

    /// What a killed producer may have left unread in files that have its input's name no more: whoever
    /// rotates files publishes those again.
    fn publish_rotated(&mut self) {
        for path in std::mem::take(&mut self.rotated) {
            let args = format!("produce --queries-file {} --run {RUN}", path.display());
            let member = self.spawn(Role::Producer, 2, &args);
            self.leaving.push(member);
        }
    }

    /// The followed file gets another name, and its name another file, if the producer has come as far
    /// as to read it: what was renamed before would be read by nobody.
    fn rotate(&mut self) -> bool {
        let input = self.input();
        let is_read = self
            .members
            .iter()
            .any(|member| member.role == Role::Producer && member.process.has_open(&input));
        if !is_read {
            return false;
        }
        self.num_rotated += 1;
        let name = format!("{}.{}", input.display(), self.num_rotated);
        self.rotated.push(PathBuf::from(&name));
        self.order(|done| Order::Rotate(name.into(), done))
    }

    /// A job comes that kills whoever begins it, until it is given up.
    fn poison(&mut self) -> bool {
        if self.is_poisoned {
            return false;
        }
        self.is_poisoned = true;
        self.order(|done| Order::Write(POISON.to_owned(), done))
    }

    /// Has the thread that writes the followed file do something; whether it did.
    fn order(&self, order: impl FnOnce(mpsc::Sender<()>) -> Order) -> bool {
        let (done, told) = mpsc::channel();
        self.orders.send(order(done)).is_ok() && told.recv_timeout(DEADLINE).is_ok()
    }

    /// A fault begins; what ends it, if it lasts. It does not happen where another one is in the way.
    pub(super) fn apply(&mut self, fault: &Fault) -> Option<Remedy> {
        let mut remedy = None;
        let happened = match fault.kind {
            Kind::WorkerKilled => self.kill(Role::Worker, fault.target),
            Kind::CollectorKilled => self.kill(Role::Collector, fault.target),
            Kind::ProducerKilled => self.kill(Role::Producer, fault.target),
            Kind::ListenerKilled => self.kill(Role::Listener, fault.target),
            Kind::WorkerJoined => {
                self.add(Role::Worker);
                true
            }
            Kind::WorkerLeft => self.dismiss(fault.target),
            Kind::FileRotated => self.rotate(),
            Kind::JobPoisonous => self.poison(),
            Kind::WorkerStopped | Kind::CollectorStopped => {
                let is_worker = fault.kind == Kind::WorkerStopped;
                let role = if is_worker { Role::Worker } else { Role::Collector };
                let place = self.find(role, fault.target);
                remedy = place.map(|place| {
                    self.members[place].process.stop();
                    Remedy::Continue(self.members[place].name.clone())
                });
                remedy.is_some()
            }
            Kind::NatsKilled | Kind::NatsStopped | Kind::NatsFull => {
                remedy = self.hit_nats(fault.kind);
                remedy.is_some()
            }
            Kind::RedisKilled | Kind::RedisStopped | Kind::RedisFull => {
                remedy = self.hit_redis(fault.kind);
                remedy.is_some()
            }
            Kind::RedisFlushed | Kind::RedisRestored => self.turn_redis_back(fault.kind),
            _ => {
                remedy = self.hit_link(fault);
                remedy.is_some()
            }
        };
        *self.counts.entry(fault.kind).or_default() += usize::from(happened);
        remedy
    }

    /// A worker is told to end, and another one joins.
    fn dismiss(&mut self, target: usize) -> bool {
        let Some(place) = self.find(Role::Worker, target) else { return false };
        let member = self.members.swap_remove(place);
        // It may have been stopped.
        member.process.cont();
        member.process.signal(Signal::TERM);
        self.leaving.push(member);
        self.add(Role::Worker);
        true
    }

    fn hit_nats(&mut self, kind: Kind) -> Option<Remedy> {
        if self.nats_is_bad {
            return None;
        }
        self.nats_is_bad = true;
        match kind {
            Kind::NatsStopped => {
                self.nats.stop();
                Some(Remedy::NatsContinues)
            }
            Kind::NatsFull => {
                self.nats.process().limit_file_size(Some(FULL));
                Some(Remedy::NatsWrites)
            }
            _ => {
                self.nats.kill();
                Some(Remedy::Nats)
            }
        }
    }

    fn hit_redis(&mut self, kind: Kind) -> Option<Remedy> {
        if self.redis_is_bad {
            return None;
        }
        self.keep_copy();
        self.redis_is_bad = true;
        match kind {
            Kind::RedisStopped => {
                self.redis.stop();
                Some(Remedy::RedisContinues)
            }
            Kind::RedisFull => {
                self.redis.process().limit_file_size(Some(FULL));
                Some(Remedy::RedisWrites)
            }
            _ => {
                self.redis.kill();
                Some(Remedy::Redis)
            }
        }
    }

    fn turn_redis_back(&mut self, kind: Kind) -> bool {
        if self.redis_is_bad {
            return false;
        }
        if kind == Kind::RedisFlushed {
            self.redis.flush_all();
            return true;
        }
        let Some(copy) = self.copies.pop_front() else {
            self.keep_copy();
            return false;
        };
        self.redis.restore(&copy);
        true
    }

    /// Something to go back to later.
    fn keep_copy(&mut self) {
        self.copies.push_back(self.redis.copy());
        if self.copies.len() > MAX_COPIES {
            self.copies.pop_front();
        }
    }

    fn hit_link(&mut self, fault: &Fault) -> Option<Remedy> {
        let place = fault.target % self.links.len();
        let link = &mut self.links[place];
        if link.is_bad {
            return None;
        }
        link.is_bad = true;
        match fault.kind {
            Kind::LinkHeld => link.proxy.hold(),
            Kind::RepliesLost => link.proxy.lose_replies(),
            Kind::LinkRefused => link.proxy.refuse(),
            Kind::LinkSlow => link.proxy.delay(SLOW),
            _ => link.proxy.reset(),
        }
        Some(Remedy::Mend(place))
    }

    /// A fault ends.
    pub(super) fn remedy(&mut self, remedy: &Remedy) {
        match remedy {
            Remedy::Continue(name) => {
                if let Some(member) = self.members.iter().find(|member| member.name == *name) {
                    member.process.cont();
                }
            }
            Remedy::Nats => self.nats.restart(),
            Remedy::NatsContinues => self.nats.cont(),
            Remedy::NatsWrites => self.nats.process().limit_file_size(None),
            Remedy::Redis => self.redis.restart(),
            Remedy::RedisContinues => self.redis.cont(),
            Remedy::RedisWrites => self.redis.process().limit_file_size(None),
            Remedy::Mend(link) => {
                self.links[*link].proxy.pass();
                self.links[*link].is_bad = false;
            }
        }
        match remedy {
            Remedy::Nats | Remedy::NatsContinues | Remedy::NatsWrites => self.nats_is_bad = false,
            Remedy::Redis | Remedy::RedisContinues | Remedy::RedisWrites => {
                self.redis_is_bad = false;
            }
            Remedy::Continue(_) | Remedy::Mend(_) => {}
        }
    }

    /// An error if a process has ended that nobody has ended, or one has not ended well.
    pub(super) fn check(&mut self) -> Result<(), String> {
        self.replace_poisoned();
        if let Some(member) = self.members.iter().find(|member| !member.process.is_running()) {
            return Err(format!("{} ended by itself:\n{}", member.name, member.process.log()));
        }
        let (ended, leaving): (Vec<Member>, _) =
            self.leaving.drain(..).partition(|member| !member.process.is_running());
        self.leaving = leaving;
        for member in ended {
            self.settle(&member)?;
        }
        Ok(())
    }

    /// Workers that the poisonous job has taken down; others join.
    fn replace_poisoned(&mut self) {
        let dead = |member: &Member| {
            member.process.status().is_some_and(|status| self.is_poisonous(member, status))
        };
        let places: Vec<usize> =
            (0..self.members.len()).rev().filter(|place| dead(&self.members[*place])).collect();
        for place in places {
            let member = self.members.swap_remove(place);
            self.keep_log(&member);
            self.add(Role::Worker);
        }
    }

    /// Whether this is the end of a worker that had the poisonous job.
    fn is_poisonous(&self, member: &Member, status: ExitStatus) -> bool {
        let aborted = status.signal() == Some(Signal::ABORT.as_raw());
        self.is_poisoned && member.role == Role::Worker && aborted
    }

    /// Tells everybody to end, and waits until they have.
    pub(super) fn end(&mut self) -> Result<(), String> {
        for member in &self.members {
            member.process.signal(Signal::TERM);
        }
        for member in self.members.drain(..).chain(self.leaving.drain(..)).collect::<Vec<_>>() {
            self.settle(&member)?;
        }
        Ok(())
    }

    /// The end of a process that was told to.
    fn settle(&self, member: &Member) -> Result<(), String> {
        let status = member.process.wait(DEADLINE);
        self.keep_log(member);
        if status.success() || self.is_poisonous(member, status) {
            return Ok(());
        }
        let log = member.process.log();
        Err(format!("{} ended with {status}, expected exit code 0:\n{log}", member.name))
    }

    fn keep_log(&self, member: &Member) {
        let dir = self.dir.path().join("logs");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(format!("{}.log", member.name)), member.process.log()).unwrap();
    }

    /// Keeps all files of the round beyond its end, with everybody's log; where they are.
    pub(super) fn keep(&mut self) -> [&Path; 3] {
        for member in self.members.iter().chain(&self.leaving) {
            self.keep_log(member);
        }
        let logs = self.dir.path().join("logs");
        std::fs::create_dir_all(&logs).unwrap();
        std::fs::write(logs.join("nats-server.log"), self.nats.log()).unwrap();
        std::fs::write(logs.join("redis-server.log"), self.redis.log()).unwrap();
        self.dir.disable_cleanup(true);
        [self.dir.path(), self.nats.keep(), self.redis.keep()]
    }
}
