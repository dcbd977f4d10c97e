//! Which devices the workers of this process compute on.

use crate::Error;

/// Where an engine computes. Each device has one engine, with a thread of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The processor.
    Cpu,
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
        }
    }
}

/// The devices that `spec` names: `all`, or a list with commas of `cpu` and numbers of GPUs. Naming
/// `cpu` several times gives as many engines.
pub fn devices(spec: &str) -> Result<Vec<Device>, Error> {
    if spec.trim() == "all" {
        return Ok(vec![Device::Cpu]);
    }
    spec.split(',').map(|name| device(name.trim())).collect()
}

fn device(name: &str) -> Result<Device, Error> {
    let reason = match name {
        "cpu" => return Ok(Device::Cpu),
        _ if name.parse::<u32>().is_ok() => "this build has no CUDA",
        _ => "there is no such device",
    };
    Err(Error::Device { name: name.to_owned(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_is_all_there_is() {
        assert_eq!(devices("all").unwrap(), [Device::Cpu]);
        assert_eq!(devices("cpu").unwrap(), [Device::Cpu]);
        assert_eq!(devices("cpu, cpu").unwrap().len(), 2);
    }

    #[test]
    fn a_gpu_is_refused_with_what_is_expected_instead() {
        let error = devices("cpu,1").unwrap_err().to_string();
        assert_eq!(error, "this build has no CUDA: expected cpu or all, got '1'");
        let error = devices("").unwrap_err().to_string();
        assert_eq!(error, "there is no such device: expected cpu or all, got ''");
    }
}
