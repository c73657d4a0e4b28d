//! Whether a session's rows may run with those of others where that changes bits.

use std::fmt;

use bincode::{Decode, Encode};
use serde::Serialize;

/// What may be done with the numbers of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Encode, Decode)]
#[serde(rename_all = "lowercase")]
pub enum Numerics {
    /// Each row has the bits that it has alone.
    #[default]
    Exact,
    /// Its rows may run with those of other sessions, and in other portions, also where the kernels of the model's
    /// types then give other bits, within their noise.
    Fast,
}

impl Numerics {
    /// As the user writes it.
    pub fn name(self) -> &'static str {
        match self {
            Numerics::Exact => "exact",
            Numerics::Fast => "fast",
        }
    }
}

impl fmt::Display for Numerics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a text names no numerics.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a kind of numerics: exact or fast")]
pub struct NumericsError {
    /// What was given, shortened.
    pub text: String,
}

impl std::str::FromStr for Numerics {
    type Err = NumericsError;

    fn from_str(text: &str) -> Result<Self, NumericsError> {
        [Numerics::Exact, Numerics::Fast]
            .into_iter()
            .find(|numerics| numerics.name() == text)
            .ok_or_else(|| NumericsError {
                text: text.chars().take(32).collect(),
            })
    }
}
