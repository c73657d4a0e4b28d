//! The messages of a chat, from either dialect into what templates read. Pure.

use engine::Message;
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::fields::{Fields, wrong};

/// Messages of a chat at most: a template walks through all of them.
const MESSAGES_MAX: usize = 4096;

/// As OpenAI's API has them.
///
/// # Errors
/// One of them is not as it should be; the error says which.
pub fn messages(value: Value) -> Result<Vec<Message>, ApiError> {
    let message = |(n, value)| message(value, &format!("messages[{n}]"));
    list(value)?.into_iter().enumerate().map(message).collect()
}

/// As Anthropic's API has them: what tools answered stands among the user's words there.
///
/// # Errors
/// As [`messages`].
pub fn anthropics_messages(value: Value) -> Result<Vec<Message>, ApiError> {
    let mut all = Vec::new();
    for (n, value) in list(value)?.into_iter().enumerate() {
        anthropics_message(value, &format!("messages[{n}]"), &mut all)?;
    }
    Ok(all)
}

fn list(value: Value) -> Result<Vec<Value>, ApiError> {
    match value {
        Value::Array(list) if list.is_empty() => {
            Err(ApiError::field("messages", "`messages` is empty"))
        }
        Value::Array(list) if list.len() > MESSAGES_MAX => {
            let many = format!("{} messages, at most {MESSAGES_MAX} are taken", list.len());
            Err(ApiError::field("messages", many))
        }
        Value::Array(list) => Ok(list),
        other => Err(wrong("messages", &other, "a list of messages")),
    }
}

fn role(fields: &mut Fields, possible: &[&str]) -> Result<String, ApiError> {
    let role = match fields.need("role")? {
        Value::String(role) => role,
        other => return Err(wrong(&fields.at("role"), &other, "a string")),
    };
    if possible.contains(&role.as_str()) {
        return Ok(role);
    }
    let at = fields.at("role");
    let why = format!("`{at}` must be one of {}", possible.join(", "));
    Err(ApiError::field(at, why))
}

fn message(value: Value, at: &str) -> Result<Message, ApiError> {
    let mut fields = Fields::of(value, at)?;
    let role = role(
        &mut fields,
        &["system", "developer", "user", "assistant", "tool"],
    )?;
    match role.as_str() {
        "assistant" => {
            let calls = match fields.take("tool_calls") {
                None => Vec::new(),
                Some(Value::Array(list)) => list,
                Some(other) => {
                    return Err(wrong(&fields.at("tool_calls"), &other, "a list of calls"));
                }
            };
            let content = match fields.take("content") {
                None if !calls.is_empty() => String::new(),
                None => content(&mut fields)?,
                Some(content) => content_text(content, &fields.at("content"))?,
            };
            let message = Message::new(role, content);
            if calls.is_empty() {
                return Ok(message);
            }
            let calls = calls.into_iter().enumerate();
            let calls =
                calls.map(|(n, value)| call(value, &fields.at(&format!("tool_calls[{n}]"))));
            let calls = calls.collect::<Result<Vec<Value>, _>>()?;
            Ok(message.with("tool_calls", calls.into()))
        }
        "tool" => {
            let id = fields.text("tool_call_id")?.unwrap_or_default();
            Ok(Message::new(role, content(&mut fields)?).with("tool_call_id", id.into()))
        }
        // The newer word for the same.
        "developer" => Ok(Message::new("system", content(&mut fields)?)),
        _ => Ok(Message::new(role, content(&mut fields)?)),
    }
}

/// A call that was made before. Its arguments come as text, and templates want what it says.
fn call(value: Value, at: &str) -> Result<Value, ApiError> {
    let mut call = Fields::of(value, at)?;
    let inner = call.at("function");
    let mut function = Fields::of(call.need("function")?, &inner)?;
    let name = function.text("name")?.unwrap_or_default();
    let arguments = match function.take("arguments") {
        Some(Value::String(text)) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        other => other.unwrap_or_else(|| json!({})),
    };
    let id = call.text("id")?.unwrap_or_default();
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

fn content(fields: &mut Fields) -> Result<String, ApiError> {
    content_text(fields.need("content")?, &fields.at("content"))
}

/// A text, or parts of one.
///
/// # Errors
/// It is something else, or not all text.
pub fn content_text(value: Value, at: &str) -> Result<String, ApiError> {
    let parts = match value {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(wrong(at, &other, "a string or a list of parts")),
    };
    let mut whole = String::new();
    for (n, part) in parts.into_iter().enumerate() {
        let at = format!("{at}[{n}]");
        let mut fields = Fields::of(part, &at)?;
        match fields.text("type")?.as_deref() {
            Some("text") => whole += &fields.text("text")?.unwrap_or_default(),
            _ => return Err(no_text(&at)),
        }
    }
    Ok(whole)
}

fn no_text(at: &str) -> ApiError {
    let why = format!("`{at}` is not of type text, and models here read nothing else");
    ApiError::field(at, why)
}

fn anthropics_message(value: Value, at: &str, all: &mut Vec<Message>) -> Result<(), ApiError> {
    let mut fields = Fields::of(value, at)?;
    let role = role(&mut fields, &["user", "assistant"])?;
    let parts = match fields.need("content")? {
        Value::Array(parts) => parts,
        other => {
            let text = content_text(other, &fields.at("content"))?;
            all.push(Message::new(role, text));
            return Ok(());
        }
    };
    let (mut text, mut calls, mut answered) = (String::new(), Vec::new(), false);
    for (n, part) in parts.into_iter().enumerate() {
        let at = fields.at(&format!("content[{n}]"));
        let mut part = Fields::of(part, &at)?;
        match (role.as_str(), part.text("type")?.as_deref()) {
            (_, Some("text")) => text += &part.text("text")?.unwrap_or_default(),
            // What a model thought before it spoke is not said to it again.
            ("assistant", Some("thinking" | "redacted_thinking")) => {}
            ("assistant", Some("tool_use")) => {
                let (id, name) = (part.text("id")?, part.text("name")?);
                let arguments = part.take("input").unwrap_or_else(|| json!({}));
                let function = json!({"name": name, "arguments": arguments});
                calls.push(json!({"id": id, "type": "function", "function": function}));
            }
            ("user", Some("tool_result")) => {
                let id = part.text("tool_use_id")?.unwrap_or_default();
                let content = match part.take("content") {
                    None => String::new(),
                    Some(content) => content_text(content, &part.at("content"))?,
                };
                all.push(Message::new("tool", content).with("tool_call_id", id.into()));
                answered = true;
            }
            _ => return Err(no_text(&at)),
        }
    }
    let message = Message::new(role, text);
    if !calls.is_empty() {
        all.push(message.with("tool_calls", calls.into()));
    } else if !(answered && message.content.is_empty()) {
        all.push(message);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_dialects_give_the_same_conversation() {
        let arguments = json!({"place": "Turku"});
        let openais = json!([
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments.to_string()}},
            ]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
            {"role": "user", "content": "And now?"},
        ]);
        let anthropics = json!([
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": arguments}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "text", "text": "And now?"},
            ]},
        ]);
        let all = messages(openais).unwrap();
        assert_eq!(all, anthropics_messages(anthropics).unwrap());
        assert_eq!(
            all[1].more["tool_calls"][0]["function"]["arguments"],
            arguments
        );
        assert_eq!(all[2].more["tool_call_id"], "c1");
        assert_eq!(all.len(), 4);
    }

    #[test]
    fn mistakes_are_named_by_their_place() {
        let error = |value| messages(value).unwrap_err().json()["error"]["param"].clone();
        let calls = json!([{"role": "assistant", "tool_calls": [{"function": {"name": 7}}]}]);
        assert_eq!(error(calls), "messages[0].tool_calls[0].function.name");
        assert_eq!(error(json!([{"role": "assistant"}])), "messages[0].content");
        let image = json!([{"role": "user", "content": [{"type": "image"}]}]);
        let error = anthropics_messages(image).unwrap_err().json();
        assert_eq!(error["error"]["param"], "messages[0].content[0]");
    }
}
