//! What becomes a grammar and what is refused; what grammars do to answers is tested end to end.

use serde_json::json;

use super::*;

fn refused(schema: &Value) -> String {
    Grammar::of_schema(schema).unwrap_err().to_string()
}

#[test]
fn what_is_not_supported_is_refused_where_it_stands() {
    for (schema, words) in [
        (json!(false), "#: not a schema"),
        (json!(7), "#: not a schema"),
        (json!({"type": "strin"}), "no type `strin`"),
        (
            json!({"type": "string", "pattern": "a+"}),
            "`pattern` is not supported",
        ),
        (
            json!({"type": "string", "format": "email"}),
            "\"email\" is not supported",
        ),
        (
            json!({"type": "integer", "minimum": 3}),
            "`minimum` is not supported",
        ),
        (
            json!({"type": "string", "maxLength": 1_000_000}),
            "0 to 256",
        ),
        (json!({"type": "array", "minItems": -1}), "0 to 256"),
        (
            json!({"type": "array", "minItems": 3, "maxItems": 2}),
            "below",
        ),
        (json!({"oneOf": [{}]}), "`oneOf` is not supported"),
        (json!({"enum": []}), "not a list of values"),
        (
            json!({"enum": ["a"], "type": "integer"}),
            "none of the values",
        ),
        (json!({"$ref": "http://elsewhere"}), "does not point into"),
        (
            json!({"$ref": "#/$defs/gone"}),
            "there is no `#/$defs/gone`",
        ),
        (json!({"$ref": "#"}), "refers to itself"),
        (json!({"type": "object", "required": ["a"]}), "names `a`"),
        (
            json!({"type": "object", "properties": {"a": {"type": "array", "items": {"not": {}}}}}),
            "#/properties/a/items: `not` is not supported",
        ),
    ] {
        let why = refused(&schema);
        assert!(why.contains(words), "{schema}: {why}");
    }
}

#[test]
fn a_schema_has_its_limits() {
    let mut deep = json!({"type": "string"});
    for _ in 0..40 {
        deep = json!({"type": "array", "items": deep});
    }
    assert!(refused(&deep).contains("levels"));
    let many: Map<String, Value> = (0..2000).map(|n| (format!("p{n}"), json!({}))).collect();
    assert!(refused(&json!({"type": "object", "properties": many})).contains("too large"));
    let long: Map<String, Value> = (0..40)
        .map(|n| (format!("p{n}"), json!({"type": "string", "maxLength": 256})))
        .collect();
    assert!(refused(&json!({"type": "object", "properties": long})).contains("too large"));
    assert!(refused(&json!({"const": "x".repeat(5000)})).contains("bytes"));
}

/// The sampler would follow twice as many ways after each bracket.
#[test]
fn alternatives_that_begin_alike_are_few() {
    let list = |items: Value| json!({"type": "array", "items": items});
    let twice = |items: Value| json!({"anyOf": [list(items.clone()), list(items)]});
    let endless = json!({"$ref": "#/$defs/a", "$defs": {"a": twice(json!({"$ref": "#/$defs/a"}))}});
    assert!(refused(&endless).contains("begin alike"));
    let mut deep = json!({"type": "null"});
    for _ in 0..8 {
        deep = twice(deep);
    }
    assert!(refused(&deep).contains("begin alike"));
    let hidden = json!({"$defs": {"a": twice(twice(twice(json!(true))))}, "type": "object", "properties": {
        "once": {"$ref": "#/$defs/a"},
        "again": twice(twice(twice(twice(json!({"$ref": "#/$defs/a"}))))),
    }});
    assert!(refused(&hidden).contains("begin alike"));
    // A list or nothing, a tree of such, and two kinds of things: what people write.
    let tree = json!({"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {
        "left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
        "right": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
    }}}});
    Grammar::of_schema(&tree).unwrap();
    let either = json!({"anyOf": [
        {"type": "object", "properties": {"cat": {"type": "string"}}},
        {"type": "object", "properties": {"dog": {"type": "string"}}},
    ]});
    Grammar::of_schema(&either).unwrap();
}

#[test]
fn words_of_a_schema_are_letters_and_no_grammar() {
    let text = "\" ] | root \u{1f41f}\n\\";
    let grammar = Grammar::of_schema(&json!({"const": text})).unwrap();
    let line = grammar.text().lines().find(|line| line.starts_with("r1"));
    let literal = line.unwrap().strip_prefix("r1 ::= ").unwrap();
    let inside = literal.trim_matches('"');
    let plain = |c: char| c.is_ascii_alphanumeric() || " _-.:,{}[]\\".contains(c);
    assert!(inside.chars().all(plain), "{literal}");
}
