//! A checkpoint's tensors to a device: matrices in the model's 16-bit type, vectors in f32.

use std::cell::Cell;
use std::sync::Arc;

use super::device::{Device, Half, Memory};
use crate::Error;
use crate::kernels::Cpu;
use crate::model::Store;
use crate::model::packing::Convert;
use crate::precision::MatrixRole;
use crate::weights::{Format, Tensor};

/// Bytes that are converted before they are copied to the device.
const STAGING_BYTES: usize = 16 << 20;

/// A matrix on a device, `(num_rows, row_len)`.
#[derive(Debug)]
pub(super) struct Matrix {
    pub(super) memory: Memory,
    pub(super) num_rows: usize,
    pub(super) row_len: usize,
}

/// Takes tensors to a device.
#[derive(Debug)]
pub(super) struct DeviceStore<'a> {
    pub(super) device: &'a Arc<dyn Device>,
    pub(super) half: Half,
    /// What converts.
    pub(super) cpu: &'a Cpu,
    pub(super) num_bytes: Cell<u64>,
}

impl DeviceStore<'_> {
    fn take(&self, num_bytes: usize) -> Result<Memory, Error> {
        self.num_bytes.set(self.num_bytes.get() + num_bytes as u64);
        Memory::new(self.device, num_bytes)
    }
}

impl Store for DeviceStore<'_> {
    type Matrix = Matrix;
    type Vector = Memory;
    type Rows = Matrix;

    fn note(&self, _: &str, _: &[usize], _: Format) {}

    fn numbers(&self, tensor: &Tensor<'_>) -> Vec<f32> {
        tensor.to_vec()
    }

    fn vector(&self, numbers: Vec<f32>) -> Result<Memory, Error> {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let memory = self.take(bytes.len())?;
        memory.write(&bytes)?;
        Ok(memory)
    }

    fn matrix(&self, name: &str, _: MatrixRole, tensors: &[Tensor<'_>]) -> Result<Matrix, Error> {
        let format = match self.half {
            Half::Bf16 => Format::Bf16,
            Half::Fp16 => Format::F16,
        };
        let row_len = tensors.first().map_or(0, Tensor::row_len);
        let num_rows = tensors.iter().map(Tensor::num_rows).sum();
        let row_bytes = format.num_bytes(row_len);
        let memory = self.take(num_rows * row_bytes)?;
        let convert = Convert::new(self.cpu.simd);
        let rows_at_a_time = (STAGING_BYTES / row_bytes.max(1)).max(1);
        let mut staging = Vec::new();
        let mut offset = 0;
        for tensor in tensors {
            for first in (0..tensor.num_rows()).step_by(rows_at_a_time) {
                let num = rows_at_a_time.min(tensor.num_rows() - first);
                staging.resize(num * row_bytes, 0);
                self.cpu.threads.share_chunks(&mut staging, row_bytes, |row, (): &mut (), out| {
                    convert.row(tensor, first + row, format, out);
                });
                memory.write_at(offset, &staging)?;
                offset += staging.len();
            }
        }
        convert.finish(name)?;
        Ok(Matrix { memory, num_rows, row_len })
    }

    fn rows(&self, name: &str, role: MatrixRole, tensor: &Tensor<'_>) -> Result<Matrix, Error> {
        self.matrix(name, role, std::slice::from_ref(tensor))
    }
}
