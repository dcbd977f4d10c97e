//! Which devices the workers of this process compute on.

use engine::{Device, Gpu, GpuId};

use crate::Error;

/// The devices that `spec` names: `all`, which is every GPU that this process may use, or the processor where there is none; or a
/// list with commas of `cpu`, numbers and names of GPUs. Naming `cpu` several times gives as many engines.
pub fn devices(spec: &str) -> Result<Vec<Device>, Error> {
    if spec.trim() == "all" {
        return Ok(all(Gpu::all()));
    }
    let device = |name: &str| match name.trim().parse() {
        Ok(Device::Gpu(id)) => found(id),
        Ok(Device::Cpu) => Ok(Device::Cpu),
        Err(unknown) => Err(Error::Device(unknown.to_string())),
    };
    spec.split(',').map(device).collect()
}

fn all(gpus: Result<Vec<Gpu>, engine::Error>) -> Vec<Device> {
    let gpus = gpus.unwrap_or_else(|reason| {
        tracing::debug!(%reason, "computing on the processor");
        Vec::new()
    });
    let devices: Vec<_> = gpus.iter().map(|gpu| Device::Gpu(GpuId::Index(gpu.index))).collect();
    if devices.is_empty() { vec![Device::Cpu] } else { devices }
}

/// One that there is.
fn found(id: GpuId) -> Result<Device, Error> {
    match Gpu::find(id) {
        Ok(_) => Ok(Device::Gpu(id)),
        Err(error) => Err(Error::Device(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use engine::GpuUuid;

    use super::*;

    #[test]
    fn the_processor_can_be_named_several_times() {
        assert_eq!(devices("cpu").unwrap(), [Device::Cpu]);
        assert_eq!(devices("cpu, cpu").unwrap().len(), 2);
    }

    #[test]
    fn all_are_the_gpus_or_else_the_processor() {
        let gpu = |index| Gpu {
            index,
            name: "GPU".into(),
            uuid: GpuUuid([index as u8; 16]),
            memory_bytes: 1 << 34,
            compute_capability: (9, 0),
        };
        let expected = [0, 1].map(|index| Device::Gpu(GpuId::Index(index)));
        assert_eq!(all(Ok(vec![gpu(0), gpu(1)])), expected);
        assert_eq!(all(Ok(Vec::new())), [Device::Cpu]);
        assert_eq!(all(Err(engine::Error::Device("no driver".into()))), [Device::Cpu]);
    }

    #[test]
    fn what_is_no_device_is_refused_with_what_is_expected_instead() {
        let error = devices("").unwrap_err().to_string();
        assert!(error.starts_with("expected cpu, a number or a name"), "{error}");
        // No machine has so many.
        assert!(matches!(devices("cpu,4000"), Err(Error::Device(_))));
    }
}
