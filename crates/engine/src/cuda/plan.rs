//! A step as the kernels want it: lists of whole numbers, one behind the other, that are copied to the device at once.

use std::ops::Range;

use super::device::{Address, Memory};
use super::kernels::{SPLIT_KEYS, Shape};
use crate::Error;
use crate::sampler::PlainChoice;
use crate::step::{BLOCK_SIZE, SequenceInput, StepInput};

/// Most sequences of a step that is given a form.
const MAX_FORM_ROWS: usize = 512;

/// The ladder's longest step: what a multiple of it has room for, a step that is filled up has.
pub(super) const LADDER_STEP: usize = 64;

/// What steps have in common that are the same work for a device, but for the numbers of their lists: those in which every sequence computes
/// one token. Their lists are filled up to a ladder of lengths, so that there are few forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Form {
    /// Tokens, each with a row of logits.
    num_rows: usize,
    /// Items of `attend_decode`.
    num_items: usize,
}

impl Form {
    /// That of a step; `None` if it has none.
    fn of(input: &StepInput, shape: &Shape) -> Option<Self> {
        let decodes = |s: &SequenceInput| s.num_scheduled_tokens == 1 && s.wants_logits;
        let num = input.sequences.len();
        if !shape.has_decode() || !(1..=MAX_FORM_ROWS).contains(&num) {
            return None;
        }
        let num_rows = match num {
            ..=8 => num.next_power_of_two(),
            9..=64 => num.next_multiple_of(8),
            65..=256 => num.next_multiple_of(16),
            _ => num.next_multiple_of(LADDER_STEP),
        };
        let num_items: usize = input.sequences.iter().map(num_splits).sum();
        // 1, 2, 3, 4, 6, 8, 12, 16, … items a row.
        let items_a_row = num_items.div_ceil(num_rows);
        let power = items_a_row.next_power_of_two();
        let three_quarters = power / 4 * 3;
        let items_a_row = if items_a_row <= three_quarters { three_quarters } else { power };
        let form = Self { num_rows, num_items: num_rows * items_a_row };
        input.sequences.iter().all(decodes).then_some(form)
    }
}

/// Blocks of attention that share the keys of a token which decodes.
fn num_splits(sequence: &SequenceInput) -> usize {
    (sequence.num_computed_tokens + 1).div_ceil(SPLIT_KEYS)
}

/// The lists of a step. Their memory is used again.
#[derive(Debug, Default)]
pub(super) struct StepPlan {
    numbers: Vec<i32>,
    /// The step's form, if it has one.
    pub(super) form: Option<Form>,
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
    /// Items of `sample`, seven numbers each: for every row of logits, or none.
    pub(super) samples: List,
    /// Blocks of the sequences, one sequence's behind the other's. The last list, whose length is all that steps of one form differ in.
    pub(super) tables: List,
    /// Rows of logits that were asked for, without those that fill up.
    pub(super) num_rows: usize,
    /// Partial results of attention that there may be.
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
    /// Lays a step out. What fills it up writes its keys and values to `scratch_block`.
    pub(super) fn fill(
        &mut self,
        input: &StepInput,
        choices: &[Option<PlainChoice>],
        (shape, scratch_block): (&Shape, usize),
    ) {
        self.numbers.clear();
        self.form = Form::of(input, shape);
        let num_rows = self.form.map_or(0, |form| form.num_rows);
        let sequences = || input.sequences.iter();
        let positions = |s: &SequenceInput| s.num_computed_tokens..s.end();
        self.tokens = self.list(1, num_rows, 0, |list| {
            list.extend(input.token_ids.iter().map(|id| *id as i32));
        });
        self.positions = self.list(1, num_rows, 0, |list| {
            list.extend(sequences().flat_map(positions).map(int));
        });
        self.is_long = self.list(1, num_rows, 0, |list| {
            list.extend(sequences().flat_map(|s| positions(s).map(|_| i32::from(s.is_long))));
        });
        self.slots = self.list(1, num_rows, int(scratch_block * BLOCK_SIZE), |list| {
            for sequence in sequences() {
                list.extend(positions(sequence).map(|position| {
                    let block = sequence.block_table[position / BLOCK_SIZE].0 as usize;
                    int(block * BLOCK_SIZE + position % BLOCK_SIZE)
                }));
            }
        });
        let mut end = 0;
        self.wanted = self.list(1, num_rows, 0, |list| {
            for sequence in sequences() {
                end += sequence.num_scheduled_tokens;
                list.extend(sequence.wants_logits.then_some(int(end - 1)));
            }
        });
        self.num_rows = sequences().filter(|sequence| sequence.wants_logits).count();
        self.fill_attention(input, shape);
        let num_samples = if choices.is_empty() { num_rows } else { self.wanted.len() };
        self.samples = self.list(7, 0, 0, |list| {
            for row in 0..num_samples {
                let likeliest = PlainChoice::LIKELIEST;
                let choice = choices.get(row).copied().flatten().unwrap_or(likeliest);
                let numbers = [choice.temperature, choice.top_p, choice.min_p];
                list.extend([int(row), int(choice.top_k)]);
                list.extend(numbers.map(|number| number.to_bits().cast_signed()));
                list.extend([choice.draw as u32, (choice.draw >> 32) as u32].map(u32::cast_signed));
            }
        });
        self.tables = self.list(1, 0, 0, |list| {
            for sequence in sequences() {
                let blocks = &sequence.block_table[..num_blocks(sequence)];
                list.extend(blocks.iter().map(|block| block.0 as i32));
            }
        });
    }

    fn fill_attention(&mut self, input: &StepInput, shape: &Shape) {
        let decodes = |s: &SequenceInput| s.num_scheduled_tokens == 1 && shape.has_decode();
        // With the first token and the place of the table of each.
        let sequences = || {
            let (mut next_token, mut next_table) = (0, 0);
            input.sequences.iter().map(move |sequence| {
                let (token, table) = (next_token, next_table);
                next_token += sequence.num_scheduled_tokens;
                next_table += num_blocks(sequence);
                (sequence, token, table)
            })
        };
        self.prefill = self.list(4, 0, 0, |list| {
            for (sequence, first, table) in sequences().filter(|(s, _, _)| !decodes(s)) {
                for start in (0..sequence.num_scheduled_tokens).step_by(shape.prefill_tokens()) {
                    let num = shape.prefill_tokens().min(sequence.num_scheduled_tokens - start);
                    let position = sequence.num_computed_tokens + start;
                    list.extend([int(first + start), int(num), int(position), int(table)]);
                }
            }
        });
        let (num_rows, num_items) =
            self.form.map_or((0, 0), |form| (form.num_rows, form.num_items));
        let mut num_partials = 0;
        self.decode = self.list(6, num_items, -1, |list| {
            for (sequence, token, table) in sequences().filter(|(s, _, _)| decodes(s)) {
                let position = sequence.num_computed_tokens;
                for split in 0..num_splits(sequence) {
                    let first_key = split * SPLIT_KEYS;
                    let end = (first_key + SPLIT_KEYS).min(position + 1);
                    let partial = if num_splits(sequence) == 1 { -1 } else { int(num_partials) };
                    num_partials += usize::from(partial >= 0);
                    list.extend([int(token), int(position), int(table)]);
                    list.extend([int(first_key), int(end), partial]);
                }
            }
        });
        self.num_partials = if self.form.is_some() { num_items } else { num_partials };
        let mut first_partial = 0;
        self.combine = self.list(3, num_rows, 0, |list| {
            for (sequence, token, _) in sequences().filter(|(s, _, _)| decodes(s)) {
                let splits = num_splits(sequence);
                if splits > 1 {
                    list.extend([int(token), int(first_partial), int(splits)]);
                    first_partial += splits;
                }
            }
        });
    }

    /// Appends a list, and fills it up to `num_items` with `filling`.
    fn list(
        &mut self,
        item_len: usize,
        num_items: usize,
        filling: i32,
        fill: impl FnOnce(&mut Vec<i32>),
    ) -> List {
        let start = self.numbers.len();
        fill(&mut self.numbers);
        let end = self.numbers.len().max(start + num_items * item_len);
        self.numbers.resize(end, filling);
        List { range: start..end, item_len }
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

/// Blocks that a sequence has keys in once the step is computed.
fn num_blocks(sequence: &SequenceInput) -> usize {
    sequence.end().div_ceil(BLOCK_SIZE)
}

/// A count as kernels take it. None is so large: they are bounded by what fits a device.
pub(super) fn int(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}
