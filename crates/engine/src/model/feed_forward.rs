//! The feed-forward network of a layer: one for all tokens, or many (experts) of which a router picks a few for
//! each token. Called by the decoder.
//!
//! A token adds up its experts in their order, so the sum does not depend on what else is in the step.

use crate::config::ModelConfig;
use crate::kernels::{
    Activations, Cpu, Epilogue, Inner, Kernel, Linear, Mlp, PackedMatrix, Vector, matmul,
    softmax_row,
};

/// What stands behind the norm of a layer's second half.
#[derive(Debug)]
pub(crate) enum FeedForward<M = PackedMatrix, V = Vec<f32>> {
    /// One network.
    Dense(Mlp<M, V>),
    /// Several.
    Experts(Experts<M, V>),
}

/// Networks of which each token goes through a few.
#[derive(Debug)]
pub(crate) struct Experts<M = PackedMatrix, V = Vec<f32>> {
    /// `(num_experts, hidden_size)`
    pub(crate) router: Linear<M, V>,
    pub(crate) experts: Vec<Mlp<M, V>>,
    /// Experts that a token goes through.
    pub(crate) num_per_token: usize,
    /// Whether a token's weights are made to sum to 1.
    pub(crate) normalize_weights: bool,
}

/// Memory of a step's feed-forward networks, made once.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// What lies inside a network for all tokens.
    pub(crate) dense: Inner,
    routed: Option<Routed>,
}

/// What experts need beside.
#[derive(Debug)]
struct Routed {
    /// `(num_rows, num_experts)`
    scores: Activations,
    /// Each row's experts with their weights, `num_per_token` a row.
    chosen: Vec<(usize, f32)>,
    /// An expert's rows, with what its output counts there.
    rows: Vec<(usize, f32)>,
    /// Those rows' inputs, and then outputs: `(num_rows, hidden_size)`.
    gathered: Activations,
    inner: Inner,
}

impl Scratch {
    /// Memory for `max_rows` rows at a time.
    pub(crate) fn new(config: &ModelConfig, max_rows: usize) -> Self {
        Self {
            dense: Inner::new(config.intermediate_size),
            routed: config.experts.map(|experts| Routed {
                scores: Activations::new(max_rows, experts.num_experts),
                chosen: Vec::with_capacity(max_rows * experts.num_experts_per_token),
                rows: Vec::with_capacity(max_rows),
                gathered: Activations::new(max_rows, config.hidden_size),
                inner: Inner::new(experts.intermediate_size),
            }),
        }
    }
}

impl Experts {
    /// `hidden[first..] += sum over a row's experts of weight * expert(x)`
    pub(crate) fn add(
        &self,
        cpu: &Cpu,
        (x, num_rows): (&Activations, usize),
        scratch: &mut Scratch,
        (hidden, first): (&mut Activations, usize),
    ) {
        let Some(Routed { scores, chosen, rows, gathered, inner }) = &mut scratch.routed else {
            unreachable!("the scratch was made for the same configuration");
        };
        let out = (scores.shared(), Epilogue::Store);
        matmul(cpu, (x.rows(), num_rows), &self.router, out);
        chosen.clear();
        for row in 0..num_rows {
            cpu.simd.run(Choose { experts: self, scores: scores.row_mut(row), chosen });
        }
        for (index, expert) in self.experts.iter().enumerate() {
            rows.clear();
            for (row, chosen) in chosen.chunks_exact(self.num_per_token).enumerate() {
                let weight = chosen.iter().find(|(expert, _)| *expert == index);
                rows.extend(weight.map(|(_, weight)| (row, *weight)));
            }
            if rows.is_empty() {
                continue;
            }
            for (i, (row, _)) in rows.iter().enumerate() {
                gathered.row_mut(i).copy_from_slice(x.row(*row));
            }
            expert.widen(cpu, (gathered.rows(), rows.len()), inner);
            expert.narrow(cpu, (inner, rows.len()), (gathered.shared(), Epilogue::Store));
            for (i, (row, weight)) in rows.iter().enumerate() {
                let hidden = hidden.row_mut(first + row);
                for (hidden, x) in hidden.iter_mut().zip(gathered.row(i)) {
                    *hidden += weight * x;
                }
            }
        }
    }
}

/// Picks a row's experts: the likeliest ones, the lower index first among equals.
struct Choose<'a> {
    experts: &'a Experts,
    /// What the router says of each expert; replaced by their probabilities, not yet normalised.
    scores: &'a mut [f32],
    chosen: &'a mut Vec<(usize, f32)>,
}

impl Kernel for Choose<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { experts, scores, chosen } = self;
        let total = softmax_row(scores, 0);
        let start = chosen.len();
        for _ in 0..experts.num_per_token {
            let mut best: Option<usize> = None;
            for (index, score) in scores.iter().enumerate() {
                let taken = chosen[start..].iter().any(|(taken, _)| *taken == index);
                if !taken && best.is_none_or(|best| *score > scores[best]) {
                    best = Some(index);
                }
            }
            chosen.extend(best.map(|best| (best, scores[best])));
        }
        let chosen = &mut chosen[start..];
        let total = if experts.normalize_weights {
            chosen.iter().map(|(_, score)| score).sum()
        } else {
            total
        };
        chosen.iter_mut().for_each(|(_, weight)| *weight /= total);
    }
}
