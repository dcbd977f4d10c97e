//! The options that say how answers are generated.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, ValueEnum};
use shared::Generation;
use shared::generation::{MAX_LOGPROBS, MAX_NEW_TOKENS};
use shared::json;

use super::Usage;

/// How answers are generated. What a query's own `generation` says comes before these options, then come
/// the model's generation_config.json and the defaults named here.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Generation")]
pub(crate) struct GenerationOptions {
    /// Whether the model has a say. A setting is taken from the query's own `generation`, else from
    /// its option here, else from the model's generation_config.json, else from flotilla's default.
    #[arg(long, value_enum, value_name = "FROM", default_value_t = ModelSettings::Model)]
    pub(crate) generation_config: ModelSettings,
    /// Most tokens of an answer [default: the model's, or 512].
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_NEW_TOKENS)))]
    pub(crate) max_new_tokens: Option<u32>,
    /// Tokens of an answer before it may end by itself [default: 0].
    #[arg(long, value_name = "N")]
    pub(crate) min_new_tokens: Option<u32>,
    /// Sampling temperature; 0 takes the most likely token [default: the model's, or 0.2].
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub(crate) temperature: Option<f32>,
    /// Sample among the most likely tokens whose probabilities add up to this [default: the
    /// model's, or 0.95].
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) top_p: Option<f32>,
    /// Sample among this many most likely tokens; 0 for all [default: the model's, or 0].
    #[arg(long, value_name = "K", allow_negative_numbers = true, value_parser = parse_top_k)]
    pub(crate) top_k: Option<u32>,
    /// Sample among tokens that are at least this likely, as a fraction of the most likely one's
    /// probability [default: the model's, or 0].
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) min_p: Option<f32>,
    /// Sample among the tokens of most typical information whose probabilities add up to this
    /// [default: the model's, or 1].
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) typical_p: Option<f32>,
    /// Above 1, makes tokens less likely that are in the prompt or the answer so far [default: the
    /// model's, or 1].
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) repetition_penalty: Option<f32>,
    /// Above 0, makes tokens less likely that are in the answer so far; from -2 to 2 [default: 0].
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) presence_penalty: Option<f32>,
    /// Above 0, makes tokens less likely the more often they are in the answer so far; from -2 to 2
    /// [default: 0].
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) frequency_penalty: Option<f32>,
    /// Add this to a token's logit: 50256=-100 forbids it, 100 all but forces it; may be given
    /// several times.
    #[arg(long, value_name = "ID=BIAS", value_parser = parse_bias)]
    pub(crate) logit_bias: Vec<(u32, f32)>,
    /// Text that ends an answer and is not part of it; may be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    /// Token that ends an answer and is not part of its text; may be given several times.
    #[arg(long, visible_alias = "stop-token-ids", value_name = "ID", value_delimiter = ',')]
    pub(crate) stop_token_id: Vec<u32>,
    /// Go on behind the model's end-of-text token.
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Write the log-probability of each generated token into its line, and of so many of the most
    /// likely ones; at most 20. A line grows by some 70 bytes for each of them.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=i64::from(MAX_LOGPROBS)))]
    pub(crate) logprobs: Option<u32>,
    /// Seed of the run; each job's own comes from it and the job's id.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Variables of the model's chat template as a JSON object, such as '{"enable_thinking": false}';
    /// `flotilla models` names those that a model's template reads. A query's own come before these.
    #[arg(long, value_name = "JSON", value_parser = parse_variables)]
    pub(crate) chat_template_kwargs: Option<json::Object>,
    /// System prompt.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) system_prompt: Option<String>,
    /// Jinja template of the user message, with `context`, `query`, `id`, `target_api` and
    /// `dependencies`. Its text can't be control tokens: those come from the model's chat template.
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_template: Option<PathBuf>,
}

/// Whether the model has a say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ModelSettings {
    /// It has, before flotilla's defaults.
    Model,
    /// It has none.
    None,
}

impl GenerationOptions {
    /// What every job is told where its query says nothing; the seed is the run's. An error is wrong usage.
    pub(crate) fn generation(&self) -> Result<Generation, Usage> {
        let said = Generation {
            max_new_tokens: self.max_new_tokens,
            min_new_tokens: self.min_new_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            typical_p: self.typical_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: filled(&self.logit_bias).map(|biases| biases.iter().copied().collect()),
            stop: filled(&self.stop).map(<[_]>::to_vec),
            stop_token_ids: filled(&self.stop_token_id).map(<[_]>::to_vec),
            ignore_eos: self.ignore_eos.then_some(true),
            logprobs: self.logprobs.map(|_| true),
            top_logprobs: self.logprobs,
            seed: Some(self.seed),
            chat_template_kwargs: self.chat_template_kwargs.clone(),
        };
        said.validate().map_err(Usage)?;
        Ok(match self.generation_config {
            ModelSettings::Model => said,
            ModelSettings::None => said.or(&Generation::DEFAULTS),
        })
    }

    /// The text of the prompt template, checked.
    pub(crate) fn template(&self) -> anyhow::Result<Option<String>> {
        let Some(path) = &self.prompt_template else { return Ok(None) };
        let source = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the prompt template {}", path.display()))?;
        engine::UserTemplate::new(&source)
            .with_context(|| format!("the prompt template {} is wrong", path.display()))?;
        Ok(Some(source))
    }
}

fn filled<T>(values: &[T]) -> Option<&[T]> {
    (!values.is_empty()).then_some(values)
}

/// A number of tokens; elsewhere -1 stands for all.
fn parse_top_k(text: &str) -> Result<u32, String> {
    if text == "-1" {
        return Ok(0);
    }
    text.parse().map_err(|_| "expected a whole number of at least 0".to_owned())
}

fn parse_variables(text: &str) -> Result<json::Object, String> {
    serde_json::from_str(text).map_err(|error| {
        format!(r#"expected a JSON object such as {{"enable_thinking": false}}: {error}"#)
    })
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let parsed = text
        .split_once('=')
        .and_then(|(token, bias)| Some((token.trim().parse().ok()?, bias.trim().parse().ok()?)));
    parsed.ok_or_else(|| "expected a token id and a number such as 50256=-100".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        generation: GenerationOptions,
    }

    fn parse(args: &str) -> Result<Generation, String> {
        let args = std::iter::once("flotilla").chain(args.split_whitespace());
        let command = Command::try_parse_from(args).map_err(|error| error.to_string())?;
        command.generation.generation().map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_not_said_stays_open_unless_the_model_has_no_say() {
        let seed = Some(0);
        assert_eq!(parse(""), Ok(Generation { seed, ..Generation::default() }));
        let said = Generation { temperature: Some(0.0), seed, ..Generation::default() };
        assert_eq!(parse("--temperature 0"), Ok(said));
        let closed = Generation { top_k: Some(4), ..Generation::DEFAULTS };
        assert_eq!(parse("--generation-config none --top-k 4"), Ok(closed));
    }

    #[test]
    fn every_option_arrives() {
        let given = parse(
            "--max-new-tokens 7 --min-new-tokens 2 --temperature 0.7 --top-p 0.5 --top-k -1 --min-p 0.1 \
             --typical-p 0.9 --repetition-penalty 1.2 --presence-penalty -0.5 --frequency-penalty 0.5 \
             --logit-bias 3=-100 --logit-bias 5=1.5 --stop END --stop -x --stop-token-id 5 \
             --stop-token-ids 6,7 --ignore-eos --logprobs 3 --seed 9 --chat-template-kwargs {\"enable_thinking\":false}",
        );
        let expected = Generation {
            max_new_tokens: Some(7),
            min_new_tokens: Some(2),
            temperature: Some(0.7),
            top_p: Some(0.5),
            top_k: Some(0),
            min_p: Some(0.1),
            typical_p: Some(0.9),
            repetition_penalty: Some(1.2),
            presence_penalty: Some(-0.5),
            frequency_penalty: Some(0.5),
            logit_bias: Some([(3, -100.0), (5, 1.5)].into()),
            stop: Some(vec!["END".to_owned(), "-x".to_owned()]),
            stop_token_ids: Some(vec![5, 6, 7]),
            ignore_eos: Some(true),
            logprobs: Some(true),
            top_logprobs: Some(3),
            seed: Some(9),
            chat_template_kwargs: serde_json::from_str(r#"{"enable_thinking": false}"#).ok(),
        };
        let given = given.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(given, expected);
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_what_was_expected() {
        for (args, expected) in [
            ("--temperature NaN", "temperature: expected a number of at least 0, given NaN"),
            ("--top-p 0 --min-p 2", "given 0; min_p: expected a number from 0 to 1, given 2"),
            ("--top-k -2", "expected a whole number of at least 0"),
            ("--repetition-penalty 0", "repetition_penalty: expected a number above 0"),
            ("--presence-penalty -3", "presence_penalty: expected a number from -2 to 2"),
            ("--max-new-tokens 1000000000", "1000000000 is not in 1..=10000000"),
            ("--max-new-tokens 4 --min-new-tokens 5", "min_new_tokens: expected at most"),
            ("--logit-bias 7", "a token id and a number such as 50256=-100"),
            ("--logit-bias 7=inf", "logit_bias of token 7: expected a finite number"),
            ("--logprobs 21", "21 is not in 0..=20"),
            ("--chat-template-kwargs false", "expected a JSON object such as"),
            (
                "--chat-template-kwargs {\"tokenize\":true}",
                "flotilla doesn't set itself, given tokenize",
            ),
            ("--generation-config some", "[possible values: model, none]"),
        ] {
            let error = parse(args).unwrap_err();
            assert!(error.contains(expected), "{args}: {error}");
        }
    }
}
