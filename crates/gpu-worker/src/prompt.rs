//! From a job to the tokens of its prompt, cutting the context where the window is too short.

use engine::{PromptFormat, TemplateVariables, UserTemplate};
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
/// The context is cut, at the end of a line if one is near, so that `max_new_tokens` or a quarter of
/// the window, whichever is less, stays free for the answer. What surrounds the context is never
/// cut. Calls `step` for each text that it tokenises.
pub(crate) fn render(
    format: &PromptFormat,
    job: &Job,
    (window, max_new_tokens): (usize, usize),
    step: &dyn Fn(),
) -> Result<Rendered, String> {
    let variables = match &job.generation.chat_template_kwargs {
        Some(variables) => TemplateVariables::new(variables),
        None => TemplateVariables::default(),
    };
    let prompt = Prompt { format, job, template: template(format, job)?, variables, step };
    let room = window - max_new_tokens.min(window / MAX_ANSWER_SHARE);
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
    if context.is_empty() || without.token_ids.len() >= room {
        return Ok(Rendered { context_truncated: !context.is_empty(), ..without });
    }
    let head = &context[..context.floor_char_boundary(max_bytes)];
    let kept = prompt.longest_fitting(head, room)?.unwrap_or(without);
    Ok(Rendered { context_truncated: true, ..kept })
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
    variables: TemplateVariables,
    step: &'a dyn Fn(),
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
            .render_told(self.job.system_prompt.as_deref(), &user, &self.variables)
            .map_err(|error| error.to_string())?;
        (self.step)();
        let text_sha256 = format!("{:x}", Sha256::digest(prompt.text.as_bytes()));
        Ok(Rendered { text_sha256, token_ids: prompt.token_ids, context_truncated: false })
    }

    /// The prompt with the longest head of `context` that fits `room`, ending at a line end where
    /// that costs less than half of it; `None` if not even one character fits.
    fn longest_fitting(&self, context: &str, room: usize) -> Result<Option<Rendered>, String> {
        let fitting = |end: usize| {
            let rendered = self.with_context(&context[..end])?;
            Ok::<_, String>(Some(rendered).filter(|rendered| rendered.token_ids.len() <= room))
        };
        let (mut fits, mut too_long) = (0, context.len() + 1);
        let mut best = None;
        while too_long - fits > 1 {
            let middle = fits.midpoint(too_long);
            match fitting(context.floor_char_boundary(middle))? {
                Some(rendered) => (fits, best) = (middle, Some(rendered)),
                None => too_long = middle,
            }
        }
        let end = context.floor_char_boundary(fits);
        let line_end = context[..end].rfind('\n').filter(|at| at * 2 >= end);
        // Fewer characters can be more tokens, where the cut splits what was one token.
        match line_end.map(fitting).transpose()?.flatten() {
            Some(rendered) => Ok(Some(rendered)),
            None => Ok(best),
        }
    }
}
