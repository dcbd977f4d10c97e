//! Jinja templates: a model's chat template, and the templates of the user's message.
//!
//! They are rendered as transformers renders them (`jinja`). What goes in and out here is text; the tokens of
//! a prompt are made in `prompt`.

mod jinja;
mod json;
mod variables;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use minijinja::value::Serde;
use minijinja::{Environment, Value, context};
use serde::Serialize;

use crate::Error;
use crate::model_files::ModelFiles;
use crate::tokenizer::named_tokens;

pub use variables::TemplateVariables;

/// The name of a template that comes from no file.
const NAME: &str = "template";

/// The template of the user's message for models that bring none.
const DEFAULT_USER_TEMPLATE: &str =
    "{% if context %}Documentation:\n\n{{ context }}\n\n{% endif %}Question: {{ query }}";

/// Words that stand for a message's text where it is found out what a template does.
const PROBES: [&str; 2] = ["system-probe", "user-probe"];

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
    /// Where it comes from; its name in errors.
    origin: String,
    /// `bos_token`, `eos_token` and their like, as the template knows them.
    special_tokens: BTreeMap<String, String>,
    /// All variables that it reads.
    read: BTreeSet<String>,
    takes_system: bool,
    /// Whether it reads only messages whose content is a list of parts.
    wants_parts: bool,
}

impl ChatTemplate {
    /// The chat template of a model; `None` if it has none.
    pub fn load(model_path: &Path) -> Result<Option<Self>, Error> {
        let files = ModelFiles::open(model_path)?;
        let config = files.json("tokenizer_config.json")?.unwrap_or_default();
        let Some((origin, source)) = find_source(&files, &config)? else {
            return Ok(None);
        };
        let map = files.json("special_tokens_map.json")?.unwrap_or_default();
        let special_tokens = named_tokens(&config, &map);
        Self::compile(origin, &source, special_tokens).map(Some)
    }

    /// Compiles a template.
    pub fn new(source: &str, special_tokens: BTreeMap<String, String>) -> Result<Self, Error> {
        Self::compile(NAME.to_owned(), source, special_tokens)
    }

    fn compile(
        origin: String,
        source: &str,
        special_tokens: BTreeMap<String, String>,
    ) -> Result<Self, Error> {
        let mut environment = jinja::chat_environment();
        environment
            .add_template_owned(origin.clone(), jinja::prepared(source))
            .map_err(|error| Error::Model(format!("the chat template is wrong: {error}")))?;
        let read = environment.get_template(&origin);
        let read = read.map(|template| template.undeclared_variables(false)).unwrap_or_default();
        let read = read.into_iter().collect();
        let mut template = Self {
            environment,
            origin,
            special_tokens,
            read,
            takes_system: true,
            wants_parts: false,
        };
        let [system, user] = PROBES;
        let user = Message { role: "user", content: user };
        let system = Message { role: "system", content: system };
        let shows_user = |template: &Self| {
            template.render(&[user], true).is_ok_and(|text| text.contains(user.content))
        };
        if !shows_user(&template) {
            template.wants_parts = true;
            template.wants_parts = shows_user(&template);
        }
        // A template may refuse a system message, or leave it out without a word.
        template.takes_system =
            template.render(&[system, user], true).is_ok_and(|text| text.contains(system.content));
        Ok(template)
    }

    /// Whether a system message becomes part of the prompt.
    pub fn takes_system(&self) -> bool {
        self.takes_system
    }

    /// Roles whose messages become part of the prompt, of those that there usually are.
    pub fn roles(&self) -> Vec<&'static str> {
        let message = |role, content| Message { role, content };
        let probe = "role-probe";
        let shows = |role: &'static str| {
            let first = message("user", "first");
            let conversations = match role {
                "system" => vec![message(role, probe), first],
                "user" => vec![message(role, probe)],
                "assistant" => vec![first, message(role, probe), message("user", "last")],
                _ => vec![first, message("assistant", "second"), message(role, probe)],
            };
            self.render(&conversations, true).is_ok_and(|text| text.contains(probe))
        };
        ["system", "user", "assistant", "tool"].into_iter().filter(|role| shows(role)).collect()
    }

    /// What else the template can be told: variables that it reads, and neither flotilla, the tokenizer nor itself
    /// sets. One that it sets where it isn't given (`is defined`) counts.
    pub fn variables(&self) -> Vec<&str> {
        let template = self.environment.get_template(&self.origin);
        let source = template.as_ref().map_or("", |template| template.source());
        let is_asked_for = |name: &str| {
            let tests = [format!("{name} is defined"), format!("{name} is not defined")];
            let mut places = tests.iter().flat_map(|test| source.match_indices(test));
            places.any(|(at, _)| source[..at].ends_with([' ', '(']))
        };
        let is_set = |name: &str| {
            ["messages", "add_generation_prompt"].contains(&name)
                || name.ends_with("_token")
                || self.environment.globals().any(|(global, _)| global == name)
                || source.contains(&format!("set {name} =")) && !is_asked_for(name)
        };
        self.read.iter().map(String::as_str).filter(|name| !is_set(name)).collect()
    }

    /// Whether it reads a variable.
    pub(crate) fn reads(&self, name: &str) -> bool {
        self.read.contains(name)
    }

    /// The text of a conversation.
    pub fn render(
        &self,
        messages: &[Message<'_>],
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        self.render_told(messages, add_generation_prompt, &TemplateVariables::default())
    }

    /// The text of a conversation, with further variables of the template.
    pub(crate) fn render_told(
        &self,
        messages: &[Message<'_>],
        add_generation_prompt: bool,
        variables: &TemplateVariables,
    ) -> Result<String, Error> {
        let message = |message: &Message<'_>| {
            let content = if self.wants_parts {
                Value::from(vec![context! { type => "text", text => message.content }])
            } else {
                Value::from(message.content)
            };
            context! { role => message.role, content }
        };
        let messages: Vec<Value> = messages.iter().map(message).collect();
        let variables = variables.value().clone();
        self.render_with(context! { messages, add_generation_prompt, ..variables })
    }

    /// The text that the template makes of these variables, of which `messages` is one, as transformers'
    /// `apply_chat_template` takes them.
    pub fn render_with(&self, variables: impl Serialize) -> Result<String, Error> {
        let defaults = context! { tools => (), documents => (), add_generation_prompt => false };
        let context = context! {
            ..Value::from(Serde(&variables)),
            ..Value::from(Serde(&self.special_tokens)),
            ..defaults
        };
        let template = self.environment.get_template(&self.origin);
        template.and_then(|template| template.render(context)).map_err(|error| {
            let raised = std::error::Error::source(&error).and_then(|s| s.downcast_ref());
            Error::Reject(match raised {
                Some(jinja::Raised(text)) => {
                    format!("the chat template ({}) refuses the prompt: {text}", self.origin)
                }
                None => format!("the chat template failed: {error}"),
            })
        })
    }
}

/// A model's chat template and the file that it comes from, in the order in which transformers looks: files of
/// their own, then the tokenizer's configuration, then that of older processors.
fn find_source(
    files: &ModelFiles,
    config: &serde_json::Value,
) -> Result<Option<(String, String)>, Error> {
    const FILE: &str = "chat_template.jinja";
    if let Some(source) = files.text(FILE)? {
        return Ok(Some((FILE.to_owned(), source)));
    }
    let others = ["additional_chat_templates/default.jinja", "chat_templates/default.jinja"];
    for name in others {
        if let Some(source) = files.text(name)? {
            return Ok(Some((name.to_owned(), source)));
        }
    }
    let processor = files.json("chat_template.json")?.unwrap_or_default();
    let configs = [("tokenizer_config.json", config), ("chat_template.json", &processor)];
    for (name, config) in configs {
        if let Some(source) = template_source(&config["chat_template"])
            .map_err(|what| Error::Model(format!("chat_template in {name} {what}")))?
        {
            return Ok(Some((name.to_owned(), source)));
        }
    }
    Ok(None)
}

/// A template as configuration files have it: a string, or several named ones of which `default` counts.
fn template_source(value: &serde_json::Value) -> Result<Option<String>, String> {
    let mut names = Vec::new();
    let mut named = BTreeMap::new();
    match value {
        serde_json::Value::Null => return Ok(None),
        serde_json::Value::String(source) => return Ok(Some(source.clone())),
        serde_json::Value::Array(entries) => {
            for entry in entries {
                if let (Some(name), Some(source)) =
                    (entry["name"].as_str(), entry["template"].as_str())
                {
                    names.push(name);
                    named.insert(name, source);
                }
            }
        }
        serde_json::Value::Object(entries) => {
            for (name, source) in entries {
                names.push(name);
                named.extend(source.as_str().map(|source| (name.as_str(), source)));
            }
        }
        other => return Err(format!("is {other}, expected a template or a list of named ones")),
    }
    match named.get("default") {
        Some(source) => Ok(Some((*source).to_owned())),
        None if names.is_empty() => Ok(None),
        None => Err(format!("has none named \"default\", only {}", names.join(", "))),
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
        let mut environment = jinja::environment();
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| Error::Reject(format!("the prompt template is wrong: {error}")))?;
        Ok(Self { environment })
    }

    /// The template of the model, `prompt_template.jinja` in its folder, or the built-in one.
    pub fn load(model_path: &Path) -> Result<Self, Error> {
        let own = ModelFiles::open(model_path)?.text("prompt_template.jinja")?;
        Self::new(own.as_deref().unwrap_or(DEFAULT_USER_TEMPLATE))
    }

    /// The user's message.
    pub fn render(&self, fields: &UserFields<'_>) -> Result<String, Error> {
        let render = || self.environment.get_template(NAME)?.render(Serde(fields));
        render().map_err(|error| Error::Reject(format!("the prompt template failed: {error}")))
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
        assert_eq!(render("{{ strftime_now('%d %b %Y, %-m') }}"), "26 Jul 2024, 7");
    }

    #[test]
    fn a_template_that_reads_only_parts_gets_parts() {
        let source = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}";
        assert_eq!(render(source), "hi <b>");
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
