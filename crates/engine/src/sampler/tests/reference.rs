//! The definitions of the samplers: dense, everything sorted, one operation after another.

use crate::step::TokenId;

use super::super::SamplingParams;

/// The probability of each token to be drawn.
pub(super) fn reference(
    logits: &[f32],
    params: &SamplingParams,
    (prompt, generated): (&[TokenId], &[TokenId]),
) -> Vec<f64> {
    let mut scores: Vec<f64> = logits.iter().map(|logit| f64::from(*logit)).collect();
    for (id, score) in scores.iter_mut().enumerate() {
        let token = id as TokenId;
        *score += f64::from(params.logit_bias.get(&token).copied().unwrap_or(0.0));
        let times = generated.iter().filter(|other| **other == token).count() as f64;
        if times > 0.0 || prompt.contains(&token) {
            let penalty = f64::from(params.repetition_penalty);
            *score = if *score > 0.0 { *score / penalty } else { *score * penalty };
        }
        *score -= times * f64::from(params.frequency_penalty);
        *score -= if times > 0.0 { f64::from(params.presence_penalty) } else { 0.0 };
        if generated.len() < params.min_new_tokens
            && (params.stop_token_ids.contains(&token) || (token == 0 && !params.ignore_eos))
        {
            *score = f64::NEG_INFINITY;
        }
        *score /= f64::from(params.temperature);
    }
    let mut probabilities = softmax(&scores);
    if params.top_k > 0 {
        let best = ranked(&probabilities, |p| -p);
        keep(&mut probabilities, &best[..params.top_k.min(best.len())]);
    }
    if params.top_p < 1.0 {
        let best = ranked(&probabilities, |p| -p);
        let set = smallest(&probabilities, &best, f64::from(params.top_p));
        keep(&mut probabilities, set);
    }
    let most = probabilities.iter().copied().fold(0.0, f64::max);
    let likely = ranked(&probabilities, |p| -p);
    let enough = |id: &&usize| probabilities[**id] >= f64::from(params.min_p) * most;
    let likely: Vec<usize> = likely.iter().filter(enough).copied().collect();
    keep(&mut probabilities, &likely);
    if params.typical_p < 1.0 {
        let surprise = |p: f64| if p > 0.0 { -p.ln() } else { f64::INFINITY };
        let expected = |p: &f64| if *p > 0.0 { *p * surprise(*p) } else { 0.0 };
        let entropy: f64 = probabilities.iter().map(expected).sum();
        let typical = ranked(&probabilities, |p| (surprise(p) - entropy).abs());
        let set = smallest(&probabilities, &typical, f64::from(params.typical_p));
        keep(&mut probabilities, set);
    }
    probabilities
}

/// Probabilities of scores.
pub(super) fn softmax(scores: &[f64]) -> Vec<f64> {
    let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - best).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / total).collect()
}

/// Ids by a key of their probability, lowest first; among equals the likelier, then the lower.
fn ranked(probabilities: &[f64], key: impl Fn(f64) -> f64) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..probabilities.len()).collect();
    ids.sort_by(|a, b| {
        let (p, q) = (probabilities[*a], probabilities[*b]);
        key(p).total_cmp(&key(q)).then(q.total_cmp(&p)).then(a.cmp(b))
    });
    ids
}

/// The first of these ids that have this probability together.
fn smallest<'i>(probabilities: &[f64], ids: &'i [usize], share: f64) -> &'i [usize] {
    let mut mass = 0.0;
    let end = ids.iter().position(|id| {
        mass += probabilities[*id];
        mass >= share - 1e-12
    });
    &ids[..end.map_or(ids.len(), |end| end + 1)]
}

fn keep(probabilities: &mut [f64], ids: &[usize]) {
    let total: f64 = ids.iter().map(|id| probabilities[*id]).sum();
    for (id, probability) in probabilities.iter_mut().enumerate() {
        *probability = if ids.contains(&id) { *probability / total } else { 0.0 };
    }
}
