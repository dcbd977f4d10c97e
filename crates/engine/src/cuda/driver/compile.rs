//! Kernels from their source: by NVIDIA's run-time compiler, once for each model's shape and kind of device, then from disk.

use std::ffi::CString;
use std::io::Write as _;
use std::path::Path;

use cudarc::nvrtc::{result, sys};
use sha2::{Digest, Sha256};

use crate::Error;

/// A program of the compiler's, given back when it is dropped.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: nobody uses it any more. There is nothing to do where it fails.
        let _given_back = unsafe { result::destroy_program(self.0) };
    }
}

/// The machine code of `source` for devices of a compute capability.
pub(super) fn image(
    source: &str,
    compute_capability: (u32, u32),
    cache: Option<&Path>,
) -> Result<Vec<u8>, Error> {
    // SAFETY: only looks for the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Device(
            "the GPU's kernels are compiled by libnvrtc of CUDA 12 or 13, which was not found: install it, or name its \
             folder in LD_LIBRARY_PATH"
                .into(),
        ));
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two numbers.
    let version = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    version.result().map_err(|error| Error::Device(format!("libnvrtc: {error}")))?;
    let options = options(compute_capability);
    let key = Sha256::digest(format!("{major}.{minor} {options:?}\n{source}"));
    let file = cache.map(|folder| folder.join(format!("{}.cubin", hex(&key))));
    if let Some(image) = file.as_deref().and_then(read) {
        return Ok(image);
    }
    let started = std::time::Instant::now();
    let (image, _) = compile(source, &options)?;
    tracing::info!(
        seconds = started.elapsed().as_secs_f32(),
        "kernels compiled for this model and device"
    );
    if let Some(file) = file
        && let Err(error) = write(&file, &image)
    {
        // They are compiled again next time.
        tracing::warn!(file = %file.display(), %error, "compiled kernels could not be kept");
    }
    Ok(image)
}

fn options((major, minor): (u32, u32)) -> Vec<String> {
    vec![format!("--gpu-architecture=sm_{major}{minor}"), "--std=c++17".to_owned()]
}

/// Machine code, and what the compiler says of it.
fn compile(source: &str, options: &[String]) -> Result<(Vec<u8>, String), Error> {
    let told = |error: result::NvrtcError| Error::Device(format!("libnvrtc: {error}"));
    let source = CString::new(source).unwrap_or_default();
    let program = Program(result::create_program(&source, Some(c"flotilla.cu")).map_err(told)?);
    // SAFETY: the program is there.
    let compiled = unsafe { result::compile_program(program.0, options) };
    // SAFETY: as above.
    let log = unsafe { result::get_program_log(program.0) }.unwrap_or_default();
    let log: Vec<u8> = log.into_iter().map(|byte| byte.to_ne_bytes()[0]).collect();
    let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
    if let Err(error) = compiled {
        return Err(Error::Device(format!("the kernels could not be compiled: {error}\n{log}")));
    }
    let mut size = 0;
    // SAFETY: writes a number.
    unsafe { sys::nvrtcGetCUBINSize(program.0, &raw mut size) }.result().map_err(told)?;
    let mut image = vec![0_u8; size];
    // SAFETY: the image has the size that was told.
    unsafe { sys::nvrtcGetCUBIN(program.0, image.as_mut_ptr().cast()) }.result().map_err(told)?;
    Ok((image, log))
}

/// What a file holds behind the checksum of it; `None` if it is not whole.
fn read(file: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(file).ok()?;
    let (sum, image) = bytes.split_at_checked(32)?;
    (Sha256::digest(image)[..] == *sum).then(|| image.to_vec())
}

/// Writes a file so that it is whole or not there.
fn write(file: &Path, image: &[u8]) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let mut unfinished = tempfile::NamedTempFile::new_in(folder)?;
    unfinished.write_all(&Sha256::digest(image))?;
    unfinished.write_all(image)?;
    unfinished.persist(file)?;
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::device::Half;
    use crate::cuda::kernels::Shape;

    /// Of TinyLlama, Mistral 7B, Gemma 2, Phi-3 mini, Qwen 2.5 0.5B, and one of a single KV head.
    fn shapes() -> [Shape; 6] {
        [
            (2048, 64, 32, 4),
            (4096, 128, 32, 8),
            (2304, 256, 8, 4),
            (3072, 96, 32, 32),
            (896, 64, 14, 2),
            (2560, 80, 32, 1),
        ]
        .map(|(hidden_size, head_dim, num_heads, num_kv_heads)| Shape {
            half: Half::Bf16,
            hidden_size,
            head_dim,
            num_heads,
            num_kv_heads,
            activation: 0,
        })
    }

    /// Kernels whose numbers don't all fit the registers, from what the assembler says of each.
    fn spilling(log: &str) -> Vec<&str> {
        let (mut num_kernels, mut spilling) = (0, Vec::new());
        let mut kernel = "";
        for line in log.lines() {
            if let Some((_, rest)) = line.split_once("Compiling entry function '") {
                kernel = rest.split_once('\'').map_or(rest, |(name, _)| name);
                num_kernels += 1;
            } else if line.contains("bytes spill stores") && !line.contains(" 0 bytes spill stores")
            {
                spilling.push(kernel);
            }
        }
        assert!(num_kernels >= 8, "{log}");
        spilling
    }

    #[test]
    #[ignore = "needs libnvrtc: make check-cuda"]
    fn kernels_compile_for_every_generation_and_spill_nothing_on_hopper() {
        for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)] {
            let is_hopper = capability == (9, 0);
            let num_shapes = if is_hopper { usize::MAX } else { 2 };
            for shape in shapes().into_iter().take(num_shapes) {
                let mut options = options(capability);
                options.push("--ptxas-options=-v".to_owned());
                let half = if capability == (8, 6) { Half::Fp16 } else { Half::Bf16 };
                let shape = Shape { half, ..shape };
                let (image, log) = compile(&shape.source(), &options).unwrap();
                assert!(image.starts_with(b"\x7fELF"), "{shape:?}");
                let spilling = spilling(&log);
                // It calls a division, which is not where its time goes.
                let is_none = spilling.iter().all(|kernel| *kernel == "sample");
                assert!(is_none || !is_hopper, "{shape:?}: {spilling:?}");
            }
        }
    }

    #[test]
    #[ignore = "needs libnvrtc: make check-cuda"]
    fn what_does_not_compile_says_where() {
        let error = image("#line 7 \"a.cu\"\nfloat f() { return x; }", (9, 0), None).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("a.cu(7)") && error.contains("\"x\""), "{error}");
    }

    #[test]
    fn a_kept_image_is_whole_or_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kernels/a.cubin");
        assert_eq!(read(&file), None);
        write(&file, b"image").unwrap();
        assert_eq!(read(&file), Some(b"image".to_vec()));
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(read(&file), None);
        std::fs::write(&file, &bytes[..20]).unwrap();
        assert_eq!(read(&file), None);
    }
}
