//! A step as the kernels want it: lists of whole numbers, one behind the other, that are copied to the device at once.

use std::ops::Range;

use super::device::{Address, Memory};
use super::kernels::{SPLIT_KEYS, Shape};
use crate::Error;
use crate::sampler::PlainChoice;
use crate::step::{BLOCK_SIZE, SequenceInput, StepInput};

/// The lists of a step. Their memory is used again.
#[derive(Debug, Default)]
pub(super) struct StepPlan {
    numbers: Vec<i32>,
    /// Token ids, `(num_tokens)`.
    pub(super) tokens: List,
    /// Positions of the tokens in their sequences.
    pub(super) positions: List,
    /// Whether a token's sequence is a long one, 0 or 1.
    pub(super) is_long: List,
    /// Where keys and values of a token live: block * BLOCK_SIZE + offset.
    pub(super) slots: List,
    /// Tokens whose logits are wanted.
    pub(super) wanted: List,
    /// Items of `attend_prefill`, four numbers each.
    pub(super) prefill: List,
    /// Items of `attend_decode`, six numbers each.
    pub(super) decode: List,
    /// Items of `combine`, three numbers each.
    pub(super) combine: List,
    /// Blocks of the sequences, `(num_sequences, table_width)`.
    pub(super) tables: List,
    pub(super) table_width: usize,
    /// Items of `sample`, seven numbers each.
    pub(super) samples: List,
    /// Partial results of attention.
    pub(super) num_partials: usize,
}

/// A list's place.
#[derive(Clone, Debug, Default)]
pub(super) struct List {
    range: Range<usize>,
    item_len: usize,
}

impl List {
    /// Number of its items.
    pub(super) fn len(&self) -> usize {
        self.range.len() / self.item_len.max(1)
    }

    /// Its address on the device, and the number of its items.
    pub(super) fn at(&self, plan: &Memory) -> (Address, usize) {
        (plan.address() + (self.range.start * size_of::<i32>()) as u64, self.len())
    }
}

impl StepPlan {
    /// Lays a step out.
    pub(super) fn fill(
        &mut self,
        input: &StepInput,
        choices: &[Option<PlainChoice>],
        shape: &Shape,
    ) {
        self.numbers.clear();
        let sequences = || input.sequences.iter();
        let positions = |s: &SequenceInput| {
            s.num_computed_tokens..s.num_computed_tokens + s.num_scheduled_tokens
        };
        self.tokens = self.list(1, |list| list.extend(input.token_ids.iter().map(|id| *id as i32)));
        self.positions = self.list(1, |list| {
            list.extend(sequences().flat_map(positions).map(int));
        });
        self.is_long = self.list(1, |list| {
            list.extend(sequences().flat_map(|s| positions(s).map(|_| i32::from(s.is_long))));
        });
        self.slots = self.list(1, |list| {
            for sequence in sequences() {
                list.extend(positions(sequence).map(|position| {
                    let block = sequence.block_table[position / BLOCK_SIZE].0 as usize;
                    int(block * BLOCK_SIZE + position % BLOCK_SIZE)
                }));
            }
        });
        let mut end = 0;
        self.wanted = self.list(1, |list| {
            for sequence in sequences() {
                end += sequence.num_scheduled_tokens;
                list.extend(sequence.wants_logits.then_some(int(end - 1)));
            }
        });
        let num_blocks = |s: &SequenceInput| positions(s).end.div_ceil(BLOCK_SIZE);
        let width = sequences().map(num_blocks).max().unwrap_or(0);
        self.tables = self.list(width, |list| {
            for sequence in sequences() {
                let start = list.len();
                let blocks = &sequence.block_table[..num_blocks(sequence)];
                list.extend(blocks.iter().map(|block| block.0 as i32));
                list.resize(start + width, 0);
            }
        });
        self.table_width = width;
        self.fill_attention(input, shape);
        self.samples = self.list(7, |list| {
            for (row, choice) in choices.iter().enumerate() {
                let Some(choice) = choice else { continue };
                let numbers = [choice.temperature, choice.top_p, choice.min_p];
                list.extend([int(row), int(choice.top_k)]);
                list.extend(numbers.map(|number| number.to_bits().cast_signed()));
                list.extend([choice.draw as u32, (choice.draw >> 32) as u32].map(u32::cast_signed));
            }
        });
    }

    fn fill_attention(&mut self, input: &StepInput, shape: &Shape) {
        let decodes = |s: &SequenceInput| s.num_scheduled_tokens == 1 && shape.has_decode();
        let sequences = || {
            let mut first_token = 0;
            input.sequences.iter().enumerate().map(move |(index, sequence)| {
                let first = first_token;
                first_token += sequence.num_scheduled_tokens;
                (index, first, sequence)
            })
        };
        self.prefill = self.list(4, |list| {
            for (index, first, sequence) in sequences().filter(|(_, _, s)| !decodes(s)) {
                for start in (0..sequence.num_scheduled_tokens).step_by(shape.prefill_tokens()) {
                    let num = shape.prefill_tokens().min(sequence.num_scheduled_tokens - start);
                    let position = sequence.num_computed_tokens + start;
                    list.extend([int(first + start), int(num), int(position), int(index)]);
                }
            }
        });
        let num_splits = |s: &SequenceInput| (s.num_computed_tokens + 1).div_ceil(SPLIT_KEYS);
        let mut num_partials = 0;
        self.decode = self.list(6, |list| {
            for (index, token, sequence) in sequences().filter(|(_, _, s)| decodes(s)) {
                let position = sequence.num_computed_tokens;
                for split in 0..num_splits(sequence) {
                    let first_key = split * SPLIT_KEYS;
                    let end = (first_key + SPLIT_KEYS).min(position + 1);
                    let partial = if num_splits(sequence) == 1 { -1 } else { int(num_partials) };
                    num_partials += usize::from(partial >= 0);
                    list.extend([int(token), int(position), int(index)]);
                    list.extend([int(first_key), int(end), partial]);
                }
            }
        });
        self.num_partials = num_partials;
        let mut first_partial = 0;
        self.combine = self.list(3, |list| {
            for (_, token, sequence) in sequences().filter(|(_, _, s)| decodes(s)) {
                let splits = num_splits(sequence);
                if splits > 1 {
                    list.extend([int(token), int(first_partial), int(splits)]);
                    first_partial += splits;
                }
            }
        });
    }

    fn list(&mut self, item_len: usize, fill: impl FnOnce(&mut Vec<i32>)) -> List {
        let start = self.numbers.len();
        fill(&mut self.numbers);
        List { range: start..self.numbers.len(), item_len }
    }

    /// Memory that it takes on the device.
    pub(super) fn num_bytes(&self) -> usize {
        self.numbers.len() * size_of::<i32>()
    }

    /// Copies it to the device.
    #[expect(unsafe_code, reason = "numbers as bytes")]
    pub(super) fn upload(&self, to: &Memory) -> Result<(), Error> {
        // SAFETY: numbers have no gaps, and any byte may be read.
        let bytes = unsafe {
            std::slice::from_raw_parts(self.numbers.as_ptr().cast::<u8>(), self.num_bytes())
        };
        to.write(bytes)
    }
}

/// A count as kernels take it. None is so large: they are bounded by what fits a device.
pub(super) fn int(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}
