//! Who may ask the servers of a process over HTTP: keys, and where there are none, only programs of this machine.

use std::collections::HashSet;
use std::net::IpAddr;

use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;

/// Keys, as their hashes: comparing those tells nothing of how much of a guess was right.
#[derive(Clone, Default)]
pub struct Keys(HashSet<blake3::Hash>);

impl Keys {
    /// These keys; empty ones are none.
    pub fn new<K: AsRef<str>>(keys: impl IntoIterator<Item = K>) -> Self {
        let keys = keys.into_iter();
        let hash = |key: K| {
            let key = key.as_ref().trim();
            (!key.is_empty()).then(|| blake3::hash(key.as_bytes()))
        };
        Self(keys.filter_map(hash).collect())
    }

    /// Keys from the text of a file: one a line, `#` begins a remark.
    pub fn of_file(text: &str) -> Self {
        Self::new(
            text.lines()
                .filter(|line| !line.trim_start().starts_with('#')),
        )
    }

    /// Adds those of another list.
    pub fn add(&mut self, other: Keys) {
        self.0.extend(other.0);
    }

    /// Whether anybody may ask.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this is one of them.
    pub fn has(&self, key: &str) -> bool {
        self.0.contains(&blake3::hash(key.trim().as_bytes()))
    }
}

/// None of them, whoever looks.
impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({})", self.0.len())
    }
}

/// The key of a request, as OpenAI's clients and Prometheus send it, or Anthropic's clients.
pub fn key_of(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.to_str().ok()?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key)
    });
    let plain = || headers.get("x-api-key").and_then(|key| key.to_str().ok());
    bearer.or_else(plain)
}

/// `localhost` or an address of the loopback, with or without a port.
pub fn is_own_name(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(""),
        None => host.split(':').next().unwrap_or(""),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::Keys;

    #[test]
    fn keys_are_not_shown() {
        let keys = Keys::new(["secret", " "]);
        assert!(keys.has("secret") && !keys.has(""));
        assert_eq!(format!("{keys:?}"), "Keys(1)");
    }
}
