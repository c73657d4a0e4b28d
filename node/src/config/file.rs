//! What the config file may say.

use std::path::{Path, PathBuf};

use super::{ConfigError, parse_bool, read_text};

/// What a config file may say: the same names as the flags.
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
#[allow(missing_docs)] // each is the flag of that name
pub struct FileConfig {
    pub home: Option<PathBuf>,
    pub swarm: Option<String>,
    pub key_file: Option<PathBuf>,
    pub peer: Vec<String>,
    #[serde(deserialize_with = "on_or_off")]
    pub mdns: Option<bool>,
    pub allow: Vec<String>,
    pub trusted: bool,
    pub otlp: Option<String>,
    pub log: Option<String>,
    pub log_json: bool,
    #[serde(deserialize_with = "one_or_several")]
    pub model: Vec<String>,
    pub layers: Option<String>,
    pub memory: Option<String>,
    pub hold: Option<String>,
    pub island_rtt: Option<f64>,
    pub turn: Option<u64>,
    pub listen: Vec<String>,
    pub announce: Vec<String>,
    pub threads: Option<u32>,
    pub upload_limit: Option<String>,
    pub disk: Option<String>,
    pub cpu_share: Option<u32>,
    pub quiet_hours: Option<String>,
    pub metrics: Option<String>,
    pub metrics_key_file: Option<PathBuf>,
}

impl FileConfig {
    /// The model that a client means who names none.
    pub fn first_model(&self) -> Option<&str> {
        self.model.first().map(String::as_str)
    }
}

pub(super) fn parse_file(path: &Path) -> Result<FileConfig, ConfigError> {
    let text = read_text(path)?;
    toml::from_str(&text).map_err(|e| ConfigError::File {
        path: path.to_owned(),
        reason: e.to_string().trim().to_owned(),
    })
}

fn on_or_off<'de, D: serde::Deserializer<'de>>(value: D) -> Result<Option<bool>, D::Error> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Value {
        Bool(bool),
        Word(String),
    }
    match serde::Deserialize::deserialize(value)? {
        Value::Bool(on) => Ok(Some(on)),
        Value::Word(word) => parse_bool(&word)
            .map(Some)
            .map_err(serde::de::Error::custom),
    }
}

fn one_or_several<'de, D: serde::Deserializer<'de>>(value: D) -> Result<Vec<String>, D::Error> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Value {
        One(String),
        Several(Vec<String>),
    }
    Ok(match serde::Deserialize::deserialize(value)? {
        Value::One(one) => vec![one],
        Value::Several(several) => several,
    })
}
