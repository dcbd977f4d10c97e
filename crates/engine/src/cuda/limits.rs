//! What a GPU can do at most, measured: how fast its memory is copied, how fast it multiplies.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::device::{Device, Memory, Product};
use crate::Error;

/// What is copied at a time, and multiplied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// More than caches hold.
    pub(super) num_bytes: usize,
    /// Rows, columns and inner numbers of a product.
    pub(super) width: usize,
}

impl Sizes {
    /// Those of a real device.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "there is none"))]
    pub(super) const USUAL: Self = Self { num_bytes: 1 << 30, width: 8192 };
}

/// Times that each is done before the device is waited for, and rounds of that; the fastest counts.
const NUM_TIMES: usize = 10;
const NUM_ROUNDS: usize = 4;

/// Bytes read or written in a second, and multiplications and additions in the model's 16-bit type.
pub(super) fn measure(device: &Arc<dyn Device>, sizes: Sizes) -> Result<(f64, f64), Error> {
    let Sizes { num_bytes, width } = sizes;
    let (from, to) = (Memory::new(device, num_bytes)?, Memory::new(device, num_bytes)?);
    let copy = fastest(&to, || device.copy(from.address(), to.address(), num_bytes))?;
    drop((from, to));
    // Numbers of all kinds: zeros are multiplied with less power, and so faster.
    let mut random = 1_u32;
    let numbers: Vec<u8> = (0..width * width)
        .flat_map(|_| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // From 0.25 on, below 4, of both signs, in either 16-bit type.
            let bits = (random >> 16) as u16;
            (0x3400 | bits & 0x83ff | (bits >> 3) & 0x0c00).to_le_bytes()
        })
        .collect();
    let [x, weight, out] = [0; 3].map(|_| Memory::new(device, numbers.len()));
    let (x, weight, out) = (x?, weight?, out?);
    x.write(&numbers)?;
    weight.write(&numbers)?;
    let product = Product {
        x: x.address(),
        weight: weight.address(),
        out: out.address(),
        num_rows: width,
        in_features: width,
        out_features: width,
        wide: false,
    };
    let multiply = fastest(&out, || device.multiply(&product))?;
    let operations = 2.0 * (width as f64).powi(3);
    Ok((2.0 * num_bytes as f64 / copy.as_secs_f64(), operations / multiply.as_secs_f64()))
}

/// How long `work`, which writes to `out`, takes at least.
fn fastest(out: &Memory, work: impl Fn() -> Result<(), Error>) -> Result<Duration, Error> {
    let mut fastest = Duration::MAX;
    let wait = || out.read(&mut [0; 2]);
    work()?;
    wait()?;
    for _ in 0..NUM_ROUNDS {
        let start = Instant::now();
        for _ in 0..NUM_TIMES {
            work()?;
        }
        wait()?;
        fastest = fastest.min(start.elapsed() / NUM_TIMES as u32);
    }
    Ok(fastest)
}
