//! The weights of a linear layer, packed at load into panels of 16 outputs.

use super::blocks::{BlockPanels, lines_per_panel, pack_row};
use super::int8::{self, Int8Columns, Int8Panels};
use super::lanes::{Bf16Lanes, F16Lanes, Line, Stored, U8Lanes};
use super::memory::{Plain, Zeroed};
#[cfg(target_arch = "x86_64")]
use super::tiles::{self, Numbers};
use super::{Cpu, Kernel, LANES, Lanes, PAIR_LINES, PAIR_OUTPUTS, Simd, Threads, Vector};
use crate::Error;
use crate::weights::Format;

/// The weights of a linear layer, `(out_features, in_features)`.
///
/// Inside a panel `k` (the input) is the slow index. Weights stay in the format that they are given in;
/// what is next to each other and in one format is one part.
#[derive(Debug, Default)]
pub(crate) struct PackedMatrix {
    pub(super) parts: Vec<PackedRows>,
    pub(super) in_features: usize,
    pub(super) out_features: usize,
}

/// Consecutive outputs in one format.
#[derive(Debug)]
pub(super) struct PackedRows {
    pub(super) panels: Panels,
    pub(super) first_output: usize,
    pub(super) num_outputs: usize,
}

/// Panels one behind the other.
#[derive(Debug)]
pub(super) enum Panels {
    F32(Zeroed<Lanes>),
    F16(Zeroed<F16Lanes>),
    Bf16(Zeroed<Bf16Lanes>),
    /// bfloat16 for the matrix unit.
    #[cfg(target_arch = "x86_64")]
    Tiles(Zeroed<Line>),
    Int8(Int8Panels),
    Block(BlockPanels),
}

/// Rows to be packed: the weights of some outputs.
pub(crate) struct RowSource<'a> {
    /// How they are kept.
    pub(crate) format: Format,
    /// How many there are.
    pub(crate) num_rows: usize,
    /// Writes the bytes of a row, in this format or what it is given in ([`Format::given`]).
    pub(crate) write: &'a (dyn Fn(usize, &mut [u8]) + Sync),
}

impl PackedMatrix {
    /// Packs the rows of several sources, one behind the other.
    ///
    /// Fails for want of memory.
    pub(crate) fn pack(
        cpu: &Cpu,
        in_features: usize,
        sources: &[RowSource<'_>],
    ) -> Result<Self, Error> {
        let mut out_features = 0;
        let mut parts = Vec::new();
        for sources in sources.chunk_by(|a, b| a.format == b.format) {
            let part =
                PackedRows::pack(cpu, in_features, out_features, sources).map_err(|error| {
                    Error::OutOfMemory(format!(
                        "no room for weights, {in_features} inputs wide: {error}"
                    ))
                })?;
            out_features += part.num_outputs;
            parts.push(part);
        }
        Ok(Self { parts, in_features, out_features })
    }

    /// The weights, if all of them are multiplied together on a matrix unit, where there is one.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn on_tiles(&self) -> Option<tiles::Weights<'_>> {
        match &*self.parts {
            [part] => part.on_tiles(),
            _ => None,
        }
    }

    /// The weights, if all of them are whole numbers.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn in_int8(&self) -> Option<&Int8Panels> {
        match &*self.parts {
            [PackedRows { panels: Panels::Int8(panels), .. }] => Some(panels),
            _ => None,
        }
    }

    /// Whether all weights are `f32`.
    pub(crate) fn is_f32(&self) -> bool {
        self.parts.iter().all(|part| matches!(part.panels, Panels::F32(_)))
    }

    /// Memory that it takes.
    pub(crate) fn num_bytes(&self) -> usize {
        let bytes = |part: &PackedRows| match &part.panels {
            Panels::F32(lanes) => size_of_val(&**lanes),
            Panels::F16(lanes) => size_of_val(&**lanes),
            Panels::Bf16(lanes) => size_of_val(&**lanes),
            #[cfg(target_arch = "x86_64")]
            Panels::Tiles(lines) => size_of_val(&**lines),
            Panels::Int8(panels) => panels.num_bytes(),
            Panels::Block(panels) => panels.num_bytes(),
        };
        self.parts.iter().map(bytes).sum()
    }

    /// Widens the weights of one output: `(in_features)`.
    pub(crate) fn row(&self, simd: Simd, output: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.in_features, "numbers of a row");
        let found = self.parts.iter().rfind(|part| part.first_output <= output);
        let part = found.expect("an output of the matrix");
        simd.run(UnpackRow { panels: &part.panels, output: output - part.first_output, out });
    }
}

/// Memory that a matrix of one format takes.
pub(crate) fn packed_bytes(
    simd: Simd,
    format: Format,
    out_features: usize,
    in_features: usize,
) -> usize {
    #[cfg(target_arch = "x86_64")]
    if simd.has_matrix_unit() && format == Format::Bf16 {
        return num_tile_lines(out_features, in_features) * size_of::<Line>();
    }
    if format == Format::Int8 {
        return int8::packed_bytes(out_features, in_features);
    }
    let panel_bytes = match format {
        Format::Block(block) => lines_per_panel(block, in_features) * size_of::<U8Lanes>(),
        _ => LANES * format.num_bytes(in_features),
    };
    out_features.div_ceil(LANES) * panel_bytes
}

/// Lines of a matrix in tiles.
#[cfg(target_arch = "x86_64")]
fn num_tile_lines(out_features: usize, in_features: usize) -> usize {
    out_features.div_ceil(PAIR_OUTPUTS)
        * in_features.div_ceil(Numbers::Bf16.tile_inputs())
        * PAIR_LINES
}

impl PackedRows {
    /// The weights, if they are multiplied on a matrix unit, where there is one.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn on_tiles(&self) -> Option<tiles::Weights<'_>> {
        match &self.panels {
            Panels::Tiles(lines) => Some(tiles::Weights::Tiles(lines)),
            Panels::Int8(panels) => Some(tiles::Weights::Int8(panels)),
            Panels::Block(panels) => Some(tiles::Weights::Blocks(panels)),
            Panels::F32(_) | Panels::F16(_) | Panels::Bf16(_) => None,
        }
    }

    fn pack(
        cpu: &Cpu,
        in_features: usize,
        first_output: usize,
        sources: &[RowSource<'_>],
    ) -> std::io::Result<Self> {
        let format = sources[0].format;
        let num_outputs = sources.iter().map(|source| source.num_rows).sum();
        let write = |mut row: usize, bytes: &mut [u8]| {
            for source in sources {
                if row < source.num_rows {
                    (source.write)(row, bytes);
                    return;
                }
                row -= source.num_rows;
            }
        };
        let rows = Rows { threads: &cpu.threads, write: &write, num_outputs, in_features, format };
        let panels = match format {
            Format::F32 => Panels::F32(rows.pack(|lanes: &mut Lanes, lane, bytes| {
                lanes.0[lane] = f32::from_le_bytes(bytes);
            })?),
            Format::F16 => Panels::F16(rows.pack(|lanes: &mut F16Lanes, lane, bytes| {
                lanes.0[lane] = u16::from_le_bytes(bytes);
            })?),
            #[cfg(target_arch = "x86_64")]
            Format::Bf16 if cpu.simd.has_matrix_unit() => Panels::Tiles(rows.pack_tiles()?),
            Format::Bf16 => Panels::Bf16(rows.pack(|lanes: &mut Bf16Lanes, lane, bytes| {
                lanes.0[lane] = u16::from_le_bytes(bytes);
            })?),
            Format::Int8 => Panels::Int8(rows.pack_int8()?),
            Format::Block(block) => {
                let num_panels = num_outputs.div_ceil(LANES);
                let mut panels = BlockPanels::new(block, num_panels, in_features)?;
                let lines = lines_per_panel(block, in_features);
                rows.pack_panels::<_, LANES>(panels.lines_mut(), lines, |panel, lane, bytes| {
                    pack_row(block, bytes, lane, panel);
                });
                Panels::Block(panels)
            }
        };
        Ok(Self { panels, first_output, num_outputs })
    }
}

/// Rows of one format, to be packed.
struct Rows<'a, W> {
    threads: &'a Threads,
    write: &'a W,
    num_outputs: usize,
    in_features: usize,
    format: Format,
}

impl<W: Fn(usize, &mut [u8]) + Sync> Rows<'_, W> {
    /// Panels of plain numbers of `N` bytes.
    fn pack<S: Plain, const N: usize>(
        &self,
        set: impl Fn(&mut S, usize, [u8; N]) + Send + Sync,
    ) -> std::io::Result<Zeroed<S>> {
        let num_panels = self.num_outputs.div_ceil(LANES);
        let mut panels = Zeroed::new_streamed(num_panels * self.in_features)?;
        self.pack_panels::<_, LANES>(&mut panels, self.in_features, |panel, lane, bytes| {
            for (lanes, bytes) in panel.iter_mut().zip(bytes.as_chunks::<N>().0) {
                set(lanes, lane, *bytes);
            }
        });
        Ok(panels)
    }

    /// Pairs of panels of bfloat16, as tiles: two inputs of 16 outputs in a line, 16 lines of the one panel,
    /// 16 of the other.
    #[cfg(target_arch = "x86_64")]
    fn pack_tiles(&self) -> std::io::Result<Zeroed<Line>> {
        let mut lines = Zeroed::new_streamed(num_tile_lines(self.num_outputs, self.in_features))?;
        let pair_lines = num_tile_lines(1, self.in_features);
        self.pack_panels::<Line, PAIR_OUTPUTS>(&mut lines, pair_lines, |pair, output, bytes| {
            for (k, number) in bytes.as_chunks::<2>().0.iter().enumerate() {
                let (line, at) = tile_place(output, k);
                pair[line].0.as_chunks_mut().0[at] = *number;
            }
        });
        Ok(lines)
    }

    /// Pairs of panels of whole numbers.
    fn pack_int8(&self) -> std::io::Result<Int8Panels> {
        let row_bytes = self.format.num_bytes(self.in_features);
        let given_bytes = self.format.given().num_bytes(self.in_features);
        let read = |row: usize, numbers: &mut [f32]| {
            let mut bytes = vec![0; given_bytes];
            (self.write)(row, &mut bytes);
            self.format.given().decode(&bytes, numbers);
        };
        let shape = (self.num_outputs, self.in_features);
        let columns = Int8Columns::of(self.threads, shape, read);
        let mut panels = Int8Panels::new(self.num_outputs, columns)?;
        let pair_lines = panels.pair_lines();
        let (columns, lines) = panels.parts_mut();
        self.pack_panels::<Line, PAIR_OUTPUTS>(lines, pair_lines, |pair, output, bytes| {
            let mut numbers = vec![0.0; self.in_features];
            self.format.given().decode(bytes, &mut numbers);
            let mut row = vec![0; row_bytes];
            columns.encode(&numbers, &mut row);
            int8::pack_row(&row, output, pair);
        });
        Ok(panels)
    }

    /// Calls `put(panel, lane, bytes of the row)` for every row, where panels are of `WIDTH` outputs.
    fn pack_panels<T: Send, const WIDTH: usize>(
        &self,
        panels: &mut [T],
        panel_len: usize,
        put: impl Fn(&mut [T], usize, &[u8]) + Send + Sync,
    ) {
        let row_bytes = self.format.given().num_bytes(self.in_features);
        self.threads.share_chunks(panels, panel_len, |index, bytes: &mut Vec<u8>, panel| {
            bytes.resize(row_bytes, 0);
            let first = index * WIDTH;
            for lane in 0..WIDTH.min(self.num_outputs - first) {
                (self.write)(first + lane, bytes);
                put(panel, lane, bytes);
            }
        });
    }
}

/// Where a weight is in its pair of panels: its line, and its place there.
#[cfg(target_arch = "x86_64")]
fn tile_place(output: usize, k: usize) -> (usize, usize) {
    let tile_inputs = Numbers::Bf16.tile_inputs();
    let tile = k / tile_inputs * 2 + output / LANES;
    (tile * LANES + k % tile_inputs / 2, output % LANES * 2 + k % 2)
}

/// Widens one lane of a panel.
struct UnpackRow<'a> {
    panels: &'a Panels,
    output: usize,
    out: &'a mut [f32],
}

impl Kernel for UnpackRow<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { panels, output, out } = self;
        let (panel, lane) = (output / LANES, output % LANES);
        match panels {
            Panels::F32(lanes) => unpack::<V, _>(lanes, panel, lane, out),
            Panels::F16(lanes) => unpack::<V, _>(lanes, panel, lane, out),
            Panels::Bf16(lanes) => unpack::<V, _>(lanes, panel, lane, out),
            #[cfg(target_arch = "x86_64")]
            Panels::Tiles(lines) => {
                let pair_lines = num_tile_lines(1, out.len());
                let pair = &lines[output / PAIR_OUTPUTS * pair_lines..][..pair_lines];
                for (k, out) in out.iter_mut().enumerate() {
                    let (line, at) = tile_place(output % PAIR_OUTPUTS, k);
                    let bits = u16::from_le_bytes(pair[line].0.as_chunks().0[at]);
                    *out = f32::from_bits(u32::from(bits) << 16);
                }
            }
            Panels::Int8(panels) => panels.row(output, out),
            Panels::Block(panels) => panels.row::<V>(panel, lane, out),
        }
    }
}

#[inline(always)]
fn unpack<V: Vector, S: Stored>(panels: &[S], panel: usize, lane: usize, out: &mut [f32]) {
    let mut widened = Lanes::ZERO;
    for (lanes, out) in panels[panel * out.len()..].iter().zip(out) {
        lanes.load::<V>().store(&mut widened);
        *out = widened.0[lane];
    }
}
