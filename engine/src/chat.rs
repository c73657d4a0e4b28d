//! Chat templates: a model's own Jinja, rendered with limits, since it comes
//! from whoever made the model.

use std::io::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::{Deserialize, Serialize};

/// Instructions that a template may take: a thousandfold of a long chat's.
const FUEL: u64 = 10_000_000;
/// Longest text that a template may make.
const OUTPUT_BYTES_MAX: usize = 4 << 20;

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message {
            role: role.into(),
            content: content.into(),
        }
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

/// Renders `template` as the transformers library would.
///
/// # Errors
/// See [`ChatError`].
pub fn render_chat(
    template: &str,
    messages: &[Message],
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
    env.add_template("chat", template).map_err(template_error)?;
    let template = env.get_template("chat").map_err(template_error)?;
    let message = |m: &Message| context! { role => m.role.as_str(), content => m.content.as_str() };
    let context = context! {
        messages => messages.iter().map(message).collect::<Vec<Value>>(),
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
        let text = render_chat(CHATML, &chat(), true, "<s>", "</s>").unwrap();
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
        let text = render_chat(template, &chat(), false, "<s>", "</s>").unwrap();
        assert_eq!(text, "<s>BE BRIEF.</s>[}}?]1");
    }

    #[test]
    fn exceptions_and_nonsense_are_errors() {
        let render = |t: &str| {
            render_chat(t, &chat(), true, "", "")
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
            render_chat(text, &[], true, "", ""),
            Err(ChatError::Template(_))
        ));
        let text = "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}\
            {% for a in range(24) %}{% set ns.s = ns.s ~ ns.s %}{{ ns.s }}{% endfor %}";
        assert!(matches!(
            render_chat(text, &[], true, "", ""),
            Err(ChatError::Length)
        ));
    }
}
