//! What is asked, however it came: the requests of both kinds read into one. Pure.

use engine::{Grammar, Message};
use serde_json::Value;

use crate::error::ApiError;
use crate::fields::{Fields, wrong};
use crate::messages_in::{anthropics_messages, content_text, messages};
use crate::sampling::Sampling;
use crate::tools::Tools;

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    /// The hash of the key that was asked with: what is kept of a conversation is its owner's alone.
    pub caller: Option<[u8; 32]>,
    /// The model's name, if one was given.
    pub model: Option<String>,
    /// Prompts; each is answered `n` times.
    pub prompts: Vec<Prompt>,
    /// Which field they came from.
    pub param: &'static str,
    /// Answers to each prompt.
    pub n: u32,
    /// Tokens of each answer at most; the server's own limit where it is not said.
    pub max_tokens: Option<u32>,
    /// Texts before which an answer ends.
    pub stops: Vec<String>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// What the answer keeps to.
    pub grammar: Option<Grammar>,
    /// What the model may call.
    pub tools: Tools,
    /// Whether it comes as it is made.
    pub stream: bool,
    /// Whether the stream ends with the usage.
    pub include_usage: bool,
}

/// What comes before the answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Through the chat template.
    Chat(Vec<Message>),
    /// As it is.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
}

/// Answers of one request at most, over all its prompts: each holds a place in the swarm for a while.
const ANSWERS_MAX: usize = 16;
/// Stop texts, and the longest: each is looked for after every token.
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 1024;
/// What a completion has where it does not say, as OpenAI has it.
const COMPLETION_TOKENS: u32 = 16;

impl Ask {
    /// Asked by whom.
    #[must_use]
    pub fn of(self, caller: Option<[u8; 32]>) -> Self {
        Self { caller, ..self }
    }

    /// `POST /v1/chat/completions`.
    ///
    /// # Errors
    /// A field is missing, wrong or not supported.
    pub fn chat(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let messages = messages(fields.need("messages")?)?;
        for (name, why) in [
            ("audio", "text is all that models here make"),
            ("functions", "it is called `tools` now"),
            ("prediction", "answers are not predicted here"),
        ] {
            fields.refuse(name, why)?;
        }
        let tools = Tools::read(&mut fields)?;
        let ask = Self::read(&mut fields, vec![Prompt::Chat(messages)], "messages")?;
        let mut ask = ask.with_tools(tools)?;
        // The newer name comes first, as in OpenAI's own.
        if let Some(tokens) = fields.count("max_completion_tokens", 1)? {
            ask.max_tokens = Some(tokens);
        }
        ask.sampling.read_chat_logprobs(&mut fields)?;
        Ok(ask)
    }

    /// `POST /v1/completions`.
    ///
    /// # Errors
    /// A field is missing, wrong or not supported.
    pub fn completion(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let prompts = prompts(fields.need("prompt")?, "prompt", ANSWERS_MAX)?;
        fields.refuse("echo", "the prompt is known to whoever asked")?;
        fields.refuse(
            "suffix",
            "models here go on with a text, they do not fill in",
        )?;
        let mut ask = Self::read(&mut fields, prompts, "prompt")?;
        ask.max_tokens.get_or_insert(COMPLETION_TOKENS);
        if let Some(best) = fields.count("best_of", 1)?
            && best != ask.n
        {
            let why = "`best_of` is not supported: every answer is given";
            return Err(ApiError::field("best_of", why));
        }
        ask.sampling.read_logprobs(&mut fields)?;
        Ok(ask)
    }

    /// `POST /v1/messages`; where the prompt is only counted, the answer's length need not be said.
    ///
    /// # Errors
    /// A field is missing, wrong or not supported.
    pub fn message(body: &[u8], answered: bool) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        if answered {
            let max_tokens = fields.need("max_tokens")?;
            fields.put("max_tokens", max_tokens);
        }
        let mut all = Vec::new();
        if let Some(system) = fields.take("system") {
            let text = content_text(system, "system")?;
            all.push(Message::new("system", text));
        }
        all.extend(anthropics_messages(fields.need("messages")?)?);
        let tools = Tools::read_anthropics(&mut fields)?;
        let stops = stops(fields.take("stop_sequences"), "stop_sequences")?;
        // Other dialects' words for the same mean nothing in this one.
        for name in ["n", "stop", "response_format", "stream_options"] {
            fields.take(name);
        }
        let ask = Self::read(&mut fields, vec![Prompt::Chat(all)], "messages")?;
        Self { stops, ..ask }.with_tools(tools)
    }

    fn with_tools(self, tools: Tools) -> Result<Self, ApiError> {
        let demanded = tools.grammar()?;
        if demanded.is_some() && self.grammar.is_some() {
            let why = "`response_format` says what to write, and `tool_choice` that it is a call";
            return Err(ApiError::field("response_format", why));
        }
        Ok(Self {
            grammar: demanded.or(self.grammar),
            tools,
            ..self
        })
    }

    fn read(
        fields: &mut Fields,
        prompts: Vec<Prompt>,
        param: &'static str,
    ) -> Result<Self, ApiError> {
        let n = fields.integer("n", 1..=ANSWERS_MAX as i64)?.unwrap_or(1) as u32;
        if prompts.len().saturating_mul(n as usize) > ANSWERS_MAX {
            let many = format!(
                "{} prompts with {n} answers each; one request gets at most {ANSWERS_MAX} answers",
                prompts.len()
            );
            return Err(ApiError::field(param, many));
        }
        let stream = fields.flag("stream")?;
        let include_usage = match fields.take("stream_options") {
            None => false,
            Some(_) if !stream => {
                let why = "`stream_options` needs `stream` to be true";
                return Err(ApiError::field("stream_options", why));
            }
            Some(options) => Fields::of(options, "stream_options")?.flag("include_usage")?,
        };
        Ok(Self {
            caller: None,
            model: fields.text("model")?,
            prompts,
            param,
            n,
            max_tokens: fields.count("max_tokens", 1)?,
            stops: stops(fields.take("stop"), "stop")?,
            sampling: Sampling::read(fields)?,
            grammar: grammar(fields.take("response_format"))?,
            tools: Tools::default(),
            stream,
            include_usage,
        })
    }
}

/// Text, any JSON object, or what is valid by a schema.
fn grammar(format: Option<Value>) -> Result<Option<Grammar>, ApiError> {
    const AT: &str = "response_format";
    let Some(format) = format else {
        return Ok(None);
    };
    let mut fields = Fields::of(format, AT)?;
    let kind = fields.text("type")?;
    let (schema, at) = match kind.as_deref() {
        Some("text") => return Ok(None),
        // With a schema beside it, as llama.cpp's server has it.
        Some("json_object") => match fields.take("schema") {
            None => return Ok(Some(Grammar::json_object())),
            Some(schema) => (schema, fields.at("schema")),
        },
        Some("json_schema") => {
            let at = fields.at("json_schema");
            let mut inner = Fields::of(fields.need("json_schema")?, &at)?;
            (inner.need("schema")?, inner.at("schema"))
        }
        _ => {
            let at = fields.at("type");
            let why = format!("`{at}` must be text, json_object or json_schema");
            return Err(ApiError::field(at, why));
        }
    };
    let grammar = Grammar::of_schema(&schema);
    let wrong = |error| ApiError::field(&at, format!("`{at}` at {error}"));
    grammar.map(Some).map_err(wrong)
}

/// One text or several.
fn stops(value: Option<Value>, at: &str) -> Result<Vec<String>, ApiError> {
    let list = match value {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) => vec![Value::String(text)],
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(at, &other, "a string or a list of strings")),
    };
    if list.len() > STOPS_MAX {
        let many = format!(
            "`{at}` has {} texts, at most {STOPS_MAX} are taken",
            list.len()
        );
        return Err(ApiError::field(at, many));
    }
    let stop = |(n, value): (usize, Value)| match value {
        Value::String(text) if (1..=STOP_BYTES_MAX).contains(&text.len()) => Ok(text),
        Value::String(_) => Err(ApiError::field(
            format!("{at}[{n}]"),
            format!("`{at}[{n}]` must have 1 to {STOP_BYTES_MAX} bytes"),
        )),
        other => Err(wrong(&format!("{at}[{n}]"), &other, "a string")),
    };
    list.into_iter().enumerate().map(stop).collect()
}

/// A text, a list of texts, token ids, or a list of such lists; `at` is the field's name.
///
/// # Errors
/// It is something else, or more than `max`.
pub fn prompts(value: Value, at: &str, max: usize) -> Result<Vec<Prompt>, ApiError> {
    const WANTED: &str = "a string, a list of strings, token ids, or a list of lists of them";
    match value {
        Value::String(text) => Ok(vec![Prompt::Text(text)]),
        Value::Array(list) if list.first().is_some_and(Value::is_number) => {
            Ok(vec![Prompt::Ids(ids(list, at)?)])
        }
        Value::Array(list) if list.is_empty() => {
            Err(ApiError::field(at, format!("`{at}` is empty")))
        }
        Value::Array(list) if list.len() > max => {
            let many = format!("`{at}` has {} texts, at most {max} are taken", list.len());
            Err(ApiError::field(at, many))
        }
        Value::Array(list) => {
            let prompt = |(n, value)| match value {
                Value::String(text) => Ok(Prompt::Text(text)),
                Value::Array(list) => Ok(Prompt::Ids(ids(list, &format!("{at}[{n}]"))?)),
                other => Err(wrong(&format!("{at}[{n}]"), &other, WANTED)),
            };
            list.into_iter().enumerate().map(prompt).collect()
        }
        other => Err(wrong(at, &other, WANTED)),
    }
}

fn ids(list: Vec<Value>, at: &str) -> Result<Vec<u32>, ApiError> {
    let id = |(n, value): (usize, Value)| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| wrong(&format!("{at}[{n}]"), &value, "a token id"))
    };
    list.into_iter().enumerate().map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn chat(value: &Value) -> Result<Ask, ApiError> {
        Ask::chat(value.to_string().as_bytes())
    }

    fn completion(value: &Value) -> Result<Ask, ApiError> {
        Ask::completion(value.to_string().as_bytes())
    }

    /// The field that an error names.
    fn param(asked: Result<Ask, ApiError>) -> String {
        let error = asked.err().unwrap().json();
        error["error"]["param"].as_str().unwrap_or("none").into()
    }

    fn hello() -> Value {
        json!([{"role": "user", "content": "hello"}])
    }

    #[test]
    fn a_chat_as_clients_send_it() {
        let ask = chat(&json!({
            "model": "demo",
            "messages": [
                {"role": "developer", "content": "be kind"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
            ],
            "stream": true,
            "stream_options": {"include_usage": true},
            "max_tokens": 5, "max_completion_tokens": 7,
            "stop": "END", "user": "u", "store": false, "tools": [], "response_format": {"type": "text"},
        }))
        .unwrap();
        let messages = vec![
            Message::new("system", "be kind"),
            Message::new("user", "ab"),
        ];
        assert_eq!(ask.prompts, [Prompt::Chat(messages)]);
        assert_eq!(ask.max_tokens, Some(7));
        assert_eq!(ask.stops, ["END"]);
        assert!(ask.stream && ask.include_usage && ask.n == 1);
    }

    #[test]
    fn mistakes_in_a_chat_name_their_field() {
        for (field, value) in [
            ("messages", json!({})),
            ("messages", json!({"messages": []})),
            ("messages", json!({"messages": "hello"})),
            ("messages[0]", json!({"messages": ["hello"]})),
            ("messages[0].role", json!({"messages": [{"content": "x"}]})),
            (
                "messages[0].role",
                json!({"messages": [{"role": "king", "content": "x"}]}),
            ),
            (
                "messages[0].content",
                json!({"messages": [{"role": "user"}]}),
            ),
            (
                "messages[0].content",
                json!({"messages": [{"role": "user", "content": 7}]}),
            ),
            (
                "messages[0].content[0]",
                json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            ),
            ("n", json!({"messages": hello(), "n": 0})),
            ("n", json!({"messages": hello(), "n": 17})),
            ("stop[1]", json!({"messages": hello(), "stop": ["a", ""]})),
            ("stop", json!({"messages": hello(), "stop": 5})),
            ("max_tokens", json!({"messages": hello(), "max_tokens": 0})),
            (
                "max_completion_tokens",
                json!({"messages": hello(), "max_completion_tokens": "9"}),
            ),
            ("stream", json!({"messages": hello(), "stream": "yes"})),
            (
                "stream_options",
                json!({"messages": hello(), "stream_options": {}}),
            ),
            ("model", json!({"messages": hello(), "model": 3})),
            (
                "tools[0].function",
                json!({"messages": hello(), "tools": [{}]}),
            ),
            (
                "response_format.type",
                json!({"messages": hello(), "response_format": {"type": "nonsense"}}),
            ),
            (
                "response_format.json_schema",
                json!({"messages": hello(), "response_format": {"type": "json_schema"}}),
            ),
            (
                "response_format.json_schema.schema",
                json!({"messages": hello(), "response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "x"}}}}),
            ),
        ] {
            assert_eq!(param(chat(&value)), field, "{value}");
        }
    }

    #[test]
    fn a_message_as_anthropics_clients_send_it() {
        let message = |value: Value| Ask::message(value.to_string().as_bytes(), true);
        let ask = message(json!({
            "model": "demo", "max_tokens": 9, "messages": hello(), "stop_sequences": ["END"], "n": 4,
            "system": [{"type": "text", "text": "be kind", "cache_control": {"type": "ephemeral"}}],
        }))
        .unwrap();
        let all = vec![
            Message::new("system", "be kind"),
            Message::new("user", "hello"),
        ];
        assert_eq!(ask.prompts, [Prompt::Chat(all)]);
        assert_eq!((ask.max_tokens, ask.n), (Some(9), 1));
        assert_eq!(ask.stops, ["END"]);
        assert_eq!(param(message(json!({"messages": hello()}))), "max_tokens");
        let zero = json!({"messages": hello(), "max_tokens": 0});
        assert_eq!(param(message(zero)), "max_tokens");
    }

    /// Bytes of good requests, changed at random: each is read or refused, and nothing else happens.
    #[test]
    fn requests_that_were_tampered_with_are_read_or_refused() {
        let tool = json!({"name": "f", "parameters": {"type": "object", "properties": {"a": {"enum": [1, "x"]}}}});
        let schema = json!({"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": {"type": "array"}}});
        let good = [
            json!({"messages": hello(), "n": 2, "stop": ["a"], "logit_bias": {"1": 2}, "seed": -1,
                "tools": [{"type": "function", "function": tool}], "tool_choice": "required"}),
            json!({"prompt": [[1, 2], "x"], "logprobs": 3, "stream": true, "stream_options": {},
                "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}),
            json!({"max_tokens": 3, "system": [{"type": "text", "text": "s"}], "messages": [
                {"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]}),
        ];
        let mut state = 1u64;
        let mut below = |limit: usize| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) as usize % limit.max(1)
        };
        let mut read = 0;
        for _ in 0..30_000 {
            let mut bytes = good[below(3)].to_string().into_bytes();
            for _ in 0..=below(3) {
                let (at, to) = (below(bytes.len()), below(bytes.len()));
                match below(4) {
                    0 => bytes[at] = below(256) as u8,
                    1 => bytes.truncate(at.max(1)),
                    2 => bytes.swap(at, to),
                    _ => bytes[at] = b"{}[],:\"019-\\"[below(12)],
                }
            }
            read += usize::from(Ask::chat(&bytes).is_ok());
            read += usize::from(Ask::completion(&bytes).is_ok());
            read += usize::from(Ask::message(&bytes, true).is_ok());
        }
        assert!(read > 100, "hardly any was still good: {read}");
    }

    #[test]
    fn prompts_of_all_four_kinds() {
        let prompts = |value| completion(&json!({"prompt": value})).unwrap().prompts;
        let text = |text: &str| Prompt::Text(text.into());
        assert_eq!(prompts(json!("a")), [text("a")]);
        assert_eq!(prompts(json!(["a", "b"])), [text("a"), text("b")]);
        assert_eq!(prompts(json!([1, 2])), [Prompt::Ids(vec![1, 2])]);
        assert_eq!(
            prompts(json!([[1], [2]])),
            [Prompt::Ids(vec![1]), Prompt::Ids(vec![2])]
        );
        assert_eq!(
            completion(&json!({"prompt": "a"})).unwrap().max_tokens,
            Some(16)
        );
        for (field, value) in [
            ("prompt", json!({})),
            ("prompt", json!({"prompt": 5})),
            ("prompt", json!({"prompt": []})),
            ("prompt", json!({"prompt": vec!["x"; 17]})),
            ("prompt", json!({"prompt": ["a", "b"], "n": 9})),
            ("prompt[1]", json!({"prompt": [1, -1]})),
            ("prompt[1]", json!({"prompt": ["a", 1]})),
            ("prompt[0][1]", json!({"prompt": [[1, 4_294_967_296u64]]})),
            ("echo", json!({"prompt": "a", "echo": true})),
            ("suffix", json!({"prompt": "a", "suffix": "b"})),
            ("best_of", json!({"prompt": "a", "best_of": 3})),
        ] {
            assert_eq!(param(completion(&value)), field, "{value}");
        }
    }
}
