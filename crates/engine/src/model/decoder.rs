//! The forward pass: tokens through the layers to logits.

use super::rope::RopeTable;
use super::{Layer, Model};
use crate::attention::{Attention, LayerInput};
use crate::config::ModelConfig;
use crate::kernels::{Activations, Cpu, Epilogue, matmul, rms_norm, silu_mul};
use crate::kv_cache::{KvCache, LayerCache};
use crate::step::StepInput;

/// Tokens that go through the feed-forward network together: what lies between its layers stays in cache.
const MLP_ROWS: usize = 256;

/// Memory of a step, made once.
#[derive(Debug)]
pub(crate) struct Buffers {
    hidden: Activations,
    normed: Activations,
    qkv: Activations,
    attended: Activations,
    gate_up: Activations,
    activated: Activations,
    logits: Activations,
    /// `0, 1, 2, …`: every row.
    rows: Vec<usize>,
    /// Rows whose logits are wanted.
    wanted: Vec<usize>,
    attention: Attention,
}

impl Buffers {
    /// Memory for steps of up to `max_tokens` tokens.
    pub(crate) fn new(config: &ModelConfig, max_tokens: usize, num_threads: usize) -> Self {
        let mlp_rows = max_tokens.min(MLP_ROWS);
        let qkv_width = config.query_width() + 2 * config.kv_width();
        Self {
            hidden: Activations::new(max_tokens, config.hidden_size),
            normed: Activations::new(max_tokens, config.hidden_size),
            qkv: Activations::new(max_tokens, qkv_width),
            attended: Activations::new(max_tokens, config.query_width()),
            gate_up: Activations::new(mlp_rows, 2 * config.intermediate_size),
            activated: Activations::new(mlp_rows, config.intermediate_size),
            logits: Activations::new(0, config.vocab_size),
            rows: (0..max_tokens).collect(),
            wanted: Vec::new(),
            attention: Attention::new(num_threads),
        }
    }

    /// The logits of the last step, a row for each sequence that wanted them.
    pub(crate) fn logits(&self) -> (&Activations, usize) {
        (&self.logits, self.wanted.len())
    }
}

/// What every layer of a step is given.
#[derive(Clone, Copy)]
pub(crate) struct Step<'a> {
    /// What computes.
    pub(crate) cpu: &'a Cpu,
    /// The step.
    pub(crate) input: &'a StepInput,
    /// Angles of every position.
    pub(crate) rope: &'a RopeTable,
}

impl Model {
    /// Computes a step that was checked: keys and values go to the cache, logits to the buffers.
    pub(crate) fn forward(&self, step: Step<'_>, cache: &mut KvCache, buffers: &mut Buffers) {
        let num_tokens = step.input.token_ids.len();
        buffers.attention.plan(&self.config, step.input);
        for (row, token) in step.input.token_ids.iter().enumerate() {
            self.embedding.look_up(*token as usize, buffers.hidden.row_mut(row));
        }
        for (index, layer) in self.layers.iter().enumerate() {
            self.attend(step, layer, cache.layer_mut(index), buffers);
            for first in (0..num_tokens).step_by(MLP_ROWS) {
                let rows = first..num_tokens.min(first + MLP_ROWS);
                self.feed_forward(step.cpu, layer, rows, buffers);
            }
        }
        self.project_output(step, buffers);
    }

    /// `hidden += attention(norm(hidden))`
    fn attend(&self, step: Step<'_>, layer: &Layer, cache: &mut LayerCache, buffers: &mut Buffers) {
        let Step { cpu, input, rope } = step;
        let Buffers { hidden, normed, qkv, attended, rows, attention, .. } = buffers;
        let num_tokens = input.token_ids.len();
        let norm = (&*layer.input_norm, self.config.rms_norm_eps);
        rms_norm(cpu, hidden.rows(), &rows[..num_tokens], norm, normed.shared());
        matmul(cpu, (normed.rows(), num_tokens), &layer.qkv, (qkv.shared(), Epilogue::Store));
        let qk_norm = layer.qk_norm.as_ref().map(|(query, key)| (&**query, &**key));
        let layer_input = LayerInput { config: &self.config, rope, qk_norm, qkv: qkv.rows() };
        attention.write(cpu, layer_input, cache);
        attention.attend(cpu, layer_input, (input, cache), attended.shared());
        let out = (hidden.shared(), Epilogue::Add);
        matmul(cpu, (attended.rows(), num_tokens), &layer.attention_output, out);
    }

    /// `hidden += down(silu(gate(norm(hidden))) * up(norm(hidden)))` for some rows.
    fn feed_forward(
        &self,
        cpu: &Cpu,
        layer: &Layer,
        rows: std::ops::Range<usize>,
        buffers: &mut Buffers,
    ) {
        let Buffers { hidden, normed, gate_up, activated, rows: all_rows, .. } = buffers;
        let (first, num_rows) = (rows.start, rows.len());
        let norm = (&*layer.mlp_norm, self.config.rms_norm_eps);
        rms_norm(cpu, hidden.rows(), &all_rows[rows], norm, normed.shared());
        let out = (gate_up.shared(), Epilogue::Store);
        matmul(cpu, (normed.rows(), num_rows), &layer.gate_up, out);
        silu_mul(cpu, gate_up.rows(), num_rows, activated.shared());
        let out = (hidden.shared_from(first), Epilogue::Add);
        matmul(cpu, (activated.rows(), num_rows), &layer.down, out);
    }

    /// Logits of the last tokens of the sequences that want them.
    fn project_output(&self, Step { cpu, input, .. }: Step<'_>, buffers: &mut Buffers) {
        let Buffers { hidden, normed, logits, wanted, .. } = buffers;
        wanted.clear();
        let mut end = 0;
        for sequence in &input.sequences {
            end += sequence.num_scheduled_tokens;
            if sequence.wants_logits {
                wanted.push(end - 1);
            }
        }
        logits.ensure_rows(wanted.len());
        let norm = (&*self.norm, self.config.rms_norm_eps);
        rms_norm(cpu, hidden.rows(), wanted, norm, normed.shared());
        let out = (logits.shared(), Epilogue::Store);
        matmul(cpu, (normed.rows(), wanted.len()), &self.output, out);
    }
}
