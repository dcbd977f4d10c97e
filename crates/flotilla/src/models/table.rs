//! A model as text on a terminal.

use super::{Memory, Shape, Text, View};
use crate::columns::{Align, write_table};

/// The text.
pub(super) fn table(view: &View) -> String {
    let mut text = format!("{}\n", view.model.replace(char::is_control, "?"));
    let mut line = |name: &str, value: &str| text += &format!("  {name:<15}{value}\n");
    if let Some(problem) = &view.problem {
        line("can't be loaded", &format!(": {problem}"));
    }
    if let Some(shape) = &view.shape {
        shape_lines(shape, &mut line);
    }
    if let Some(view) = &view.text {
        text_lines(view, &mut line);
    }
    if let Some(memory) = &view.memory {
        memory_tables(memory, &mut text);
    }
    text
}

fn shape_lines(shape: &Shape, line: &mut impl FnMut(&str, &str)) {
    line("architecture", shape.architecture);
    line("parameters", &grouped(shape.parameters));
    let formats: Vec<_> = match shape.stored.as_slice() {
        [only] => vec![only.format.to_owned()],
        several => several
            .iter()
            .map(|stored| format!("{} {}", grouped(stored.parameters), stored.format))
            .collect(),
    };
    if !formats.is_empty() {
        line("stored", &format!("{} on disk, {}", size(shape.file_bytes), formats.join(", ")));
    }
    let sliding = shape.sliding_windows.iter().map(|sliding| {
        let (window, layers) = (grouped(sliding.window as u64), sliding.layers);
        format!("; {layers} of {} layers see {window}", shape.layers)
    });
    line(
        "window",
        &format!("{} tokens{}", grouped(shape.window as u64), sliding.collect::<String>()),
    );
    line("vocabulary", &format!("{} tokens", grouped(shape.vocabulary as u64)));
    let Shape { layers, hidden_size, attention_heads, kv_heads, head_dim, .. } = shape;
    line("layers", &format!("{layers}, {hidden_size} wide"));
    line("heads", &format!("{attention_heads} of {head_dim}, {kv_heads} of keys and values"));
    if let Some(experts) = &shape.experts {
        let super::Experts { experts, per_token, layers } = experts;
        line("experts", &format!("{experts}, {per_token} for each token, in {layers} layers"));
    }
}

fn text_lines(text: &Text, line: &mut impl FnMut(&str, &str)) {
    let roles = text.chat_roles.as_ref().map(|roles| roles.join(", "));
    line("chat template", &roles.unwrap_or_else(|| "none: prompts are plain text".to_owned()));
    if !text.chat_variables.is_empty() {
        line("its variables", &text.chat_variables.join(", "));
    }
    let tokens = text.end_tokens.iter().map(|token| match &token.text {
        Some(text) => format!("{text} ({})", token.id),
        None => token.id.to_string(),
    });
    let tokens = tokens.collect::<Vec<_>>().join(", ");
    line("ends with", if tokens.is_empty() { "no token" } else { &tokens });
}

fn memory_tables(memory: &Memory, text: &mut String) {
    let kv_bytes = memory.kv_cache.iter();
    let kv_bytes = kv_bytes.map(|kv| format!("{} {}", kv.dtype, grouped(kv.bytes_per_token)));
    *text += &format!("  {:<15}{}\n\n", "KV bytes/token", kv_bytes.collect::<Vec<_>>().join(", "));
    let fitting = memory.weights.first().map(|weights| weights.fitting.as_slice());
    let columns = fitting.unwrap_or_default().iter();
    let columns: Vec<_> = columns
        .map(|fit| format!("{} {}", fit.kv_cache_dtype, grouped(fit.tokens as u64)))
        .collect();
    let mut heads = vec![("PRECISION", Align::Left), ("WEIGHTS", Align::Right)];
    heads.extend(columns.iter().map(|column| (column.as_str(), Align::Right)));
    let rows = memory.weights.iter().map(|weights| {
        let precision = weights.precision.unwrap_or("as stored").to_owned();
        let fitting = weights.fitting.iter().map(|fit| grouped(fit.sequences));
        [precision, size(weights.bytes)].into_iter().chain(fitting).collect::<Vec<_>>()
    });
    if let Some(available) = memory.available_bytes {
        *text += &format!(
            "Sequences that fit into {} of free memory, by KV cache and tokens:\n",
            size(available)
        );
    }
    write_table(text, &heads, rows);
}

/// A number with its thousands set apart.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes in the unit that suits them.
fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.into_iter().find(|(shift, _)| bytes >> shift > 0) {
        Some((shift, unit)) => format!("{:.1} {unit}", bytes as f64 / f64::from(1 << shift)),
        None => format!("{bytes} bytes"),
    }
}
