//! A feed-forward network: two layers side by side, one the gates of the other, and one that follows.
//!
//! On a matrix unit what lies between the layers is never in memory but as the left-hand side of the last.

use std::ops::Range;

use super::elementwise::{ELEMENT_WORK, PIECE_ROWS, activate};
use super::{
    Activations, Cpu, Epilogue, Kernel, Linear, PAIR_OUTPUTS, PackedMatrix, Rows, SharedRows,
    Vector, matmul,
};
#[cfg(target_arch = "x86_64")]
use super::{
    Gates,
    int8::{self, Int8Panels},
    tiles::{self, Gated, Left, Numbers, Tiles, Weights},
};
use crate::config::Activation;

/// `down(activation(gate(x)) * up(x))`
#[derive(Debug)]
pub(crate) struct Mlp<M = PackedMatrix, V = Vec<f32>> {
    pub(crate) activation: Activation,
    /// Gates, and behind them ups: `(2 * intermediate_size, hidden_size)`.
    pub(crate) gate_up: Linear<M, V>,
    /// `(hidden_size, intermediate_size)`
    pub(crate) down: Linear<M, V>,
}

/// What lies between the layers. Grows when it is written, and is used again.
#[derive(Debug)]
pub(crate) struct Inner {
    /// `(num_rows, 2 * intermediate_size)`
    gate_up: Activations,
    /// `(num_rows, intermediate_size)`
    activated: Activations,
    /// The same, where the last layer is multiplied on a matrix unit.
    #[cfg(target_arch = "x86_64")]
    tiles: Left,
}

impl Inner {
    /// For networks of this width.
    pub(crate) fn new(intermediate_size: usize) -> Self {
        Self {
            gate_up: Activations::new(0, 2 * intermediate_size),
            activated: Activations::new(0, intermediate_size),
            #[cfg(target_arch = "x86_64")]
            tiles: Left::default(),
        }
    }
}

impl Mlp {
    /// `inner = activation(gate(x)) * up(x)`
    pub(crate) fn widen(&self, cpu: &Cpu, (x, num_rows): (Rows<'_>, usize), inner: &mut Inner) {
        #[cfg(target_arch = "x86_64")]
        if let Some((tiles, weights)) = self.gates_on_tiles(cpu) {
            let shape = (self.gate_up.weight.in_features, self.gate_up.weight.out_features);
            let to = if self.is_inner_in_tiles(cpu) {
                Gated::Tiles(inner.tiles.shared(num_rows, shape.1 / 2))
            } else {
                inner.activated.ensure_rows(num_rows);
                Gated::Rows(inner.activated.shared())
            };
            let gated = (to, self.gates());
            tiles::matmul_gated((cpu, tiles), (x, num_rows), (weights, shape), gated);
            return;
        }
        let Inner { gate_up, activated, .. } = inner;
        #[cfg(target_arch = "x86_64")]
        if let Some(panels) = self.gates_in_bytes(cpu) {
            activated.ensure_rows(num_rows);
            let weights = (panels, self.gate_up.weight.in_features);
            let gated = (activated.shared(), self.gates());
            int8::matmul_gated(cpu, (x, num_rows), weights, gated);
            return;
        }
        gate_up.ensure_rows(num_rows);
        activated.ensure_rows(num_rows);
        matmul(cpu, (x, num_rows), &self.gate_up, (gate_up.shared(), Epilogue::Store));
        let (gate_up, out) = (gate_up.rows(), activated.shared());
        let pieces = num_rows.div_ceil(PIECE_ROWS);
        cpu.threads.share(pieces, num_rows * out.width() * ELEMENT_WORK * 2, |piece| {
            let rows = piece * PIECE_ROWS..num_rows.min((piece + 1) * PIECE_ROWS);
            cpu.simd.run(Gate { gate_up, rows, out, activation: self.activation });
        });
    }

    /// `out = down(inner)`, or added to `out`.
    pub(crate) fn narrow(
        &self,
        cpu: &Cpu,
        (inner, num_rows): (&Inner, usize),
        (out, epilogue): (SharedRows<'_>, Epilogue),
    ) {
        #[cfg(target_arch = "x86_64")]
        if let (true, Some(tiles), Some(weights)) =
            (self.is_inner_in_tiles(cpu), &cpu.tiles, self.down.weight.on_tiles())
        {
            let weights = (weights, self.down.weight.in_features);
            let out = (out, self.down.finish(epilogue));
            tiles::matmul_tiles((cpu, tiles), (&inner.tiles, num_rows), weights, out);
            return;
        }
        matmul(cpu, (inner.activated.rows(), num_rows), &self.down, (out, epilogue));
    }

    /// What becomes of the first layers' sums, where both are multiplied together.
    #[cfg(target_arch = "x86_64")]
    fn gates(&self) -> Gates<'_> {
        Gates { activation: self.activation, bias: self.gate_up.bias.as_deref() }
    }

    /// Whether gates and ups fill pairs of panels.
    #[cfg(target_arch = "x86_64")]
    fn is_aligned(&self) -> bool {
        self.gate_up.weight.out_features.is_multiple_of(2 * PAIR_OUTPUTS)
    }

    /// The first weights, if they are multiplied on a matrix unit and gates and ups fill pairs of panels.
    #[cfg(target_arch = "x86_64")]
    fn gates_on_tiles<'a>(&'a self, cpu: &'a Cpu) -> Option<(&'a Tiles, Weights<'a>)> {
        let weights = self.gate_up.weight.on_tiles().filter(|_| self.is_aligned())?;
        cpu.tiles.as_ref().map(|tiles| (tiles, weights))
    }

    /// The first weights, if they are multiplied as bytes and gates and ups fill pairs of panels.
    #[cfg(target_arch = "x86_64")]
    fn gates_in_bytes(&self, cpu: &Cpu) -> Option<&Int8Panels> {
        let multiplies_bytes = cpu.simd.multiplies_bytes() && self.is_aligned();
        self.gate_up.weight.in_int8().filter(|_| multiplies_bytes)
    }

    /// Whether what lies between the layers is in tiles. Whole numbers need the largest of a row first.
    #[cfg(target_arch = "x86_64")]
    fn is_inner_in_tiles(&self, cpu: &Cpu) -> bool {
        let numbers = self.down.weight.on_tiles().map(|weights| weights.numbers());
        self.gates_on_tiles(cpu).is_some() && numbers == Some(Numbers::Bf16)
    }
}

/// `out = activation(gate) * up`, where a row of `gate_up` is the gates and then the ups.
struct Gate<'a> {
    gate_up: Rows<'a>,
    rows: Range<usize>,
    out: SharedRows<'a>,
    activation: Activation,
}

impl Kernel for Gate<'_> {
    #[inline(always)]
    #[expect(unsafe_code, reason = "several threads write disjoint rows")]
    fn run<V: Vector>(self) {
        let width = self.out.width();
        for row in self.rows {
            // SAFETY: each piece of work has rows of its own.
            let out = unsafe { self.out.slice_mut(row, 0, width) };
            out.copy_from_slice(self.gate_up.slice(row, 0, width));
            activate(self.activation, out);
            for (out, up) in out.iter_mut().zip(self.gate_up.slice(row, width, width)) {
                *out *= up;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{PackedMatrix, RowSource, Simd, Threads};
    use super::*;
    use crate::quant::BlockFormat;
    use crate::weights::Format;

    fn number(seed: usize) -> f32 {
        let mixed = (seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 57;
        (mixed as f32 - 64.0) / 256.0
    }

    fn linear(cpu: &Cpu, format: Format, [inputs, outputs]: [usize; 2], biased: bool) -> Linear {
        let write = |row: usize, bytes: &mut [u8]| {
            let numbers: Vec<f32> = (0..inputs).map(|k| number(row * inputs + k)).collect();
            format.given().encode(&numbers, bytes);
        };
        let source = RowSource { format, num_rows: outputs, write: &write };
        let weight = PackedMatrix::pack(cpu, inputs, &[source]).unwrap();
        Linear { weight, bias: biased.then(|| (0..outputs).map(number).collect()) }
    }

    /// The network, one layer after the other.
    fn step_by_step(cpu: &Cpu, mlp: &Mlp, (x, num_rows): (Rows<'_>, usize)) -> Activations {
        let width = mlp.down.weight.in_features;
        let mut gate_up = Activations::new(num_rows, 2 * width);
        let mut activated = Activations::new(num_rows, width);
        let mut out = Activations::new(num_rows, mlp.down.weight.out_features);
        matmul(cpu, (x, num_rows), &mlp.gate_up, (gate_up.shared(), Epilogue::Store));
        for row in 0..num_rows {
            let (gates, ups) = gate_up.row(row).split_at(width);
            let activated = activated.row_mut(row);
            activated.copy_from_slice(gates);
            activate(mlp.activation, activated);
            activated.iter_mut().zip(ups).for_each(|(gate, up)| *gate *= up);
        }
        let x = (activated.rows(), num_rows);
        matmul(cpu, x, &mlp.down, (out.shared(), Epilogue::Store));
        out
    }

    #[test]
    fn layers_together_give_the_bits_of_one_after_the_other() {
        let activations = [
            Activation::Silu,
            Activation::GeluTanh,
            Activation::Gelu,
            Activation::QuickGelu,
            Activation::Relu,
        ];
        let q8_0 = Format::Block(BlockFormat::Q8_0);
        let formats = [Format::F32, Format::F16, Format::Bf16, Format::Int8, q8_0];
        // The second is no multiple of what a matrix unit takes; the third is more inputs than one block of them.
        let widths = [(64, 96), (64, 80), (96, 1024)];
        for simd in Simd::available() {
            let cpu = Cpu::new(simd, Threads::new(2).unwrap());
            for (index, format) in formats.into_iter().enumerate() {
                let fits = |(_, inner): &(usize, usize)| inner % format.block_len() == 0;
                for (hidden, inner) in widths.into_iter().filter(fits) {
                    for (rows, activation) in
                        [1, 16, 33, 300].into_iter().zip(activations.iter().cycle().skip(index))
                    {
                        let biased = rows % 2 == 1;
                        let mlp = Mlp {
                            activation: *activation,
                            gate_up: linear(&cpu, format, [hidden, 2 * inner], biased),
                            down: linear(&cpu, format, [inner, hidden], biased),
                        };
                        let mut x = Activations::new(rows, hidden);
                        for row in 0..rows {
                            let numbers = x.row_mut(row).iter_mut().enumerate();
                            numbers.for_each(|(k, x)| *x = 16.0 * number(7 + row * hidden + k));
                        }
                        let want = step_by_step(&cpu, &mlp, (x.rows(), rows));
                        let mut between = Inner::new(inner);
                        let mut out = Activations::new(rows, hidden);
                        mlp.widen(&cpu, (x.rows(), rows), &mut between);
                        mlp.narrow(&cpu, (&between, rows), (out.shared(), Epilogue::Store));
                        for row in 0..rows {
                            let bits = |x: &Activations| -> Vec<u32> {
                                x.row(row).iter().map(|x| x.to_bits()).collect()
                            };
                            let name = simd.name();
                            let shape = (rows, hidden, inner);
                            assert_eq!(
                                bits(&out),
                                bits(&want),
                                "{name}, {format}: {row} of {shape:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}
