//! Models by the name that they have at the Hugging Face Hub: fetched into the cache that Python's libraries use
//! too, or found there.
//!
//! Called before anything else of a command starts; what comes out is a folder or a GGUF file like any other.
//! `listing` knows what a repository has and which of it is needed, `transfer` brings one file. Only files are
//! ever added to the cache, each under its own name once it is whole: a crash leaves a part that the next start
//! goes on from.

mod listing;
mod transfer;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;
use hf_hub::api::sync::{Api, ApiBuilder};
use hf_hub::{Cache, Repo, RepoType};

use listing::{Listing, Unavailable};
use transfer::Transfers;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
const DEFAULT_REVISION: &str = "main";

/// The settings that all programs around the Hub share.
#[derive(Args, Clone, Debug)]
pub(crate) struct HubOptions {
    /// Folder of the Hugging Face cache and token [default: ~/.cache/huggingface].
    #[arg(long, env = "HF_HOME", value_name = "DIR", hide = true)]
    hf_home: Option<PathBuf>,
    /// Folder of the models themselves [default: hub in the one above].
    #[arg(long, env = "HF_HUB_CACHE", value_name = "DIR", hide = true)]
    hf_hub_cache: Option<PathBuf>,
    /// Token for private and gated models.
    #[arg(long, env = "HF_TOKEN", value_name = "TOKEN", hide = true, hide_env_values = true)]
    hf_token: Option<String>,
    /// Where the Hub is.
    #[arg(long, env = "HF_ENDPOINT", value_name = "URL", hide = true)]
    hf_endpoint: Option<String>,
    /// 1 to use only what is in the cache.
    #[arg(long, env = "HF_HUB_OFFLINE", value_name = "0|1", hide = true)]
    hf_hub_offline: Option<String>,
    /// Where caches are, for the default above.
    #[arg(long, env = "XDG_CACHE_HOME", value_name = "DIR", hide = true)]
    xdg_cache_home: Option<PathBuf>,
}

/// What of a model is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Everything that it takes to answer.
    Model,
    /// What counts tokens.
    Tokenizer,
}

/// A model at the Hub: `org/name[@revision][:file]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Remote {
    repo: String,
    revision: String,
    /// The GGUF file that is meant, by its name or a part of it such as `Q4_K_M`.
    file: Option<String>,
}

impl Remote {
    /// Reads a name; `None` if it can't be one.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (text, file) = match text.split_once(':') {
            Some((rest, file)) => (rest, Some(file)),
            None => (text, None),
        };
        let (repo, revision) = text.split_once('@').unwrap_or((text, DEFAULT_REVISION));
        let (organisation, name) = repo.split_once('/')?;
        let is_name = |name: &str| {
            let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            name.len() <= 96 && name.chars().all(is_allowed) && !name.starts_with(['.', '-'])
        };
        let is_path = |path: &str| !path.split('/').any(|part| part.is_empty() || part == "..");
        let is_whole = !organisation.is_empty() && is_name(organisation) && !name.is_empty();
        if !is_whole || !is_name(name) || !is_path(revision) || !file.is_none_or(is_path) {
            return None;
        }
        let file = file.map(str::to_owned);
        Some(Self { repo: repo.to_owned(), revision: revision.to_owned(), file })
    }

    fn at(&self, revision: &str) -> Repo {
        Repo::with_revision(self.repo.clone(), RepoType::Model, revision.to_owned())
    }
}

/// The Hub, and its cache on this machine.
pub(crate) struct Hub {
    cache: Cache,
    endpoint: String,
    token: Option<String>,
    offline: bool,
}

impl Hub {
    pub(crate) fn new(options: &HubOptions) -> anyhow::Result<Self> {
        let given =
            |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
        let text = |text: &Option<String>| text.clone().filter(|text| !text.trim().is_empty());
        let caches = given(&options.xdg_cache_home)
            .or_else(|| Some(std::env::home_dir()?.join(".cache")))
            .map(|caches| caches.join("huggingface"));
        let home = given(&options.hf_home)
            .or(caches)
            .context("there is no home folder for the cache of models; set HF_HOME")?;
        let of_home = Cache::new(home.join("hub"));
        let token = text(&options.hf_token).or_else(|| of_home.token());
        let cache = given(&options.hf_hub_cache).map_or(of_home, Cache::new);
        // Links are made relative to the folder.
        let root = std::path::absolute(cache.path())
            .with_context(|| format!("{} is no folder", cache.path().display()))?;
        let endpoint = text(&options.hf_endpoint).unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        let offline = text(&options.hf_hub_offline).is_some_and(|value| {
            ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str())
        });
        Ok(Self {
            cache: Cache::new(root),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.map(|token| token.trim().to_owned()),
            offline,
        })
    }

    /// The model's place in the cache, where it is when this returns.
    pub(crate) fn fetch(&self, remote: &Remote, need: Need) -> anyhow::Result<PathBuf> {
        let known = self.cached(remote, need);
        if self.offline {
            return known.with_context(|| {
                format!(
                    "{} at revision {} is not whole in the cache {}, and HF_HUB_OFFLINE is set",
                    remote.repo,
                    remote.revision,
                    self.cache.path().display()
                )
            });
        }
        // A commit never changes.
        if let Some(path) = known.as_ref().filter(|_| is_commit(&remote.revision)) {
            return Ok(path.clone());
        }
        let listing = match Listing::ask(self, remote) {
            Ok(listing) => listing,
            Err(Unavailable::Network(error)) => {
                if let Some(path) = known {
                    tracing::warn!("{error:#}; using {} from the cache", remote.repo);
                    return Ok(path);
                }
                return Err(error);
            }
            Err(Unavailable::Refused(error)) => return Err(error),
        };
        let path = Transfers::new(self, remote, &listing)?.run(need)?;
        if !is_commit(&remote.revision) {
            self.name_commit(remote, &listing.commit)?;
        }
        Ok(path)
    }

    /// The model in the cache, if everything that is wanted is there.
    fn cached(&self, remote: &Remote, need: Need) -> Option<PathBuf> {
        let repo = self.cache.path().join(remote.at("").folder_name());
        let commit = match std::fs::read_to_string(repo.join("refs").join(&remote.revision)) {
            Ok(commit) => commit.trim().to_owned(),
            Err(_) => remote.revision.clone(),
        };
        let snapshot = repo.join("snapshots").join(commit);
        let names = listing::local_files(&snapshot);
        let is_there = |name: &str| snapshot.join(name).is_file();
        let read = |name: &str| std::fs::read_to_string(snapshot.join(name)).ok();
        let wanted = listing::wanted(remote, &names, need).ok()?;
        if wanted.has_index && need == Need::Model {
            let shards = listing::shards(&read(listing::INDEX)?).ok()?;
            shards.iter().all(|shard| is_there(shard)).then_some(())?;
        }
        wanted.files.iter().all(|name| is_there(name)).then(|| wanted.path_in(&snapshot))
    }

    /// Notes which commit a branch or tag is at, for the next time without a network.
    fn name_commit(&self, remote: &Remote, commit: &str) -> anyhow::Result<()> {
        let refs = self.cache.path().join(remote.at("").folder_name()).join("refs");
        let path = refs.join(&remote.revision);
        if std::fs::read_to_string(&path).is_ok_and(|known| known.trim() == commit) {
            return Ok(());
        }
        let write = || {
            let folder = path.parent().unwrap_or(&refs);
            std::fs::create_dir_all(folder)?;
            let file = tempfile::NamedTempFile::new_in(folder)?;
            std::fs::write(file.path(), commit)?;
            file.persist(&path).map_err(|error| error.error)
        };
        write().map(drop).with_context(|| format!("cannot write {}", path.display()))
    }

    fn api(&self) -> anyhow::Result<Api> {
        ApiBuilder::from_cache(self.cache.clone())
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_progress(false)
            .with_user_agent("flotilla", env!("CARGO_PKG_VERSION"))
            .build()
            .context("cannot set up the connection to the Hub")
    }
}

/// Whether a revision is a commit, and not a branch or tag.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The model of this name: a folder or file of this machine, or one that is fetched.
pub(crate) fn find(given: &str, options: &HubOptions, need: Need) -> anyhow::Result<PathBuf> {
    let path = Path::new(given);
    if path.join("config.json").is_file() || path.is_file() {
        return Ok(path.to_owned());
    }
    if path.is_dir() {
        bail!(
            "{given} is not a model: expected a folder with config.json, model.safetensors and \
               tokenizer.json"
        );
    }
    match Remote::parse(given) {
        // What was meant may be a folder whose name has a mistake.
        Some(remote) => Hub::new(options)?.fetch(&remote, need).with_context(|| {
            format!("{given} is no folder or file here, and can't be had from the Hub")
        }),
        None if given.is_empty() => bail!("the name of the model is empty"),
        None => bail!(
            "{given} is not a model: expected a folder with config.json, model.safetensors and \
             tokenizer.json, a GGUF file, or the name of a model at the Hugging Face Hub as org/name"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_models_have_a_repository_a_revision_and_a_file() {
        let remote = |repo: &str, revision: &str, file: Option<&str>| {
            let file = file.map(str::to_owned);
            Some(Remote { repo: repo.into(), revision: revision.into(), file })
        };
        for (text, expected) in [
            ("org/name", remote("org/name", "main", None)),
            ("Org-1/na.me_2@v1.0", remote("Org-1/na.me_2", "v1.0", None)),
            ("o/n@refs/pr/3", remote("o/n", "refs/pr/3", None)),
            ("o/n:Q4_K_M", remote("o/n", "main", Some("Q4_K_M"))),
            ("o/n@dev:sub/m.gguf", remote("o/n", "dev", Some("sub/m.gguf"))),
            ("nowhere", None),
            ("./models/x", None),
            ("../x/y", None),
            ("/srv/models", None),
            ("a/b/c", None),
            ("a/", None),
            ("/b", None),
            ("o/n@", None),
            ("o/n@../../x", None),
            ("o/n:", None),
            ("o/n:../x", None),
            ("o/na me", None),
        ] {
            assert_eq!(Remote::parse(text), expected, "{text}");
        }
    }
}
