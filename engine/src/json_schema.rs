//! From a JSON schema to a grammar that llama.cpp's sampler keeps an answer to. Pure.
//!
//! What a grammar cannot hold an answer to is refused by name, never let pass: every text that a grammar made here
//! accepts is valid by the schema. The reverse does not hold: properties come in the schema's order, properties that
//! the schema does not name do not come, and there is little white space.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;

use serde_json::{Map, Value};

/// A grammar in llama.cpp's notation, made here: no text of a stranger gets to its parser as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grammar {
    text: String,
}

/// Why a schema has no grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at}: {why}")]
pub struct SchemaError {
    /// Where in the schema, as a path from its root `#`.
    pub at: String,
    /// What is wrong with it.
    pub why: String,
}

/// Depth of a schema, by nesting.
const DEPTH_MAX: usize = 32;
/// Rules of a grammar, those that counting makes included: the sampler walks through some of them after every token.
const RULES_MAX: usize = 4096;
/// Bytes of a grammar.
const BYTES_MAX: usize = 256 << 10;
/// Of what is counted: characters of a string, items of a list. llama.cpp makes a rule of each.
const COUNT_MAX: u64 = 256;

/// Ways in which a text may have been read, by alternatives that begin alike inside such alternatives.
const WAYS_MAX: u64 = 64;
/// Values of an `enum`, and bytes of one of them or of a property's name.
const VALUES_MAX: usize = 512;
const WORD_BYTES_MAX: usize = 1024;

/// What says nothing about which values are valid.
const ANNOTATIONS: [&str; 12] = [
    "$schema",
    "$id",
    "$comment",
    "$defs",
    "definitions",
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
];

/// Rules of every JSON text. The space is bounded, or a small model would go on with it for ever.
const JSON: &str = r#"
ws ::= ("\n" [ ]{0,16} | " ")?
hex ::= [0-9a-fA-F]
char ::= [^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" hex hex hex hex)
string ::= "\"" char* "\""
integer ::= "-"? ("0" | [1-9] [0-9]{0,15})
number ::= integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?
boolean ::= "true" | "false"
null ::= "null"
member ::= string ws ":" ws value
object ::= "{" ws (member ws ("," ws member ws)*)? "}"
array ::= "[" ws (value ws ("," ws value ws)*)? "]"
value ::= object | array | string | number | boolean | null
"#;

impl Grammar {
    /// Any JSON object.
    pub fn json_object() -> Self {
        Self {
            text: format!("root ::= ws object ws\n{JSON}"),
        }
    }

    /// The values that are valid by `schema`, in one of the ways to write them.
    ///
    /// # Errors
    /// The schema is none, is too large, or says something that a grammar cannot hold an answer to.
    pub fn of_schema(schema: &Value) -> Result<Self, SchemaError> {
        let mut rules = Rules {
            text: String::new(),
            n: 0,
            ..Rules::new(schema)
        };
        let root = rules.of(schema, "#")?;
        Ok(Self {
            text: format!("root ::= ws {root} ws\n{}{JSON}", rules.text),
        })
    }

    /// A call of one of these functions, each with the schema of its arguments:
    /// `{"name": "…", "arguments": {…}}`.
    ///
    /// # Errors
    /// As [`Grammar::of_schema`].
    pub fn of_calls(functions: &[(String, Value)]) -> Result<Self, SchemaError> {
        let (mut text, mut n, mut calls) = (String::new(), 0, Vec::new());
        for (name, schema) in functions {
            let mut rules = Rules {
                text,
                n,
                ..Rules::new(schema)
            };
            let arguments = rules.of(schema, "#")?;
            let name = literal(&Value::String(name.clone()).to_string());
            let (key, other) = (literal("\"name\""), literal("\"arguments\""));
            let call = format!(
                r#""{{" ws {key} ws ":" ws {name} ws "," ws {other} ws ":" ws {arguments} ws "}}""#
            );
            calls.push(rules.new_rule(&call, "#")?);
            (text, n) = (rules.text, rules.n);
        }
        let calls = calls.join(" | ");
        Ok(Self {
            text: format!("root ::= ws ({calls}) ws\n{text}{JSON}"),
        })
    }

    /// In llama.cpp's notation; the rule `root` begins.
    pub fn text(&self) -> &str {
        &self.text
    }
}

struct Rules<'a> {
    root: &'a Value,
    text: String,
    n: usize,
    /// The rules of what was referred to: a schema may contain itself.
    by_ref: HashMap<String, Referred>,
    depth: usize,
    /// In how many ways a text may have been read on the way here: the sampler follows each of them.
    ways: u64,
    /// The most of them since this was set.
    ways_most: u64,
}

struct Referred {
    rule: String,
    /// Ways on the way to it the first time.
    ways: u64,
    /// By how much they grew inside; not known before it is read to its end.
    grew: Option<u64>,
}

fn wrong(at: &str, why: impl Into<String>) -> SchemaError {
    let why = why.into();
    SchemaError {
        at: at.chars().take(200).collect(),
        why: why.chars().take(300).collect(),
    }
}

impl<'a> Rules<'a> {
    fn new(root: &'a Value) -> Self {
        Self {
            root,
            text: String::new(),
            n: 0,
            by_ref: HashMap::new(),
            depth: 0,
            ways: 1,
            ways_most: 1,
        }
    }

    /// From here on a text may have been read in `times` as many ways.
    fn branch(&mut self, times: u64, at: &str) -> Result<(), SchemaError> {
        self.ways = self.ways.saturating_mul(times);
        self.ways_most = self.ways_most.max(self.ways);
        if self.ways > WAYS_MAX {
            let why = "alternatives inside alternatives begin alike, too many to follow";
            return Err(wrong(at, why));
        }
        Ok(())
    }

    /// An expression for the values that are valid by `schema`: the name of a rule, or a literal.
    fn of(&mut self, schema: &'a Value, at: &str) -> Result<String, SchemaError> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(wrong(at, format!("more than {DEPTH_MAX} levels")));
        }
        let expression = match schema {
            Value::Bool(true) => "value".to_owned(),
            Value::Object(map) => self.of_map(map, at)?,
            _ => return Err(wrong(at, "not a schema that anything is valid by")),
        };
        self.depth -= 1;
        Ok(expression)
    }

    fn of_map(&mut self, map: &'a Map<String, Value>, at: &str) -> Result<String, SchemaError> {
        let known = |names: &[&str]| {
            let strange = |name: &&String| {
                !ANNOTATIONS.contains(&name.as_str()) && !names.contains(&name.as_str())
            };
            match map.keys().find(strange) {
                Some(name) => Err(wrong(at, format!("`{name}` is not supported here"))),
                None => Ok(()),
            }
        };
        if let Some(target) = map.get("$ref") {
            known(&["$ref"])?;
            return self.of_ref(target, at);
        }
        if let Some(value) = map.get("const") {
            known(&["const", "type"])?;
            return self.of_values(std::slice::from_ref(value), map, at);
        }
        if let Some(values) = map.get("enum") {
            known(&["enum", "type"])?;
            let values = values.as_array().filter(|values| !values.is_empty());
            let values = values.ok_or_else(|| wrong(at, "`enum` is not a list of values"))?;
            return self.of_values(values, map, at);
        }
        if let Some(schemas) = map.get("anyOf") {
            known(&["anyOf"])?;
            return self.any_of(schemas, &format!("{at}/anyOf"));
        }
        if let Some(schemas) = map.get("allOf") {
            known(&["allOf"])?;
            return match schemas.as_array().map(Vec::as_slice) {
                Some([one]) => self.of(one, &format!("{at}/allOf/0")),
                _ => Err(wrong(at, "`allOf` of several is not supported")),
            };
        }
        match map.get("type") {
            None if map.contains_key("properties") => {
                known(OBJECT)?;
                self.object(map, at)
            }
            None => {
                known(&[])?;
                Ok("value".into())
            }
            Some(Value::String(kind)) => {
                known(keywords(kind))?;
                self.of_type(kind, map, at)
            }
            Some(Value::Array(kinds)) if !kinds.is_empty() => {
                let kinds: Vec<&str> = kinds.iter().filter_map(Value::as_str).collect();
                let all: Vec<&str> = kinds
                    .iter()
                    .flat_map(|kind| keywords(kind))
                    .copied()
                    .collect();
                known(&all)?;
                let each = kinds.iter().map(|kind| self.of_type(kind, map, at));
                let each = each.collect::<Result<Vec<_>, _>>()?;
                self.one_of(each, at)
            }
            Some(_) => Err(wrong(at, "`type` is neither a name nor a list of names")),
        }
    }

    /// Those of these values that the type allows.
    fn of_values(
        &mut self,
        values: &[Value],
        map: &Map<String, Value>,
        at: &str,
    ) -> Result<String, SchemaError> {
        let kinds = match map.get("type") {
            None => None,
            Some(Value::Array(kinds)) => Some(kinds.as_slice()),
            Some(kind) => Some(std::slice::from_ref(kind)),
        };
        let fits = |value: &&Value| {
            kinds.is_none_or(|kinds| kinds.iter().any(|kind| is_of_type(value, kind)))
        };
        if values.len() > VALUES_MAX {
            return Err(wrong(at, format!("more than {VALUES_MAX} values")));
        }
        let values: Vec<String> = values.iter().filter(fits).map(Value::to_string).collect();
        if values.iter().any(|value| value.len() > WORD_BYTES_MAX) {
            return Err(wrong(
                at,
                format!("a value of more than {WORD_BYTES_MAX} bytes"),
            ));
        }
        let literals: Vec<String> = values.iter().map(|value| literal(value)).collect();
        if literals.is_empty() {
            return Err(wrong(at, "none of the values is of the type"));
        }
        self.one_of(literals, at)
    }

    fn of_type(
        &mut self,
        kind: &str,
        map: &'a Map<String, Value>,
        at: &str,
    ) -> Result<String, SchemaError> {
        match kind {
            "object" => self.object(map, at),
            "array" => self.array(map, at),
            "string" => self.string(map, at),
            "integer" | "number" | "boolean" | "null" => Ok(kind.into()),
            other => Err(wrong(at, format!("there is no type `{other}`"))),
        }
    }

    fn of_ref(&mut self, target: &'a Value, at: &str) -> Result<String, SchemaError> {
        let path = target.as_str().and_then(|target| target.strip_prefix('#'));
        let path = path.ok_or_else(|| wrong(at, "`$ref` does not point into this schema"))?;
        if let Some(known) = self.by_ref.get(path) {
            let (rule, before, grew) = (known.rule.clone(), known.ways, known.grew);
            let ways = self.ways;
            match grew {
                // Inside itself: each round would branch again.
                None if ways > before => self.branch(WAYS_MAX + 1, at)?,
                None => {}
                Some(times) => {
                    self.branch(times, at)?;
                    self.ways = ways;
                }
            }
            return Ok(rule);
        }
        let target = self.root.pointer(path);
        let target = target.ok_or_else(|| wrong(at, format!("there is no `#{path}`")))?;
        let rule = self.name(at)?;
        let referred = Referred {
            rule: rule.clone(),
            ways: self.ways,
            grew: None,
        };
        self.by_ref.insert(path.to_owned(), referred);
        let most = std::mem::replace(&mut self.ways_most, self.ways);
        let expression = self.of(target, &format!("#{path}"))?;
        if expression == rule {
            return Err(wrong(at, "`$ref` refers to itself"));
        }
        if let Some(referred) = self.by_ref.get_mut(path) {
            referred.grew = Some(self.ways_most / self.ways.max(1));
        }
        self.ways_most = self.ways_most.max(most);
        self.rule(&rule, &expression, at)?;
        Ok(rule)
    }

    /// How many of these alternatives may begin alike.
    fn alike(&self, schemas: &[Value]) -> u64 {
        let kinds: Vec<u8> = schemas.iter().map(|schema| self.kinds(schema, 8)).collect();
        let of_bit = |bit: u8| kinds.iter().filter(|kinds| *kinds & bit != 0).count();
        let most = (0..6).map(|bit| of_bit(1 << bit)).max().unwrap_or(1);
        most.max(1) as u64
    }

    /// What a value may be, a bit for each of six types; all where that is not plain.
    fn kinds(&self, schema: &Value, depth: u8) -> u8 {
        const ALL: u8 = 0b11_1111;
        let bit = |kind: &str| match kind {
            "object" => 1,
            "array" => 2,
            "string" => 4,
            "integer" | "number" => 8,
            "boolean" => 16,
            "null" => 32,
            _ => ALL,
        };
        let of_value = |value: &Value| match value {
            Value::Object(_) => 1,
            Value::Array(_) => 2,
            Value::String(_) => 4,
            Value::Number(_) => 8,
            Value::Bool(_) => 16,
            Value::Null => 32,
        };
        let Some(map) = schema.as_object().filter(|_| depth > 0) else {
            return ALL;
        };
        if let Some(Value::String(target)) = map.get("$ref") {
            let target = target
                .strip_prefix('#')
                .and_then(|at| self.root.pointer(at));
            return target.map_or(ALL, |target| self.kinds(target, depth - 1));
        }
        if let Some(value) = map.get("const") {
            return of_value(value);
        }
        if let Some(Value::Array(values)) = map.get("enum") {
            return values.iter().map(of_value).fold(0, |a, b| a | b);
        }
        match map.get("type") {
            Some(Value::String(kind)) => bit(kind),
            Some(Value::Array(kinds)) => {
                let kinds = kinds.iter().filter_map(Value::as_str);
                kinds.map(bit).fold(0, |a, b| a | b)
            }
            _ => ALL,
        }
    }

    fn any_of(&mut self, schemas: &'a Value, at: &str) -> Result<String, SchemaError> {
        let schemas = schemas.as_array().filter(|schemas| !schemas.is_empty());
        let schemas = schemas.ok_or_else(|| wrong(at, "not a list of schemas"))?;
        let ways = self.ways;
        self.branch(self.alike(schemas), at)?;
        let each = schemas.iter().enumerate();
        let each = each.map(|(n, schema)| self.of(schema, &format!("{at}/{n}")));
        let each = each.collect::<Result<Vec<_>, _>>()?;
        self.ways = ways;
        self.one_of(each, at)
    }

    fn one_of(&mut self, expressions: Vec<String>, at: &str) -> Result<String, SchemaError> {
        self.new_rule(&expressions.join(" | "), at)
    }

    /// One rule for what may follow at each place, before and after the first property that was written.
    fn object(&mut self, map: &'a Map<String, Value>, at: &str) -> Result<String, SchemaError> {
        let required = names(map.get("required"), at)?;
        let properties = match map.get("properties") {
            None => None,
            Some(Value::Object(properties)) => Some(properties),
            Some(_) => return Err(wrong(at, "`properties` is not an object")),
        };
        let extra = map.get("additionalProperties");
        let unnamed = |name: &&&str| !properties.is_some_and(|all| all.contains_key(**name));
        if let Some(name) = required.iter().find(unnamed) {
            let why = format!("`required` names `{name}`, `properties` does not");
            return Err(wrong(at, why));
        }
        let Some(properties) = properties.filter(|properties| !properties.is_empty()) else {
            return match extra {
                None | Some(Value::Bool(true)) => Ok("object".into()),
                Some(Value::Bool(false)) => Ok(r#""{" ws "}""#.into()),
                Some(schema) => {
                    let value = self.of(schema, &format!("{at}/additionalProperties"))?;
                    let member = format!(r#"string ws ":" ws {value} ws"#);
                    let member = self.new_rule(&member, at)?;
                    self.new_rule(
                        &format!(r#""{{" ws ({member} ("," ws {member})*)? "}}""#),
                        at,
                    )
                }
            };
        };
        // From the last to the first: what may follow when nothing was written yet, and when something was.
        let (mut none_yet, mut some) = (String::new(), String::new());
        for (name, schema) in properties.iter().rev() {
            if name.len() > WORD_BYTES_MAX {
                return Err(wrong(
                    at,
                    format!("a name of more than {WORD_BYTES_MAX} bytes"),
                ));
            }
            let value = self.of(schema, &format!("{at}/properties/{name}"))?;
            let name_literal = literal(&Value::String(name.clone()).to_string());
            let member = self.new_rule(&format!(r#"{name_literal} ws ":" ws {value} ws"#), at)?;
            let (first, later) = (
                format!("{member} {some}"),
                format!(r#""," ws {member} {some}"#),
            );
            if required.contains(name.as_str()) {
                none_yet = self.new_rule(&first, at)?;
                some = self.new_rule(&later, at)?;
            } else {
                none_yet = self.new_rule(&format!("{first} | {}", or_nothing(&none_yet)), at)?;
                some = self.new_rule(&format!("{later} | {}", or_nothing(&some)), at)?;
            }
        }
        self.new_rule(&format!(r#""{{" ws {none_yet} "}}""#), at)
    }

    fn array(&mut self, map: &'a Map<String, Value>, at: &str) -> Result<String, SchemaError> {
        let (min, max) = (count(map, "minItems", at)?, count(map, "maxItems", at)?);
        self.n += max.or(min).unwrap_or(0) as usize;
        let item = match map.get("items") {
            None => "value".to_owned(),
            Some(schema) => self.of(schema, &format!("{at}/items"))?,
        };
        let item = self.new_rule(&format!("{item} ws"), at)?;
        let more = self.new_rule(&format!(r#""," ws {item}"#), at)?;
        let min = min.unwrap_or(0);
        let inner = match max {
            Some(max) if max < min => return Err(wrong(at, "`maxItems` is below `minItems`")),
            Some(0) => String::new(),
            Some(max) => format!("{item} {more}{{{},{}}}", min.max(1) - 1, max - 1),
            None if min > 1 => format!("{item} {more}{{{},}}", min - 1),
            None => format!("{item} {more}*"),
        };
        let inner = if min == 0 && !inner.is_empty() {
            format!("({inner})?")
        } else {
            inner
        };
        self.new_rule(&format!(r#""[" ws {inner} "]""#), at)
    }

    fn string(&mut self, map: &'a Map<String, Value>, at: &str) -> Result<String, SchemaError> {
        let (min, max) = (count(map, "minLength", at)?, count(map, "maxLength", at)?);
        self.n += max.or(min).unwrap_or(0) as usize;
        if let Some(format) = map.get("format") {
            if min.is_some() || max.is_some() {
                return Err(wrong(
                    at,
                    "`format` together with a length is not supported",
                ));
            }
            return formatted(format, at).map(str::to_owned);
        }
        match (min.unwrap_or(0), max) {
            (0, None) => Ok("string".into()),
            (min, None) => self.new_rule(&format!(r#""\"" char{{{min},}} "\"""#), at),
            (min, Some(max)) if max < min => Err(wrong(at, "`maxLength` is below `minLength`")),
            (_, Some(0)) => Ok(r#""\"\"""#.into()),
            (min, Some(max)) => self.new_rule(&format!(r#""\"" char{{{min},{max}}} "\"""#), at),
        }
    }

    fn new_rule(&mut self, expression: &str, at: &str) -> Result<String, SchemaError> {
        let name = self.name(at)?;
        self.rule(&name, expression, at)?;
        Ok(name)
    }

    fn name(&mut self, at: &str) -> Result<String, SchemaError> {
        self.n += 1;
        if self.n > RULES_MAX {
            return Err(wrong(at, "the schema is too large"));
        }
        Ok(format!("r{}", self.n))
    }

    fn rule(&mut self, name: &str, expression: &str, at: &str) -> Result<(), SchemaError> {
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "{name} ::= {expression}");
        if self.text.len() > BYTES_MAX {
            return Err(wrong(at, "the schema is too large"));
        }
        Ok(())
    }
}

const OBJECT: &[&str] = &["type", "properties", "required", "additionalProperties"];

fn is_of_type(value: &Value, kind: &Value) -> bool {
    match (kind.as_str().unwrap_or_default(), value) {
        ("number", Value::Number(_))
        | ("string", Value::String(_))
        | ("boolean", Value::Bool(_))
        | ("null", Value::Null)
        | ("array", Value::Array(_))
        | ("object", Value::Object(_)) => true,
        ("integer", Value::Number(number)) => !number.is_f64(),
        _ => false,
    }
}

/// What may stand beside a type.
fn keywords(kind: &str) -> &'static [&'static str] {
    match kind {
        "object" => OBJECT,
        "array" => &["type", "items", "minItems", "maxItems"],
        "string" => &["type", "minLength", "maxLength", "format"],
        _ => &["type"],
    }
}

/// Of strings in a form of their own, with quotes.
fn formatted(format: &Value, at: &str) -> Result<&'static str, SchemaError> {
    match format.as_str() {
        Some("date") => Ok(
            r#""\"" [0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | "1" [0-9] | "2" [0-8]) "\"""#,
        ),
        Some("uuid") => Ok(r#""\"" hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12} "\"""#),
        _ => Err(wrong(at, format!("the format {format} is not supported"))),
    }
}

fn names<'a>(value: Option<&'a Value>, at: &str) -> Result<HashSet<&'a str>, SchemaError> {
    let Some(value) = value else {
        return Ok(HashSet::new());
    };
    let names = value
        .as_array()
        .and_then(|list| list.iter().map(Value::as_str).collect());
    names.ok_or_else(|| wrong(at, "`required` is not a list of names"))
}

fn count(map: &Map<String, Value>, name: &str, at: &str) -> Result<Option<u64>, SchemaError> {
    match map.get(name).map(|value| (value, value.as_u64())) {
        None => Ok(None),
        Some((_, Some(n))) if n <= COUNT_MAX => Ok(Some(n)),
        Some((value, _)) => {
            let why = format!("`{name}` is {value}, 0 to {COUNT_MAX} is supported");
            Err(wrong(at, why))
        }
    }
}

fn or_nothing(rule: &str) -> &str {
    if rule.is_empty() { "\"\"" } else { rule }
}

/// A text as it is, in quotes; everything but plain letters is written by its number.
fn literal(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        if c.is_ascii_alphanumeric() || " _-.:,{}[]".contains(c) {
            out.push(c);
        } else {
            let _ = write!(out, "\\U{:08X}", u32::from(c));
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests;
