//! How a model that embeds text makes one vector of its rows: `<arch>.pooling_type`. Pure.
//!
//! ```text
//! tokens ─▶ layers ─▶ last norm ─▶ the rows that count ─▶ their mean ─▶ length 1
//! ```

use gguf::{Header, Value};

/// Which rows behind the last norm make the vector of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// All of them, their mean.
    Mean,
    /// That of the first token.
    First,
    /// That of the last token.
    Last,
}

/// Why a model says something of pooling and has none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPooling {
    /// It ranks texts: its last step is a classifier, which is no part of a stage.
    #[error("it ranks texts (pooling type 4), which is not supported")]
    Ranks,
    /// A kind that came later, or a value of another type.
    #[error("{0} is none of 0 (none), 1 (mean), 2 (first), 3 (last)")]
    Unknown(String),
}

impl Pooling {
    /// What a model's header says; nothing for those that only continue text.
    ///
    /// # Errors
    /// See [`NoPooling`].
    pub fn of(header: &Header, arch: &str) -> Result<Option<Pooling>, NoPooling> {
        Self::of_value(header.get(&format!("{arch}.pooling_type")))
    }

    /// The same of the key's value.
    ///
    /// # Errors
    /// As [`Pooling::of`].
    pub fn of_value(value: Option<&Value>) -> Result<Option<Pooling>, NoPooling> {
        let Some(value) = value else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(0) => Ok(None),
            Some(1) => Ok(Some(Pooling::Mean)),
            Some(2) => Ok(Some(Pooling::First)),
            Some(3) => Ok(Some(Pooling::Last)),
            Some(4) => Err(NoPooling::Ranks),
            Some(other) => Err(NoPooling::Unknown(other.to_string())),
            None => Err(NoPooling::Unknown("a value that is no number".into())),
        }
    }
}

/// Adds up the rows that count.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    sum: Vec<f64>,
    n: u32,
}

impl Pool {
    /// One more row.
    pub fn add(&mut self, row: &[f32]) {
        self.sum.resize(row.len(), 0.0);
        for (sum, value) in self.sum.iter_mut().zip(row) {
            *sum += f64::from(*value);
        }
        self.n += 1;
    }

    /// Their mean, brought to length 1; all zeros stay what they are.
    pub fn unit(self) -> Vec<f32> {
        let n = f64::from(self.n.max(1));
        let mean: Vec<f32> = self.sum.iter().map(|sum| (sum / n) as f32).collect();
        let square = mean.iter().map(|value| f64::from(*value).powi(2));
        let length = square.sum::<f64>().sqrt();
        let scale = if length > 0.0 {
            (1.0 / length) as f32
        } else {
            0.0
        };
        mean.iter().map(|value| value * scale).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_says_how_or_why_not() {
        let of = |value: u32| Pooling::of_value(Some(&value.into()));
        assert_eq!(Pooling::of_value(None), Ok(None));
        assert_eq!(of(0), Ok(None));
        assert_eq!(of(1), Ok(Some(Pooling::Mean)));
        assert_eq!(of(3), Ok(Some(Pooling::Last)));
        assert_eq!(of(4), Err(NoPooling::Ranks));
        assert!(of(9).unwrap_err().to_string().starts_with("9 is none of"));
        assert!(Pooling::of_value(Some(&"last".into())).is_err());
    }

    #[test]
    fn vectors_have_length_one() {
        let mut pool = Pool::default();
        pool.add(&[1.0, 5.0]);
        pool.add(&[5.0, 3.0]);
        let unit = pool.unit();
        assert!((unit[0] - 0.6).abs() < 1e-7 && (unit[1] - 0.8).abs() < 1e-7);
        let mut nothing = Pool::default();
        nothing.add(&[0.0, 0.0]);
        assert_eq!(nothing.unit(), [0.0, 0.0]);
    }
}
