//! The forward pass: tokens through the layers to logits.

use super::feed_forward::{FeedForward, Scratch};
use super::rope::RopeTable;
use super::{Layer, Model};
use crate::attention::{Attention, LayerInput};
use crate::config::{LayerConfig, ModelConfig};
use crate::kernels::{Activations, Cpu, Epilogue, matmul, rms_norm, softcap};
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
    feed_forward: Scratch,
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
            feed_forward: Scratch::new(config, mlp_rows),
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
    /// Angles of every position, a table for each of the model's ropes.
    pub(crate) ropes: &'a [RopeTable],
}

impl Model {
    /// Computes a step that was checked: keys and values go to the cache, logits to the buffers.
    pub(crate) fn forward(&self, step: Step<'_>, cache: &mut KvCache, buffers: &mut Buffers) {
        let num_tokens = step.input.token_ids.len();
        buffers.attention.plan(&self.config, step.input);
        for (row, token) in step.input.token_ids.iter().enumerate() {
            let hidden = buffers.hidden.row_mut(row);
            self.embed(step.cpu.simd, *token as usize, hidden);
            hidden.iter_mut().for_each(|x| *x *= self.config.embedding_scale);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let place = (&self.config.layers[index], cache.layer_mut(index));
            self.attend(step, layer, place, buffers);
            for first in (0..num_tokens).step_by(MLP_ROWS) {
                let rows = first..num_tokens.min(first + MLP_ROWS);
                self.feed_forward(step.cpu, layer, rows, buffers);
            }
        }
        self.project_output(step, buffers);
    }

    /// `hidden += attention(norm(hidden))`
    fn attend(
        &self,
        step: Step<'_>,
        layer: &Layer,
        (settings, cache): (&LayerConfig, &mut LayerCache),
        buffers: &mut Buffers,
    ) {
        let Step { cpu, input, ropes } = step;
        let Buffers { hidden, normed, qkv, attended, rows, attention, .. } = buffers;
        let num_tokens = input.token_ids.len();
        let rows = &rows[..num_tokens];
        let out = (normed.shared(), Epilogue::Store);
        rms_norm(cpu, (hidden.rows(), rows), self.norm_of(&layer.input_norm), out);
        matmul(cpu, (normed.rows(), num_tokens), &layer.qkv, (qkv.shared(), Epilogue::Store));
        let layer_input = LayerInput {
            config: &self.config,
            rope: &ropes[settings.rope],
            sliding_window: settings.sliding_window,
            qk_norm: layer.qk_norm.as_ref().map(|(query, key)| (&**query, &**key)),
            qkv: qkv.rows(),
        };
        attention.write(cpu, layer_input, cache);
        attention.attend(cpu, layer_input, (input, cache), attended.shared());
        let x = (attended.rows(), num_tokens);
        let Some(norm) = &layer.attention_output_norm else {
            matmul(cpu, x, &layer.attention_output, (hidden.shared(), Epilogue::Add));
            return;
        };
        matmul(cpu, x, &layer.attention_output, (normed.shared(), Epilogue::Store));
        let out = (hidden.shared(), Epilogue::Add);
        rms_norm(cpu, (normed.rows(), rows), self.norm_of(norm), out);
    }

    /// `hidden += feed_forward(norm(hidden))` for some rows.
    fn feed_forward(
        &self,
        cpu: &Cpu,
        layer: &Layer,
        rows: std::ops::Range<usize>,
        buffers: &mut Buffers,
    ) {
        let Buffers { hidden, normed, feed_forward: scratch, rows: all_rows, .. } = buffers;
        let (first, num_rows) = (rows.start, rows.len());
        let out = (normed.shared(), Epilogue::Store);
        rms_norm(cpu, (hidden.rows(), &all_rows[rows]), self.norm_of(&layer.mlp_norm), out);
        let mlp = match &layer.feed_forward {
            FeedForward::Dense(mlp) => mlp,
            FeedForward::Experts(experts) => {
                experts.add(cpu, (normed, num_rows), scratch, (hidden, first));
                return;
            }
        };
        mlp.widen(cpu, (normed.rows(), num_rows), &mut scratch.dense);
        let Some(norm) = &layer.mlp_output_norm else {
            let out = (hidden.shared_from(first), Epilogue::Add);
            mlp.narrow(cpu, (&scratch.dense, num_rows), out);
            return;
        };
        mlp.narrow(cpu, (&scratch.dense, num_rows), (normed.shared(), Epilogue::Store));
        let out = (hidden.shared_from(first), Epilogue::Add);
        rms_norm(cpu, (normed.rows(), &all_rows[..num_rows]), self.norm_of(norm), out);
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
        let out = (normed.shared(), Epilogue::Store);
        rms_norm(cpu, (hidden.rows(), wanted), self.norm_of(&self.norm), out);
        let out = (logits.shared(), Epilogue::Store);
        matmul(cpu, (normed.rows(), wanted.len()), &self.output, out);
        if let Some(cap) = self.config.output_softcap {
            softcap(cpu, cap, (logits.shared(), wanted.len()));
        }
    }

    /// A norm's weights with what all of them share.
    fn norm_of<'a>(&self, weight: &'a [f32]) -> (&'a [f32], f32) {
        (weight, self.config.rms_norm_eps)
    }
}
