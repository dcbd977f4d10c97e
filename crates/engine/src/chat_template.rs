//! Jinja templates: a model's chat template, and the templates of the user's message.
//!
//! They are rendered as transformers renders them. What goes in and out here is text; the tokens of a prompt
//! are made in `prompt`.

use std::collections::BTreeMap;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, Value, context};
use serde::Serialize;

use crate::Error;
use crate::tokenizer::{read_json, read_text, token_content};

/// The name of the one template of an environment.
const NAME: &str = "template";

/// The template of the user's message for models that bring none.
const DEFAULT_USER_TEMPLATE: &str =
    "{% if context %}Documentation:\n\n{{ context }}\n\n{% endif %}Question: {{ query }}";

/// One message of a conversation.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Message<'a> {
    /// `system`, `user` or `assistant`.
    pub role: &'a str,
    /// The text.
    pub content: &'a str,
}

/// A model's chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token` and their like, as the template knows them.
    special_tokens: BTreeMap<String, String>,
    takes_system: bool,
}

impl ChatTemplate {
    /// The chat template of the model in a folder; `None` if it has none.
    pub fn load(model_path: &Path) -> Result<Option<Self>, Error> {
        let config = read_json(&model_path.join("tokenizer_config.json"))?.unwrap_or_default();
        let source = match read_text(&model_path.join("chat_template.jinja"))? {
            Some(source) => Some(source),
            None => match template_source(&config["chat_template"]) {
                Some(source) => Some(source),
                None => read_json(&model_path.join("chat_template.json"))?
                    .and_then(|file| template_source(&file["chat_template"])),
            },
        };
        let Some(source) = source else {
            return Ok(None);
        };
        let mut special_tokens = BTreeMap::new();
        let map = read_json(&model_path.join("special_tokens_map.json"))?.unwrap_or_default();
        for name in ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"] {
            let content = token_content(&config[name]).or_else(|| token_content(&map[name]));
            if let Some(content) = content {
                special_tokens.insert(name.to_owned(), content.to_owned());
            }
        }
        Self::new(&source, special_tokens).map(Some)
    }

    /// Compiles a template.
    pub fn new(source: &str, special_tokens: BTreeMap<String, String>) -> Result<Self, Error> {
        let mut environment = chat_environment();
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| Error::Model(format!("the chat template is wrong: {error:#}")))?;
        let mut template = Self { environment, special_tokens, takes_system: true };
        let probe = [
            Message { role: "system", content: "system-probe" },
            Message { role: "user", content: "user-probe" },
        ];
        // A template may refuse a system message, or leave it out without a word.
        template.takes_system =
            template.render(&probe, true).is_ok_and(|text| text.contains("system-probe"));
        Ok(template)
    }

    /// Whether a system message becomes part of the prompt.
    pub fn takes_system(&self) -> bool {
        self.takes_system
    }

    /// The text of a conversation.
    pub fn render(
        &self,
        messages: &[Message<'_>],
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        let render = || {
            let messages = Value::from(Serde(messages));
            let own = context! { messages, add_generation_prompt, tools => (), documents => () };
            let context = context! { ..own, ..Value::from(Serde(&self.special_tokens)) };
            self.environment.get_template(NAME)?.render(context)
        };
        render().map_err(|error| {
            let text = error.detail().map_or_else(|| error.to_string(), str::to_owned);
            Error::Reject(format!("the chat template refuses the prompt: {text}"))
        })
    }
}

/// What a user template can speak of.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct UserFields<'a> {
    /// The retrieved context; empty if there is none.
    pub context: &'a str,
    /// The question.
    pub query: &'a str,
    /// Its id.
    pub id: &'a str,
    /// The API that is asked for, if it is known.
    pub target_api: Option<&'a str>,
    /// Packages with their versions.
    pub dependencies: &'a BTreeMap<String, Option<String>>,
}

/// Makes the user's message from a query and its context.
#[derive(Clone, Debug)]
pub struct UserTemplate {
    environment: Environment<'static>,
}

impl UserTemplate {
    /// Compiles a template.
    pub fn new(source: &str) -> Result<Self, Error> {
        let mut environment = environment();
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| Error::Reject(format!("the prompt template is wrong: {error:#}")))?;
        Ok(Self { environment })
    }

    /// The template of the model in a folder, `prompt_template.jinja`, or the built-in one.
    pub fn load(model_path: &Path) -> Result<Self, Error> {
        let own = read_text(&model_path.join("prompt_template.jinja"))?;
        Self::new(own.as_deref().unwrap_or(DEFAULT_USER_TEMPLATE))
    }

    /// The user's message.
    pub fn render(&self, fields: &UserFields<'_>) -> Result<String, Error> {
        let render = || self.environment.get_template(NAME)?.render(Serde(fields));
        render().map_err(|error| Error::Reject(format!("the prompt template failed: {error:#}")))
    }
}

/// What both kinds of templates have in common.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment
}

/// The environment in which transformers renders chat templates.
fn chat_environment() -> Environment<'static> {
    let mut environment = environment();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.unwrap_or_default());
    environment.add_function(
        "raise_exception",
        |text: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
        },
    );
    // No `strftime_now`: a prompt must not depend on the day it is computed. Templates that use it
    // have a fixed date for where it isn't defined.
    environment
}

/// A template as configuration files have it: a string, or a list of named ones.
fn template_source(value: &serde_json::Value) -> Option<String> {
    if let Some(source) = value.as_str() {
        return Some(source.to_owned());
    }
    let named = value.as_array()?;
    let chosen = named.iter().find(|entry| entry["name"] == "default").or_else(|| named.first())?;
    chosen["template"].as_str().map(str::to_owned)
}

/// The filter `tojson` as Python's `json.dumps` writes it.
#[expect(clippy::needless_pass_by_value, reason = "the shape of a filter")]
fn to_json(value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let mut text = Vec::new();
    let wrong = |error: serde_json::Error| {
        minijinja::Error::new(ErrorKind::BadSerialization, error.to_string())
    };
    if let Some(indent) = indent {
        let indent = b" ".repeat(indent);
        let pretty = serde_json::ser::PrettyFormatter::with_indent(&indent);
        let mut writer = serde_json::Serializer::with_formatter(&mut text, pretty);
        value.serialize(&mut writer).map_err(wrong)?;
    } else {
        let mut writer = serde_json::Serializer::with_formatter(&mut text, PythonFormatter);
        value.serialize(&mut writer).map_err(wrong)?;
    }
    String::from_utf8(text)
        .map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// JSON with a space behind commas and colons.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> String {
        let messages = [Message { role: "user", content: "hi <b>" }];
        ChatTemplate::new(source, BTreeMap::new()).unwrap().render(&messages, true).unwrap()
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        let text = render("{{ messages[0] | tojson }}{{ [1, 2] | tojson }}");
        assert_eq!(text, r#"{"role": "user", "content": "hi <b>"}[1, 2]"#);
        assert_eq!(render("{{ {'a': [1]} | tojson(indent=2) }}"), "{\n  \"a\": [\n    1\n  ]\n}");
    }

    #[test]
    fn a_prompt_does_not_depend_on_the_day() {
        let source =
            "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}26{% endif %}";
        assert_eq!(render(source), "26");
    }

    #[test]
    fn a_template_that_drops_or_refuses_system_messages_is_known() {
        let takes = |source| ChatTemplate::new(source, BTreeMap::new()).unwrap().takes_system();
        assert!(takes("{% for m in messages %}{{ m.content }}{% endfor %}"));
        assert!(!takes("{{ messages[-1].content }}"));
        assert!(!takes(
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        ));
    }

    #[test]
    fn what_a_template_raises_is_the_reason() {
        let source = "{{ raise_exception('turns must alternate') }}";
        let template = ChatTemplate::new(source, BTreeMap::new()).unwrap();
        let error = template.render(&[], true).unwrap_err();
        assert!(error.to_string().contains("turns must alternate"));
    }

    #[test]
    fn the_user_template_leaves_text_alone() {
        let dependencies = BTreeMap::from([("numpy".to_owned(), Some("1.2".to_owned()))]);
        let mut fields = UserFields {
            context: "<a> {{ x }}",
            query: "why?",
            id: "q1",
            target_api: None,
            dependencies: &dependencies,
        };
        let template = UserTemplate::new(DEFAULT_USER_TEMPLATE).unwrap();
        let text = "Documentation:\n\n<a> {{ x }}\n\nQuestion: why?";
        assert_eq!(template.render(&fields).unwrap(), text);
        fields.context = "";
        assert_eq!(template.render(&fields).unwrap(), "Question: why?");
        let own = "{{ id }} {{ dependencies.numpy }} {{ target_api or 'any' }}";
        assert_eq!(UserTemplate::new(own).unwrap().render(&fields).unwrap(), "q1 1.2 any");
        assert!(UserTemplate::new("{% if %}").is_err());
    }
}
