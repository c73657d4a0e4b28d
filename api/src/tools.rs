//! Tools: functions that a model may ask its caller to call. The chat template tells the model of them; what it
//! writes then is either words or calls, in one of the two forms that models are trained on. Pure.

use engine::Grammar;
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::fields::{Fields, printable, wrong};

/// Tools of a request at most: each is described in the prompt.
const TOOLS_MAX: usize = 128;
/// Longest name of a tool.
const NAME_BYTES_MAX: usize = 64;
/// How most models begin and end a call in the midst of words.
const BEGIN: &str = "<tool_call>";
const END: &str = "</tool_call>";

/// What a model may call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tools {
    /// As OpenAI's API and the templates have them.
    pub list: Vec<Value>,
    /// Whether nothing but a call will do.
    pub must: bool,
    functions: Vec<(String, Value)>,
}

/// A call.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Names it to the caller.
    pub id: String,
    /// The function.
    pub name: String,
    /// Its arguments: a JSON object.
    pub arguments: Value,
}

impl Tools {
    /// `tools` and `tool_choice`, as chats have them.
    ///
    /// # Errors
    /// A field is wrong.
    pub fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let mut tools = Self::default();
        for (n, tool) in list(fields, "tools")?.into_iter().enumerate() {
            let mut tool = Fields::of(tool, &format!("tools[{n}]"))?;
            if tool.text("type")?.is_some_and(|kind| kind != "function") {
                let at = tool.at("type");
                return Err(ApiError::field(&at, format!("`{at}` must be function")));
            }
            let at = tool.at("function");
            let mut function = Fields::of(tool.need("function")?, &at)?;
            let parameters = function.take("parameters");
            tools.add(&mut function, parameters)?;
        }
        match fields.take("tool_choice") {
            None => Ok(tools),
            Some(Value::String(choice)) => tools.chosen(&choice, None, "tool_choice"),
            Some(choice) => {
                let mut choice = Fields::of(choice, "tool_choice")?;
                let at = choice.at("function");
                let mut function = Fields::of(choice.need("function")?, &at)?;
                let name = function.text("name")?.unwrap_or_default();
                tools.chosen("required", Some(name), "tool_choice")
            }
        }
    }

    /// The same as Anthropic's API has them.
    ///
    /// # Errors
    /// A field is wrong.
    pub fn read_anthropics(fields: &mut Fields) -> Result<Self, ApiError> {
        let mut tools = Self::default();
        for (n, tool) in list(fields, "tools")?.into_iter().enumerate() {
            let mut tool = Fields::of(tool, &format!("tools[{n}]"))?;
            if tool.text("type")?.is_some_and(|kind| kind != "custom") {
                let at = tool.at("type");
                let why = format!("`{at}`: only tools of the caller's own are supported");
                return Err(ApiError::field(at, why));
            }
            let schema = tool.take("input_schema");
            tools.add(&mut tool, schema)?;
        }
        let Some(choice) = fields.take("tool_choice") else {
            return Ok(tools);
        };
        let mut choice = Fields::of(choice, "tool_choice")?;
        let name = choice.text("name")?;
        let kind = match choice.text("type")?.as_deref() {
            Some("any" | "tool") => "required".to_owned(),
            other => other.unwrap_or("auto").to_owned(),
        };
        tools.chosen(&kind, name, "tool_choice")
    }

    fn add(&mut self, function: &mut Fields, schema: Option<Value>) -> Result<(), ApiError> {
        let at = function.at("name");
        let name = function.text("name")?.unwrap_or_default();
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(plain) {
            let why = format!("`{at}` must have 1 to {NAME_BYTES_MAX} letters, digits, _ - .");
            return Err(ApiError::field(at, why));
        }
        let schema = schema.unwrap_or_else(|| json!({"type": "object", "properties": {}}));
        if !schema.is_object() {
            return Err(wrong(&function.at("parameters"), &schema, "a JSON schema"));
        }
        let mut told = Map::new();
        told.insert("name".into(), name.clone().into());
        if let Some(description) = function.text("description")? {
            told.insert("description".into(), description.into());
        }
        told.insert("parameters".into(), schema.clone());
        self.list
            .push(json!({"type": "function", "function": told}));
        self.functions.push((name, schema));
        Ok(())
    }

    fn chosen(mut self, choice: &str, name: Option<String>, at: &str) -> Result<Self, ApiError> {
        match choice {
            "auto" => Ok(self),
            "none" => Ok(Self::default()),
            "required" => {
                if let Some(name) = name {
                    self.functions.retain(|(known, _)| *known == name);
                }
                if self.functions.is_empty() {
                    return Err(ApiError::field(
                        at,
                        format!("`{at}` names no tool there is"),
                    ));
                }
                self.must = true;
                Ok(self)
            }
            other => {
                let other = printable(other, 40);
                let why =
                    format!("`{at}` is `{other}`; auto, none, required or a tool is possible");
                Err(ApiError::field(at, why))
            }
        }
    }

    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// What an answer keeps to that must be a call.
    ///
    /// # Errors
    /// A schema says what no grammar can hold an answer to.
    pub fn grammar(&self) -> Result<Option<Grammar>, ApiError> {
        if !self.must {
            return Ok(None);
        }
        let grammar = Grammar::of_calls(&self.functions);
        let wrong = |error| {
            let why = format!("`tools`: a call can be demanded only of simple tools: {error}");
            ApiError::field("tools", why)
        };
        grammar.map(Some).map_err(wrong)
    }

    fn has(&self, name: &str) -> bool {
        self.functions.iter().any(|(known, _)| known == name)
    }
}

fn list(fields: &mut Fields, name: &str) -> Result<Vec<Value>, ApiError> {
    match fields.take(name) {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() > TOOLS_MAX => {
            let many = format!("{} tools, at most {TOOLS_MAX} are taken", list.len());
            Err(ApiError::field(name, many))
        }
        Some(Value::Array(list)) => Ok(list),
        Some(other) => Err(wrong(name, &other, "a list of tools")),
    }
}

/// The text of an answer as it comes, of which calls are held back.
#[derive(Clone, Debug, Default)]
pub struct Spoken {
    text: String,
    /// Bytes of `text` that were shown.
    shown: usize,
}

impl Spoken {
    /// Takes more text and gives what is certainly not part of a call.
    pub fn push(&mut self, text: &str) -> &str {
        self.text += text;
        let begun = self.text.trim_start();
        let end = if begun.is_empty() || begun.starts_with(['{', '[']) {
            // All of it may be one call.
            self.shown
        } else {
            self.text.find(BEGIN).unwrap_or_else(|| {
                let mut prefixes = (1..BEGIN.len()).rev();
                let held = prefixes.find(|&n| self.text.ends_with(&BEGIN[..n]));
                self.text.len() - held.unwrap_or(0)
            })
        };
        let start = self.shown.min(end);
        self.shown = end.max(start);
        &self.text[start..self.shown]
    }

    /// No more comes: the calls, or, where what was held back is none, the rest of the text.
    pub fn finish(self, tools: &Tools) -> (String, Vec<Call>) {
        let rest = &self.text[self.shown..];
        match calls(rest, tools) {
            Some(calls) => (String::new(), calls),
            None => (rest.to_owned(), Vec::new()),
        }
    }
}

/// The calls that a text consists of.
fn calls(text: &str, tools: &Tools) -> Option<Vec<Call>> {
    let text = text.trim();
    if !text.starts_with(BEGIN) {
        let value: Value = serde_json::from_str(text).ok()?;
        return match value {
            Value::Array(list) if !list.is_empty() => {
                list.into_iter().map(|value| call(value, tools)).collect()
            }
            other => Some(vec![call(other, tools)?]),
        };
    }
    let mut found = Vec::new();
    for part in text.split(BEGIN).skip(1) {
        let inner = part.split(END).next().unwrap_or(part);
        found.push(call(serde_json::from_str(inner.trim()).ok()?, tools)?);
    }
    Some(found)
}

/// `{"name": …, "arguments": {…}}`; some models say `parameters`.
fn call(value: Value, tools: &Tools) -> Option<Call> {
    let Value::Object(mut map) = value else {
        return None;
    };
    let name = map
        .get("name")?
        .as_str()
        .filter(|name| tools.has(name))?
        .to_owned();
    let arguments = map.remove("arguments").or_else(|| map.remove("parameters"));
    let arguments = arguments.unwrap_or_else(|| json!({}));
    arguments.is_object().then(|| Call {
        id: format!("call_{:024x}", rand::random::<u128>() >> 32),
        name,
        arguments,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools(choice: &Value) -> Result<Tools, ApiError> {
        let weather = json!({"type": "function", "function": {
            "name": "weather", "description": "of a place",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        }});
        let time = json!({"type": "function", "function": {"name": "time"}});
        let body = json!({"tools": [weather, time], "tool_choice": choice});
        Tools::read(&mut Fields::of_body(body.to_string().as_bytes())?)
    }

    /// What is shown, and which calls there are, however the text is cut.
    fn spoken(text: &str) -> (String, Vec<(String, Value)>) {
        let tools = tools(&json!("auto")).unwrap();
        let mut all = Vec::new();
        for size in [1, 3, 7, 1000] {
            let mut spoken = Spoken::default();
            let mut shown = String::new();
            let chars: Vec<char> = text.chars().collect();
            for piece in chars.chunks(size) {
                shown += spoken.push(&piece.iter().collect::<String>());
            }
            let (rest, calls) = spoken.finish(&tools);
            let calls: Vec<_> = calls
                .into_iter()
                .map(|it| (it.name, it.arguments))
                .collect();
            all.push((shown + &rest, calls));
        }
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{all:?}");
        all.remove(0)
    }

    #[test]
    fn calls_are_told_from_words() {
        let there = json!({"place": "Turku"});
        let weather = || ("weather".to_owned(), there.clone());
        for (text, shown, calls) in [
            ("just words", "just words", vec![]),
            ("a < b and <tool", "a < b and <tool", vec![]),
            (
                "{\"name\": \"weather\", \"arguments\": {\"place\": \"Turku\"}}",
                "",
                vec![weather()],
            ),
            (
                "[{\"name\": \"weather\", \"parameters\": {\"place\": \"Turku\"}}, {\"name\": \"time\"}]",
                "",
                vec![weather(), ("time".into(), json!({}))],
            ),
            (
                "Let me look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"place\": \"Turku\"}}\n</tool_call>\n\
              <tool_call>{\"name\": \"time\"}</tool_call>",
                "Let me look.\n",
                vec![weather(), ("time".into(), json!({}))],
            ),
            // What only looks like a call is text.
            (
                "{\"name\": \"nobody\", \"arguments\": {}}",
                "{\"name\": \"nobody\", \"arguments\": {}}",
                vec![],
            ),
            ("{\"name\": \"weather\"", "{\"name\": \"weather\"", vec![]),
            (
                "<tool_call>weather</tool_call>",
                "<tool_call>weather</tool_call>",
                vec![],
            ),
            ("{\"answer\": 7}", "{\"answer\": 7}", vec![]),
        ] {
            assert_eq!(spoken(text), (shown.to_owned(), calls), "{text}");
        }
    }

    #[test]
    fn a_call_can_be_demanded() {
        assert_eq!(tools(&json!("auto")).unwrap().grammar().unwrap(), None);
        assert!(tools(&json!("none")).unwrap().is_empty());
        assert!(
            tools(&json!("required"))
                .unwrap()
                .grammar()
                .unwrap()
                .is_some()
        );
        let one = json!({"type": "function", "function": {"name": "time"}});
        let one = tools(&one).unwrap();
        assert!(one.must && one.list.len() == 2 && one.has("time") && !one.has("weather"));
        for wrong in [
            json!("always"),
            json!({"type": "function", "function": {"name": "x"}}),
            json!(7),
        ] {
            assert!(tools(&wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn wrong_tools_are_refused_by_name() {
        for (field, list) in [
            ("tools", json!({})),
            ("tools[0]", json!([7])),
            ("tools[0].type", json!([{"type": "web_search"}])),
            ("tools[0].function", json!([{"type": "function"}])),
            (
                "tools[0].function.name",
                json!([{"function": {"name": "a b"}}]),
            ),
            (
                "tools[0].function.parameters",
                json!([{"function": {"name": "a", "parameters": 7}}]),
            ),
        ] {
            let body = json!({"tools": list}).to_string();
            let mut fields = Fields::of_body(body.as_bytes()).unwrap();
            let error = Tools::read(&mut fields).unwrap_err().json();
            assert_eq!(error["error"]["param"], field, "{list}");
        }
    }
}
