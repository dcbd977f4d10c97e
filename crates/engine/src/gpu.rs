//! What GPUs there are, what they are called, and which one the user means.

use std::fmt::{Display, Formatter};
use std::str::FromStr;

use crate::Error;

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its place among those that this process may use.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What tells it from every other.
    pub uuid: GpuUuid,
    /// All of its memory.
    pub memory_bytes: u64,
    /// Compute capability, `(major, minor)`.
    pub compute_capability: (u32, u32),
}

/// What tells a GPU from every other. Written as the driver's tools write it: `GPU-` and groups of hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GpuUuid(pub [u8; 16]);

/// Which GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GpuId {
    /// By its place among those that this process may use.
    Index(u32),
    /// By what tells it from every other.
    Uuid(GpuUuid),
}

/// What a model is computed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// A GPU.
    Gpu(GpuId),
}

/// A device's name that is none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected cpu, a number or a name such as GPU-8f6d1c2a-…, got '{0}'")]
pub struct UnknownDevice(String);

impl Gpu {
    /// The devices that this process may use: all of the machine, or those that `CUDA_VISIBLE_DEVICES` names.
    #[cfg(not(feature = "cuda"))]
    pub fn all() -> Result<Vec<Self>, Error> {
        Err(Error::Device(
            "this program was built for processors alone; one for GPUs is built with --features cuda".into(),
        ))
    }

    /// The device of that name.
    pub fn find(id: GpuId) -> Result<Self, Error> {
        let all = Self::all()?;
        let found = all.iter().find(|gpu| match id {
            GpuId::Index(index) => gpu.index == index,
            GpuId::Uuid(uuid) => gpu.uuid == uuid,
        });
        found.cloned().ok_or_else(|| {
            let names: Vec<_> = all
                .iter()
                .map(|gpu| format!("{} ({}, {})", gpu.index, gpu.name, gpu.uuid))
                .collect();
            let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            Error::Device(format!(
                "there is no GPU {id}; those that this process may use (CUDA_VISIBLE_DEVICES): {there}"
            ))
        })
    }
}

impl Display for GpuUuid {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str("GPU")?;
        for (place, byte) in self.0.iter().enumerate() {
            let dash = if matches!(place, 0 | 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl GpuUuid {
    fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("GPU-")?.replace('-', "");
        let is_whole = digits.len() == 32 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        let number = is_whole.then(|| u128::from_str_radix(&digits, 16).ok()).flatten()?;
        Some(Self(number.to_be_bytes()))
    }
}

impl Display for Gpu {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let Self { index, name, compute_capability: (major, minor), .. } = self;
        let gib = self.memory_bytes as f64 / f64::from(1 << 30);
        write!(f, "{index}: {name}, {gib:.0} GiB, compute capability {major}.{minor}")
    }
}

impl Display for GpuId {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Index(index) => write!(f, "{index}"),
            Self::Uuid(uuid) => write!(f, "{uuid}"),
        }
    }
}

impl Device {
    /// What it is called, and of a GPU that is there what it is.
    pub fn describe(self) -> String {
        match self {
            Self::Cpu => self.to_string(),
            Self::Gpu(id) => Gpu::find(id).map_or_else(|_| self.to_string(), |gpu| gpu.to_string()),
        }
    }
}

impl Display for Device {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Gpu(id) => write!(f, "{id}"),
        }
    }
}

impl FromStr for Device {
    type Err = UnknownDevice;

    fn from_str(text: &str) -> Result<Self, UnknownDevice> {
        let gpu = || match text.parse() {
            Ok(index) => Some(GpuId::Index(index)),
            Err(_) => GpuUuid::parse(text).map(GpuId::Uuid),
        };
        let device = if text == "cpu" { Some(Self::Cpu) } else { gpu().map(Self::Gpu) };
        device.ok_or_else(|| UnknownDevice(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_tells_what_it_is() {
        let gpu = Gpu {
            index: 1,
            name: "NVIDIA H100 80GB HBM3".into(),
            uuid: GpuUuid([0xab; 16]),
            memory_bytes: 81_559 << 20,
            compute_capability: (9, 0),
        };
        assert_eq!(gpu.to_string(), "1: NVIDIA H100 80GB HBM3, 80 GiB, compute capability 9.0");
        assert_eq!(gpu.uuid.to_string(), "GPU-abababab-abab-abab-abab-abababababab");
        assert_eq!(Device::Cpu.describe(), "cpu");
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ["cpu", "0", "11", "GPU-8f6d1c2a-0b3e-4d5f-9a7b-0123456789ab"] {
            assert_eq!(name.parse::<Device>().map(|device| device.to_string()), Ok(name.into()));
        }
        for name in [
            "",
            "gpu",
            "-1",
            "1.5",
            "GPU-8f6d1c2a",
            "GPU-",
            "GPU-+8f6d1c2a-0b3e-4d5f-9a7b-0123456789a",
        ] {
            assert!(name.parse::<Device>().is_err(), "{name}");
        }
    }
}
