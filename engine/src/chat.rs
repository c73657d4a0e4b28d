//! Chat templates: a model's own Jinja, rendered with limits, since it comes
//! from whoever made the model.

use std::io::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::{Deserialize, Serialize};
use serde_json::Map;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Instructions that a template may take: a thousandfold of a long chat's.
const FUEL: u64 = 10_000_000;
/// Longest text that a template may make.
const OUTPUT_BYTES_MAX: usize = 4 << 20;

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// What was said.
    pub content: String,
    /// What templates may know besides: `tool_calls`, `tool_call_id`, `name`.
    #[serde(flatten)]
    pub more: Map<String, serde_json::Value>,
}

impl Message {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message {
            role: role.into(),
            content: content.into(),
            more: Map::new(),
        }
    }

    /// The same with something a template may know besides.
    #[must_use]
    pub fn with(mut self, name: &str, value: serde_json::Value) -> Message {
        self.more.insert(name.to_owned(), value);
        self
    }
}

/// Why a template gave no text.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The template is not Jinja, asks for what there is not, or raised an
    /// exception of its own.
    #[error("chat template: {0}")]
    Template(String),
    /// The template makes too much text.
    #[error("chat template: more than {OUTPUT_BYTES_MAX} bytes of text")]
    Length,
}

/// Renders `template` as the transformers library would; `tools` are functions that the model is told of, as JSON
/// schemas of OpenAI's kind.
///
/// # Errors
/// See [`ChatError`].
pub fn render_chat(
    template: &str,
    messages: &[Message],
    tools: &[serde_json::Value],
    add_generation_prompt: bool,
    bos_token: &str,
    eos_token: &str,
) -> Result<String, ChatError> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    env.set_syntax(syntax.map_err(template_error)?);
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(unknown_method_callback);
    env.add_function(
        "raise_exception",
        |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    env.add_filter("tojson", to_json);
    env.add_template("chat", template).map_err(template_error)?;
    let template = env.get_template("chat").map_err(template_error)?;
    let tools = (!tools.is_empty()).then_some(tools);
    let context = context! {
        messages => Value::from(Serde(messages)),
        tools => Value::from(Serde(tools)),
        add_generation_prompt => add_generation_prompt,
        bos_token => bos_token,
        eos_token => eos_token,
    };
    let mut out = Bounded(Vec::new());
    match template.render_captured_to(context, &mut out) {
        Err(error) if error.kind() == ErrorKind::WriteFailure => Err(ChatError::Length),
        Err(error) => Err(template_error(error)),
        Ok(_) => String::from_utf8(out.0).map_err(|e| ChatError::Template(e.to_string())),
    }
}

/// As Python writes JSON, which is what models were trained on: a space after commas and colons, and no letter
/// escaped that need not be.
fn to_json(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    // What else Python's takes changes nothing of this.
    for name in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Value> = kwargs.get(name)?;
    }
    kwargs.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut out, Spaced)),
        Some(indent) => {
            let spaces = vec![b' '; indent.min(16)];
            let pretty = PrettyFormatter::with_indent(&spaces);
            value.serialize(&mut Serializer::with_formatter(&mut out, pretty))
        }
    };
    let wrong = |why: String| Error::new(ErrorKind::BadSerialization, why);
    written.map_err(|error| wrong(error.to_string()))?;
    let text = String::from_utf8(out).map_err(|error| wrong(error.to_string()))?;
    Ok(Value::from_safe_string(text))
}

struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

fn template_error(error: Error) -> ChatError {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    ChatError::Template(text)
}

struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_BYTES_MAX {
            return Err(io::Error::other("too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' \
        + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn chat() -> Vec<Message> {
        vec![
            Message::new("system", " Be brief. "),
            Message::new("user", "Why {{ so }}?"),
        ]
    }

    #[test]
    fn chatml() {
        let text = render_chat(CHATML, &chat(), &[], true, "<s>", "</s>").unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy {{ so }}?<|im_end|>\n\
             <|im_start|>assistant\n"
        );
    }

    #[test]
    fn python_methods_blocks_and_namespaces() {
        let template = "{{ bos_token }}
{%- set ns = namespace(n=0) %}
{%- for m in messages %}
    {%- if loop.first and m.role == 'system' %}
        {%- set ns.n = ns.n + 1 %}
        {{- m.content.strip().upper() + eos_token }}
    {%- elif m['content'].startswith('Why') %}
        {{- '[' ~ m['content'].split(' ')[-1] ~ ']' }}
    {%- endif %}
{%- endfor %}{{ ns.n }}";
        let text = render_chat(template, &chat(), &[], false, "<s>", "</s>").unwrap();
        assert_eq!(text, "<s>BE BRIEF.</s>[}}?]1");
    }

    #[test]
    fn tools_and_calls_as_templates_read_them() {
        let template =
            "{%- if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}
{%- for m in messages %}{% if m.tool_calls %}{% for call in m.tool_calls %}<{{ call.function.name }}
{{- call.function.arguments | tojson(indent=1) }}>{% endfor %}
{%- elif m.role == 'tool' %}[{{ m.tool_call_id }}: {{ m.content }}]{% endif %}{% endfor %}";
        let tool = serde_json::json!({"type": "function", "function": {"name": "f", "n": [1, 2]}});
        let calls =
            serde_json::json!([{"function": {"name": "f", "arguments": {"a": "<\u{1f41f}"}}}]);
        let chat = [
            Message::new("assistant", "").with("tool_calls", calls),
            Message::new("tool", "ok").with("tool_call_id", "c1".into()),
        ];
        let text = render_chat(template, &chat, &[tool], true, "", "").unwrap();
        assert_eq!(
            text,
            "{\"type\": \"function\", \"function\": {\"name\": \"f\", \"n\": [1, 2]}}\n\
             <f{\n \"a\": \"<\u{1f41f}\"\n}>[c1: ok]"
        );
        let none = "{{ tools is none }}";
        assert_eq!(render_chat(none, &[], &[], true, "", "").unwrap(), "True");
    }

    #[test]
    fn exceptions_and_nonsense_are_errors() {
        let render = |t: &str| {
            render_chat(t, &chat(), &[], true, "", "")
                .unwrap_err()
                .to_string()
        };
        assert!(render("{{ raise_exception('only users') }}").contains("only users"));
        assert!(render("{% for %}").contains("syntax error"));
        assert!(render("{{ messages.nothing.more }}").contains("undefined"));
    }

    #[test]
    fn a_template_cannot_run_or_write_for_ever() {
        let text =
            "{% for a in range(9999) %}{% for b in range(9999) %}{{ '' }}{% endfor %}{% endfor %}";
        assert!(matches!(
            render_chat(text, &[], &[], true, "", ""),
            Err(ChatError::Template(_))
        ));
        let text = "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}\
            {% for a in range(24) %}{% set ns.s = ns.s ~ ns.s %}{{ ns.s }}{% endfor %}";
        assert!(matches!(
            render_chat(text, &[], &[], true, "", ""),
            Err(ChatError::Length)
        ));
    }
}
