//! What a repository at the Hub has, and which of it is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use serde::Deserialize;
use ureq::http::StatusCode;

use super::{DEFAULT_REVISION, Hub, Need, Remote, is_commit};

const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
const TOKENIZER: &str = "tokenizer.json";

/// What is small and fetched where there is such a file.
const SMALL_FILES: [&str; 8] = [
    "config.json",
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "prompt_template.jinja",
];

/// Until a connection stands, and until an answer begins.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Why there is no listing.
pub(super) enum Unavailable {
    /// The Hub can't be reached; what the cache has may do.
    Network(anyhow::Error),
    /// The Hub says no.
    Refused(anyhow::Error),
}

/// What a repository has at a commit.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: BTreeMap<String, RemoteFile>,
}

/// What is known of a file before it is fetched.
#[derive(Debug)]
pub(super) struct RemoteFile {
    /// Its size, and its name among the blobs of the cache: what Python's libraries call it too.
    pub(super) blob: Option<(u64, String)>,
    /// Hash of its content, for large files.
    pub(super) sha256: Option<String>,
}

#[derive(Deserialize)]
struct Answer {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

impl Listing {
    /// Asks the Hub.
    pub(super) fn ask(hub: &Hub, remote: &Remote) -> Result<Self, Unavailable> {
        let api = hub.api().map_err(Unavailable::Refused)?;
        let request = api.repo(remote.at(&remote.revision)).info_request().query("blobs", "true");
        let request = request
            .config()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(ANSWER_TIMEOUT))
            .timeout_per_read(Some(ANSWER_TIMEOUT))
            .build();
        let unreachable = |error: ureq::Error| {
            let error = anyhow::Error::new(error);
            Unavailable::Network(error.context(format!("cannot reach {}", hub.endpoint)))
        };
        let mut response = request.call().map_err(unreachable)?;
        let status = response.status();
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            let error = anyhow!("{} answers with {status}", hub.endpoint);
            return Err(Unavailable::Network(error));
        }
        if !status.is_success() {
            return Err(Unavailable::Refused(refusal(hub, remote, &response)));
        }
        let text = response.body_mut().read_to_string().map_err(unreachable)?;
        Self::parse(&text)
            .with_context(|| format!("{} does not answer as the Hub does", hub.endpoint))
            .map_err(Unavailable::Refused)
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let answer: Answer = serde_json::from_str(text)?;
        // Both become names of files.
        ensure!(is_commit(&answer.sha), "{:?} is no commit", answer.sha);
        let mut files = BTreeMap::new();
        for Sibling { rfilename, size, blob_id, lfs } in answer.siblings {
            if !is_relative(&rfilename) {
                continue;
            }
            let (blob, sha256) = match (lfs, blob_id, size) {
                (Some(lfs), _, _) => (Some((lfs.size, lfs.sha256.clone())), Some(lfs.sha256)),
                (None, Some(id), Some(size)) => (Some((size, id)), None),
                _ => (None, None),
            };
            if let Some((_, name)) = &blob {
                check_blob_name(name)?;
            }
            files.insert(rfilename, RemoteFile { blob, sha256 });
        }
        Ok(Self { commit: answer.sha, files })
    }
}

/// The name of a blob comes from the network and becomes that of a file.
pub(super) fn check_blob_name(name: &str) -> anyhow::Result<()> {
    let is_plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    ensure!(is_plain && (1..=128).contains(&name.len()), "{name:?} is no hash of a file");
    Ok(())
}

/// Whether a name stays within the folder that it is put in.
fn is_relative(name: &str) -> bool {
    Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// What an answer means that is neither a success nor the Hub's own trouble.
pub(super) fn refusal<B>(
    hub: &Hub,
    remote: &Remote,
    response: &ureq::http::Response<B>,
) -> anyhow::Error {
    let Hub { endpoint, token, .. } = hub;
    let Remote { repo, revision, .. } = remote;
    let code = response.headers().get("x-error-code").and_then(|code| code.to_str().ok());
    let status = response.status();
    let advice = match token {
        None => "set HF_TOKEN to a token that may read it, or log in with `hf auth login`",
        Some(_) => "the token that is set may not read it",
    };
    match (code, status) {
        (Some("RevisionNotFound"), _) => anyhow!("{repo} has no revision {revision} at {endpoint}"),
        (Some("EntryNotFound"), _) => anyhow!("{repo} lost a file while it was fetched; try again"),
        (Some("GatedRepo"), _) | (None, StatusCode::FORBIDDEN) => anyhow!(
            "{repo} is gated: ask for access at {endpoint}/{repo}, then set HF_TOKEN to a token of that \
             account{}",
            if token.is_some() { " (the token that is set has no access)" } else { "" }
        ),
        (Some("RepoNotFound"), _) | (None, StatusCode::UNAUTHORIZED) => {
            anyhow!("there is no model {repo} at {endpoint}, or it is private: {advice}")
        }
        (None, StatusCode::NOT_FOUND) if revision == DEFAULT_REVISION => {
            anyhow!("there is no model {repo} at {endpoint}, and no folder {repo} here")
        }
        (None, StatusCode::NOT_FOUND) => {
            anyhow!("there is no model {repo} with a revision {revision} at {endpoint}")
        }
        _ => anyhow!("{endpoint} answers with {status} when asked for {repo}"),
    }
}

/// The files to fetch.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// By name, the small ones first.
    pub(super) files: Vec<String>,
    /// Whether there is an index that names more of them.
    pub(super) has_index: bool,
    /// The GGUF file that is the model, where one is.
    gguf: Option<String>,
}

impl Wanted {
    /// The model in its folder.
    pub(super) fn path_in(&self, snapshot: &Path) -> PathBuf {
        self.gguf.as_ref().map_or_else(|| snapshot.to_owned(), |name| snapshot.join(name))
    }
}

/// Which of a repository's files are needed. An error says what is there in place of a model.
pub(super) fn wanted(
    remote: &Remote,
    names: &BTreeSet<String>,
    need: Need,
) -> anyhow::Result<Wanted> {
    let repo = &remote.repo;
    if let Some(file) = &remote.file {
        let files = gguf_files(repo, names, file)?;
        return Ok(Wanted { gguf: Some(files[0].clone()), files, has_index: false });
    }
    let example = names.iter().find(|name| name.ends_with(".gguf"));
    let has_weights = names.contains(SINGLE) || names.contains(INDEX);
    match example {
        Some(example) if !has_weights => bail!(
            "{repo} has several GGUF files and no safetensors: say which, as {repo}:{example}"
        ),
        _ => {}
    }
    ensure!(names.contains("config.json"), "{repo} has no config.json: it is not a model");
    ensure!(
        names.contains(TOKENIZER),
        "{repo} has no tokenizer.json, the only form of a tokenizer that is read"
    );
    let small = |name: &&str| {
        let is_wanted = need == Need::Model || [TOKENIZER, "config.json"].contains(name);
        is_wanted && names.contains(*name)
    };
    let mut files: Vec<String> = SMALL_FILES.into_iter().filter(small).map(str::to_owned).collect();
    let mut has_index = false;
    if need == Need::Model {
        ensure!(
            has_weights,
            "{repo} has neither {SINGLE} nor {INDEX}{}",
            names.iter().find(|name| is_foreign(name)).map_or_else(String::new, |name| {
                format!("; {name} is in a format that is not read")
            })
        );
        has_index = !names.contains(SINGLE);
        files.push(if has_index { INDEX } else { SINGLE }.to_owned());
    }
    Ok(Wanted { files, has_index, gguf: None })
}

fn is_foreign(name: &str) -> bool {
    let endings = [".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx"];
    !name.contains('/') && endings.iter().any(|ending| name.ends_with(ending))
}

/// The files that an index names, each once.
pub(super) fn shards(index: &str) -> anyhow::Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index =
        serde_json::from_str(index).with_context(|| format!("{INDEX} has no usable weight_map"))?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    let foreign = shards.iter().find(|name| Path::new(name).components().count() != 1);
    ensure!(foreign.is_none(), "{INDEX} names {foreign:?}, expected a file beside it");
    Ok(shards)
}

/// The GGUF file of this name, or the only one that has it as a part; with all of its parts, the first first.
fn gguf_files(repo: &str, names: &BTreeSet<String>, file: &str) -> anyhow::Result<Vec<String>> {
    let ggufs = || names.iter().filter(|name| name.ends_with(".gguf"));
    if names.contains(file) {
        return with_parts(repo, names, file);
    }
    // Of a model in several parts, the first stands for it.
    let lower = file.to_lowercase();
    let matching: Vec<&String> = ggufs()
        .filter(|name| name.to_lowercase().contains(&lower))
        .filter(|name| part(name).is_none_or(|(_, number, _)| number == 1))
        .collect();
    match matching.as_slice() {
        [one] => with_parts(repo, names, one),
        [] => {
            let known: Vec<&str> = ggufs().map(String::as_str).collect();
            bail!(
                "{repo} has no GGUF file {file}, but {}",
                if known.is_empty() { "none at all".to_owned() } else { known.join(", ") }
            )
        }
        several => bail!(
            "{repo} has several GGUF files with {file} in their names: {}; give one of them",
            several.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ")
        ),
    }
}

fn with_parts(repo: &str, names: &BTreeSet<String>, file: &str) -> anyhow::Result<Vec<String>> {
    let Some((stem, _, count)) = part(file) else { return Ok(vec![file.to_owned()]) };
    let parts = names
        .iter()
        .filter(|name| part(name).is_some_and(|(other, _, total)| other == stem && total == count));
    let parts: Vec<String> = parts.cloned().collect();
    let num_parts = parts.len();
    ensure!(num_parts == count as usize, "{repo} has {num_parts} of the {count} parts of {file}");
    Ok(parts)
}

/// `x-00002-of-00003.gguf` → `x`, 2, 3.
fn part(name: &str) -> Option<(&str, u32, u32)> {
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    Some((stem, number.parse().ok()?, count.parse().ok()?))
}

/// The names of the files in a folder of the cache, those in folders below it included.
pub(super) fn local_files(snapshot: &Path) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut folders = vec![snapshot.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(path);
            } else if let Ok(name) = path.strip_prefix(snapshot) {
                names.insert(name.to_string_lossy().into_owned());
            }
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted_of(text: &str, names: &[&str], need: Need) -> Result<Wanted, String> {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        wanted(&Remote::parse(text).unwrap(), &names, need).map_err(|error| error.to_string())
    }

    #[test]
    fn only_what_is_needed_is_fetched() {
        let names = [
            "README.md",
            "config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "tokenizer.json",
            "tokenizer_config.json",
            "original/consolidated.00.pth",
        ];
        let files = |need| wanted_of("o/n", &names, need).unwrap().files;
        assert_eq!(
            files(Need::Model),
            ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
        );
        assert_eq!(files(Need::Tokenizer), ["config.json", "tokenizer.json"]);
    }

    #[test]
    fn what_is_no_model_is_told() {
        let error = |names: &[&str]| wanted_of("o/n", names, Need::Model).unwrap_err();
        assert!(error(&["README.md"]).contains("no config.json"));
        assert!(error(&["config.json"]).contains("no tokenizer.json"));
        let old = ["config.json", "tokenizer.json", "pytorch_model.bin"];
        assert!(error(&old).contains("pytorch_model.bin is in a format"));
        assert!(error(&["n-Q8_0.gguf", "n-Q4_K_M.gguf"]).contains("as o/n:n-Q4_K_M.gguf"));
    }

    #[test]
    fn a_gguf_file_is_chosen_by_its_name_or_a_part_of_it() {
        let names = [
            "n-Q4_K_M.gguf",
            "n-Q4_K_S.gguf",
            "big/n-Q8_0-00001-of-00002.gguf",
            "big/n-Q8_0-00002-of-00002.gguf",
        ];
        let files = |text: &str| wanted_of(text, &names, Need::Model).map(|wanted| wanted.files);
        assert_eq!(files("o/n:q4_k_m").unwrap(), ["n-Q4_K_M.gguf"]);
        assert_eq!(files("o/n:n-Q4_K_S.gguf").unwrap(), ["n-Q4_K_S.gguf"]);
        assert_eq!(files("o/n:Q8_0").unwrap(), names[2..]);
        let error = wanted_of("o/n:n", &["n-00001-of-00002.gguf"], Need::Model).unwrap_err();
        assert!(error.contains("1 of the 2 parts"), "{error}");
        assert!(files("o/n:Q4_K").unwrap_err().contains("several"));
        assert!(files("o/n:Q2_K").unwrap_err().contains("has no GGUF file Q2_K, but big/"));
    }

    #[test]
    fn a_listing_that_would_leave_the_cache_is_refused() {
        let commit = "0".repeat(40);
        let parse = |sha: &str, name: &str, blob: &str| {
            let text = format!(
                r#"{{"sha":"{sha}","siblings":[{{"rfilename":"{name}","size":1,"blobId":"{blob}"}}]}}"#
            );
            Listing::parse(&text)
        };
        assert_eq!(parse(&commit, "config.json", "ab12").unwrap().files.len(), 1);
        assert!(parse("../../x", "config.json", "ab12").is_err());
        assert!(parse(&commit, "config.json", "../x").is_err());
        assert!(parse(&commit, "../config.json", "ab12").unwrap().files.is_empty());
        assert!(parse(&commit, "/etc/config.json", "ab12").unwrap().files.is_empty());
    }
}
