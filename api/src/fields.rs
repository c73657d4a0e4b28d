//! Reading a JSON object field by field: a wrong type or a value out of range is refused with the field's name and
//! what it may be. Fields that nobody reads are let pass, as clients send many. Pure.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ApiError;

/// An object and where in the request it stands.
pub struct Fields {
    map: Map<String, Value>,
    at: String,
}

impl Fields {
    /// The object that a body is.
    ///
    /// # Errors
    /// It is not JSON, or not an object.
    pub fn of_body(bytes: &[u8]) -> Result<Self, ApiError> {
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|error| ApiError::malformed(format!("the request is not JSON: {error}")))?;
        match value {
            Value::Object(map) => Ok(Self {
                map,
                at: String::new(),
            }),
            other => Err(ApiError::malformed(format!(
                "the request is {}, not an object",
                kind(&other)
            ))),
        }
    }

    /// The object that stands at `at`.
    ///
    /// # Errors
    /// It is none.
    pub fn of(value: Value, at: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self {
                map,
                at: format!("{at}."),
            }),
            other => Err(wrong(at, &other, "an object")),
        }
    }

    /// Where a field of it stands.
    pub fn at(&self, name: &str) -> String {
        format!("{}{name}", self.at)
    }

    /// A field as it is; `null` is none.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// Puts a field back.
    pub fn put(&mut self, name: &str, value: impl Into<Value>) {
        self.map.insert(name.to_owned(), value.into());
    }

    /// A field that must be there.
    ///
    /// # Errors
    /// It is not.
    pub fn need(&mut self, name: &str) -> Result<Value, ApiError> {
        let at = self.at(name);
        self.take(name)
            .ok_or_else(|| ApiError::field(&at, format!("`{at}` is missing")))
    }

    /// A number in a range.
    ///
    /// # Errors
    /// It is something else.
    pub fn number(
        &mut self,
        name: &str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let wanted = format!("a number from {} to {}", range.start(), range.end());
        match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(wrong(&self.at(name), &value, &wanted)),
        }
    }

    /// A whole number in a range.
    ///
    /// # Errors
    /// It is something else.
    pub fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        match value.as_i64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ if *range.end() == i64::MAX => Err(wrong(&self.at(name), &value, "a whole number")),
            _ => {
                let wanted = format!("a whole number from {} to {}", range.start(), range.end());
                Err(wrong(&self.at(name), &value, &wanted))
            }
        }
    }

    /// A whole number from `min` up, as far as `u32` goes.
    ///
    /// # Errors
    /// It is something else.
    pub fn count(&mut self, name: &str, min: u32) -> Result<Option<u32>, ApiError> {
        let found = self.integer(name, min.into()..=u32::MAX.into())?;
        Ok(found.and_then(|n| u32::try_from(n).ok()))
    }

    /// True or false; false where it is absent.
    ///
    /// # Errors
    /// It is something else.
    pub fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        match self.take(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => Err(wrong(&self.at(name), &other, "true or false")),
        }
    }

    /// A text.
    ///
    /// # Errors
    /// It is something else.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&self.at(name), &other, "a string")),
        }
    }

    /// Refuses a field that would change the answer and is not supported, unless it asks for nothing.
    ///
    /// # Errors
    /// It asks for something.
    pub fn refuse(&mut self, name: &str, why: &str) -> Result<(), ApiError> {
        let nothing = |value: &Value| match value {
            Value::Bool(flag) => !flag,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            Value::String(text) => text.is_empty() || text == "none",
            _ => false,
        };
        match self.take(name) {
            Some(value) if !nothing(&value) => {
                let at = self.at(name);
                Err(ApiError::field(
                    &at,
                    format!("`{at}` is not supported: {why}"),
                ))
            }
            _ => Ok(()),
        }
    }
}

/// What to say of a field of the wrong type or out of range.
pub fn wrong(at: &str, found: &Value, wanted: &str) -> ApiError {
    let found = match found {
        Value::Number(number) => number.to_string(),
        other => kind(other).to_owned(),
    };
    ApiError::field(at, format!("`{at}` is {found}, it must be {wanted}"))
}

/// The type of a value, in words.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Words of somebody else, cut and without control characters.
pub fn printable(text: &str, chars_max: usize) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(chars_max).map(clean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        Fields::of_body(value.to_string().as_bytes()).unwrap_or_else(|e| panic!("{e}"))
    }

    fn param(error: &ApiError) -> String {
        error.json()["error"]["param"].as_str().unwrap_or("").into()
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for text in ["", "{", "[1]", "\"x\"", "{\"a\":1}x", "\u{feff}{}", "nul"] {
            let error = Fields::of_body(text.as_bytes()).err().unwrap();
            assert_eq!(error.status(), 400, "{text}");
        }
        let deep = "[".repeat(100_000);
        assert!(Fields::of_body(deep.as_bytes()).is_err());
        assert!(Fields::of_body(b"{\"a\":\"\xff\"}").is_err());
    }

    #[test]
    fn wrong_types_and_ranges_name_the_field() {
        let mut all = fields(json!({
            "t": "hot", "p": 1.5, "n": 2.5, "k": -1, "s": 1, "stop": 7, "none": null, "big": 1e300
        }));
        assert_eq!(param(&all.number("t", 0.0..=2.0).unwrap_err()), "t");
        let error = all.number("p", 0.0..=1.0).unwrap_err();
        assert!(error.to_string().contains("1.5"), "{error}");
        assert!(error.to_string().contains("from 0 to 1"), "{error}");
        assert!(all.integer("n", 0..=9).is_err());
        assert!(all.count("k", 0).is_err());
        assert!(all.count("big", 0).is_err());
        assert!(all.flag("s").is_err());
        assert!(all.text("stop").is_err());
        assert_eq!(all.text("none").unwrap(), None);
        assert_eq!(param(&all.need("gone").unwrap_err()), "gone");
    }

    #[test]
    fn fields_inside_are_named_by_their_path() {
        let mut inner = Fields::of(json!({"role": 1}), "messages[2]").unwrap();
        assert_eq!(param(&inner.text("role").unwrap_err()), "messages[2].role");
    }

    #[test]
    fn what_asks_for_nothing_is_not_refused() {
        let mut all =
            fields(json!({"a": false, "b": [], "c": null, "d": "none", "e": true, "f": [1]}));
        for name in ["a", "b", "c", "d", "gone"] {
            assert!(all.refuse(name, "x").is_ok(), "{name}");
        }
        for name in ["e", "f"] {
            assert!(all.refuse(name, "x").is_err(), "{name}");
        }
    }
}
