//! Models by their name at the Hugging Face Hub, from a server on loopback that answers as the Hub does: what is
//! fetched, what never again, and what is said where nothing can be.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use flotilla_tests::process::DEADLINE;
use flotilla_tests::{Process, Workplace, repository};
use futures_util::{StreamExt as _, stream};
use sha2::{Digest as _, Sha256};
use tokio::runtime::Runtime;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_secret";

/// A repository of models at the Hub.
#[derive(Clone, Default)]
struct Repository {
    files: BTreeMap<String, Bytes>,
    /// Whether it takes a token to see it.
    is_private: bool,
    /// Whether it takes a token to fetch its files.
    is_gated: bool,
    /// Bytes of a file after which the first transfer breaks off.
    cut: Option<(&'static str, usize)>,
    /// Bytes of a file after which the first transfer hangs.
    hang: Option<(&'static str, usize)>,
}

impl Repository {
    /// A model of the engine's tests, with files that nobody needs.
    fn of(fixture: &str) -> Self {
        let folder = repository().join("crates/engine/tests/fixtures").join(fixture);
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if name != "expected.json" {
                files.insert(name, fs::read(&path).unwrap().into());
            }
        }
        for name in ["README.md", "pytorch_model.bin", "original/consolidated.00.pth"] {
            files.insert(name.to_owned(), Bytes::from_static(b"not needed"));
        }
        Self { files, ..Self::default() }
    }
}

/// The server, ended when dropped.
struct FakeHub {
    runtime: Runtime,
    addr: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    repositories: Mutex<BTreeMap<String, Repository>>,
    /// Every request: its path, and the range it asks for.
    log: Mutex<Vec<String>>,
    port: Mutex<u16>,
    hangs: tokio::sync::Notify,
}

impl FakeHub {
    fn start(repositories: &[(&str, Repository)]) -> Self {
        let runtime = Runtime::new().unwrap();
        let shared = Arc::<Shared>::default();
        *shared.repositories.lock().unwrap() =
            repositories.iter().map(|(name, files)| ((*name).to_owned(), files.clone())).collect();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let addr = listener.local_addr().unwrap();
        *shared.port.lock().unwrap() = addr.port();
        let app = Router::new().fallback(answer).with_state(Arc::clone(&shared));
        runtime.spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { runtime, addr, shared }
    }

    fn command(&self, place: &Workplace, args: &str) -> Command {
        let mut command = place.command(args);
        command
            .env("HF_ENDPOINT", format!("http://{}", self.addr))
            .env_remove("FLOTILLA_MODEL_PATH");
        command
    }

    fn run(&self, place: &Workplace, code: i32, args: &str) -> String {
        finish(&mut self.command(place, args), code)
    }

    /// What has been asked for since the last time.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut *self.shared.log.lock().unwrap())
    }

    /// Waits until a transfer hangs.
    fn wait_for_hang(&self) {
        let hangs = self.shared.hangs.notified();
        self.runtime.block_on(async { tokio::time::timeout(DEADLINE, hangs).await }).unwrap();
    }
}

/// Runs a command to its end, which must be with `code`; what it wrote to stderr.
fn finish(command: &mut Command, code: i32) -> String {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{command:?}\n{stderr}");
    stderr
}

fn error(status: StatusCode, code: &str) -> Response {
    (status, [("x-error-code", code.to_owned())], "").into_response()
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let path = request.uri().path().trim_start_matches('/').to_owned();
    let text = |name: header::HeaderName| {
        let value = request.headers().get(name);
        value.map(|value| value.to_str().unwrap().to_owned())
    };
    let range = text(header::RANGE);
    let has_token =
        text(header::AUTHORIZATION).is_some_and(|value| value == format!("Bearer {TOKEN}"));
    let asked = range.iter().fold(path.clone(), |path, range| format!("{path} {range}"));
    shared.log.lock().unwrap().push(asked);
    let (is_listing, rest) = match path.strip_prefix("api/models/") {
        Some(rest) => (true, rest),
        None => (false, path.strip_prefix("cdn/").unwrap_or(&path)),
    };
    let parts: Vec<&str> = rest.splitn(5, '/').collect();
    let name = format!("{}/{}", parts[0], parts[1]);
    let mut repositories = shared.repositories.lock().unwrap();
    let may_see = |found: &&mut Repository| {
        // Who knows an address of the CDN has been let through.
        !found.is_private || has_token || path.starts_with("cdn/")
    };
    let Some(found) = repositories.get_mut(&name).filter(may_see) else {
        return error(StatusCode::UNAUTHORIZED, "RepoNotFound");
    };
    if !["main", "v1", COMMIT].contains(&parts[3]) {
        return error(StatusCode::NOT_FOUND, "RevisionNotFound");
    }
    if is_listing {
        return listing(found);
    }
    let file = parts[4];
    let is_large = is_large(file);
    if path.starts_with("cdn/") {
        assert!(!has_token, "a token went to another host");
    } else if found.is_gated && !has_token {
        return error(StatusCode::FORBIDDEN, "GatedRepo");
    } else if is_large {
        // Another name, and so another host.
        let port = *shared.port.lock().unwrap();
        let location = format!("http://localhost:{port}/cdn/{path}");
        return (StatusCode::FOUND, [(header::LOCATION, location)], "").into_response();
    }
    let cut = found.cut.take_if(|(name, _)| *name == file).map(|(_, len)| len);
    let hang = found.hang.take_if(|(name, _)| *name == file).map(|(_, len)| len);
    let content = found.files[file].clone();
    send(&shared, &content, range.as_deref(), (cut, hang))
}

/// Whether it is kept apart from the repository, under its hash.
fn is_large(file: &str) -> bool {
    [".safetensors", ".gguf"].iter().any(|ending| file.ends_with(ending))
}

fn listing(found: &Repository) -> Response {
    let siblings: Vec<_> = found
        .files
        .iter()
        .map(|(name, content)| {
            let hash = hex(content);
            let mut sibling = serde_json::json!({
                "rfilename": name, "size": content.len(), "blobId": hash[..40],
            });
            if is_large(name) {
                sibling["lfs"] =
                    serde_json::json!({"sha256": hash, "size": content.len(), "pointerSize": 130});
            }
            sibling
        })
        .collect();
    axum::Json(serde_json::json!({"sha": COMMIT, "siblings": siblings})).into_response()
}

fn send(
    shared: &Arc<Shared>,
    content: &Bytes,
    range: Option<&str>,
    (cut, hang): (Option<usize>, Option<usize>),
) -> Response {
    let len = content.len();
    let start = range.map(|range| {
        range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse::<usize>().unwrap()
    });
    let (status, start) = match start {
        Some(start) => (StatusCode::PARTIAL_CONTENT, start),
        None => (StatusCode::OK, 0),
    };
    let headers = [
        (header::CONTENT_LENGTH, (len - start).to_string()),
        (header::CONTENT_RANGE, format!("bytes {start}-{}/{len}", len - 1)),
    ];
    let body = match (cut, hang) {
        (Some(cut), _) => {
            let piece = stream::iter([Ok(content.slice(start..cut))]);
            let end = stream::once(async {
                // What is written goes out while there is no more.
                tokio::task::yield_now().await;
                Err(std::io::Error::other("cut"))
            });
            Body::from_stream(piece.chain(end))
        }
        (_, Some(hang)) => {
            let shared = Arc::clone(shared);
            let piece = stream::iter([Ok::<_, std::io::Error>(content.slice(start..hang))]);
            let never = stream::once(async move {
                shared.hangs.notify_one();
                std::future::pending().await
            });
            Body::from_stream(piece.chain(never))
        }
        _ => Body::from(content.slice(start..)),
    };
    (status, headers, body).into_response()
}

fn hex(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

const RUN: &str = "run --queries-file queries.jsonl --output-file results.jsonl --max-new-tokens 4 \
                   --kv-cache-memory 1 --model-path";

fn place() -> Workplace {
    let place = Workplace::new();
    place.write_queries("queries.jsonl", 2);
    place
}

/// The names of the files of which a part is in the cache.
fn incomplete(folder: &Path) -> Vec<u64> {
    let blobs = fs::read_dir(folder.join("blobs")).unwrap();
    let partial = blobs
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_name().to_str().unwrap().ends_with(".incomplete"));
    partial.map(|entry| entry.metadata().unwrap().len()).collect()
}

#[test]
fn a_model_is_fetched_once_and_only_what_is_needed_of_it() {
    let place = place();
    let hub = FakeHub::start(&[("org/tiny", Repository::of("llama-gqa"))]);
    hub.run(&place, 0, &format!("{RUN} org/tiny"));
    place.assert_each_once("results.jsonl", 2);
    let listing = "api/models/org/tiny/revision/main".to_owned();
    let file = |name: &str| format!("org/tiny/resolve/{COMMIT}/{name}");
    let weights = file("model.safetensors");
    let small =
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];
    let mut expected = vec![listing.clone()];
    expected.extend(small.map(file));
    expected.extend([weights.clone(), format!("cdn/{weights}")]);
    assert_eq!(hub.requests(), expected);
    // The layout of Python's libraries.
    let folder = place.path("hf/hub/models--org--tiny");
    assert_eq!(fs::read_to_string(folder.join("refs/main")).unwrap(), COMMIT);
    let link = fs::read_link(folder.join("snapshots").join(COMMIT).join("config.json")).unwrap();
    assert!(link.starts_with("../../blobs"), "{}", link.display());
    assert!(incomplete(&folder).is_empty());

    // Again: whether the branch moved is asked for, and nothing else; of a commit not even that.
    place.write_queries("queries.jsonl", 3);
    hub.run(&place, 0, &format!("{RUN} org/tiny"));
    assert_eq!(hub.requests(), [listing]);
    place.write_queries("queries.jsonl", 4);
    hub.run(&place, 0, &format!("{RUN} org/tiny@{COMMIT}"));
    assert!(hub.requests().is_empty());
    place.assert_each_once("results.jsonl", 4);

    // Offline, the cache is enough; and without a network, after a warning.
    place.write_queries("queries.jsonl", 5);
    finish(hub.command(&place, &format!("{RUN} org/tiny")).env("HF_HUB_OFFLINE", "1"), 0);
    assert!(hub.requests().is_empty());
    place.write_queries("queries.jsonl", 6);
    let mut command = hub.command(&place, &format!("{RUN} org/tiny"));
    drop(hub);
    let log = finish(&mut command, 0);
    assert!(log.contains("cannot reach") && log.contains("from the cache"), "{log}");
    place.assert_each_once("results.jsonl", 6);
}

#[test]
fn a_transfer_that_breaks_off_goes_on_where_it_stopped() {
    let place = place();
    let cut = Some(("model.safetensors", 100_000));
    let sharded = Repository::of("llama-sharded");
    let hub = FakeHub::start(&[
        ("org/cut", Repository { cut, ..Repository::of("llama-gqa") }),
        ("org/hang", Repository { hang: cut, ..Repository::of("llama-gqa") }),
        (
            "org/sharded",
            Repository { cut: Some(("model-00002-of-00002.safetensors", 9)), ..sharded },
        ),
    ]);
    let again = |requests: Vec<String>| {
        requests.into_iter().filter_map(|asked| Some(asked.split_once(" bytes=")?.1.to_owned()))
    };
    // In the same process.
    hub.run(&place, 0, &format!("{RUN} org/cut"));
    assert_eq!(again(hub.requests()).collect::<Vec<_>>(), ["100000-", "100000-"]);
    place.assert_each_once("results.jsonl", 2);
    fs::remove_file(place.path("results.jsonl")).unwrap();
    hub.run(&place, 0, &format!("{RUN} org/sharded"));
    assert_eq!(again(hub.requests()).collect::<Vec<_>>(), ["9-", "9-"]);

    // In the next one, after a kill.
    fs::remove_file(place.path("results.jsonl")).unwrap();
    let process = Process::start(&mut hub.command(&place, &format!("{RUN} org/hang")));
    hub.wait_for_hang();
    let folder = place.path("hf/hub/models--org--hang");
    // What the server has sent may still be on its way.
    let deadline = std::time::Instant::now() + DEADLINE;
    while incomplete(&folder) != [100_000] {
        assert!(std::time::Instant::now() < deadline, "{:?}", incomplete(&folder));
        std::thread::yield_now();
    }
    process.kill();
    hub.requests();
    assert!(!folder.join("refs/main").exists());
    hub.run(&place, 0, &format!("{RUN} org/hang"));
    assert_eq!(again(hub.requests()).collect::<Vec<_>>(), ["100000-", "100000-"]);
    place.assert_each_once("results.jsonl", 2);
}

#[test]
fn processes_that_start_together_fetch_each_file_once() {
    let place = place();
    let hub = FakeHub::start(&[("org/tiny", Repository::of("llama-sharded"))]);
    let start = |output: &str| {
        let args = format!("{RUN} org/tiny").replace("results.jsonl", output);
        Process::start(&mut hub.command(&place, &args))
    };
    let processes = [start("a.jsonl"), start("b.jsonl"), start("c.jsonl")];
    for process in processes {
        assert!(process.wait(DEADLINE).success(), "{}", process.log());
    }
    let mut files: Vec<_> = hub.requests();
    files.retain(|asked| !asked.starts_with("api/"));
    let num_requests = files.len();
    files.sort_unstable();
    files.dedup();
    assert_eq!(files.len(), num_requests, "{files:?}");
    for output in ["a.jsonl", "b.jsonl", "c.jsonl"] {
        place.assert_each_once(output, 2);
    }
}

#[test]
fn contexts_need_the_tokenizer_alone() {
    let place = place();
    let hub = FakeHub::start(&[("org/tiny", Repository::of("llama-gqa"))]);
    let corpus = repository().join("examples/corpus");
    let corpus = corpus.display();
    hub.run(&place, 0, &format!(
        "contexts --queries-file queries.jsonl --corpus-path {corpus} --output-file contexts.jsonl \
         --model-path org/tiny"
    ));
    let requests = hub.requests();
    let names: Vec<_> = requests.iter().map(|asked| asked.rsplit_once('/').unwrap().1).collect();
    assert_eq!(names, ["main", "config.json", "tokenizer.json"]);
    assert_eq!(place.lines("contexts.jsonl").len(), 2);
}

#[test]
fn a_gguf_file_of_a_repository_answers_like_its_folder() {
    let place = place();
    let fixtures = repository().join("crates/engine/tests/fixtures");
    let file: Bytes = fs::read(fixtures.join("llama-gqa.gguf")).unwrap().into();
    let names =
        ["sub/tiny-F32.gguf", "sub/tiny-Q8_0.gguf"].map(|name| (name.to_owned(), file.clone()));
    let files = BTreeMap::from(names);
    let hub = FakeHub::start(&[("org/tiny-GGUF", Repository { files, ..Repository::default() })]);
    hub.run(&place, 0, &format!("{RUN} org/tiny-GGUF:f32 --temperature 0"));
    let requests = hub.requests();
    assert_eq!(requests.len(), 3, "{requests:?}");
    assert!(requests[2].ends_with("sub/tiny-F32.gguf"), "{requests:?}");
    let answers = |name: &str| -> BTreeMap<_, _> {
        let lines = place.lines(name).into_iter();
        lines.map(|line| (line["id"].to_string(), line["answer"].to_string())).collect()
    };
    assert_eq!(place.lines("results.jsonl")[0]["model"], "tiny-F32");
    let folder = fixtures.join("llama-gqa");
    let args = format!("{RUN} {} --temperature 0", folder.display());
    place.run_expecting(0, &args.replace("results.jsonl", "folder.jsonl"));
    assert_eq!(answers("results.jsonl"), answers("folder.jsonl"));
    let log = hub.run(&place, 1, &format!("{RUN} org/tiny-GGUF"));
    assert!(log.contains("say which, as org/tiny-GGUF:sub/tiny-F32.gguf"), "{log}");
}

#[test]
fn what_cannot_be_fetched_is_told_in_a_sentence() {
    let place = place();
    let tiny = Repository::of("llama-gqa");
    let mut without = tiny.clone();
    without.files.remove("model.safetensors");
    let mut hub = FakeHub::start(&[
        ("org/private", Repository { is_private: true, ..tiny.clone() }),
        ("org/gated", Repository { is_gated: true, ..tiny.clone() }),
        ("org/tiny", tiny),
        ("org/bin", without),
    ]);
    for (model, expected) in [
        ("org/nothing", "there is no model org/nothing at http"),
        ("org/private", "or it is private: set HF_TOKEN"),
        ("org/gated", "org/gated is gated: ask for access at http"),
        ("org/tiny@v9", "org/tiny has no revision v9"),
        ("org/bin", "pytorch_model.bin is in a format that is not read"),
        ("org/tiny:Q4_K_M", "org/tiny has no GGUF file Q4_K_M, but none at all"),
        ("no/such/model", "no/such/model is not a model: expected a folder"),
    ] {
        let log = hub.run(&place, 1, &format!("{RUN} {model}"));
        assert!(log.contains(expected), "{model}: {log}");
        assert_eq!(log.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{log}");
    }
    for model in ["org/private", "org/gated", "org/tiny@v1"] {
        finish(hub.command(&place, &format!("{RUN} {model}")).env("HF_TOKEN", TOKEN), 0);
    }
    let offline = |model: &str| {
        let mut command = hub.command(&place, &format!("{RUN} {model}"));
        finish(command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", place.path("empty")), 1)
    };
    assert!(offline("org/tiny").contains("HF_HUB_OFFLINE is set"));
    hub.addr.set_port(9);
    let log = hub.run(&place, 1, &format!("{RUN} org/other"));
    assert!(log.contains("cannot reach http://127.0.0.1:9"), "{log}");
}

#[test]
fn a_full_disk_and_a_wrong_content_are_told() {
    let place = place();
    let tiny = Repository::of("llama-gqa");
    let hub = FakeHub::start(&[("org/tiny", tiny.clone())]);
    let blobs = place.path("hf/hub/models--org--tiny/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let hash = hex(&tiny.files["model.safetensors"]);
    let partial = blobs.join(format!("{hash}.incomplete"));
    // The device that is always full.
    std::os::unix::fs::symlink("/dev/full", &partial).unwrap();
    let log = hub.run(&place, 1, &format!("{RUN} org/tiny"));
    assert!(log.contains("the disk is full: model.safetensors needs"), "{log}");
    // A part that was damaged is found out by its hash, and fetched again.
    fs::remove_file(&partial).unwrap();
    fs::write(&partial, vec![0; 1000]).unwrap();
    hub.requests();
    hub.run(&place, 0, &format!("{RUN} org/tiny"));
    let log = hub.requests();
    assert!(log.iter().any(|asked| asked.ends_with(" bytes=1000-")), "{log:?}");
    assert!(log.last().unwrap().ends_with("model.safetensors"), "{log:?}");
    place.assert_each_once("results.jsonl", 2);
}
