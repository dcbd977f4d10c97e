//! Tensors of a checkpoint to matrices in memory, in the precision that was chosen: row by row, so that
//! nothing but the matrix itself takes memory. Or only to the account of what that would take.

use std::cell::{Cell, RefCell};
use std::sync::OnceLock;

use crate::Error;
use crate::kernels::{
    Cpu, Int8Columns, Kernel, PackedMatrix, RowSource, Simd, Vector, packed_bytes,
};
use crate::precision::{MatrixRole, Precision};
use crate::quant::MAX_BLOCK_LEN;
use crate::weights::{Format, Tensor};

use super::Store;

/// Packs the matrices of a model.
#[derive(Debug)]
pub(super) struct Packing<'a> {
    /// What packs; without it nothing is packed, nor read.
    cpu: Option<&'a Cpu>,
    precision: Option<Precision>,
    /// Matrices whose rows are no whole number of the precision's blocks.
    num_finer: Cell<usize>,
    account: RefCell<Account>,
}

/// The tensors of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Account {
    /// Their names, with their shapes, in the order in which they were asked for.
    pub(crate) tensors: Vec<(String, Vec<usize>)>,
    /// Memory that they take once they are packed.
    pub(crate) num_bytes: u64,
    /// Numbers that are stored in each format.
    pub(crate) stored: Vec<(Format, u64)>,
}

/// Rows to be looked up, as a file would have them.
#[derive(Debug)]
pub(crate) struct StoredRows {
    format: Format,
    /// Scales of the columns, where rows are whole numbers.
    columns: Option<Int8Columns>,
    bytes: Vec<u8>,
}

impl<'a> Packing<'a> {
    /// In a precision, or as the checkpoint has everything.
    pub(super) fn new(cpu: &'a Cpu, precision: Option<Precision>) -> Self {
        Self { cpu: Some(cpu), ..Self::counting(precision) }
    }

    /// Only counts what a precision takes.
    pub(super) fn counting(precision: Option<Precision>) -> Self {
        Self { cpu: None, precision, num_finer: Cell::new(0), account: RefCell::default() }
    }

    /// How a tensor is kept.
    fn format(&self, role: MatrixRole, tensor: &Tensor<'_>) -> Format {
        let stored = tensor.format();
        let Some(precision) = self.precision else { return stored };
        let format = precision.format(role, tensor.row_len(), stored);
        if format != precision.format(role, MAX_BLOCK_LEN, stored) {
            self.num_finer.set(self.num_finer.get() + 1);
        }
        format
    }

    fn add(&self, num_bytes: usize) {
        self.account.borrow_mut().num_bytes += num_bytes as u64;
    }

    /// Ends it: what was taken in. Says what could not be kept in the precision itself.
    pub(super) fn finish(self) -> Account {
        if let (Some(precision), matrices @ 1.., Some(_)) =
            (self.precision, self.num_finer.get(), self.cpu)
        {
            tracing::warn!(
                %precision,
                matrices,
                "rows that are no whole number of blocks are kept in a finer format"
            );
        }
        self.account.into_inner()
    }
}

impl Store for Packing<'_> {
    type Matrix = PackedMatrix;
    type Vector = Vec<f32>;
    type Rows = StoredRows;

    fn note(&self, name: &str, shape: &[usize], format: Format) {
        let mut account = self.account.borrow_mut();
        let numbers = shape.iter().map(|len| *len as u64).product::<u64>();
        account.tensors.push((name.to_owned(), shape.to_vec()));
        match account.stored.iter_mut().find(|(stored, _)| *stored == format) {
            Some((_, count)) => *count += numbers,
            None => account.stored.push((format, numbers)),
        }
    }

    fn numbers(&self, tensor: &Tensor<'_>) -> Vec<f32> {
        self.add(tensor.num_rows() * tensor.row_len() * size_of::<f32>());
        if self.cpu.is_some() { tensor.to_vec() } else { Vec::new() }
    }

    fn vector(&self, numbers: Vec<f32>) -> Result<Vec<f32>, Error> {
        Ok(numbers)
    }

    fn matrix(
        &self,
        name: &str,
        role: MatrixRole,
        tensors: &[Tensor<'_>],
    ) -> Result<PackedMatrix, Error> {
        let formats: Vec<_> = tensors.iter().map(|tensor| self.format(role, tensor)).collect();
        let in_features = tensors.first().map_or(0, Tensor::row_len);
        let Some(cpu) = self.cpu else {
            let rows: Vec<_> =
                formats.into_iter().zip(tensors.iter().map(Tensor::num_rows)).collect();
            for rows in rows.chunk_by(|(format, _), (other, _)| format == other) {
                let num_rows = rows.iter().map(|(_, num_rows)| num_rows).sum();
                self.add(packed_bytes(Simd::detect(), rows[0].0, num_rows, in_features));
            }
            return Ok(PackedMatrix::default());
        };
        let convert = Convert::new(cpu.simd);
        let writes: Vec<_> = tensors
            .iter()
            .zip(&formats)
            .map(|(tensor, format)| {
                |row: usize, out: &mut [u8]| convert.row(tensor, row, *format, out)
            })
            .collect();
        let sources: Vec<_> = formats
            .iter()
            .zip(tensors)
            .zip(&writes)
            .map(|((format, tensor), write)| RowSource {
                format: *format,
                num_rows: tensor.num_rows(),
                write,
            })
            .collect();
        let matrix = PackedMatrix::pack(cpu, in_features, &sources)?;
        convert.finish(name)?;
        self.add(matrix.num_bytes());
        Ok(matrix)
    }

    fn rows(&self, name: &str, role: MatrixRole, tensor: &Tensor<'_>) -> Result<StoredRows, Error> {
        let format = self.format(role, tensor);
        let row_bytes = format.num_bytes(tensor.row_len());
        self.add(row_bytes * tensor.num_rows());
        if format == Format::Int8 {
            self.add(Int8Columns::num_bytes(tensor.row_len()));
        }
        let Some(cpu) = self.cpu else {
            return Ok(StoredRows { format, columns: None, bytes: Vec::new() });
        };
        let convert = Convert::new(cpu.simd);
        let columns = (format == Format::Int8).then(|| {
            let shape = (tensor.num_rows(), tensor.row_len());
            Int8Columns::of(&cpu.threads, shape, |row, numbers| tensor.decode_row(row, numbers))
        });
        let mut bytes = vec![0; row_bytes * tensor.num_rows()];
        let given_bytes = format.given().num_bytes(tensor.row_len());
        cpu.threads.share_chunks(&mut bytes, row_bytes, |row, given: &mut Vec<u8>, out| {
            let Some(columns) = &columns else {
                convert.row(tensor, row, format, out);
                return;
            };
            given.resize(given_bytes, 0);
            convert.row(tensor, row, format, given);
            let mut numbers = vec![0.0; tensor.row_len()];
            format.given().decode(given, &mut numbers);
            columns.encode(&numbers, out);
        });
        convert.finish(name)?;
        Ok(StoredRows { format, columns, bytes })
    }
}

impl StoredRows {
    /// Widens a row.
    pub(super) fn look_up(&self, row: usize, out: &mut [f32]) {
        let row_bytes = self.format.num_bytes(out.len());
        let bytes = &self.bytes[row * row_bytes..][..row_bytes];
        match &self.columns {
            Some(columns) => columns.decode(bytes, out),
            None => self.format.decode(bytes, out),
        }
    }
}

/// Converts rows on several threads, and remembers the first that could not be.
#[derive(Debug)]
pub(crate) struct Convert {
    simd: Simd,
    problem: OnceLock<String>,
}

impl Convert {
    pub(crate) fn new(simd: Simd) -> Self {
        Self { simd, problem: OnceLock::new() }
    }

    /// A row as it is given to be kept in a format.
    pub(crate) fn row(&self, tensor: &Tensor<'_>, row: usize, kept: Format, out: &mut [u8]) {
        let to = kept.given();
        if tensor.format() == kept {
            out.copy_from_slice(tensor.row(row));
            return;
        }
        let mut numbers = vec![0.0; tensor.row_len()];
        tensor.decode_row(row, &mut numbers);
        let is_beyond = |number: &&f32| number.is_nan() || number.abs() > to.max();
        if let Some(number) = numbers.iter().find(is_beyond) {
            let problem = format!("has the number {number}, {to} only reaches to {}", to.max());
            // Another thread's problem is as good.
            let _first = self.problem.set(problem);
        }
        self.simd.run(Encode { numbers: &numbers, to, out });
    }

    /// Says what could not be converted. `name` is that of the tensor.
    pub(crate) fn finish(self, name: &str) -> Result<(), Error> {
        match self.problem.into_inner() {
            Some(problem) => Err(Error::Model(format!(
                "the tensor {name} {problem}: it needs another precision"
            ))),
            None => Ok(()),
        }
    }
}

struct Encode<'a> {
    numbers: &'a [f32],
    to: Format,
    out: &'a mut [u8],
}

impl Kernel for Encode<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        self.to.encode(self.numbers, self.out);
    }
}
