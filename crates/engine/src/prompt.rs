//! The prompt: from a system prompt and a user's message to tokens.
//!
//! Text of a user can never become a control token. What would become one gets marks inside, a character that
//! occurs nowhere else, before the chat template sees it, and loses them once the template's own control
//! tokens are found. A text without such passages is tokenised as transformers does it, in one call.

use std::path::Path;
use std::sync::{Arc, Once};

use crate::Error;
use crate::chat_template::{ChatTemplate, Message, TemplateVariables, UserTemplate};
use crate::step::TokenId;
use crate::tokenizer::Tokenizer;

/// Characters for private use, of which one that the text lacks serves as mark.
const MARKS: std::ops::RangeInclusive<char> = '\u{F0000}'..='\u{FFFFD}';

/// A prompt, ready for the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// The text that the model sees.
    pub text: String,
    /// Its tokens.
    pub token_ids: Vec<TokenId>,
}

/// How a model wants its prompts.
#[derive(Debug)]
pub struct PromptFormat {
    tokenizer: Arc<Tokenizer>,
    chat_template: Option<ChatTemplate>,
    user_template: UserTemplate,
    /// Has been called once a variable was given that the chat template doesn't read.
    unread_variable: Once,
}

impl PromptFormat {
    /// The format of the model in a folder.
    pub fn load(model_path: &Path, tokenizer: Arc<Tokenizer>) -> Result<Self, Error> {
        let chat_template = ChatTemplate::load(model_path)?;
        let user_template = UserTemplate::load(model_path)?;
        Ok(Self::new(tokenizer, chat_template, user_template))
    }

    /// A format of given parts.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        chat_template: Option<ChatTemplate>,
        user_template: UserTemplate,
    ) -> Self {
        Self { tokenizer, chat_template, user_template, unread_variable: Once::new() }
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The model's chat template; without one prompts are plain text.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// The template of the user's message where a job brings none.
    pub fn user_template(&self) -> &UserTemplate {
        &self.user_template
    }

    /// The prompt of a user's message, with what the model is told beforehand.
    pub fn render(&self, system: Option<&str>, user: &str) -> Result<Prompt, Error> {
        self.render_told(system, user, &TemplateVariables::default())
    }

    /// The prompt of a user's message, with further variables of the chat template. As in transformers, those that
    /// the template doesn't read change nothing; the first is warned of.
    pub fn render_told(
        &self,
        system: Option<&str>,
        user: &str,
        variables: &TemplateVariables,
    ) -> Result<Prompt, Error> {
        let system = system.filter(|system| !system.is_empty());
        let is_free =
            |mark: &char| !user.contains(*mark) && !system.is_some_and(|s| s.contains(*mark));
        let mark = MARKS.clone().find(is_free);
        let mark = mark.ok_or_else(|| Error::Reject("no private character is free".into()))?;
        let user = self.tokenizer.neutralise(user, mark)?;
        let system = system.map(|text| self.tokenizer.neutralise(text, mark)).transpose()?;
        self.notice_unread(variables);
        let variables = &variables.map_texts(&|text| self.tokenizer.neutralise(text, mark))?;
        let mut text = self.compose(system.as_deref(), &user, variables)?;
        // Control tokens can also arise where the template's text meets the user's.
        let edged = system.as_deref().map(|text| with_edges(text, mark));
        let apart = self.compose(edged.as_deref(), &with_edges(&user, mark), variables)?;
        if self.tokenizer.control_tokens(&text) != self.tokenizer.control_tokens(&apart) {
            text = apart;
        }
        // A chat template brings its own special tokens.
        let add_special_tokens = self.chat_template.is_none();
        let token_ids = self.tokenizer.encode_marked(&text, mark, add_special_tokens)?;
        text.retain(|character| character != mark);
        Ok(Prompt { text, token_ids })
    }

    fn notice_unread(&self, variables: &TemplateVariables) {
        let template = self.chat_template.as_ref();
        let is_read = |name: &String| template.is_some_and(|template| template.reads(name));
        if let Some(name) = variables.names().find(|name| !is_read(name)) {
            self.unread_variable.call_once(|| {
                tracing::warn!(
                    name,
                    "chat_template_kwargs has what the model's template doesn't read"
                );
            });
        }
    }

    fn compose(
        &self,
        system: Option<&str>,
        user: &str,
        variables: &TemplateVariables,
    ) -> Result<String, Error> {
        match (&self.chat_template, system) {
            (Some(template), Some(system)) if template.takes_system() => {
                let system = Message { role: "system", content: system };
                let messages = [system, Message { role: "user", content: user }];
                template.render_told(&messages, true, variables)
            }
            (Some(template), system) => {
                let content = plain(system, user);
                let messages = [Message { role: "user", content: &content }];
                template.render_told(&messages, true, variables)
            }
            (None, system) => Ok(plain(system, user)),
        }
    }
}

/// System prompt and message as one text.
fn plain(system: Option<&str>, user: &str) -> String {
    system.map_or_else(|| user.to_owned(), |system| format!("{system}\n\n{user}"))
}

/// The text with a mark before its first and behind its last character that is not white space, so that a
/// template can still strip it.
fn with_edges(text: &str, mark: char) -> String {
    let head = text.len() - text.trim_start().len();
    let (head, rest) = text.split_at(head);
    let body = rest.trim_end();
    if body.is_empty() {
        return text.to_owned();
    }
    let tail = &rest[body.len()..];
    format!("{head}{mark}{body}{mark}{tail}")
}
