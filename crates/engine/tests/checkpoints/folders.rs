//! Folders with safetensors as people have them: other names, more tensors than needed, files that are missing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::driver::{Sequence, run};
use flotilla_engine::step::TokenId;
use flotilla_engine::{Runner, RunnerOptions};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::json;
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A copy of a fixture's small files.
fn folder(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(fixture(name).join("config.json"), folder.path().join("config.json")).unwrap();
    folder
}

fn logits(model: &Path) -> Vec<f32> {
    let mut runner = Runner::load(model, &RunnerOptions::default()).unwrap();
    runner.allocate_kv_cache(4).unwrap();
    let tokens: Vec<TokenId> = (3..40).collect();
    run(&mut runner, &mut Sequence::contiguous(tokens, 0, 64), 64).remove(0)
}

fn error(model: &Path) -> String {
    Runner::load(model, &RunnerOptions::default()).unwrap_err().to_string()
}

/// Writes the fixture's tensors, renamed, and others beside them.
fn write(
    name: &str,
    folder: &Path,
    rename: impl Fn(&str) -> String,
    more: &[(&str, TensorView<'_>)],
) {
    let bytes = std::fs::read(fixture(name).join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<(String, TensorView<'_>)> =
        tensors.tensors().into_iter().map(|(name, view)| (rename(&name), view)).collect();
    all.extend(more.iter().map(|(name, view)| ((*name).to_owned(), view.clone())));
    serialize_to_file(all, None, &folder.join("model.safetensors")).unwrap();
}

#[test]
fn a_base_model_and_tensors_that_nobody_needs_are_read() {
    let folder = folder("llama-tied");
    let rename = |name: &str| name.strip_prefix("model.").unwrap().to_owned();
    let (ids, floats) = ([0u8; 32], [0u8; 16]);
    let ids = TensorView::new(Dtype::I64, vec![4], &ids).unwrap();
    let floats = TensorView::new(Dtype::F32, vec![2, 2], &floats).unwrap();
    let more = [
        ("layers.0.self_attn.rotary_emb.inv_freq", floats.clone()),
        ("embeddings.position_ids", ids),
        ("vision_tower.patch.weight", floats),
    ];
    write("llama-tied", folder.path(), rename, &more);
    assert_eq!(logits(folder.path()), logits(&fixture("llama-tied")));
}

/// The fixture's tensors with the matrices of all experts of a layer in one, as transformers 5 keeps them in memory
/// and saves them where it is told not to go back to the original format.
fn write_fused(name: &str, folder: &Path) {
    let bytes = std::fs::read(fixture(name).join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut all: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let mut names = tensors.names();
    // By the experts' numbers, each one's gate before its up.
    names.sort_by_key(|name| name.replace("down_proj", "z"));
    for name in names {
        let view = tensors.tensor(name).unwrap();
        let Some((layer, matrix)) = name.split_once(".experts.") else {
            all.insert(name.into(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
            continue;
        };
        let is_down = matrix.ends_with("down_proj.weight");
        let matrix = if is_down { "down_proj" } else { "gate_up_proj" };
        let [rows, columns] = view.shape() else { panic!("{name}") };
        let rows = if is_down { *rows } else { 2 * rows };
        let fused = all.entry(format!("{layer}.experts.{matrix}"));
        let fused = fused.or_insert_with(|| (view.dtype(), vec![0, rows, *columns], Vec::new()));
        fused.2.extend(view.data());
        fused.1[0] = fused.2.len() / (rows * columns * view.dtype().bitsize() / 8);
    }
    let views = all.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

#[test]
fn experts_may_lie_in_one_tensor() {
    let folder = folder("qwen3-moe");
    write_fused("qwen3-moe", folder.path());
    assert_eq!(logits(folder.path()), logits(&fixture("qwen3-moe")));
}

#[test]
fn a_tensor_of_another_type_is_named_with_its_file() {
    let folder = folder("llama-tied");
    let zeros = [0u8; 32 * 8];
    let norm = TensorView::new(Dtype::I64, vec![32], &zeros).unwrap();
    let rename = |name: &str| name.replace("model.norm", "model.other");
    write("llama-tied", folder.path(), rename, &[("model.norm.weight", norm)]);
    let error = error(folder.path());
    assert!(error.contains("model.norm.weight") && error.contains("model.safetensors"), "{error}");
    assert!(error.contains("has dtype I64, expected F32, F16 or BF16"), "{error}");
}

#[test]
fn what_a_folder_has_in_place_of_safetensors_is_told() {
    let folder = folder("llama-gqa");
    let error = || error(folder.path());
    assert!(error().ends_with("has neither model.safetensors nor model.safetensors.index.json"));
    std::fs::write(folder.path().join("pytorch_model.bin"), "").unwrap();
    assert!(error().ends_with("pytorch_model.bin is in a format that is not read"), "{}", error());
    std::fs::write(folder.path().join("m.gguf"), "").unwrap();
    assert!(error().ends_with("to load m.gguf, give the path of the file itself"), "{}", error());
    let index = json!({"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}});
    let path = folder.path().join("model.safetensors.index.json");
    std::fs::write(&path, index.to_string()).unwrap();
    assert!(error().contains("names model-00002-of-00002.safetensors, expected a file beside it"));
    let index = json!({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}});
    std::fs::write(&path, index.to_string()).unwrap();
    assert!(error().contains("expected a file beside it"), "{}", error());
}

#[test]
fn a_shard_that_was_cut_is_named() {
    let folder = folder("llama-sharded");
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    for name in ["model.safetensors.index.json", shards[0], shards[1]] {
        std::fs::copy(fixture("llama-sharded").join(name), folder.path().join(name)).unwrap();
    }
    assert_eq!(logits(folder.path()), logits(&fixture("llama-sharded")));
    let bytes = std::fs::read(folder.path().join(shards[1])).unwrap();
    std::fs::write(folder.path().join(shards[1]), &bytes[..bytes.len() - 40]).unwrap();
    let error = error(folder.path());
    assert!(error.contains(shards[1]) && error.contains("damaged"), "{error}");
}

#[test]
fn a_file_that_is_no_model_is_told() {
    let error = error(&fixture("llama-gqa").join("model.safetensors"));
    assert!(error.contains("expected the letters GGUF"), "{error}");
    assert!(error.ends_with("give the folder"), "{error}");
}
