//! From a job to the tokens of its prompt, cutting the context where the window is too short.

use engine::{PromptFormat, UserTemplate};
use sha2::{Digest, Sha256};
use shared::Job;

/// Most of the window that is kept free for the answer, as a divisor: a quarter.
const MAX_ANSWER_SHARE: usize = 4;
/// No tokenizer in use makes tokens of more bytes than this on average over a text. Longer texts
/// than a window of such tokens need not be tokenised to know that they are too long.
const MAX_BYTES_PER_TOKEN: usize = 64;

/// A prompt, ready for the engine.
#[derive(Debug)]
pub(crate) struct Rendered {
    /// SHA-256 of the prompt's text, hexadecimal.
    pub(crate) text_sha256: String,
    /// The prompt.
    pub(crate) token_ids: Vec<engine::TokenId>,
    /// Whether the context was cut.
    pub(crate) context_truncated: bool,
}

/// Renders `job` for a model whose window holds `window` tokens; the reason if it can't fit.
///
/// The context is cut, at the end of a line if one fits, so that `max_new_tokens` or a quarter of
/// the window, whichever is less, stays free for the answer. What surrounds the context is never
/// cut.
pub(crate) fn render(format: &PromptFormat, job: &Job, window: usize) -> Result<Rendered, String> {
    let prompt = Prompt { format, job, template: template(format, job)? };
    let room = window - (job.generation.max_new_tokens as usize).min(window / MAX_ANSWER_SHARE);
    let context = &job.context.context;
    let max_bytes = room.saturating_mul(MAX_BYTES_PER_TOKEN);
    if job.context.query.len() > max_bytes {
        let bytes = job.context.query.len();
        return Err(format!("a query of {bytes} bytes does not fit the window of {window} tokens"));
    }
    if context.len() <= max_bytes {
        let whole = prompt.with_context(context)?;
        if whole.token_ids.len() <= room {
            return Ok(whole);
        }
    }
    let without = prompt.with_context("")?;
    if without.token_ids.len() >= window {
        let length = without.token_ids.len();
        return Err(format!(
            "the prompt has {length} tokens even without its context, the window only {window}"
        ));
    }
    let truncated = !context.is_empty();
    let kept = prompt.longest_fitting(context, max_bytes, room)?.unwrap_or(without);
    Ok(Rendered { context_truncated: truncated, ..kept })
}

fn template(format: &PromptFormat, job: &Job) -> Result<UserTemplate, String> {
    match &job.prompt_template {
        Some(source) => UserTemplate::new(source).map_err(|error| error.to_string()),
        None => Ok(format.user_template().clone()),
    }
}

struct Prompt<'a> {
    format: &'a PromptFormat,
    job: &'a Job,
    template: UserTemplate,
}

impl Prompt<'_> {
    fn with_context(&self, context: &str) -> Result<Rendered, String> {
        let fields = engine::UserFields {
            context,
            query: &self.job.context.query,
            id: &self.job.context.id.0,
            target_api: self.job.context.target_api.as_deref(),
            dependencies: &self.job.context.dependencies,
        };
        let user = self.template.render(&fields).map_err(|error| error.to_string())?;
        let prompt = self
            .format
            .render(self.job.system_prompt.as_deref(), &user)
            .map_err(|error| error.to_string())?;
        let text_sha256 = format!("{:x}", Sha256::digest(prompt.text.as_bytes()));
        Ok(Rendered { text_sha256, token_ids: prompt.token_ids, context_truncated: false })
    }

    /// The prompt with the longest head of `context` that fits `room`, ending at a line end if
    /// one fits, else inside the first line; `None` if not even one character does.
    fn longest_fitting(
        &self,
        context: &str,
        max_bytes: usize,
        room: usize,
    ) -> Result<Option<Rendered>, String> {
        let head = &context[..context.floor_char_boundary(max_bytes)];
        let line_ends: Vec<usize> = head.match_indices('\n').map(|(at, _)| at).collect();
        if let Some(kept) = self.last_fitting(head, &line_ends, room)? {
            return Ok(Some(kept));
        }
        let first_line = &head[..line_ends.first().copied().unwrap_or(head.len())];
        let char_ends: Vec<usize> =
            first_line.char_indices().map(|(at, c)| at + c.len_utf8()).collect();
        self.last_fitting(head, &char_ends, room)
    }

    /// The prompt with `context` up to the last of `ends` that fits, by bisection.
    fn last_fitting(
        &self,
        context: &str,
        ends: &[usize],
        room: usize,
    ) -> Result<Option<Rendered>, String> {
        let (mut low, mut high) = (0, ends.len());
        let mut best = None;
        while low < high {
            let middle = low.midpoint(high);
            let rendered = self.with_context(&context[..ends[middle]])?;
            if rendered.token_ids.len() <= room {
                best = Some(rendered);
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(best)
    }
}
